from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bad_files import picture
from dino_index.errors import ImageError, NoImagesFound
from dino_index.images import load_image
from dino_index.knn import vote
from dino_training.probe import EDIT_KINDS, Embed, Figures, Probe

SIZE = 24
NUM_IMAGES = 60
LABELS = ["cat", "dog", "owl"]


def load(position: int) -> NDArray[np.uint8]:
    """Pictures of different sizes and shapes."""
    return np.asarray(picture(48 + position % 7, 64 - position % 5, seed=position))


def probe(labels: list[str | None] | None = None, *, num_probed: int = NUM_IMAGES, seed: int = 0) -> Probe:
    return Probe(load, NUM_IMAGES, labels, num_probed=num_probed, size=SIZE, seed=seed)


def labels_of_all() -> list[str | None]:
    return [LABELS[position % 3] for position in range(NUM_IMAGES)]


def by_table(vectors: dict[bytes, Tensor]) -> Embed:
    """An embedding that is known for each picture."""

    def embed(pixels_BSSC: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        rows_BD = torch.stack([vectors[pixels.tobytes()] for pixels in pixels_BSSC])
        return rows_BD, rows_BD

    return embed


def random_projection(pixels_BSSC: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    flat_BP = torch.from_numpy(pixels_BSSC).flatten(1).float() / 255 - 0.5
    cls_PD, gem_PD = torch.randn(2, flat_BP.shape[1], 32, generator=generator)
    return flat_BP @ cls_PD, (flat_BP @ gem_PD).abs()


def test_a_perfect_embedding_finds_every_copy_and_every_label() -> None:
    tested = probe(labels_of_all())
    vectors = {}
    for row, (pixels, copy, position) in enumerate(
        zip(tested.pixels_NSSC, tested.copies_NSSC, tested.positions, strict=True)
    ):
        own_D = torch.eye(NUM_IMAGES + 3)[row] * 0.5 + torch.eye(NUM_IMAGES + 3)[NUM_IMAGES + position % 3]
        vectors[pixels.tobytes()] = vectors[copy.tobytes()] = own_D
    figures = tested.figures(by_table(vectors))
    assert (figures.knn_top1, figures.copies_found) == (1.0, 1.0)


def test_a_constant_embedding_finds_nothing() -> None:
    def embed(pixels_BSSC: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        return torch.full((len(pixels_BSSC), 48), 0.3), torch.full((len(pixels_BSSC), 48), 0.7)

    figures = probe().figures(embed)
    assert figures.copies_found == 0
    assert figures.embedding_std == pytest.approx(0, abs=1e-5)


def test_a_random_projection_of_pixels_lies_in_between() -> None:
    figures = probe(labels_of_all()).figures(random_projection)
    assert 0.2 < figures.copies_found < 1
    assert 0.5 < figures.embedding_std < 1.1


def test_directions_drawn_at_random_have_a_spread_of_one() -> None:
    figures = probe().figures(lambda pixels: (torch.randn(len(pixels), 64), torch.randn(len(pixels), 64)))
    assert figures.embedding_std == pytest.approx(1, abs=0.02)


def test_copies_are_told_apart_by_gem_as_well() -> None:
    def embed(pixels_BSSC: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        return torch.ones(len(pixels_BSSC), 8), random_projection(pixels_BSSC)[1] * 1000

    assert probe().figures(embed).copies_found > 0.2


def test_the_probe_depends_on_the_seed_alone() -> None:
    first, again, other = probe(num_probed=20), probe(num_probed=20), probe(num_probed=20, seed=1)
    assert first.positions == again.positions
    assert np.array_equal(first.pixels_NSSC, again.pixels_NSSC)
    assert np.array_equal(first.copies_NSSC, again.copies_NSSC)
    assert first.figures(random_projection) == again.figures(random_projection)
    assert first.positions != other.positions


def test_images_are_squashed_as_for_an_index() -> None:
    tested = probe(num_probed=1)
    expected = load_image(Image.fromarray(load(tested.positions[0])), size=(SIZE, SIZE)).pixels_HWC
    assert np.array_equal(tested.pixels_NSSC[0], expected)
    assert tested.pixels_NSSC.shape == tested.copies_NSSC.shape == (1, SIZE, SIZE, 3)


def test_every_image_has_a_copy_that_differs() -> None:
    tested = probe(num_probed=2 * len(EDIT_KINDS))
    changed = np.abs(tested.pixels_NSSC.astype(int) - tested.copies_NSSC).max(axis=(1, 2, 3))
    assert (changed > 0).all()


def test_knn_counts_the_votes_of_a_search() -> None:
    rng = np.random.default_rng(0)
    labels: list[str | None] = [str(rng.choice(LABELS)) for _ in range(NUM_IMAGES)]
    tested = probe(labels)
    cls_ND = torch.nn.functional.normalize(random_projection(tested.pixels_NSSC)[0], dim=1).numpy()
    right = 0
    for query, position in enumerate(tested.positions):
        scores = {other: float(cls_ND[query] @ cls_ND[other]) for other in range(NUM_IMAGES) if other != query}
        nearest = sorted(scores, key=lambda other: -scores[other])[:20]
        votes = vote(
            [scores[other] for other in nearest], [str(labels[tested.positions[other]]) for other in nearest], 0.07
        )
        right += votes[0][0] == labels[position]
    assert 0 < right < NUM_IMAGES
    assert tested.figures(random_projection).knn_top1 == pytest.approx(right / NUM_IMAGES)


def test_images_without_a_label_are_left_out_where_there_are_labels() -> None:
    labels: list[str | None] = [None] * NUM_IMAGES
    labels[3:23] = ["a", "b"] * 10
    tested = probe(labels)
    assert sorted(tested.positions) == list(range(3, 23))
    assert tested.figures(random_projection).knn_top1 is not None


@pytest.mark.parametrize("label", [None, "same"])
def test_one_label_for_all_says_nothing(label: str | None) -> None:
    tested = probe([label] * NUM_IMAGES, num_probed=12)
    figures = tested.figures(random_projection)
    assert tested.num_probed == 12
    assert figures.knn_top1 is None
    assert figures.main == figures.copies_found


def test_the_main_figure_is_the_one_with_labels() -> None:
    assert Figures(knn_top1=0.3, copies_found=0.5, embedding_std=1).main == 0.3
    assert Figures(knn_top1=None, copies_found=0.5, embedding_std=1).main == 0.5


def test_unreadable_images_are_replaced_and_counted() -> None:
    def load_some(position: int) -> NDArray[np.uint8]:
        if position % 2:
            raise ImageError("corrupt", "broken")
        return load(position)

    tested = Probe(load_some, NUM_IMAGES, None, num_probed=25, size=SIZE, seed=0)
    assert tested.num_probed == 25
    assert all(position % 2 == 0 for position in tested.positions)
    assert 0 < tested.num_unreadable <= NUM_IMAGES // 2


def test_no_readable_image_is_an_error() -> None:
    def load_none(position: int) -> NDArray[np.uint8]:
        raise ImageError("corrupt", "broken")

    with pytest.raises(NoImagesFound, match="none of 3 images"):
        Probe(load_none, 3, None, num_probed=8, size=SIZE, seed=0)


def test_a_single_image_is_measured() -> None:
    figures = Probe(load, 1, ["a"], num_probed=8, size=SIZE, seed=0).figures(random_projection)
    assert figures == Figures(knn_top1=None, copies_found=1.0, embedding_std=0.0)
