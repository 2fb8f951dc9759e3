"""Sends ready-made HTTP requests to a service, from a process of its own that spends as little as it can on each.

`send` starts the process, and gives back what was answered when, and how much processor time the sending took.
"""

from __future__ import annotations

import asyncio
import math
import pickle
import random
import resource
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

TIMED_OUT = -1
NO_ANSWER = 0
ABANDONED = 499
"""Statuses of requests that no answer came to: in time, at all, or that was waited for."""

_ID = b"@ID@"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request. message: its head and body as they are sent.

    abandon_after_s: the client hangs up so long after it has sent the request.
    keeps_id: the answer names an uploaded image, whose id takes the place of `@ID@` in a later request's first line.
    """

    name: str
    message: bytes
    abandon_after_s: float | None = None
    keeps_id: bool = False


@dataclass(frozen=True, kw_only=True)
class Load:
    """Which requests, in turn, and how many at a time, or a second; until so many, or seconds, are over.

    clients: so many ask one after the other. rate: else requests begin at random moments, so many a second, whether
    those before have been answered or not; beyond `max_open` that are not, requests are left out, and counted.
    """

    port: int
    requests: Sequence[Request]
    clients: int = 0
    rate: float = 0.0
    seconds: float = math.inf
    number: int = sys.maxsize
    max_open: int = 1000
    timeout_s: float = 60.0


@dataclass
class Outcome:
    """What became of the requests, in the order in which they ended.

    begins: seconds since the first. seconds: that each took. statuses: of HTTP, or one of those above.
    """

    names: list[str] = field(default_factory=list)
    begins: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    """How often no answer came, by what happened, and how long the connection had been idle."""
    num_left_out: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def counts(self) -> Counter[int]:
        return Counter(self.statuses)

    @property
    def cpu_share(self) -> float:
        """Of one processor, that the sending took."""
        return self.cpu_s / self.wall_s

    def times_s(self) -> list[float]:
        """How long each request took that was answered well, from the quickest."""
        return sorted(each for each, status in zip(self.seconds, self.statuses, strict=True) if status == 200)

    def rates(self) -> list[int]:
        """Requests that were answered well in each second."""
        ends = [
            begin + each
            for begin, each, status in zip(self.begins, self.seconds, self.statuses, strict=True)
            if status == 200
        ]
        by_second = Counter(map(int, ends))
        return [by_second[second] for second in range(int(max(ends, default=0.0)))]

    @property
    def rate(self) -> float:
        """Requests a second that were answered well."""
        return self.counts[200] / self.wall_s


def send(load: Load) -> Outcome:
    """Sends it all from another process. Blocks until that is over."""
    run = subprocess.run(
        [sys.executable, "-c", "import load_generator; load_generator.main()"],
        input=pickle.dumps(load), stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    outcome: Outcome = pickle.loads(run.stdout)
    return outcome


def main() -> None:
    load: Load = pickle.loads(sys.stdin.buffer.read())
    generator = _Generator(load)
    begin, before = time.perf_counter(), _cpu_s()
    asyncio.run(generator.closed() if load.clients else generator.opened())
    outcome = generator.outcome
    outcome.wall_s, outcome.cpu_s = time.perf_counter() - begin, _cpu_s() - before
    sys.stdout.buffer.write(pickle.dumps(outcome))


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@dataclass
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    idle_since: float | None = None
    """When its last answer came; None for a new one."""


class _Generator:
    def __init__(self, load: Load) -> None:
        self.outcome = Outcome()
        self._load = load
        self._free: deque[_Connection] = deque()
        self._ids: deque[int] = deque()
        self._begun = time.perf_counter()
        self._num_begun = 0

    async def closed(self) -> None:
        until = time.perf_counter() + self._load.seconds

        async def client() -> None:
            while time.perf_counter() < until and self._num_begun < self._load.number:
                await self._one()

        await asyncio.gather(*(client() for _ in range(self._load.clients)))

    async def opened(self) -> None:
        load, rng = self._load, random.Random(0)
        moment = begin = time.perf_counter()
        open_now: set[asyncio.Task[None]] = set()
        while moment < begin + load.seconds and self._num_begun < load.number:
            await asyncio.sleep(max(0.0, moment - time.perf_counter()))
            moment += rng.expovariate(load.rate)
            if len(open_now) >= load.max_open:
                self.outcome.num_left_out += 1
                continue
            task = asyncio.ensure_future(self._one())
            open_now.add(task)
            task.add_done_callback(open_now.discard)
        await asyncio.gather(*open_now)

    async def _one(self) -> None:
        request = self._load.requests[self._num_begun % len(self._load.requests)]
        self._num_begun += 1
        begin = time.perf_counter()
        try:
            async with asyncio.timeout(self._load.timeout_s):
                status = await self._ask(request)
        except TimeoutError:
            status = TIMED_OUT
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            status = NO_ANSWER
            where = getattr(error, "__notes__", ["while connecting"])
            self.outcome.failures[" ".join([type(error).__name__, *where])] += 1
        self.outcome.names.append(request.name)
        self.outcome.begins.append(begin - self._begun)
        self.outcome.seconds.append(time.perf_counter() - begin)
        self.outcome.statuses.append(status)

    async def _ask(self, request: Request) -> int:
        message = request.message
        line, end, rest = message.partition(b"\r\n")  # pixels may happen to hold the placeholder, too
        if _ID in line:
            # Where nothing is there to be named, something that is not there is.
            message = line.replace(_ID, str(self._ids.popleft() if self._ids else 10**12).encode()) + end + rest
        connection = None
        while connection is None and self._free:
            connection = self._free.pop()
            if connection.reader.at_eof():
                connection.writer.close()
                connection = None
        if connection is None:
            connection = _Connection(*await asyncio.open_connection("127.0.0.1", self._load.port))
        reader, writer = connection.reader, connection.writer
        idle_s = None if connection.idle_since is None else time.perf_counter() - connection.idle_since
        stays = False
        try:
            writer.write(message)
            await writer.drain()
            if request.abandon_after_s is not None:
                await asyncio.sleep(request.abandon_after_s)
                return ABANDONED
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            status = int(head[9:12])
            body = b""
            if status not in (204, 304):
                body = await reader.readexactly(int(head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]))
            if request.keeps_id and status < 300:
                self._ids.append(int(body.partition(b'"image_id":')[2].partition(b",")[0].strip(b" }]")))
            stays = b"\r\nconnection: close" not in head
            return status
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            error.add_note("on a new connection" if idle_s is None else f"on one that was idle for {idle_s:.1f} s")
            raise
        finally:
            if stays:
                connection.idle_since = time.perf_counter()
                self._free.append(connection)
            else:
                writer.close()
