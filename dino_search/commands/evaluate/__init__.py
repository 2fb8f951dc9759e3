"""`dino-search evaluate`: a module for each protocol."""

from __future__ import annotations

import typer

from dino_search.commands.evaluate.collapse import collapse
from dino_search.commands.evaluate.copies import copies
from dino_search.commands.evaluate.knn import knn
from dino_search.commands.evaluate.retrieval import retrieval


def add_commands(app: typer.Typer) -> None:
    evaluate = typer.Typer(
        help="Measure a model: k-NN classification, retrieval, copy detection. Figures come with 95 % intervals.",
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
    evaluate.command("collapse", epilog="dino-search evaluate collapse ./photos --out collapse --steps 300")(collapse)
    app.add_typer(evaluate, name="evaluate")
