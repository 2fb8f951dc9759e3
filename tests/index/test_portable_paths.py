from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_index.catalog.portable_paths import decode_path, encode_path

# What a file name may be made of, rich in what could be confused with the encoding itself.
file_names = st.lists(
    st.one_of(
        st.sampled_from([b"\\", b"x", b"\\x", b"\\x5c", b"\\xe9", b"\\xE9", b"5c", b"e9", b"\xe9", b"\xff", b"\x80"]),
        st.binary(max_size=4),
        st.text(max_size=4).map(lambda text: text.encode("utf-8", "surrogatepass")),
    ),
    max_size=8,
).map(lambda parts: b"".join(parts).decode("utf-8", "surrogateescape"))


@given(file_names)
def test_decoding_gives_the_very_name_back(name: str) -> None:
    assert decode_path(encode_path(name)) == name


@given(file_names)
def test_every_name_becomes_valid_utf_8(name: str) -> None:
    encode_path(name).encode("utf-8")


@given(file_names, file_names)
def test_different_names_stay_different(one: str, other: str) -> None:
    assert (encode_path(one) == encode_path(other)) == (one == other)


@given(file_names, file_names)
def test_a_path_is_encoded_part_by_part(folder: str, name: str) -> None:
    assert encode_path(f"{folder}/{name}") == f"{encode_path(folder)}/{encode_path(name)}"


@pytest.mark.parametrize("name", ["holiday.jpg", "Grüße 写真 🌄.jpg", "C:\\photos\\xmas.jpg", "a\nb", "50 % \\xZZ"])
def test_ordinary_names_stay_readable(name: str) -> None:
    assert encode_path(name) == name


def test_a_latin_1_name_shows_its_byte() -> None:
    assert encode_path(os.fsdecode(b"caf\xe9.jpg")) == r"caf\xe9.jpg"


def test_a_name_that_looks_encoded_keeps_its_backslash() -> None:
    assert encode_path(r"caf\xe9.jpg") == r"caf\x5cxe9.jpg"
