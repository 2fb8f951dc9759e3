"""Fetches one file of a hub repository; run by `hub.py` as a process of its own, which can be ended at any time.

Arguments: repository, revision, folder, timeout in seconds, file names in the order to try them. Prints JSON objects,
one a line: `{"ready"}`, `{"size"}` in bytes before the download, and last `{"path", "commit"}` or `{"error", "kind"}`.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from typing import Any

_CHUNK_SIZE = 1 << 16
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def main(repository: str, revision: str, folder: str, timeout_s: str, *file_names: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    # Written as it arrives, so that a slow connection is not taken for a dead one.
    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_SIZE
    _say(ready=True)
    try:
        for name in file_names:
            address = hf_hub_url(repository, name, revision=revision)
            try:
                # Asked for first and once: the download below repeats its questions for minutes where nobody answers.
                metadata = get_hf_file_metadata(address, timeout=float(timeout_s))
            except EntryNotFoundError:
                continue
            _say(size=metadata.size)
            path = hf_hub_download(repository, name, revision=revision, cache_dir=folder)
            _say(path=path, commit=metadata.commit_hash)
            return
        _say(error=f"it has none of {', '.join(file_names)}", kind="missing")
    except GatedRepoError as error:
        _say(error=_first_line(error), kind="gated")
    except RepositoryNotFoundError as error:
        _say(error=_first_line(error), kind="missing")
    except OSError as error:
        _say(error=_first_line(error), kind="storage" if error.errno in _STORAGE_ERRORS else "failed")
    except Exception as error:
        _say(error=_first_line(error), kind="failed")


def _end_with_parent() -> None:
    """Ends the process when the one that started it closes our input, as its end does, too."""
    sys.stdin.read()
    os._exit(1)


def _say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


if __name__ == "__main__":
    main(*sys.argv[1:])
