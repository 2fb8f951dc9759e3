"""Which files under the given paths are images, and what became of the others.

Nothing is left out silently: a file that is not listed is counted by type, counted as skipped for a reason,
or a failure with a reason of its own.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dino_index.errors import ImageError, SourceNotFound
from dino_index.image_bytes import OPEN_FLAGS
from dino_index.image_formats import HEAD_BYTES, image_format

if TYPE_CHECKING:
    from dino_index.shards import Shard

_NAMES_OF_IMAGES = (
    "jpg jpeg jpe jfif jif mpo png apng webp gif bmp dib tif tiff avif avifs heic heif hif heics heifs"
    " jp2 j2k jpf jpx j2c jpc ppm pgm pbm pnm pfm qoi psd ico"
)
IMAGE_EXTENSIONS = frozenset(_NAMES_OF_IMAGES.split())
_NAMES_OF_TYPES = {
    "raw photo": "3fr ari arw bay cap cr2 cr3 crw dcr dcs dng eip erf fff gpr iiq k25 kdc mdc mef mos mrw nef"
    " nrw orf pef ptx pxn r3d raf raw rw2 rwl rwz sr2 srf srw x3f",
    "video": "mp4 m4v mov qt avi mkv webm wmv flv f4v mpg mpeg m2v mts m2ts 3gp 3g2 ogv vob mxf asf rm insv",
    "audio": "mp3 wav flac aac ogg oga opus m4a wma aif aiff mid midi amr",
    "document": "pdf doc docx odt rtf xls xlsx ods ppt pptx odp epub mobi ps eps djvu pages numbers key",
    "archive": "zip rar 7z gz tgz bz2 xz zst lz4 iso dmg cab jar",
    "tar shard": "tar",
    "text": "txt md rst csv tsv json jsonl xml html htm css js py yaml yml toml ini cfg log srt vtt tex",
    "vector graphic": "svg svgz ai cdr wmf emf dxf",
    "edit record": "xmp aae thm pp3 dop xcf lrcat",
    "database": "db sqlite sqlite3",
    "table": "parquet arrow feather",
}
_TYPE_OF_EXTENSION = {
    extension: type_name for type_name, names in _NAMES_OF_TYPES.items() for extension in names.split()
}
# Folders that programs fill with small copies of pictures, and those that systems keep for themselves. Only
# names that nobody gives to a folder of their own; all in lower case.
_THUMBNAIL_FOLDERS = frozenset(("@eadir", ".thumbnails", ".thumbs", ".@__thumb", "ipod photo cache"))
_THUMBNAIL_SUFFIXES = (".lrdata",)  # previews that Lightroom keeps beside its catalogue
_SYSTEM_FOLDERS = frozenset(
    (
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "@recently-snapshot",
        "@recycle",
        "__macosx",
        "lost+found",
        "recycler",
        "system volume information",
    )
)


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file to be read as an image.

    path: absolute, links not resolved; bytes that are not UTF-8 as surrogates, as the os module gives them; of a
    member of a tar shard or behind a URL as in `image_paths`.
    size: bytes; -1 where a server does not say. mtime_ns: of the file or its shard, or the version of a URL.
    """

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class ListingFailure:
    """A file that should be an image and cannot be read, or a folder that cannot be listed.

    reason: one of ImageError.REASONS.
    """

    path: str
    reason: str
    message: str


@dataclass
class Listing:
    """What lies under the given paths.

    ignored: files that are no image, by type. skipped_folders, skipped_files: not looked at, by reason; a
    skipped folder counts once, whatever it holds.

    The rest is filled by `source_listing.list_sources` alone, `files` then with images behind URLs and single given
    members of shards, too. shards: those that were given, with all the images in them.
    looked_through: the given folders, shards and URLs of folders, of which everything was seen.
    labels, facts: what manifests say, by the path of a file or of a shard, for all that is in it; facts are JSON
    values by name. num_repeated: rows of manifests that name a file again; the first one counts.
    """

    files: list[ListedFile] = field(default_factory=list)
    failures: list[ListingFailure] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    skipped_folders: Counter[str] = field(default_factory=Counter)
    skipped_files: Counter[str] = field(default_factory=Counter)
    shards: list[Shard] = field(default_factory=list)
    looked_through: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_repeated: int = 0


def list_images(paths: Sequence[str | os.PathLike[str]], *, exclude: Sequence[str] = ()) -> Listing:
    """The image files among the given files and under the given folders.

    Files come in a fixed order: given files first, then folder after folder, names sorted by their bytes.
    Names with the extension of an image are taken unopened, others by their first bytes. RAW photographs
    are ignored. Hidden files and folders, and folders of thumbnails, are skipped unless given themselves.
    Links to folders are followed after everything else, so that each folder is listed once, under its real
    path where that is within reach.

    exclude: patterns of `*` (any characters), `?` (one), `[abc]` and `[!abc]`; case counts, except on
    Windows. A pattern without `/` is compared with the name of every file and folder. One with `/` is
    compared with the whole path below the given folder, name by name, where `**` stands for any number of
    folders, none included: `raw/**` is all that lies in the top folder `raw`, `**/raw/*.tif` the TIFF files
    in any folder `raw`. A `/` at the end restricts a pattern to folders. What lies in an excluded folder is
    not looked at. A given file can be excluded by its name, a given folder cannot.

    Raises SourceNotFound for a given path that does not exist or cannot be listed; ValueError for an empty
    pattern.
    """
    walk = _Walk(Exclusions(exclude))
    folders: list[str] = []
    for given in paths:
        path = os.path.abspath(os.fsdecode(given))
        if stat.S_ISDIR(_status_of_given(path).st_mode):
            folders.append(path)
        else:
            walk.take_given_file(path)
    # Of a folder and a link to it, both given, the folder is listed.
    walk.walk_folders(sorted(folders, key=os.path.islink))
    return walk.listing


def _status_of_given(path: str) -> os.stat_result:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            os.scandir(path).close()
        return status
    except FileNotFoundError:
        what = "a link that leads nowhere" if os.path.islink(path) else "no such file or folder"
        raise SourceNotFound(f"{path}: {what}; check the path, or whether its disk is mounted") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceNotFound(f"{path}: cannot be listed: {reason}") from error


def check_patterns(exclude: Sequence[str]) -> None:
    """Raises ValueError for a pattern that `list_images` would not take."""
    Exclusions(exclude)


class Exclusions:
    """Patterns of files and folders to leave out, as `list_images` describes them. Raises ValueError."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = [_compile(pattern) for pattern in patterns]

    def match(self, name: str, path_below: str, *, is_folder: bool) -> bool:
        """Whether a file or folder is left out, by its name or by its path below the given folder."""
        return any(pattern.matches(name, path_below, is_folder) for pattern in self._patterns)

    def match_any_part(self, path_below: str) -> bool:
        """Whether a file or one of the folders that it lies in is left out."""
        if not self._patterns:
            return False
        parts = path_below.split("/")
        return any(
            self.match(parts[at], "/".join(parts[: at + 1]), is_folder=at + 1 < len(parts)) for at in range(len(parts))
        )


class _Walk:
    """One run over folders, filling `listing`."""

    def __init__(self, exclude: Exclusions) -> None:
        self.listing = Listing()
        self._exclude = exclude
        self._given_files: set[str] = set()
        self._seen_folders: set[object] = set()

    def take_given_file(self, path: str) -> None:
        if path in self._given_files:
            return
        self._given_files.add(path)
        name = os.path.basename(path)
        if self._exclude.match(name, name, is_folder=False):
            self.listing.skipped_files["excluded"] += 1
        elif not os.path.isfile(path):
            self._fail(path, "not_a_file", "this is a pipe, socket or device, not a regular file")
        else:
            self._take_file(path, name, lambda: os.stat(path))

    def walk_folders(self, folders: Sequence[str]) -> None:
        """Lists what lies under the folders: first all that is reached without links."""
        pending = [(folder, "") for folder in reversed(folders)]
        links: deque[tuple[str, str]] = deque()
        while pending or links:
            folder, below = pending.pop() if pending else links.popleft()
            if not self._is_new_folder(folder):
                continue
            subfolders = []
            for entry, is_folder, is_link in self._entries(folder):
                path_below = f"{below}{entry.name}"
                if self._is_skipped(entry, path_below, is_folder):
                    continue
                if not is_folder:
                    self._take_entry(entry)
                elif is_link:
                    links.append((entry.path, path_below + "/"))
                else:
                    subfolders.append((entry.path, path_below + "/"))
            pending.extend(reversed(subfolders))

    def _entries(self, folder: str) -> list[tuple[os.DirEntry[str], bool, bool]]:
        """The sorted content of a folder: (entry, is a folder, is a link). What can be listed of it."""
        found = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    try:
                        found.append((entry, entry.is_dir(), entry.is_symlink()))
                    except OSError:  # a link in a circle, or into a folder that may not be entered
                        found.append((entry, False, True))
        except OSError as error:
            self._fail(folder, _reason(error), f"the folder cannot be listed: {error.strerror or error}")
        found.sort(key=lambda item: os.fsencode(item[0].name))
        return found

    def _is_new_folder(self, folder: str) -> bool:
        """False for a folder that was listed before, which is counted."""
        try:
            status = os.stat(folder)
        except OSError as error:
            self._fail(folder, _reason(error), f"the folder cannot be listed: {error.strerror or error}")
            return False
        # Some file systems of Windows number nothing.
        identity = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)
        if identity not in self._seen_folders:
            self._seen_folders.add(identity)
            return True
        parent, target = os.path.realpath(os.path.dirname(folder)), os.path.realpath(folder)
        is_loop = os.path.islink(folder) and os.path.join(parent, "").startswith(os.path.join(target, ""))
        self.listing.skipped_folders["link loop" if is_loop else "listed already"] += 1
        return False

    def _is_skipped(self, entry: os.DirEntry[str], path_below: str, is_folder: bool) -> bool:
        reason = _reserved(entry, is_folder)
        if reason is None and self._exclude.match(entry.name, path_below, is_folder=is_folder):
            reason = "excluded"
        if reason is None:
            return False
        # A given file lies under a given folder: it was taken, however it is called.
        if entry.path not in self._given_files:
            (self.listing.skipped_folders if is_folder else self.listing.skipped_files)[reason] += 1
        return True

    def _take_entry(self, entry: os.DirEntry[str]) -> None:
        if entry.path in self._given_files:
            return
        try:
            is_file = entry.is_file()
        except OSError:
            is_file = False
        if is_file:
            self._take_file(entry.path, entry.name, entry.stat)
        elif not has_image_name(entry.name):
            self.listing.ignored["broken link" if entry.is_symlink() else "not a file"] += 1
        else:
            self._fail_special(entry.path)

    def _fail_special(self, path: str) -> None:
        """A failure for what has the name of an image and is no file."""
        try:
            status = os.stat(path)
        except OSError as error:
            reason = _reason(error)
            if reason == "vanished" and os.path.islink(path):
                self._fail(path, "broken_link", "the symbolic link leads to no file")
            else:
                self._fail(path, reason, ImageError.REASONS[reason])
            return
        if not stat.S_ISREG(status.st_mode):
            self._fail(path, "not_a_file", "this is a pipe, socket or device, not a regular file")
        else:  # it came into being in this moment
            self.listing.files.append(ListedFile(path, status.st_size, status.st_mtime_ns))

    def _take_file(self, path: str, name: str, get_status: Callable[[], os.stat_result]) -> None:
        if not has_image_name(name):
            type_name = _type_by_content(path, name)
            if type_name is not None:
                self.listing.ignored[type_name] += 1
                return
        try:
            status = get_status()
        except OSError as error:
            reason = _reason(error)
            self._fail(path, reason, ImageError.REASONS[reason])
            return
        self.listing.files.append(ListedFile(path, status.st_size, status.st_mtime_ns))

    def _fail(self, path: str, reason: str, message: str) -> None:
        self.listing.failures.append(ListingFailure(path, reason, message))


def has_image_name(name: str) -> bool:
    """Whether a file name has the extension of an image."""
    return _extension(name) in IMAGE_EXTENSIONS


def type_by_name(name: str) -> str:
    """The type that a file which is no image is counted under, as far as its name tells."""
    return _TYPE_OF_EXTENSION.get(_extension(name), "other")


def _extension(name: str) -> str:
    stem, dot, extension = name.rpartition(".")
    return extension.lower() if dot and stem else ""


def _type_by_content(path: str, name: str) -> str | None:
    """None for an image, otherwise the type that it is counted under."""
    type_name = type_by_name(name)
    try:
        descriptor = os.open(path, OPEN_FLAGS)
        try:
            head = os.read(descriptor, HEAD_BYTES)
        finally:
            os.close(descriptor)
    except OSError:
        return "unreadable" if type_name == "other" else type_name
    if not head:
        return "empty"
    format_name = image_format(head)
    # Most RAW formats are TIFF outside; a JPEG under such a name is a plain picture.
    if format_name is None or (type_name == "raw photo" and format_name == "TIFF"):
        return type_name
    return None


def _reserved(entry: os.DirEntry[str], is_folder: bool) -> str | None:
    reason = reserved_name(entry.name, os.path.basename(os.path.dirname(entry.path)), is_folder=is_folder)
    if reason is None and os.name == "nt" and _has_hidden_attribute(entry):
        return "hidden"
    return reason


def reserved_name(name: str, parent_name: str, *, is_folder: bool) -> str | None:
    """Why nobody wants to see a file or folder of this name; None if there is no such reason."""
    if is_folder:
        lowered = name.lower()
        if lowered in _THUMBNAIL_FOLDERS or lowered.endswith(_THUMBNAIL_SUFFIXES):
            return "thumbnails"
        # Apple's Photos keeps the pictures in "originals" and small copies of each in "resources".
        if lowered == "resources" and parent_name.lower().endswith(".photoslibrary"):
            return "thumbnails"
        if lowered in _SYSTEM_FOLDERS:
            return "system"
    return "hidden" if name.startswith(".") else None


def _has_hidden_attribute(entry: os.DirEntry[str]) -> bool:
    try:
        attributes = getattr(entry.stat(follow_symlinks=False), "st_file_attributes", 0)
    except OSError:
        return False
    return bool(attributes & stat.FILE_ATTRIBUTE_HIDDEN)


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "vanished"
    if error.errno == errno.ELOOP:
        return "broken_link"
    return "permission" if isinstance(error, PermissionError) else "unreadable"


@dataclass(frozen=True, slots=True)
class _Pattern:
    """One exclude pattern: a single name, or the names of a path. None stands for `**`."""

    names: tuple[re.Pattern[str] | None, ...]
    is_path: bool
    only_folders: bool

    def matches(self, name: str, path_below: str, is_folder: bool) -> bool:
        if self.only_folders and not is_folder:
            return False
        if not self.is_path:
            return _match_names(self.names, [name])
        return _match_names(self.names, path_below.split("/"))


def _compile(pattern: str) -> _Pattern:
    names = pattern.replace(os.sep, "/")
    only_folders = names.endswith("/")
    is_path = "/" in names.rstrip("/")
    flags = re.IGNORECASE if os.name == "nt" else 0
    parts = [part for part in names.split("/") if part not in ("", ".")]
    if not parts:
        raise ValueError(f"an exclude pattern must name something, and {pattern!r} does not")
    compiled = (None if part == "**" else re.compile(fnmatch.translate(part), flags) for part in parts)
    return _Pattern(tuple(compiled), is_path, only_folders)


def _match_names(patterns: Sequence[re.Pattern[str] | None], names: Sequence[str]) -> bool:
    if not patterns:
        return not names
    first, rest = patterns[0], patterns[1:]
    if first is not None:
        return bool(names) and first.match(names[0]) is not None and _match_names(rest, names[1:])
    if not rest:  # at the end it stands for what lies below, not for the folder itself
        return bool(names)
    return any(_match_names(rest, names[skipped:]) for skipped in range(len(names) + 1))
