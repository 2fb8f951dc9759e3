"""The service under load: a real `dino-search serve` on loopback, and requests from a process of their own.

ViT-S/16 at 224 px, random weights. `--parts lone,sustained,latency,overload,soak --photos FOLDER`

- lone: one request at a time against the same search in Python;
- sustained: searches by image of 32 clients against embedding the same files as `index` does;
- latency: searches that begin at random moments, at 80 % of what the service was found to carry;
- overload: four times what it can carry, then 32 clients again;
- soak: requests of every kind.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Before torch, as the service does it; see `dino_search.api.app`.
import faiss  # noqa: F401
import psutil
from load_generator import ABANDONED, NO_ANSWER, TIMED_OUT, Load, Outcome, Request, send
from material import report, report_ratio, write_photographs, write_random_model
from service_requests import mixed_requests, search_request

from dino_index.backbones import Backbone
from dino_index.copy_detection import DetectionOptions
from dino_index.embedding import EmbeddingSettings, embed_files
from dino_index.image_files import ListedFile, list_images
from dino_index.model_files import resolve_model
from dino_search import Collection
from dino_search.copies import CopiesOptions

PARTS = ("lone", "sustained", "latency", "overload", "soak")
_OVERLOAD = 4
_LATENCY_LOAD = 0.8
_REFUSALS = (429, 503)
_PAUSE_S = 0.03
_MB = 2**20


@dataclass(frozen=True, kw_only=True)
class Service:
    """A process that serves, and what it was made from. queries: files that are not in its collection."""

    process: subprocess.Popen[bytes]
    port: int
    home: Path
    model: Path
    queries: Sequence[Path]

    @property
    def searches(self) -> list[Request]:
        return [search_request(path) for path in self.queries]


class Watch:
    """Resident memory and open files of a process, looked at twice a second while the block runs."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = psutil.Process(process.pid)
        self._is_over = threading.Event()
        self.memory_mb: list[float] = []
        self.files: list[int] = []

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            self.memory_mb.append(self._process.memory_info().rss / _MB)
            self.files.append(self._process.num_fds())
            if self._is_over.wait(0.5):
                return

    def level(self) -> tuple[float, float]:
        """(MB, open files) at the end: medians of the last five seconds."""
        return statistics.median(self.memory_mb[-10:]), statistics.median(self.files[-10:])


@contextmanager
def running_service(
    folder: Path, photos: Path | None, num_images: int, num_queries: int, *, calibrated: bool
) -> Iterator[Service]:
    """A collection of photographs, and a service on it that is ready.

    calibrated: for `/copies`, `/compare` and `/duplicates`, which would do it at the first request.
    """
    if photos is None:
        paths = write_photographs(folder / "photos", num_images + num_queries, (500, 375))
    else:
        paths = [Path(file.path) for file in list_images([photos]).files]
    stored, queries = paths[:num_images], paths[num_images : num_images + num_queries]
    assert queries, f"expected more than {num_images} pictures, found {len(paths)}"
    model = write_random_model(folder / "vits16.safetensors", "vit_small_patch16_224")
    home = folder / "home"
    with Collection.open(home=home, model=model) as collection:
        collection.index(stored)
        for detection in (DetectionOptions(), DetectionOptions(regions="none", variants="none")) if calibrated else ():
            collection.calibrate(CopiesOptions(detection=detection), num_queries=60)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dino_search", "serve", "--home", str(home), "--port", str(port)]
    environment = os.environ | {"DINO_SEARCH_LOG_LEVEL": "warning", "DINO_SEARCH_LOG_FORMAT": "json"}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            while fetched(port, "/readyz")[0] != 200:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
            yield Service(process=process, port=port, home=home, model=model, queries=queries)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, (folder / "log").read_text()
    if noted := (folder / "log").read_text():
        print(f"the service's log:\n{noted[-2000:]}")


def fetched(port: int, target: str) -> tuple[int, str]:
    """(status, body); 0 where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", target)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except OSError:
        return 0, ""
    finally:
        connection.close()


def stages_of(port: int) -> dict[str, float]:
    """What `/metrics` has counted up to now: seconds and number of each stage, of batches and their pictures."""
    text = fetched(port, "/metrics")[1]
    pattern = r'^dino_search_(?:stage_seconds|batch_size)_(sum|count)(?:\{stage="(\w+)"\})? (\S+)$'
    return {f"{m[2] or 'batch'} {m[1]}": float(m[3]) for m in re.finditer(pattern, text, re.MULTILINE)}


def print_stages(before: dict[str, float], after: dict[str, float]) -> None:
    """Milliseconds in each stage, and pictures a batch."""
    means = {}
    for name in sorted({key.split()[0] for key in after}):
        count = after[f"{name} count"] - before.get(f"{name} count", 0)
        means[name] = (after[f"{name} sum"] - before.get(f"{name} sum", 0)) / max(count, 1)
    batch = means.pop("batch")
    print(f"  stages: {', '.join(f'{k} {1000 * v:.1f} ms' for k, v in means.items())}; {batch:.1f} pictures a batch")


def describe(outcome: Outcome) -> str:
    names = {TIMED_OUT: "timed out", NO_ANSWER: "no answer", ABANDONED: "abandoned"}
    counts = ", ".join(f"{names.get(status, status)}: {n}" for status, n in sorted(outcome.counts.items()))
    left_out = f", left out: {outcome.num_left_out}" if outcome.num_left_out else ""
    failures = "".join(f", {n} {what}" for what, n in outcome.failures.items())
    return f"{{{counts}{left_out}}}{failures}; generator {100 * outcome.cpu_share:.0f} % of a processor"


def quantile_ms(outcome: Outcome, share: float) -> float:
    times_s = outcome.times_s()
    return 1000 * times_s[min(len(times_s) - 1, int(share * len(times_s)))]


def lone(service: Service, rounds: int) -> None:
    """One request after the other, by turns with the same search in Python."""
    requests = service.searches
    contents = [path.read_bytes() for path in service.queries]
    python_ms, http_ms = [], []
    with (
        Collection.open(home=service.home, model=service.model) as collection,
        socket.create_connection(("127.0.0.1", service.port)) as connection,
        connection.makefile("rb") as answers,
    ):

        def search_by_http(request: Request) -> None:
            connection.sendall(request.message)
            assert answers.readline().split()[1] == b"200"
            num_bytes = 0
            while (line := answers.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    num_bytes = int(line.split(b":")[1])
            answers.read(num_bytes)

        for number in range(rounds + 5):
            begin = time.perf_counter()
            collection.search(contents[number % len(contents)])
            python_ms.append(1000 * (time.perf_counter() - begin))
            # What waits awake in one process is not to disturb the other.
            time.sleep(_PAUSE_S)
            begin = time.perf_counter()
            search_by_http(requests[number % len(requests)])
            http_ms.append(1000 * (time.perf_counter() - begin))
            time.sleep(_PAUSE_S)
    report("Collection.search of one picture", python_ms[5:], "ms")
    report("POST /search of one picture", http_ms[5:], "ms")
    report_ratio("  / Collection.search", http_ms[5:], python_ms[5:], "<= 1.3")


def offline_rate(backbone: Backbone, paths: Sequence[Path], number: int) -> float:
    """Images/s of reading, decoding and embedding the files as `index` does."""
    files = [ListedFile(str(paths[n % len(paths)]), 0, 0) for n in range(number)]
    begin = time.perf_counter()
    done = embed_files(files, lambda: backbone, backbone.spec.input_size, lambda digest: None, EmbeddingSettings())
    assert sum(len(outcomes) for outcomes in done) == number
    return number / (time.perf_counter() - begin)


def sustained(service: Service, rounds: int, seconds: float, clients: int) -> float:
    """Searches of 32 clients against the offline rate, by turns. Returns the rate, images/s."""
    backbone = Backbone(resolve_model(service.model))
    requests = service.searches
    number = len(service.queries)
    offline_rate(backbone, service.queries, min(number, 32))
    send(Load(port=service.port, requests=requests, clients=clients, seconds=2))
    offline, online, shares = [], [], []
    before = stages_of(service.port)
    for _ in range(rounds):
        offline.append(offline_rate(backbone, service.queries, max(number, round(40 * seconds))))
        outcome = send(Load(port=service.port, requests=requests, clients=clients, seconds=seconds))
        online.append(outcome.rate)
        shares.append(100 * outcome.cpu_share)
        print(f"  {outcome.rate:.1f}/s, offline {offline[-1]:.1f}/s; {describe(outcome)}")
    print_stages(before, stages_of(service.port))
    report("embedding the same files", offline, "images/s")
    report(f"POST /search, {clients} clients", online, "images/s")
    report_ratio("  / embedding", online, offline, ">= 0.85")
    report("  load generator, of a processor", shares, "%")
    return statistics.median(online)


def carried(service: Service, clients: int, seconds: float) -> float:
    """Searches a second that the service can carry."""
    return send(Load(port=service.port, requests=service.searches, clients=clients, seconds=seconds)).rate


def latency(service: Service, rate: float, rounds: int, seconds: float) -> None:
    """Searches that begin at random moments, as those of many people do."""
    p50s, p99s = [], []
    before = stages_of(service.port)
    for _ in range(rounds):
        outcome = send(Load(port=service.port, requests=service.searches, rate=_LATENCY_LOAD * rate, seconds=seconds))
        p50s.append(quantile_ms(outcome, 0.5))
        p99s.append(quantile_ms(outcome, 0.99))
        print(f"  p50 {p50s[-1]:.1f}, p90 {quantile_ms(outcome, 0.9):.1f}, p99 {p99s[-1]:.1f} ms, {describe(outcome)}")
    print_stages(before, stages_of(service.port))
    report(f"p50 at {_LATENCY_LOAD:.0%} of {rate:.1f}/s", p50s, "ms")
    report("p99", p99s, "ms")
    report_ratio("  p99 / p50", p99s, p50s, "<= 4")


def print_levels(watch: Watch, warm: tuple[float, float]) -> None:
    warm_mb, warm_files = warm
    end_mb, end_files = watch.level()
    most_mb = max(watch.memory_mb)
    print(f"memory: {warm_mb:.0f} MB after warm-up, at most {most_mb:.0f}, {end_mb:.0f} at the end: "
          f"{most_mb / warm_mb:.3f} and {end_mb / warm_mb:.3f} of it  [<= 1.05]")  # fmt: skip
    print(f"open files: {warm_files:.0f} after warm-up, at most {max(watch.files)}, {end_files:.0f} at the end")
    step = max(1, len(watch.memory_mb) // 12)
    print(f"  MB every {step / 2:.0f} s: {' '.join(f'{each:.0f}' for each in watch.memory_mb[::step])}")


def overload(service: Service, rate: float, clients: int, minutes: float) -> None:
    """Four times what it can carry; then how soon it is itself again."""
    requests = service.searches
    with Watch(service.process) as watch:
        rate_before = carried(service, clients, 15)
    warm = watch.level()
    with Watch(service.process) as watch:
        outcome = send(Load(port=service.port, requests=requests, rate=_OVERLOAD * rate, seconds=60 * minutes))
    print(f"{_OVERLOAD * rate:.0f} searches a second for {minutes:g} minutes: {describe(outcome)}")
    times = ", ".join(f"p{100 * share:.0f} {quantile_ms(outcome, share):.0f} ms" for share in (0.5, 0.99))
    print(f"  {outcome.rate:.1f} a second answered with 200; {times}")
    others = {status: n for status, n in outcome.counts.items() if status not in (200, *_REFUSALS)}
    print(f"  answers other than 200, 429 and 503: {others or 0}  [0]")
    after = send(Load(port=service.port, requests=requests, clients=clients, seconds=12))
    print_levels(watch, warm)
    rates = [each / rate_before for each in after.rates()]
    print(f"  in the seconds after, of the rate before: {' '.join(f'{each:.2f}' for each in rates)}; {describe(after)}")
    report("rate from the fifth second after on / before  [1]", rates[5:], "x")


def soak(service: Service, number: int, clients: int, folder: Path) -> None:
    """Requests of every kind, of a few clients at a time."""
    with Collection.open(home=service.home) as collection:
        image_ids = [result.image_id for result in collection.search(service.queries[0], k=100).results]
    folder.mkdir()
    dim = Backbone(resolve_model(service.model)).dim
    requests = mixed_requests(min(number, 2000), service.queries[:60], image_ids, dim, folder)
    with Watch(service.process) as watch:
        send(Load(port=service.port, requests=requests, clients=clients, number=number // 5))
    warm = watch.level()
    with Watch(service.process) as watch:
        outcome = send(Load(port=service.port, requests=requests, clients=clients, number=number))
    print(f"{number} requests of every kind, {clients} clients: {number / outcome.wall_s:.1f}/s; {describe(outcome)}")
    kinds = Counter(zip(outcome.names, outcome.statuses, strict=True))
    for name in sorted(set(outcome.names)):
        counts = ", ".join(f"{status}: {n}" for (kind, status), n in sorted(kinds.items()) if kind == name)
        print(f"  {name:<24}{counts}")
    bad = {status: n for status, n in outcome.counts.items() if status <= 0 or (status >= 500 and status != 503)}
    print(f"  answers that should not be: {bad or 0}  [0]")
    print_levels(watch, warm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="separated by commas")
    parser.add_argument("--photos", type=Path, help="a folder of pictures; else pieces of scikit-image's")
    parser.add_argument("--images", type=int, default=200, help="in the collection")
    parser.add_argument("--queries", type=int, default=300, help="other pictures, to be searched for")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each round")
    parser.add_argument("--overload-minutes", type=float, default=10.0)
    parser.add_argument("--soak-requests", type=int, default=10_000)
    parser.add_argument("--soak-clients", type=int, default=8)
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    assert set(parts) <= set(PARTS), f"expected some of {', '.join(PARTS)}, found {arguments.parts}"
    with (
        tempfile.TemporaryDirectory() as name,
        running_service(
            Path(name), arguments.photos, arguments.images, arguments.queries, calibrated="soak" in parts
        ) as service,
    ):
        print(f"load average {os.getloadavg()[0]:.2f} at the beginning")
        if "lone" in parts:
            lone(service, 100)
        rate = 0.0
        if "sustained" in parts:
            rate = sustained(service, arguments.rounds, arguments.seconds, arguments.clients)
        elif {"latency", "overload"} & set(parts):
            rate = carried(service, arguments.clients, arguments.seconds)
        if "latency" in parts:
            latency(service, rate, arguments.rounds, arguments.seconds)
        if "overload" in parts:
            overload(service, rate, arguments.clients, arguments.overload_minutes)
        if "soak" in parts:
            soak(service, arguments.soak_requests, arguments.soak_clients, Path(name) / "bad")


if __name__ == "__main__":
    main()
