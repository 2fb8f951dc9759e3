"""What `doctor` looks at: the installation, the machine, the home. Nothing is changed, made or looked up elsewhere.

Each check stands alone: what is broken is a finding, and never keeps the other checks from running.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dino_index.errors import DinoSearchError
from dino_search.home import default_database, default_vector_store

Status = Literal["ok", "warning", "problem"]

_MIN_FREE_BYTES = 1_000_000_000
_MIN_MEMORY_BYTES = 2_000_000_000
_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "glusterfs", "lustre", "gpfs", "beegfs", "fuse.")
# Over FUSE, but on this machine's own disks.
_LOCAL_FUSE = ("fuse.overlay", "fuse.fuse-overlayfs", "fuse.ntfs", "fuse.exfat", "fuse.ext", "fuseblk", "fuse.lxcfs")
_VOLATILE_FILE_SYSTEMS = ("tmpfs", "ramfs")
_INSTRUCTION_SETS = {
    "AVX2": "avx2", "AVX-512": "avx512f", "AVX512-BF16": "avx512_bf16", "AMX": "amx_tile", "AMX-BF16": "amx_bf16",
}  # fmt: skip
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "Pillow", "pillow-heif", "pyarrow", "SQLAlchemy", "alembic")
_FAISS_BUILDS = ("faiss-gpu", "faiss-gpu-cu12", "faiss-cpu")
# Extra, the modules that it brings, what they are for.
EXTRAS = (
    ("remote", ("fsspec", "s3fs", "gcsfs", "adlfs", "aiohttp"), "images at s3://, gs://, az:// and https:// addresses"),
    ("distributed", ("psycopg", "pymilvus", "ray"), "a catalog in PostgreSQL, vectors in Milvus, indexing on Ray"),
    ("tensorboard", ("tensorboard",), "curves of pretraining runs in TensorBoard"),
    ("tracing", ("opentelemetry.sdk", "opentelemetry.exporter"), "traces of the service's requests"),
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding. advice: what to do about it; empty where nothing is to be done."""

    name: str
    status: Status
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def diagnose(home: Path) -> Iterator[Check]:
    """All checks, one after the other, each as soon as it is done."""
    home = home.expanduser().absolute()
    for name, check in _checks(home):
        try:
            yield from check()
        except DinoSearchError as error:
            yield Check(name=name, status="problem", found=str(error))
        except Exception as error:
            found = f"the check itself failed: {type(error).__name__}: {error}"
            yield Check(name=name, status="problem", found=found, advice="reinstall dino-search if this stays")


def _checks(home: Path) -> list[tuple[str, Callable[[], Iterator[Check]]]]:
    return [
        ("python", _python),
        ("packages", _packages),
        ("faiss", _faiss),
        ("image formats", _image_formats),
        ("extras", _extras),
        ("processors", _processors),
        ("instruction sets", _instruction_sets),
        ("arithmetic", _arithmetic),
        ("memory", _memory),
        ("gpu", _gpus),
        ("model", _bundled_model),
        ("home", lambda: _home(home)),
        ("file system", lambda: _file_system(home)),
        ("database", lambda: _database(home)),
        ("vector store", lambda: _vector_store(home)),
    ]


# --- the installation


def _python() -> Iterator[Check]:
    found = f"{platform.python_version()} in {sys.prefix}, {platform.system()} {platform.machine()}"
    supported = (3, 11) <= sys.version_info < (3, 14)
    advice = "" if supported else "use Python 3.11, 3.12 or 3.13"
    yield Check(name="python", status="ok" if supported else "warning", found=found, advice=advice)
    yield Check(name="dino-search", status="ok", found=f"{version_of('dino-search')} in {Path(__file__).parent}")
    yield Check(name="sqlite", status="ok", found=sqlite3.sqlite_version)


def _packages() -> Iterator[Check]:
    for package in _PACKAGES:
        found = version_of(package)
        if found is None:
            advice = "pip install --force-reinstall dino-search"
            yield Check(name=package, status="problem", found="not installed", advice=advice)
        else:
            yield Check(name=package, status="ok", found=found)


def _faiss() -> Iterator[Check]:
    builds = {build: version for build in _FAISS_BUILDS if (version := version_of(build))}
    found = ", ".join(f"{build} {version}" for build, version in builds.items())
    if len(builds) > 1:
        advice = f"pip uninstall {' '.join(builds)}, then: pip install --force-reinstall dino-search"
        found = f"{found}: both are the module faiss, and one has overwritten the other"
        yield Check(name="faiss", status="warning", found=found, advice=advice)
    try:
        import faiss
    except Exception as error:  # a broken native library raises whatever it likes
        advice = "pip install --force-reinstall dino-search"
        yield Check(name="faiss", status="problem", found=f"cannot be imported: {error}", advice=advice)
        return
    if len(builds) <= 1:
        options = str(faiss.get_compile_options()).strip()
        yield Check(name="faiss", status="ok", found=f"{found or faiss.__version__} (built with {options})")


def _image_formats() -> Iterator[Check]:
    from PIL import features

    wanted = {"JPEG": "jpg", "PNG": "zlib", "WebP": "webp", "AVIF": "avif", "JPEG 2000": "jpg_2000", "TIFF": "libtiff"}
    codecs = {name: bool(features.check(feature)) for name, feature in wanted.items()}
    codecs["HEIC"] = importlib.util.find_spec("pillow_heif") is not None
    missing = [name for name, is_there in codecs.items() if not is_there]
    found = ", ".join(name for name, is_there in codecs.items() if is_there)
    if missing:
        advice = "install Pillow from its wheel: pip install --force-reinstall --only-binary :all: pillow pillow-heif"
        found = f"{found}; not {', '.join(missing)}"
        yield Check(name="image formats", status="warning", found=found, advice=advice)
    else:
        faster = " with libjpeg-turbo" if features.check("libjpeg_turbo") else ""
        yield Check(name="image formats", status="ok", found=found + faster)


def _extras() -> Iterator[Check]:
    for extra, modules, purpose in EXTRAS:
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        found = f"{purpose}: installed" if not missing else f"{purpose}: not installed ({', '.join(missing)})"
        # Nothing is wrong about leaving them out.
        advice = f"if you need it: pip install 'dino-search[{extra}]'" if missing else ""
        yield Check(name=f"extra {extra}", status="ok", found=found, advice=advice)


def _bundled_model() -> Iterator[Check]:
    from dino_index.model_files import BUNDLED, resolve_model

    spec = resolve_model(BUNDLED)
    yield Check(name="model", status="ok", found=f"{spec.name}, fingerprint {spec.fingerprint[:12]}")


# --- the machine


def _processors() -> Iterator[Check]:
    from dino_index.embedding import num_processors

    found = f"{num_processors()} of {os.cpu_count()} may be used"
    share = cgroup_processors()
    if share is not None and share < num_processors():
        advice = f"--workers {max(1, round(share))} suits this limit better than the default"
        found = f"{found}, limited to the time of {share:.1f} (cgroup)"
        yield Check(name="processors", status="warning", found=found, advice=advice)
    else:
        yield Check(name="processors", status="ok", found=found)


def _instruction_sets() -> Iterator[Check]:
    flags = processor_flags()
    if flags is None:
        yield Check(name="instruction sets", status="ok", found=f"unknown on {platform.system()} {platform.machine()}")
        return
    has = [name for name, flag in _INSTRUCTION_SETS.items() if flag in flags]
    lacks = [name for name in _INSTRUCTION_SETS if name not in has]
    found = f"{', '.join(has) or 'none'}; without {', '.join(lacks)}" if lacks else ", ".join(has)
    yield Check(name="instruction sets", status="ok", found=found)


def _arithmetic() -> Iterator[Check]:
    import torch

    from dino_index.backbones import choose_device, fastest_dtype

    device = choose_device("auto")
    dtype = str(fastest_dtype(device)).removeprefix("torch.")
    capability = torch.backends.cpu.get_cpu_capability()
    found = f"{dtype} on {device.type}; torch computes with {capability} in {torch.get_num_threads()} threads"
    yield Check(name="arithmetic", status="ok", found=found)


def _memory() -> Iterator[Check]:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{_gigabytes(memory.available)} of {_gigabytes(memory.total)} free"
    limit = cgroup_memory()
    usable = memory.available
    if limit is not None and limit < memory.total:
        found += f", limited to {_gigabytes(limit)} (cgroup)"
        usable = min(usable, limit)
    if usable < _MIN_MEMORY_BYTES:
        advice = f"end other programs or raise the limit; indexing wants {_gigabytes(_MIN_MEMORY_BYTES)} and more"
        yield Check(name="memory", status="warning", found=found, advice=advice)
    else:
        yield Check(name="memory", status="ok", found=found)


def _gpus() -> Iterator[Check]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(number) for number in range(count)]
    build = f"torch for CUDA {torch.version.cuda}" if torch.version.cuda else "torch for processors only"
    if not count:
        nvidia = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
        if nvidia and torch.version.cuda:
            advice = "look at `nvidia-smi`; the driver may be older than this CUDA, or the container may lack the GPU"
            found = f"a driver is installed, but {build} sees no GPU"
            yield Check(name="gpu", status="warning", found=found, advice=advice)
        elif nvidia:
            advice = "install a CUDA build of torch (https://pytorch.org/get-started)"
            found = f"a driver is installed, but {build} cannot use it"
            yield Check(name="gpu", status="warning", found=found, advice=advice)
        else:
            yield Check(name="gpu", status="ok", found=f"none ({build})")
        return
    yield Check(name="gpu", status="ok", found=f"{', '.join(names)} ({build})")
    import faiss

    faiss_count = faiss.get_num_gpus()
    if faiss_count == count:
        yield Check(name="gpu in faiss", status="ok", found=f"{faiss_count} seen")
    else:
        advice = "indexes are searched on processors; on Linux x86_64, faiss-gpu instead of faiss-cpu uses the GPU"
        yield Check(name="gpu in faiss", status="warning", found=f"{faiss_count} of {count} seen", advice=advice)


# --- the home


def _home(home: Path) -> Iterator[Check]:
    existing = _nearest_existing(home)
    if existing == home and not home.is_dir():
        advice = "choose a folder with --home"
        yield Check(name="home", status="problem", found=f"{home} is no folder", advice=advice)
        return
    if existing == home:
        try:
            with tempfile.TemporaryFile(dir=home):
                pass
        except OSError as error:
            read_only = bool(os.statvfs(home).f_flag & os.ST_RDONLY) if hasattr(os, "statvfs") else False
            found = f"{home} cannot be written: {error.strerror}"
            advice = "search, classify and info work; for all else choose a writable folder with --home"
            status: Status = "warning" if read_only else "problem"
            if not read_only:
                advice = "choose a writable folder with --home, or change its permissions"
            yield Check(name="home", status=status, found=found, advice=advice)
            return
        yield Check(name="home", status="ok", found=f"{home}, writable")
    elif not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        found = f"{home} does not exist and cannot be made below {existing}"
        advice = "choose a writable folder with --home"
        yield Check(name="home", status="problem", found=found, advice=advice)
        return
    else:
        yield Check(name="home", status="ok", found=f"{home}, made by the first index")
    free = shutil.disk_usage(existing).free
    enough = free >= _MIN_FREE_BYTES
    advice = "" if enough else "free some space or choose another disk with --home"
    yield Check(name="free space", status="ok" if enough else "warning", found=_gigabytes(free), advice=advice)


def _file_system(home: Path) -> Iterator[Check]:
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        yield Check(name="file system", status="ok", found=f"unknown on {platform.system()}")
        return
    kind, mount_point = file_system_of(_nearest_existing(home).resolve(), mounts)
    found = f"{kind} at {mount_point}"
    if is_network_file_system(kind):
        advice = (
            "SQLite's log needs memory shared between processes, which network file systems do not give: choose a "
            "folder on a local disk with --home, or use the home from one machine and one process only"
        )
        yield Check(name="file system", status="warning", found=f"{found} is on the network", advice=advice)
    elif kind in _VOLATILE_FILE_SYSTEMS:
        advice = "the home is lost when this machine restarts; choose a folder on a disk with --home"
        yield Check(name="file system", status="warning", found=f"{found} is in memory", advice=advice)
    else:
        yield Check(name="file system", status="ok", found=found)


def _database(home: Path) -> Iterator[Check]:
    from sqlalchemy import func, select

    from dino_index.catalog import Catalog, CollectionRow, ImageRow
    from dino_index.catalog.database import DATABASE_NAME
    from dino_index.catalog.schema import SCHEMA_REVISION

    path, url = home / DATABASE_NAME, default_database()
    if url is None and not path.is_file():
        yield Check(name="database", status="ok", found="none yet; the first index makes it")
        return
    place, revision = _schema(home, url)
    if url and revision is None:
        yield Check(name="database", status="ok", found=f"nothing at {place} yet; the first index makes it")
        return
    if revision is not None and revision < SCHEMA_REVISION:
        # Opening it would change it.
        found = f"{place} has schema {revision}, this version writes {SCHEMA_REVISION}"
        advice = "any other command brings it up to date, after a copy"
        yield Check(name="database", status="warning", found=found, advice=advice)
        return
    catalog = Catalog.open(home, url=url)
    assert catalog is not None
    with closing(catalog), catalog.reading() as session:
        collections = session.scalars(select(CollectionRow.name).order_by(CollectionRow.name)).all()
        num_images = session.scalars(select(func.count()).select_from(ImageRow)).one()
    what = place if url else _gigabytes(path.stat().st_size)
    found = f"{what}, schema {revision}, {num_images} files in {len(collections)} collections"
    if collections:
        found += f" ({', '.join(collections[:5])}{', ...' if len(collections) > 5 else ''})"
    yield Check(name="database", status="ok", found=found)


def _vector_store(home: Path) -> Iterator[Check]:
    from dino_index.catalog import Catalog
    from dino_index.catalog.database import DATABASE_NAME
    from dino_index.catalog.schema import SCHEMA_REVISION
    from dino_index.milvus_server import MilvusAddress, MilvusServer
    from dino_index.vector_stores import server_store_of

    url, database = default_vector_store(), default_database()
    if url is None:
        yield Check(name="vector store", status="ok", found="index files in the home")
        return
    server = MilvusServer(MilvusAddress.parse(url))
    with closing(server):
        found = f"{server.place}, Milvus {server.version()}"
    # Only a catalog of this version is opened: an older one would be changed by that.
    is_there = database is not None or (home / DATABASE_NAME).is_file()
    if not is_there or _schema(home, database)[1] != SCHEMA_REVISION:
        yield Check(name="vector store", status="ok", found=found)
        return
    catalog = Catalog.open(home, url=database, vectors_url=url)
    assert catalog is not None
    with closing(catalog):
        store = server_store_of(catalog)
        assert store is not None
        num_stored, lost = store.holdings()
    found += f", has the vectors of {num_stored - len(lost)} of {num_stored} collections"
    if lost:
        found += f" (not of {', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''})"
        advice = "the next search of each stores them anew, as does: dino-search verify --repair -c NAME"
        yield Check(name="vector store", status="warning", found=found, advice=advice)
    else:
        yield Check(name="vector store", status="ok", found=found)


def _schema(home: Path, url: str | None) -> tuple[str, str | None]:
    """(place without password, revision) of the home's catalog. Raises CatalogUnavailable."""
    from dino_index.catalog.database import DATABASE_NAME

    path = home / DATABASE_NAME
    return _schema_on_server(home, url) if url else (str(path), _schema_revision(path))


def _schema_on_server(home: Path, url: str) -> tuple[str, str | None]:
    """(place without password, revision or None where there is no catalog yet). Raises CatalogUnavailable."""
    from dino_index.catalog.database import open_store

    with closing(open_store(home, url)) as store, store.errors():
        return store.place, store.revision()


def _schema_revision(path: Path) -> str | None:
    """The revision that the file names; None where it has none or cannot be read: opening it says why."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error:
        return None
    return str(row[0]) if row else None


# --- facts


def version_of(package: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str] | None:
    """Instruction sets of the processor as Linux names them; None where nobody says."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), None)


def file_system_of(path: Path, mountinfo: str) -> tuple[str, str]:
    """(type, mount point) of what a resolved path lies on, from the text of `/proc/self/mountinfo` (see proc(5)).

    Of several mounts at one place the last one covers the others.
    """
    best = ("unknown", "/")
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not after:
            continue
        mount_point = _unescaped(fields[4])
        if path.is_relative_to(mount_point) and len(mount_point) >= len(best[1]):
            best = (after.split(" ")[0], mount_point)
    return best


def is_network_file_system(kind: str) -> bool:
    """Whether a file system type stores on another machine; of FUSE, all that are not known to be local."""
    return kind.startswith(_NETWORK_FILE_SYSTEMS) and not kind.startswith(_LOCAL_FUSE)


def cgroup_memory(root: Path = Path("/sys/fs/cgroup"), of_process: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes of memory that this process's control groups allow; None for no limit."""
    limits = list(_cgroup_values(root, of_process, "memory.max", "memory/memory.limit_in_bytes"))
    numbers = [int(value) for value in limits if value.isdigit()]
    return min((number for number in numbers if number < 1 << 60), default=None)  # version 1 writes a huge number


def cgroup_processors(
    root: Path = Path("/sys/fs/cgroup"), of_process: Path = Path("/proc/self/cgroup")
) -> float | None:
    """How many processors' time this process's control groups allow; None for no limit."""
    shares = []
    for value in _cgroup_values(root, of_process, "cpu.max", "cpu/cpu.cfs_quota_us"):
        quota, _, period = value.partition(" ")
        if quota.isdigit():
            shares.append(int(quota) / int(period or 100_000))
    return min(shares, default=None)


def _cgroup_values(root: Path, of_process: Path, file: str, file_of_version_1: str) -> Iterator[str]:
    """What the groups of this process say, the outermost included; the limit of each one holds."""
    try:
        groups = of_process.read_text().splitlines()
    except OSError:
        return
    own = next((line.removeprefix("0::") for line in groups if line.startswith("0::")), "/")
    folder = root / own.lstrip("/")
    places = [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]
    for path in [*(place / file for place in places), root / file_of_version_1]:
        try:
            yield path.read_text().strip()
        except OSError:
            continue


def _unescaped(text: str) -> str:
    r"""A mount point as it is; the kernel writes blanks in it as \040."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def _nearest_existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def worst(checks: list[Check]) -> Status:
    """The status of all checks together."""
    order: list[Status] = ["ok", "warning", "problem"]
    return max((check.status for check in checks), key=order.index, default="ok")


def facts_of(checks: list[Check]) -> dict[str, Any]:
    """What `doctor --json` prints."""
    return {"status": worst(checks), "checks": [check.to_json() for check in checks]}
