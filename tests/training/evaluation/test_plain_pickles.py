"""Ground truth as pickles: what the published files hold is read, and nothing else is even looked up."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_index.errors import TruthUnusable
from dino_training.evaluation.plain_pickles import as_list, read_plain_pickle
from dino_training.evaluation.revisited import read_revisited

QUERY: dict[str, Any] = {"bbx": [1.0, 2.0, 30.0, 40.0], "easy": [0, 1], "hard": [2], "junk": [3]}


def gnd(**changed: Any) -> dict[str, Any]:
    return {"imlist": ["a", "b", "c", "d"], "qimlist": ["q"], "gnd": [QUERY]} | changed


def written(path: Path, value: Any, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_numbers_and_containers_come_back(tmp_path: Path, protocol: int) -> None:
    value: dict[str, Any] = {
        "ints": np.array([3, 1, 2]), "small": np.array([1], np.int16), "swapped": np.array([1, 2], ">i4"),
        "floats": np.array([[1.5, 2], [3, 4]]), "columns": np.asfortranarray([[1, 2], [3, 4]]),
        "text": np.array(["a", "bc"]), "objects": np.array(["a", "long"], object), "empty": np.array([]),
        "number": np.float64(2.5), "flag": np.array([True, False]), "tuple": (1, "x", b"y", None), "set": {1, 2},
    }  # fmt: skip
    read = read_plain_pickle(written(tmp_path / "x.pkl", value, protocol))
    for name in ("ints", "small", "swapped", "floats", "columns", "text", "objects", "empty", "flag"):
        assert as_list(read[name]) == value[name].tolist(), name
    assert (read["number"], read["tuple"], read["set"]) == (2.5, value["tuple"], {1, 2})


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("wrap", [list, np.array, tuple, lambda values: np.array(values, np.int64)])
def test_a_revisited_file_is_read_with_lists_or_arrays(
    tmp_path: Path, protocol: int, wrap: Callable[[list[int]], Any]
) -> None:
    query = QUERY | {kind: wrap(QUERY[kind]) for kind in ("easy", "hard", "junk")} | {"bbx": np.array(QUERY["bbx"])}
    truth = read_revisited(written(tmp_path / "gnd.pkl", gnd(gnd=[query]), protocol))
    assert truth.references == ["a", "b", "c", "d"]
    assert truth.queries[0].lists == {"easy": {0, 1}, "hard": {2}, "junk": {3}}
    assert truth.queries[0].box == (1.0, 2.0, 30.0, 40.0)


class Running:
    """Runs a command when it is unpickled the usual way."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._made = (call, arguments)

    def __reduce__(self) -> Any:
        return self._made


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("call", [os.system, eval, exec, getattr, __import__, open, np.load, pickle.loads])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(
    tmp_path: Path, call: Callable[..., Any], protocol: int
) -> None:
    path = written(tmp_path / "gnd.pkl", gnd(gnd=[Running(call, f"touch {tmp_path}/ran")]), protocol)
    with pytest.raises(TruthUnusable, match="could run code; nothing was"):
        read_revisited(path)
    assert [file.name for file in tmp_path.iterdir()] == ["gnd.pkl"]


def test_types_that_could_follow_addresses_are_refused(tmp_path: Path) -> None:
    for number, value in enumerate(
        [np.zeros(2, "i4,f8"), np.zeros(2, "V8"), np.array([1, 2], "M8[s]"), np.ones(1, np.complex64)]
    ):
        with pytest.raises(TruthUnusable):
            read_plain_pickle(written(tmp_path / f"{number}.pkl", value))


def test_an_array_larger_than_its_bytes_is_refused(tmp_path: Path) -> None:
    data = pickle.dumps(np.arange(3, dtype=np.int64), protocol=2)
    path = tmp_path / "x.pkl"
    enlarged = data.replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85")  # its shape
    assert enlarged != data
    path.write_bytes(enlarged)
    with pytest.raises(TruthUnusable):
        read_plain_pickle(path)


@pytest.mark.parametrize("data", [b"", b"junk", b"\x80\x04", pickle.dumps(gnd())[:-9], b"cposix\nsystem\n.", b"Pid\n."])
def test_damaged_files_are_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "gnd.pkl"
    path.write_bytes(data)
    with pytest.raises(TruthUnusable) as caught:
        read_revisited(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2], {}, gnd(gnd=[]), gnd(qimlist=[], gnd=[]), gnd(imlist=[1]), gnd(gnd=[[1]]), gnd(imlist="abcd"),
        gnd(gnd=[{"easy": [0]}]), gnd(gnd=[QUERY | {"easy": [9]}]), gnd(gnd=[QUERY | {"hard": ["x"]}]),
        gnd(gnd=[QUERY | {"bbx": [1, 2, 3]}]), gnd(gnd=[QUERY | {"bbx": [5, 5, 1, 1]}]),
        gnd(gnd=[QUERY | {"bbx": [0, 0, float("nan"), 1]}]), gnd(gnd=[QUERY | {"junk": [-1]}]),
    ],
)  # fmt: skip
def test_other_contents_are_refused_by_what_was_expected(tmp_path: Path, content: Any) -> None:
    with pytest.raises(TruthUnusable, match="expected"):
        read_revisited(written(tmp_path / "gnd.pkl", content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TruthUnusable, match=r"none\.pkl"):
        read_revisited(tmp_path / "none.pkl")
