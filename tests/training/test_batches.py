from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from bad_files import picture
from dino_index.edits import EDITS
from dino_training.batches import Batch, BatchLoader
from dino_training.recipe import Recipe
from dino_training.views import cut_views, recolour

NUM_IMAGES = 14


def load(position: int) -> NDArray[np.uint8]:
    """Pictures of different sizes and shapes."""
    return np.asarray(picture(20 + position, 30 - position, seed=position))


def recipe(**changed: Any) -> Recipe:
    tiny: dict[str, Any] = {
        "global_size": 16, "local_size": 8, "num_local_views": 2, "batch_size": 4, "workers": 2,
    }  # fmt: skip
    return Recipe(**tiny | changed)


def loader(num_images: int = NUM_IMAGES, *, rank: int = 0, num_processes: int = 1, **changed: Any) -> BatchLoader:
    return BatchLoader(load, num_images, recipe(**changed), rank=rank, num_processes=num_processes)


def batches(first_step: int, last_step: int, **options: Any) -> list[Batch]:
    return list(loader(**options).batches(first_step, last_step))


def tensors(batch: Batch) -> list[Tensor]:
    return [torch.from_numpy(batch.positions_B), *batch.squares, *batch.colours]


def assert_same(one: Batch, other: Batch) -> None:
    for found, expected in zip(tensors(one), tensors(other), strict=True):
        assert torch.equal(found, expected)


def joined(parts: list[Batch]) -> Batch:
    """Several batches as one, in order."""
    return Batch(
        np.concatenate([part.positions_B for part in parts]),
        [torch.cat(views) for views in zip(*(part.squares for part in parts), strict=True)],
        [torch.cat(views) for views in zip(*(part.colours for part in parts), strict=True)],
    )


def by_position(batch: Batch) -> dict[int, list[Tensor]]:
    return {
        position: [view[row] for view in (*batch.squares, *batch.colours)]
        for row, position in enumerate(batch.positions_B.tolist())
    }


# --- which images come when


@given(
    num_images=st.integers(1, 60), parts=st.integers(1, 3), processes=st.integers(1, 3), each=st.integers(1, 4),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_an_epoch_takes_every_image_at_most_once(
    num_images: int, parts: int, processes: int, each: int, seed: int
) -> None:
    batch_size = parts * processes * each
    loaders = [
        loader(
            num_images,
            rank=rank,
            num_processes=processes,
            batch_size=batch_size,
            gradient_accumulation=parts,
            seed=seed,
        )
        for rank in range(processes)
    ]
    whole = loader(num_images, batch_size=batch_size, seed=seed)
    assert whole.steps_per_epoch == num_images // batch_size
    for epoch in range(2):
        seen: list[int] = []
        for step in range(epoch * whole.steps_per_epoch, (epoch + 1) * whole.steps_per_epoch):
            shares = [each_loader.positions(step) for each_loader in loaders]
            assert {len(share) for share in shares} == {batch_size // processes}
            # Part after part, the processes in turn see what one process sees.
            in_turn = np.concatenate([share.reshape(parts, -1) for share in shares], axis=1).reshape(-1)
            np.testing.assert_array_equal(in_turn, whole.positions(step))
            seen += in_turn.tolist()
        assert len(set(seen)) == len(seen) == whole.steps_per_epoch * batch_size
        assert set(seen) <= set(range(num_images))


def test_each_epoch_and_each_seed_has_an_order_of_its_own() -> None:
    def order(epoch: int, seed: int = 0) -> tuple[int, ...]:
        return tuple(loader(100, batch_size=100, seed=seed).positions(epoch).tolist())

    orders = [order(0), order(1), order(2), order(0, seed=1), tuple(range(100))]
    assert len(set(orders)) == 5
    assert order(1) == orders[1]


def test_steps_may_be_asked_for_in_any_order() -> None:
    one, other = loader(), loader()
    steps = [7, 0, 5, 1, 6, 0]
    assert [one.positions(step).tolist() for step in steps] == [loader().positions(step).tolist() for step in steps]
    assert [other.positions(step).tolist() for step in sorted(steps)] == [
        loader().positions(step).tolist() for step in sorted(steps)
    ]


# --- what is in a batch


def test_a_batch_holds_the_views_of_its_images_in_order() -> None:
    wanted = recipe()
    (batch,) = batches(4, 5)
    assert batch.positions_B.tolist() == loader().positions(4).tolist()
    assert [tuple(view.shape) for view in batch.squares] == [(4, size, size, 3) for size in (16, 16, 8, 8)]
    assert [tuple(view.shape) for view in batch.colours] == [(4, 7)] * 4
    epoch = 4 // loader().steps_per_epoch
    for row, position in enumerate(batch.positions_B.tolist()):
        alone = cut_views(load(position), wanted, np.random.default_rng([wanted.seed, 1, epoch, position]))
        for view, square in enumerate(alone.squares):
            np.testing.assert_array_equal(batch.squares[view][row].numpy(), square)
            np.testing.assert_array_equal(batch.colours[view][row].numpy(), alone.colour_VP[view])


def test_views_on_the_device_are_recoloured_and_normalised() -> None:
    wanted = recipe()
    (batch,) = batches(0, 1)
    views = batch.views(wanted, torch.device("cpu"))
    assert [tuple(view.shape) for view in views] == [(4, 3, size, size) for size in (16, 16, 8, 8)]
    for view, picture_BCSS in enumerate(views):
        torch.testing.assert_close(picture_BCSS, recolour(batch.squares[view], batch.colours[view], wanted))


def test_the_same_seed_gives_the_same_batches_and_another_seed_or_epoch_others() -> None:
    whole_epoch = {"batch_size": NUM_IMAGES, "edits": dict.fromkeys(EDITS, 0.2)}
    for one, same in zip(batches(0, 2, **whole_epoch), batches(0, 2, **whole_epoch), strict=True):
        assert_same(one, same)
    first, second = (by_position(batch) for batch in batches(0, 2, **whole_epoch))
    other_seed = by_position(batches(0, 1, **whole_epoch, seed=1)[0])
    for position in range(NUM_IMAGES):
        for other in (second, other_seed):
            assert not any(torch.equal(*pair) for pair in zip(first[position], other[position], strict=True))


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_the_number_of_threads_does_not_matter(workers: int) -> None:
    options: dict[str, Any] = {"edits": {"paste": 0.5, "noise": 0.5}}
    for one, other in zip(batches(0, 5, workers=workers, **options), batches(0, 5, workers=2, **options), strict=True):
        assert_same(one, other)


def test_a_run_that_goes_on_from_a_step_sees_what_it_would_have_seen() -> None:
    whole = batches(0, 8)
    for one, other in zip(whole[5:], batches(5, 8), strict=True):
        assert_same(one, other)
    assert batches(8, 8) == []


@pytest.mark.parametrize("gradient_accumulation", [1, 2])
def test_two_processes_see_together_what_one_sees(gradient_accumulation: int) -> None:
    options: dict[str, Any] = {"gradient_accumulation": gradient_accumulation, "edits": {"paste": 0.5}}
    alone = batches(0, 5, **options)
    shares = [batches(0, 5, rank=rank, num_processes=2, **options) for rank in range(2)]
    for whole, *of_processes in zip(alone, *shares, strict=True):
        parts = zip(*(share.parts(gradient_accumulation) for share in of_processes), strict=True)
        for part, together in zip(whole.parts(gradient_accumulation), parts, strict=True):
            assert_same(joined(list(together)), part)


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_parts_of_a_batch_are_the_batch(num_parts: int) -> None:
    (batch,) = batches(0, 1)
    parts = list(batch.parts(num_parts))
    assert [len(part.positions_B) for part in parts] == [4 // num_parts] * num_parts
    assert_same(joined(parts), batch)


def test_pasted_views_lie_on_other_images() -> None:
    def load_flat(position: int) -> NDArray[np.uint8]:
        return np.full((16, 16, 3), 10 * position, np.uint8)

    wanted = recipe(edits={"paste": 1.0}, batch_size=8, num_local_views=0)
    (batch,) = BatchLoader(load_flat, 8, wanted).batches(0, 1)
    backgrounds: set[int] = set()
    for position, (square, *_) in by_position(batch).items():
        shown = set(square.flatten().tolist())
        assert 10 * position in shown
        backgrounds |= shown - {10 * position}
    assert backgrounds <= {10 * position for position in range(8)}
    assert len(backgrounds) > 2


# --- threads


def test_an_image_that_fails_stops_the_run() -> None:
    def fail(position: int) -> NDArray[np.uint8]:
        raise OSError(f"no image {position}")

    with pytest.raises(OSError, match="no image"):
        next(BatchLoader(fail, NUM_IMAGES, recipe()).batches(0, 2))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("views")]


def test_a_loop_that_ends_early_leaves_no_threads_and_prepares_only_a_little_ahead() -> None:
    loaded: list[int] = []

    def count(position: int) -> NDArray[np.uint8]:
        loaded.append(position)
        return load(position)

    running = BatchLoader(count, NUM_IMAGES, recipe()).batches(0, 1000)
    next(running)
    running.close()  # type: ignore[attr-defined]
    assert 4 <= len(loaded) <= 4 * 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("views")]
