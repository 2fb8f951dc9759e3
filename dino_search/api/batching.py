"""Forward passes that concurrent requests share, and how many pictures may wait for one.

A picture that comes alone gets all processors at once, as long as that is quicker. Under load each processor computes a
pass of its own, as `Backbone.forward_threads` has it, of the pictures that have queued meanwhile: batches grow by
themselves with the load, and nobody waits for company while a processor is free. A GPU's pass may wait a moment for
what is being decoded already.

Shapes: D channels, H x W pixels, C colours.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dino_index.errors import ServerFull, TooManyRequests
from dino_search.api.metrics import Metrics

if TYPE_CHECKING:
    from dino_index.backbones import Backbone

Vectors = tuple[NDArray[np.float16], NDArray[np.float16]]
"""(cls_D, gem_D) of one picture, raw."""

_MAX_RETRY_AFTER_S = 60
# A client that holds more than this share of the places when none is left is told that it is the reason.
_FAIR_SHARE = 0.5
# Pictures in one pass of a processor, which gains little by company: ViT-S/16 in bfloat16 takes 34 ms for one alone,
# 29.5 ms each for four, but 40 ms each for eight where other work shares the cache. Each waits for all of its pass.
_MAX_ON_PROCESSOR = 4
_TRIED_EVERY = 64
# Weight of the last pass in what is known of their pace.
_PACE_FRAC = 0.3


class Admission:
    """The places for pictures between their decoding and their vectors: all there are, and who has them."""

    def __init__(self, num_places: int, metrics: Metrics) -> None:
        self.num_places = num_places
        self.num_taken = 0
        self._taken_by: Counter[str] = Counter()
        self._metrics = metrics
        self._held_s = 0.1

    @contextmanager
    def places(self, client: str, count: int = 1) -> Iterator[None]:
        """Takes places until the block ends. On the event loop only.

        A request that wants more than all the places there are gets in when nobody else is in.
        Raises TooManyRequests, ServerFull.
        """
        if self.num_taken and self.num_taken + count > self.num_places:
            self._refuse(client)
        begin = time.monotonic()
        self._change(client, count)
        try:
            yield
        finally:
            self._change(client, -count)
            self._held_s += 0.1 * (time.monotonic() - begin - self._held_s)

    @property
    def retry_after_s(self) -> int:
        """When there will be room, as far as one can tell: about as long as places are held now."""
        return min(max(1, math.ceil(self._held_s)), _MAX_RETRY_AFTER_S)

    def _change(self, client: str, count: int) -> None:
        self.num_taken += count
        self._taken_by[client] += count
        if not self._taken_by[client]:
            del self._taken_by[client]
        self._metrics.queue_depth.set(self.num_taken)

    def _refuse(self, client: str) -> None:
        self._metrics.rejected.inc()
        own = self._taken_by[client]
        if own > _FAIR_SHARE * self.num_places:
            raise TooManyRequests(
                f"{own} pictures of this client wait already, of {self.num_places} that may; send fewer at a time",
                self.retry_after_s,
            )
        raise ServerFull(
            f"{self.num_taken} pictures wait already, of {self.num_places} that may; try again later",
            self.retry_after_s,
        )


@dataclass(eq=False, slots=True)
class _Waiting:
    """One picture, or other work, that waits for a pass. work: None for a picture."""

    pixels_HWC: NDArray[np.uint8] | None
    work: Callable[[], Any] | None = None
    future: Future[Any] = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)


class _Pace:
    """Whether all processors together compute a picture that comes alone sooner than one does: what was quicker lately.

    Threads that share a pass wait for each other at every layer. Where other processes want the processors too, or a
    container has a share of them only, that takes several times as long as one thread by itself. Not for several
    threads.
    """

    def __init__(self) -> None:
        self._seconds: dict[bool, float] = {}
        self._num_passes = 0

    @property
    def prefers_wide(self) -> bool:
        """Stays the same until the next `note`. Now and then it is the other way, which may be quicker by now."""
        if len(self._seconds) < 2:
            return True
        is_quicker = self._seconds[True] < self._seconds[False]
        return is_quicker != (self._num_passes % _TRIED_EVERY == 0)

    def note(self, wide: bool, seconds: float) -> None:
        """seconds: that a pass took for each of its pictures."""
        self._num_passes += 1
        before_s = self._seconds.get(wide, seconds)
        self._seconds[wide] = before_s + _PACE_FRAC * (seconds - before_s)


class ForwardPasses:
    """One model's forward passes. Any thread may hand pictures over; threads of its own compute."""

    def __init__(self, backbone: Backbone, metrics: Metrics, *, max_wait_s: float) -> None:
        """Called in a thread in which torch has all processors. max_wait_s: see `ServiceSettings.max_wait_ms`."""
        import torch

        self.backbone = backbone
        self._metrics = metrics
        on_processors = backbone.device.type == "cpu"
        self._batch_size = min(backbone.batch_size, _MAX_ON_PROCESSOR) if on_processors else backbone.batch_size
        self._max_wait_s = max_wait_s
        self.shared = SharedBackbone(self)
        """The model for other work, which shares the slots."""
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._coming = 0
        self._running = 0
        self._alone = False
        self._closed = False
        self._stack = ExitStack()
        self._num_slots = backbone.num_passes
        self._num_threads = torch.get_num_threads()
        pool = self._stack.enter_context(backbone.forward_threads())
        self._loops = [pool.submit(self._work, False) for _ in range(self._num_slots)]
        self._has_wide = on_processors and self._num_slots > 1
        self._pace = _Pace()
        if self._has_wide:
            # The slots' threads have one processor each; this one has all, for pictures that come alone.
            self._wide = threading.Thread(target=self._work, args=(True,), name="forward-wide", daemon=True)
            self._wide.start()

    def embed(self, pixels_HWC: NDArray[np.uint8]) -> Future[Vectors]:
        """The vectors of one picture. A future that is cancelled leaves the queue."""
        return self._enqueue(_Waiting(pixels_HWC))

    def run(self, work: Callable[[], Any]) -> Future[Any]:
        """Other work that computes passes by itself, in the place of one."""
        return self._enqueue(_Waiting(None, work))

    @contextmanager
    def coming(self) -> Iterator[None]:
        """While the block runs, a picture is on its way here, which a pass may wait for a moment."""
        with self._changed:
            self._coming += 1
        try:
            yield
        finally:
            with self._changed:
                self._coming -= 1
                self._changed.notify_all()

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def close(self) -> None:
        """Ends the threads; what still waits is cancelled."""
        with self._changed:
            self._closed = True
            waiting = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for item in waiting:
            item.future.cancel()
        for loop in self._loops:
            loop.result()
        if self._has_wide:
            self._wide.join()
        self._stack.close()

    def _enqueue(self, item: _Waiting) -> Future[Any]:
        with self._changed:
            if self._closed:
                item.future.cancel()
                return item.future
            self._queue.append(item)
            self._changed.notify_all()
        # Knows nothing of the item: a circle of references would keep what it computes with for minutes.
        item.future.add_done_callback(self._leave)
        return item.future

    def _leave(self, future: Future[Any]) -> None:
        """What was cancelled leaves the queue."""
        if not future.cancelled():
            return
        with self._changed:
            for item in self._queue:
                if item.future is future:
                    self._queue.remove(item)
                    return

    def _work(self, wide: bool) -> None:
        """The loop of one thread."""
        if self.backbone.device.type == "cpu":
            from dino_index.backbones import use_threads

            use_threads(self._num_threads if wide else 1)
        while (items := self._next(wide)) is not None:
            is_one_pass = items[0].work is None
            begin = time.perf_counter()
            try:
                self._compute(items)
            finally:
                with self._changed:
                    if is_one_pass:
                        self._pace.note(wide, (time.perf_counter() - begin) / len(items))
                    self._running -= 1
                    self._alone = False
                    self._changed.notify_all()
            del items  # and all that the work among them holds: the next may be long in coming

    def _next(self, wide: bool) -> list[_Waiting] | None:
        """What this thread computes next; waits for it. None when all is over."""
        with self._changed:
            while not self._closed:
                if self._queue and not self._alone:
                    lone = self._is_lone()
                    rest_s = self._worth_waiting_s()
                    if rest_s > 0:
                        self._changed.wait(rest_s)
                        continue
                    if wide == lone:
                        self._running += 1
                        self._alone = wide
                        return self._taken()
                self._changed.wait()
        return None

    def _is_lone(self) -> bool:
        """Whether what waits is for the thread that computes on all processors."""
        is_by_itself = len(self._queue) == 1 and not self._running and not self._coming
        return self._has_wide and is_by_itself and self._pace.prefers_wide

    def _worth_waiting_s(self) -> float:
        """How long a pass should still wait for pictures that are being decoded."""
        if not self._coming or len(self._queue) >= self._batch_size:
            return 0.0
        return self._max_wait_s - (time.perf_counter() - self._queue[0].since)

    def _taken(self) -> list[_Waiting]:
        """Other work by itself; of pictures a batch, but where no more are coming only this slot's share."""
        if self._queue[0].work is not None:
            return [self._queue.popleft()]
        num_free = max(self._num_slots - self._running + 1, 1)
        share = len(self._queue) if self._coming and self._max_wait_s else math.ceil(len(self._queue) / num_free)
        items: list[_Waiting] = []
        while self._queue and len(items) < min(share, self._batch_size) and self._queue[0].work is None:
            items.append(self._queue.popleft())
        return items

    def _compute(self, items: list[_Waiting]) -> None:
        items = [item for item in items if item.future.set_running_or_notify_cancel()]
        if not items:
            return
        now = time.perf_counter()
        for item in items:
            self._metrics.stage_seconds.labels("queue").observe(now - item.since)
        try:
            if items[0].work is not None:
                items[0].future.set_result(items[0].work())
                return
            self._metrics.batch_size.observe(len(items))
            pixels = [item.pixels_HWC for item in items if item.pixels_HWC is not None]
            with self._metrics.stage("forward"):
                cls_BD, gem_BD = self.backbone.embed(self.backbone.stack(pixels))
            for item, cls_D, gem_D in zip(items, cls_BD, gem_BD, strict=True):
                item.future.set_result((cls_D, gem_D))
        except BaseException as error:
            for item in items:
                if not item.future.done():
                    item.future.set_exception(error)


class SharedBackbone:
    """A model for work that takes many passes, copy detection for one: each takes a slot as the pictures' batches do.

    What needs a `Backbone` takes it as one.
    """

    def __init__(self, passes: ForwardPasses) -> None:
        self._passes = passes
        self._backbone = passes.backbone
        self._slot = threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def embed(self, pixels_BHWC: NDArray[np.uint8]) -> Any:
        return self._in_slot(self._backbone.embed, pixels_BHWC)

    def embed_with_patches(self, pixels_BHWC: NDArray[np.uint8]) -> Any:
        return self._in_slot(self._backbone.embed_with_patches, pixels_BHWC)

    def attention(self, pixels_BHWC: NDArray[np.uint8]) -> Any:
        return self._in_slot(self._backbone.attention, pixels_BHWC)

    @contextmanager
    def forward_threads(self) -> Iterator[Executor]:
        """As of a `Backbone`; the threads are those of all requests, and go on afterwards."""
        yield _SlotExecutor(self)

    def run(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """The work in a slot, in which it may embed."""

        def in_slot() -> Any:
            self._slot.taken = True
            try:
                return work(*args, **kwargs)
            finally:
                self._slot.taken = False

        return self._passes.run(in_slot)

    def _in_slot(self, work: Callable[..., Any], *args: Any) -> Any:
        # What has a slot already would wait for one for ever.
        if getattr(self._slot, "taken", False):
            return work(*args)
        return self.run(work, *args).result()


class _SlotExecutor(Executor):
    def __init__(self, backbone: SharedBackbone) -> None:
        self._backbone = backbone

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._backbone.run(fn, *args, **kwargs)
