"""`dino-search evaluate`: a module for each protocol."""

from __future__ import annotations

import typer

from dino_search.commands.evaluate.copies import copies
from dino_search.commands.evaluate.finetune import finetune
from dino_search.commands.evaluate.knn import knn
from dino_search.commands.evaluate.linear import linear
from dino_search.commands.evaluate.retrieval import retrieval


def add_commands(app: typer.Typer) -> None:
    evaluate = typer.Typer(
        help="Measure a model: classification, retrieval, copy detection. Figures come with 95 % intervals.",
        epilog="dino-search evaluate knn --train ./train --val ./val",
        no_args_is_help=True,
    )
    evaluate.command("knn", epilog="dino-search evaluate knn --train ./train --val ./val --json")(knn)
    evaluate.command(
        "retrieval",
        epilog="dino-search evaluate retrieval --queries ./queries --references ./photos --truth truth.csv",
    )(retrieval)
    evaluate.command(
        "copies", epilog="dino-search evaluate copies --queries ./copies --references ./originals --truth truth.csv"
    )(copies)
    evaluate.command("linear", epilog="dino-search evaluate linear --train ./train --val ./val --fast --json")(linear)
    evaluate.command("finetune", epilog="dino-search evaluate finetune --train ./train --val ./val --epochs 20 --json")(
        finetune
    )
    app.add_typer(evaluate, name="evaluate")
