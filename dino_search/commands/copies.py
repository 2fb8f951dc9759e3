"""`dino-search copies`, `compare` and `calibrate`."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dino_search.commands.indexing import progress_bar, require_choice
from dino_search.commands.output import (
    MAX_BYTES,
    MAX_PIXELS,
    CollectionOption,
    DeviceOption,
    ForceOption,
    HomeOption,
    JsonOption,
    MaxBytesOption,
    MaxPixelsOption,
    complain,
    print_json,
    print_line,
    tell,
)

if TYPE_CHECKING:
    from dino_index.copy_detection import DetectionOptions
    from dino_search.copies import CopiesOptions
    from dino_search.copy_results import CopyMatch

EXIT_COPY, EXIT_DIFFERENT, EXIT_ERROR, EXIT_UNCERTAIN = 0, 1, 2, 3

PrecisionOption = Annotated[
    float, typer.Option(metavar="P", help="Call copies so that this share of them is right (estimated).")
]
CopyScoreOption = Annotated[
    float | None,
    typer.Option(metavar="S", help="Call copies from this score on instead.", show_default="by --target-precision"),
]
MatchShareOption = Annotated[
    float, typer.Option(metavar="SHARE", help="Share of the queries that probably have a match.")
]
RegionsOption = Annotated[
    str, typer.Option(metavar="none|query|both", help="Whose parts are compared, to find partial copies.")
]
VariantsOption = Annotated[
    str, typer.Option(metavar="none|mirror|all", help="Turned views of a query: mirror image, quarter turns, tilts.")
]
VerifyOption = Annotated[
    int, typer.Option("--verify", min=0, metavar="N", help="Best candidates to verify by their patches; 0: none.")
]
WhiteningOption = Annotated[bool, typer.Option("--whitening/--no-whitening", help="Whiten the vectors.")]
NormalisationOption = Annotated[
    bool, typer.Option("--normalisation/--no-normalisation", help="Take off what a query has in common with all.")
]


def add_commands(app: typer.Typer) -> None:
    app.command(epilog="dino-search copies ./suspects --report copies-report")(copies)
    app.command(epilog="dino-search compare original.jpg suspect.jpg")(compare)
    app.command(epilog="dino-search calibrate")(calibrate)


def copies(
    queries: Annotated[list[str], typer.Argument(metavar="QUERY...", help="Images, folders, manifests, shards, URLs.")],
    collection: CollectionOption = "default",
    home: HomeOption = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write tables and a page to look through the pairs.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Candidates of each query.")] = 20,
    min_score: Annotated[
        float | None, typer.Option(metavar="S", help="List only pairs from this score on.", show_default="all")
    ] = None,
    target_precision: PrecisionOption = 0.99,
    copy_score: CopyScoreOption = None,
    match_share: MatchShareOption = 0.5,
    regions: RegionsOption = "query",
    variants: VariantsOption = "all",
    verify: VerifyOption = 5,
    whitening: WhiteningOption = True,
    normalisation: NormalisationOption = True,
    report_limit: Annotated[int, typer.Option(min=0, help="Pairs on the page; the tables have all.")] = 10_000,
    force: ForceOption = False,
    device: DeviceOption = "auto",
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    max_bytes: MaxBytesOption = MAX_BYTES,
    as_json: JsonOption = False,
) -> None:
    """Find which images are edited copies of images in the collection, and how sure that is."""
    require_choice("--device", device, ("auto", "cpu", "cuda"))
    detection = _detection(k, regions, variants, verify, whitening, normalisation)
    options = _options(detection, target_precision, copy_score, match_share, max_pixels, max_bytes)
    from dino_search.collection import Collection
    from dino_search.copy_report import CopyReport, refuse_existing_report

    if report is not None:
        refuse_existing_report(report, force)
    found: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    with Collection.open(collection, home=home, device=device) as opened, progress_bar("comparing") as show:  # type: ignore[arg-type]
        run = opened.copies(queries, options, on_remark=tell, on_progress=show)
        model = opened.model_name()
        writing = nullcontext() if report is None else CopyReport(
            report, title=f"Copies of images in {collection}", collection=collection, model=model,
            limit=report_limit, min_score=min_score, force=force, facts=run.facts,
        )  # fmt: skip
        with writing as written:
            for query in run:
                counts[query.outcome] += 1
                if written is not None:
                    written.add(query)
                listed = [match for match in query.matches if min_score is None or match.score >= min_score]
                if as_json:
                    found.append(query.to_json() | {"matches": [match.to_json() for match in listed]})
                else:
                    _print_matches(listed)
                if query.status == "failed":
                    tell(f"{query.query}: {query.reason}")
        if written is not None and not written.record_in(opened):
            tell(f"the home cannot be written, so that remove --purge will not know of {report}")
    if as_json:
        print_json({"collection": collection, "model": model, "facts": run.facts, "queries": found})
    if run.listing.ignored:
        ignored = ", ".join(f"{count} {kind}" for kind, count in sorted(run.listing.ignored.items()))
        tell(f"ignored, as they are no images: {ignored}")
    tell(
        f"{counts['copy']} of {counts.total()} queries are copies, {counts['uncertain']} uncertain, "
        f"{counts['different']} have no match, {counts['failed']} could not be read"
    )
    for name, fact in run.facts.items():
        tell(f"{name}: {fact}")
    if report is not None:
        tell(f"open {report / 'report.html'}")
    if counts["failed"] == counts.total():
        complain("none of the queries could be read" if counts else "no image was found under the given paths")
        raise typer.Exit(1)


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A picture.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    collection: CollectionOption = "default",
    home: HomeOption = None,
    target_precision: PrecisionOption = 0.99,
    copy_score: CopyScoreOption = None,
    regions: RegionsOption = "query",
    variants: VariantsOption = "all",
    verify: VerifyOption = 1,
    whitening: WhiteningOption = True,
    normalisation: NormalisationOption = True,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say whether one picture is an edited copy of the other.

    Exit status 0: copy, 1: different, 3: uncertain, 2: error. Model and calibration are the collection's, where it
    exists.
    """
    from dino_index.errors import DinoSearchError

    try:
        require_choice("--device", device, ("auto", "cpu", "cuda"))
        detection = _detection(1, regions, variants, verify, whitening, normalisation)
        options = _options(detection, target_precision, copy_score, 0.5, MAX_PIXELS, MAX_BYTES)
        from dino_search.collection import Collection

        with Collection.open(collection, home=home, device=device) as opened:  # type: ignore[arg-type]
            match = opened.compare(first, second, options, on_remark=tell)
    except DinoSearchError as error:
        complain(str(error))
        raise typer.Exit(EXIT_ERROR) from error
    if as_json:
        print_json(match.to_json())
    else:
        print_line(match.decision, f"{match.score:.4f}", _precision(match), _how(match))
    raise typer.Exit({"copy": EXIT_COPY, "different": EXIT_DIFFERENT, "uncertain": EXIT_UNCERTAIN}[match.decision])


def calibrate(
    collection: CollectionOption = "default",
    home: HomeOption = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv",
            help="Labelled pairs: columns query, reference; an empty reference: the query has no match.",
            show_default="edited copies of the collection's own images",
        ),
    ] = None,
    num_queries: Annotated[int, typer.Option("--queries", min=50, help="Edited copies to make.")] = 300,
    refit: Annotated[bool, typer.Option("--refit", help="Learn whitening and background anew first.")] = False,
    regions: RegionsOption = "query",
    variants: VariantsOption = "all",
    verify: VerifyOption = 5,
    whitening: WhiteningOption = True,
    normalisation: NormalisationOption = True,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Learn which scores mean a copy: from edited copies of the collection's own images, or from labelled pairs."""
    require_choice("--device", device, ("auto", "cpu", "cuda"))
    detection = _detection(20, regions, variants, verify, whitening, normalisation)
    options = _options(detection, 0.99, None, 0.5, MAX_PIXELS, MAX_BYTES)
    from dino_search.collection import Collection

    with Collection.open(collection, home=home, device=device) as opened, progress_bar("calibrating") as show:  # type: ignore[arg-type]
        done = opened.calibrate(
            options, pairs=pairs, num_queries=num_queries, refit=refit, on_remark=tell, on_progress=show
        )
    if as_json:
        print_json(done.to_json())
        return
    print_line("precision", "score", "found")
    for row in done.table:
        score = "never" if row.score is None else f"{row.score:.4f}"
        print_line(f"{row.target_precision:.3f}", score, f"{row.found:.3f}")
    tell(done.summary)


def _detection(
    k: int, regions: str, variants: str, verify: int, whitening: bool, normalisation: bool
) -> DetectionOptions:
    """Raises BadParameter."""
    require_choice("--regions", regions, ("none", "query", "both"))
    require_choice("--variants", variants, ("none", "mirror", "all"))
    from dino_index.copy_detection import DetectionOptions

    return DetectionOptions(
        k=k,
        regions=regions,  # type: ignore[arg-type]
        variants=variants,  # type: ignore[arg-type]
        num_verified=verify,
        whitening=whitening,
        normalisation=normalisation,
    )


def _options(
    detection: DetectionOptions,
    target_precision: float,
    copy_score: float | None,
    match_share: float,
    max_pixels: int,
    max_bytes: int,
) -> CopiesOptions:
    """Raises BadParameter."""
    from dino_index.image_bytes import ReadLimits
    from dino_search.copies import CopiesOptions

    try:
        return CopiesOptions(
            detection=detection,
            target_precision=target_precision,
            copy_score=copy_score,
            match_share=match_share,
            limits=ReadLimits(max_pixels=max_pixels, max_bytes=max_bytes),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _print_matches(matches: list[CopyMatch]) -> None:
    for match in matches:
        if match.decision != "different" or match.similar:
            print_line(
                match.decision, f"{match.score:.4f}", _precision(match), _how(match), match.query, match.reference
            )


def _precision(match: CopyMatch) -> str:
    return "" if match.precision is None else f"{match.precision:.4f}"


def _how(match: CopyMatch) -> str:
    """What a person should know about how the decision came about, in a word or two."""
    if match.reason != "score":
        return "similar (burst)" if match.similar else match.reason
    return "not verified" if match.verified is None else "verified" if match.verified else "does not fit"
