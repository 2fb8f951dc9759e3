"""Forward passes that requests share: batches, order, limits, cancellation, with a model that does as the test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dino_index.backbones import Backbone
from dino_index.errors import ServerFull, TooManyRequests
from dino_search.api.batching import Admission, ForwardPasses
from dino_search.api.metrics import Metrics


class SlowModel:
    """Two passes at a time, four pictures in each; each pass waits until the test lets it go."""

    def __init__(self, *, held: bool = True) -> None:
        self.device = torch.device("cpu")
        self.num_passes = 2
        self.batch_size = 4
        self.passes: list[tuple[str, int]] = []
        """(thread, pictures) of each pass that has begun."""
        self._may_go = threading.Semaphore(0 if held else 1_000_000)

    @contextmanager
    def forward_threads(self) -> Iterator[ThreadPoolExecutor]:
        with ThreadPoolExecutor(self.num_passes, "forward") as pool:
            yield pool

    def stack(self, squares: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        return np.stack(squares)

    def embed(self, pixels_BHWC: NDArray[np.uint8]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        self.passes.append((threading.current_thread().name, len(pixels_BHWC)))
        assert self._may_go.acquire(timeout=20)
        if (pixels_BHWC == 255).all(axis=(1, 2, 3)).any():
            raise RuntimeError("a picture that breaks the pass")
        values = pixels_BHWC[:, 0, 0, :1].astype(np.float16)
        return values, -values

    def let_go(self, num_passes: int = 1) -> None:
        self._may_go.release(num_passes)

    def begun(self, num_passes: int) -> list[tuple[str, int]]:
        """The passes, once so many have begun."""
        until = time.monotonic() + 20
        while len(self.passes) < num_passes:
            assert time.monotonic() < until, f"{len(self.passes)} of {num_passes} passes have begun"
            time.sleep(0.002)
        time.sleep(0.02)  # for one too many to begin
        return list(self.passes)


@contextmanager
def passes_of(model: SlowModel, *, max_wait_s: float = 0.0) -> Iterator[ForwardPasses]:
    passes = ForwardPasses(cast(Backbone, model), Metrics(), max_wait_s=max_wait_s)
    try:
        yield passes
    finally:
        model.let_go(1000)
        passes.close()


def number(value: int) -> NDArray[np.uint8]:
    return np.full((2, 2, 3), value, np.uint8)


def values(futures: list[Future[Any]]) -> list[float]:
    return [float(future.result(timeout=20)[0][0]) for future in futures]


def test_a_picture_that_comes_alone_gets_the_thread_with_all_processors() -> None:
    model = SlowModel(held=False)
    with passes_of(model) as passes:
        for value in range(3):
            assert values([passes.embed(number(value))]) == [value]
    assert model.passes == [("forward-wide", 1)] * 3


def test_a_picture_that_comes_alone_gets_one_processor_where_all_take_longer() -> None:
    class Crowded(SlowModel):
        def embed(self, pixels_BHWC: NDArray[np.uint8]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
            if threading.current_thread().name == "forward-wide":
                time.sleep(0.1)
            return super().embed(pixels_BHWC)

    model = Crowded(held=False)
    with passes_of(model) as passes:
        # While the first is computed by all, others come, and show what one processor can do.
        assert values([passes.embed(number(value)) for value in range(5)]) == list(range(5))
        for value in range(100):
            assert values([passes.embed(number(value))]) == [value]
    wide = [thread for thread, _ in model.passes].count("forward-wide")
    assert 2 <= wide <= 4, "it is tried again now and then, as the company may have gone"


def test_a_picture_leaves_processors_to_others_that_are_being_decoded() -> None:
    model = SlowModel(held=False)
    with passes_of(model) as passes, passes.coming():
        assert values([passes.embed(number(1))]) == [1]
    assert [size for _, size in model.passes] == [1]
    assert model.passes[0][0] != "forward-wide"


def test_processors_get_few_pictures_at_a_time() -> None:
    model = SlowModel()
    model.batch_size = 16
    with passes_of(model) as passes:
        first = passes.embed(number(0))
        model.begun(1)
        rest = [passes.embed(number(value)) for value in range(1, 17)]
        model.let_go(17)
        assert values([first, *rest]) == list(range(17))
    assert max(size for _, size in model.passes) == 4


def test_pictures_that_queue_while_passes_run_share_the_next_ones() -> None:
    model = SlowModel()
    with passes_of(model) as passes:
        first = passes.embed(number(0))
        model.begun(1)
        rest = [passes.embed(number(value)) for value in range(1, 9)]
        assert len(model.begun(1)) == 1, "a pass over all processors is alone"
        model.let_go()
        begun = model.begun(3)[1:]
        assert [size for _, size in begun] == [4, 4]
        assert "forward-wide" not in {thread for thread, _ in begun}
        model.let_go(2)
        assert values([first, *rest]) == list(range(9))


def test_few_pictures_are_dealt_out_to_all_processors() -> None:
    model = SlowModel()
    with passes_of(model) as passes:
        passes.embed(number(0))
        model.begun(1)
        for value in range(1, 5):
            passes.embed(number(value))
        model.let_go()
        assert [size for _, size in model.begun(3)[1:]] == [2, 2]


def test_a_pass_waits_a_moment_for_pictures_that_are_being_decoded() -> None:
    model = SlowModel(held=False)
    with passes_of(model, max_wait_s=10) as passes:
        with passes.coming():
            futures = [passes.embed(number(1)), passes.embed(number(2))]
            time.sleep(0.05)
            assert model.passes == []
        begin = time.monotonic()
        assert values(futures) == [1, 2]
        assert time.monotonic() - begin < 5, "nothing is coming any more"


def test_a_pass_does_not_wait_longer_than_allowed_or_for_more_than_a_batch() -> None:
    model = SlowModel(held=False)
    with passes_of(model, max_wait_s=0.05) as passes, passes.coming():
        assert values([passes.embed(number(1))]) == [1]
    with passes_of(model, max_wait_s=60) as passes, passes.coming():
        assert values([passes.embed(number(value)) for value in range(8)]) == list(range(8))


def test_a_picture_that_is_given_up_leaves_the_queue() -> None:
    model = SlowModel()
    with passes_of(model) as passes:
        first = passes.embed(number(0))
        model.begun(1)
        waiting = [passes.embed(number(value)) for value in range(1, 5)]
        assert waiting[1].cancel()
        assert waiting[2].cancel()
        assert passes.num_waiting == 2
        assert not first.cancel(), "its pass has begun"
        model.let_go(3)
        assert values([first, waiting[0], waiting[3]]) == [0, 1, 4]


def test_a_failing_pass_is_told_to_its_pictures_and_others_go_on() -> None:
    model = SlowModel(held=False)
    with passes_of(model) as passes:
        with pytest.raises(RuntimeError, match="breaks the pass"):
            passes.embed(number(255)).result(timeout=20)
        assert values([passes.embed(number(7))]) == [7]


def test_other_work_takes_a_slot_in_its_turn() -> None:
    model = SlowModel()
    with passes_of(model) as passes:
        first = passes.embed(number(0))
        model.begun(1)
        done: list[str] = []
        works = [passes.run(lambda name=name: done.append(name)) for name in ("a", "b")]  # type: ignore[misc]
        last = passes.embed(number(9))
        model.let_go(2)
        for work in works:
            work.result(timeout=20)
        assert (sorted(done), values([first, last])) == (["a", "b"], [0, 9])


def test_work_in_a_slot_may_embed_without_waiting_for_another() -> None:
    model = SlowModel(held=False)
    with passes_of(model) as passes, passes.shared.forward_threads() as threads:
        futures = [threads.submit(passes.shared.embed, number(value)[None]) for value in range(8)]
        assert [float(future.result(timeout=20)[0][0, 0]) for future in futures] == list(range(8))
        assert float(passes.shared.embed(number(3)[None])[0][0, 0]) == 3


def test_closing_gives_up_what_waits() -> None:
    model = SlowModel()
    passes = ForwardPasses(cast(Backbone, model), Metrics(), max_wait_s=0)
    first = passes.embed(number(0))
    model.begun(1)
    waiting = passes.embed(number(1))
    closing = threading.Thread(target=passes.close)
    closing.start()
    model.let_go(5)
    closing.join(20)
    assert (values([first]), waiting.cancelled(), passes.embed(number(2)).cancelled()) == ([0], True, True)


def test_places_are_taken_and_given_back() -> None:
    metrics = Metrics()
    admission = Admission(4, metrics)
    with admission.places("a", 2), admission.places("b", 2):
        assert metrics.registry.get_sample_value("dino_search_queue_depth") == 4
        with pytest.raises(ServerFull) as refused, admission.places("c"):
            pass
        assert refused.value.retry_after_s >= 1
    assert metrics.registry.get_sample_value("dino_search_queue_depth") == 0
    assert metrics.registry.get_sample_value("dino_search_rejected_total") == 1
    with admission.places("c", 4):
        pass


def test_a_client_that_holds_most_places_is_told_that_it_is_the_reason() -> None:
    admission = Admission(4, Metrics())
    with admission.places("a", 3), admission.places("b"):
        with pytest.raises(TooManyRequests), admission.places("a"):
            pass
        with pytest.raises(ServerFull), admission.places("b"):
            pass


def test_a_request_of_more_pictures_than_places_gets_in_alone() -> None:
    admission = Admission(4, Metrics())
    with admission.places("a", 9), pytest.raises(ServerFull), admission.places("b"):
        pass
    with admission.places("a"), pytest.raises(ServerFull), admission.places("b", 9):
        pass
