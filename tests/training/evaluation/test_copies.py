"""Copy detection: the parts of the pipeline that are switched, Copydays' and ISC's layouts, what is reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from bad_files import picture
from dino_index import whitening
from dino_index.copy_descriptors import CopyDescriptor
from dino_index.copy_detection import DetectionOptions
from dino_index.edits import apply_edits
from dino_index.errors import EvaluationImpossible, SourceNotFound
from dino_index.matrix_products import product
from dino_index.model_files import resolve_model
from dino_index.snapshots import normalise
from dino_index.whitening import fit_reference_whitening, fit_whitening
from dino_training.evaluation.copies import CopiesOptions, evaluate_copies, evaluate_copydays
from dino_training.evaluation.features import FeatureStore
from dino_training.evaluation.truth import NamedTruth
from sample_collections import write_pictures

# Whole pictures by their vectors alone.
PLAIN = DetectionOptions(regions="none", variants="none", num_verified=0)


def write_copies(folder: Path, names: dict[str, tuple[int, list[str]]]) -> None:
    """By name: which picture, by its seed, after which edits."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (seed, edits) in names.items():
        apply_edits(picture(seed=seed), edits, np.random.default_rng(seed)).save(folder / name)


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path, NamedTruth]:
    """Twelve references, and edited copies of six of them beside two other pictures."""
    write_pictures(tmp_path / "r", *(f"r{number:02}.jpg" for number in range(12)))
    edits = [["blur"], ["grey"], ["crop"], ["mirror"], ["colour"], ["noise"]]
    write_copies(tmp_path / "q", {f"q{number}.png": (number, edits[number]) for number in range(6)})
    write_copies(tmp_path / "q", {"x0.png": (50, ["blur"]), "x1.png": (51, ["crop"])})
    matches: dict[str, set[str]] = {f"q{number}": {f"r{number:02}.jpg"} for number in range(6)}
    return tmp_path / "q", tmp_path / "r", NamedTruth(matches=matches | {"x0": set(), "x1": set()})


def slow_figures(scores: np.ndarray[tuple[int, int], np.dtype[np.float32]], k: int) -> dict[str, float]:
    """Query n is a copy of reference n, up to the sixth. scores: of each query and reference."""
    pairs, precisions, first = [], [], []
    for query, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda n: (-row[n], n))[:k]
        pairs += [(row[n], n == query and query < 6) for n in order]
        if query < 6:
            precisions.append(1 / (order.index(query) + 1) if query in order else 0.0)
            first.append(order[0] == query)
    pairs.sort(key=lambda pair: (-pair[0], pair[1]))
    found, total = 0, 0.0
    for number, (_, correct) in enumerate(pairs, 1):
        found += correct
        total += found / number if correct else 0
    return {"micro_ap": total / 6, "map": float(np.mean(precisions)), "rank1": float(np.mean(first))}


@pytest.mark.parametrize("k", [4, 20])
def test_the_vectors_of_copies_are_searched_and_judged(
    sets: tuple[Path, Path, NamedTruth], store: FeatureStore, k: int
) -> None:
    queries, references, named = sets
    options = CopiesOptions(detection=DetectionOptions(**vars(PLAIN) | {"k": k}))
    result = evaluate_copies(store, queries, references, named, options).to_json()
    asked, found = store.embed_folder(queries), store.embed_folder(references)
    scores = (
        CopyDescriptor().vectors(asked.cls_ND, asked.gem_ND) @ CopyDescriptor().vectors(found.cls_ND, found.gem_ND).T
    )
    for name, value in slow_figures(np.round(scores, 6), k).items():
        assert result[name] == pytest.approx(value), name


def test_cls_alone_is_the_cosine_of_whole_pictures(sets: tuple[Path, Path, NamedTruth], store: FeatureStore) -> None:
    queries, references, named = sets
    result = evaluate_copies(store, queries, references, named, CopiesOptions(descriptor="cls")).to_json()
    asked, found = (normalise(store.embed_folder(folder).cls_ND) for folder in (queries, references))
    # The same product to the last digit: this model's cosines are so close that rounding decides about ties.
    for name, value in slow_figures(np.round(product(asked, found.T), 6), 99).items():
        assert result[name] == pytest.approx(value), name


def test_a_mirrored_copy_is_found_by_the_views_of_the_pipeline(tmp_path: Path, store: FeatureStore) -> None:
    write_pictures(tmp_path / "r", *(f"{number}.jpg" for number in range(40)))
    write_copies(tmp_path / "q", {f"m{number}.png": (number, ["mirror"]) for number in range(8)})
    named = NamedTruth(matches={f"m{number}": {f"{number}.jpg"} for number in range(8)})
    whole, plain = (
        evaluate_copies(
            store, tmp_path / "q", tmp_path / "r", named,
            CopiesOptions(detection=DetectionOptions(variants=variants, regions="none", num_verified=0)),
        ).to_json()
        for variants in ("mirror", "none")
    )  # fmt: skip
    assert whole["rank1"] == 1.0
    assert plain["rank1"] < 1.0


def test_the_bundled_pipeline_verifies_what_it_finds(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "q").mkdir()
    named = NamedTruth()
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        photograph = Image.fromarray(getattr(data, name)()).convert("RGB")
        photograph.thumbnail((240, 240))
        photograph.save(tmp_path / f"r/{name}.png")
        apply_edits(photograph, ["crop", "grey"], np.random.default_rng(0)).save(tmp_path / f"q/{name}-copy.png")
        named.add(f"{name}-copy.png", match=f"{name}.png")
    store = FeatureStore(resolve_model(), device="cpu")
    options = CopiesOptions(detection=DetectionOptions(variants="none", regions="none"))
    result = evaluate_copies(store, tmp_path / "q", tmp_path / "r", named, options)
    assert (result.to_json()["micro_ap"], result.to_json()["rank1"]) == (1.0, 1.0)
    assert result.facts["num_verified"] == 5


def test_junk_and_the_query_itself_take_no_place_among_the_candidates(tmp_path: Path, store: FeatureStore) -> None:
    write_pictures(tmp_path, *(f"{number}.jpg" for number in range(6)))
    write_copies(tmp_path, {"copy.png": (0, ["blur"])})
    named = NamedTruth(matches={"0.jpg": {"copy.png"}}, junk={"0.jpg": {f"{number}.jpg" for number in range(1, 6)}})
    options = CopiesOptions(detection=DetectionOptions(**vars(PLAIN) | {"k": 1}))
    result = evaluate_copies(store, tmp_path, tmp_path, named, options).to_json()
    assert (result["map"], result["micro_ap"], result["recall_at_p90"]) == (1.0, 1.0, 1.0)
    assert result["queries_among_references"] == [str(tmp_path / "0.jpg")]


def test_isc_searches_with_queries_that_truth_does_not_name(
    sets: tuple[Path, Path, NamedTruth], store: FeatureStore
) -> None:
    queries, references, named = sets
    options = CopiesOptions(detection=PLAIN)
    only_matched = NamedTruth(matches={name: matches for name, matches in named.matches.items() if matches})
    everything = evaluate_copies(store, queries, references, named, options).to_json()
    as_isc = evaluate_copies(store, queries, references, only_matched, options, search_all=True).to_json()
    assert as_isc["num_queries"] == 8
    assert {name: as_isc[name] for name in ("micro_ap", "map")} == {n: everything[n] for n in ("micro_ap", "map")}
    assert evaluate_copies(store, queries, references, only_matched, options).to_json()["num_queries"] == 6


def write_copydays(root: Path) -> None:
    numbers = [2000, 2001, 2002, 2003, 2004]
    write_pictures(root / "original", *(f"{number}00.jpg" for number in numbers), seed=100)
    for kind, strength, edit in (("jpeg", "3", "reencode"), ("jpeg", "20", "noise"), ("crops", "50", "crop")):
        write_copies(
            root / kind / strength, {f"{number}00.png": (100 + at, [edit]) for at, number in enumerate(numbers)}
        )
    write_copies(
        root / "strong",
        {"200001.png": (100, ["mirror"]), "200002.png": (100, ["crop", "grey"]), "200301.png": (103, ["blur"]),
         "209901.png": (7, ["blur"])},
    )  # fmt: skip


def test_copydays_is_evaluated_by_kind_of_edit(tmp_path: Path, store: FeatureStore) -> None:
    write_copydays(tmp_path / "copydays")
    write_pictures(tmp_path / "others", *(f"{number}.jpg" for number in range(30)), seed=200)
    options = CopiesOptions(detection=PLAIN)
    result = evaluate_copydays(store, tmp_path / "copydays", tmp_path / "others", options)
    assert list(result.to_json()["map"]) == ["strong", "jpeg/3", "jpeg/20", "crops/50"]
    assert result.facts["num_queries"] == {"strong": 3, "jpeg/3": 5, "jpeg/20": 5, "crops/50": 5}
    assert result.facts["copies_without_original"] == [str(tmp_path / "copydays/strong/209901.png")]
    found = [store.embed_folder(tmp_path / folder) for folder in ("copydays/original", "others")]
    references = np.concatenate([CopyDescriptor().vectors(each.cls_ND, each.gem_ND) for each in found])
    crops = store.embed_folder(tmp_path / "copydays/crops/50")
    scores = np.round(CopyDescriptor().vectors(crops.cls_ND, crops.gem_ND) @ references.T, 6)
    expected = []
    for query, row in enumerate(scores):
        rank = int((np.delete(row, query) >= row[query]).sum())
        expected.append(0.0 if rank >= 20 else (float(rank == 0) + 1 / (rank + 1)) / 2)
    assert result.to_json()["map"]["crops/50"] == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("missing", ["original", "copies"])
def test_folders_that_are_no_copydays_are_refused(tmp_path: Path, store: FeatureStore, missing: str) -> None:
    write_pictures(tmp_path / ("strong" if missing == "original" else "original"), "200000.jpg")
    with pytest.raises(SourceNotFound, match="original"):
        evaluate_copydays(store, tmp_path, None, CopiesOptions(detection=PLAIN))


def test_copydays_whose_names_do_not_match_are_refused(tmp_path: Path, store: FeatureStore) -> None:
    write_pictures(tmp_path / "original", "200000.jpg")
    write_pictures(tmp_path / "strong", "300001.jpg")
    with pytest.raises(EvaluationImpossible, match="first four digits"):
        evaluate_copydays(store, tmp_path, None, CopiesOptions(detection=PLAIN))


@pytest.mark.parametrize(("compat", "dims"), [(False, None), (True, None), (False, 20), (True, 7)])
def test_whitening_is_learned_from_a_third_folder(
    sets: tuple[Path, Path, NamedTruth],
    store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    compat: bool,
    dims: int | None,
) -> None:
    monkeypatch.setattr(whitening, "MIN_IMAGES_PER_DIMENSION", 0)
    write_pictures(tmp_path / "third", *(f"{number}.jpg" for number in range(40)), seed=300)
    queries, references, named = sets
    options = CopiesOptions(
        detection=DetectionOptions(**vars(PLAIN) | {"normalisation": False}),
        whiten=tmp_path / "third", compat=compat, dims=dims,
    )  # fmt: skip
    result = evaluate_copies(store, queries, references, named, options)
    assert "40 other pictures" in result.facts["learned"]
    third, asked, found = (store.embed_folder(folder) for folder in (tmp_path / "third", queries, references))
    learned = (fit_reference_whitening if compat else fit_whitening)(
        CopyDescriptor().vectors(third.cls_ND, third.gem_ND)
    )
    assert learned is not None
    descriptor = CopyDescriptor(whitening=learned if dims is None else learned.reduced(dims))
    vectors = [descriptor.vectors(each.cls_ND, each.gem_ND) for each in (asked, found)]
    assert vectors[0].shape[1] == (dims or 128)
    for name, value in slow_figures(np.round(vectors[0] @ vectors[1].T, 6), 20).items():
        assert result.to_json()[name] == pytest.approx(value, abs=1e-6), name


def test_too_few_pictures_for_a_whitening_are_said(
    sets: tuple[Path, Path, NamedTruth], store: FeatureStore, tmp_path: Path
) -> None:
    write_pictures(tmp_path / "third", "a.jpg")
    queries, references, named = sets
    options = CopiesOptions(detection=PLAIN, whiten=tmp_path / "third")
    with pytest.raises(EvaluationImpossible, match="expected 1280 different pictures or more"):
        evaluate_copies(store, queries, references, named, options)
    with pytest.raises(EvaluationImpossible, match="--whiten DIR"):
        evaluate_copies(store, queries, references, named, CopiesOptions(detection=PLAIN, dims=5))


@pytest.mark.parametrize(
    "wrong", [{"descriptor": "gem"}, {"compat": True}, {"dims": 0}, {"detection": DetectionOptions(regions="both")}]
)
def test_options_that_do_not_go_together_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"descriptor|compat|dims|regions"):
        CopiesOptions(**wrong)  # type: ignore[arg-type]
