"""Pickle files that hold plain values, read without running anything in them.

Let in are Python's own values and containers, and NumPy's arrays and numbers of bool, integer, float and text types.
These arrays are made here from their parts: nothing of NumPy is called with what the file says, since an array's state
can name types that make NumPy follow addresses of the file's choice.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_index.errors import TruthUnusable

_MAX_BYTES = 256 * 2**20
_KINDS = "biufSU"
_BYTE_ORDERS = "<>=|"


def read_plain_pickle(path: Path) -> Any:
    """What the file holds. Raises TruthUnusable: not there, too large, damaged, or with objects of other kinds."""
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise TruthUnusable(
                f"{path} has {size:,} bytes, more than {_MAX_BYTES:,}: expected a file of lists of names"
            )
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except TruthUnusable as error:
        raise TruthUnusable(f"{path}: {error}") from error
    except OSError as error:
        raise TruthUnusable(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # of a damaged file: nearly any
        raise TruthUnusable(f"{path}: expected a whole pickle file, found {type(error).__name__}: {error}") from error


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Never imports anything: what is let in stands in a table."""
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise TruthUnusable(
                f"expected lists, numbers, text and arrays, found {module}.{name}, which could run code; nothing was "
                "run. Take the file from where the set is published"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise TruthUnusable(f"expected values, found a reference to another file ({pid!r})")


class _Type:
    """Stands for `numpy.dtype`."""

    def __init__(self, text: str, *_: Any) -> None:
        if not isinstance(text, str):
            raise TruthUnusable(f"expected a type's name, found {text!r}")
        self.is_object = text in ("O", "O8", "|O")
        self._text = text.lstrip(_BYTE_ORDERS)
        self._order = "="

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, sub-type, names, fields, size, alignment, flags ...)
        if state[2] is not None or state[3] is not None or state[4] is not None:
            raise TruthUnusable("expected arrays of numbers or text, found one of structures")
        if state[1] not in tuple(_BYTE_ORDERS):
            raise TruthUnusable(f"expected a byte order, found {state[1]!r}")
        self._order = state[1]

    def resolved(self) -> np.dtype[Any]:
        found = np.dtype(self._order.replace("|", "") + self._text)
        if found.kind not in _KINDS or found.itemsize < 1:
            raise TruthUnusable(f"expected arrays of numbers or text, found {found}")
        return found


class _Array:
    """Stands for `numpy.ndarray`; becomes a list, or an array of numbers, when the whole file has been read."""

    def __init__(self) -> None:
        self.found: list[Any] | NDArray[Any] = []

    @property
    def values(self) -> list[Any]:
        return self.found if isinstance(self.found, list) else self.found.tolist()

    def __setstate__(self, state: Any) -> None:
        # (version, shape, type, whether columns come first, bytes or, of objects, list)
        _, shape, kind, columns_first, data = state
        if kind.is_object:
            if len(shape) != 1 or not isinstance(data, list) or len(data) != shape[0]:
                raise TruthUnusable("expected arrays of objects to be lists of values")
            self.found = data
            return
        self.found = np.frombuffer(_as_bytes(data), kind.resolved()).reshape(shape, order="F" if columns_first else "C")


def _make_array(*arguments: Any) -> _Array:
    return _Array()


def _make_scalar(kind: _Type, data: Any = b"") -> Any:
    (value,) = np.frombuffer(_as_bytes(data), kind.resolved()).tolist()
    return value


def _array_of_buffer(data: Any, kind: _Type, shape: Any, order: str) -> _Array:
    """Stands for what protocol 5 makes arrays with."""
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", data))
    return array


def _no_bytes() -> bytes:
    """Stands for `bytes`, which old protocols write empty bytes with."""
    return b""


def _as_bytes(data: Any) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def _encode(text: str, encoding: str) -> bytes:
    """Stands for `_codecs.encode`, which Python 3 writes bytes with in old protocols."""
    if encoding != "latin1":
        raise TruthUnusable(f"expected bytes as latin1, found {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Array,
    **{(module, "set"): set for module in ("builtins", "__builtin__")},
    **{(module, "frozenset"): frozenset for module in ("builtins", "__builtin__")},
    **{(module, "bytes"): _no_bytes for module in ("builtins", "__builtin__")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array_of_buffer for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _make_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _make_scalar for core in ("core", "_core")},
}


def as_list(value: Any) -> list[Any]:
    """A list, tuple, set or array of a plain pickle as a list. Raises TruthUnusable."""
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    raise TruthUnusable(f"expected a list, found {type(value).__name__}")


def as_array(value: Any) -> NDArray[Any]:
    """An array of a plain pickle, read-only. Raises TruthUnusable for anything else, an array of objects included."""
    if isinstance(value, _Array) and isinstance(value.found, np.ndarray):
        return value.found
    raise TruthUnusable(f"expected an array of numbers, found {type(value).__name__.lstrip('_').lower()}")
