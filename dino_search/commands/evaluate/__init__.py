"""`dino-search evaluate`: a module for each protocol."""

from __future__ import annotations

import typer

from dino_search.commands.evaluate import ablation, collapse, copies, finetune, knn, linear, retrieval

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    evaluate = typer.Typer(
        help="Measure a model: classification, retrieval, copy detection. Figures come with 95 % intervals.",
        epilog="dino-search evaluate knn --train ./train --val ./val",
        no_args_is_help=True,
    )
    evaluate.command("knn", epilog="dino-search evaluate knn --train ./train --val ./val --json")(knn.knn)
    evaluate.command(
        "retrieval",
        epilog="dino-search evaluate retrieval --queries ./queries --references ./photos --truth truth.csv",
    )(retrieval.retrieval)
    evaluate.command(
        "copies", epilog="dino-search evaluate copies --queries ./copies --references ./originals --truth truth.csv"
    )(copies.copies)
    evaluate.command("linear", epilog="dino-search evaluate linear --train ./train --val ./val --fast --json")(
        linear.linear
    )
    evaluate.command("finetune", epilog="dino-search evaluate finetune --train ./train --val ./val --epochs 20 --json")(
        finetune.finetune
    )
    evaluate.command("collapse", epilog="dino-search evaluate collapse ./photos --out collapse --steps 300")(
        collapse.collapse
    )
    evaluate.command(
        "ablation", epilog="dino-search evaluate ablation --train ./train --val ./val --out ablation --steps 500"
    )(ablation.ablation)
    app.add_typer(evaluate, name="evaluate")
