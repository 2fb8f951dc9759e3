"""Settings of the service: where they come from, which goes first, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

import dino_search.api
from commands_in_process import Command
from dino_index.errors import SettingsInvalid
from dino_search.api.settings import ServiceSettings
from sample_collections import index_files


def test_flags_go_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "service.toml"
    config.write_text('port = 1\nqueue_size = 2\nmax_k = 3\npreload = ["a", "b"]\n')
    monkeypatch.setenv("DINO_SEARCH_PORT", "11")
    monkeypatch.setenv("DINO_SEARCH_QUEUE_SIZE", "12")
    for settings in (ServiceSettings.load(config, port=21),):
        assert (settings.port, settings.queue_size, settings.max_k, settings.preload) == (21, 12, 3, ("a", "b"))
    monkeypatch.setenv("DINO_SEARCH_CONFIG", str(config))
    assert ServiceSettings.load().max_k == 3


def test_lists_in_the_environment_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_SEARCH_FETCH_HOSTS", "a.example, b.example")
    monkeypatch.setenv("DINO_SEARCH_INDEX_FOLDERS", "/photos,/more")
    settings = ServiceSettings.load()
    assert settings.fetch_hosts == ("a.example", "b.example")
    assert settings.index_folders == (Path("/photos"), Path("/more"))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("prot = 1", "prot is no setting"),
        ("port = 99999", r"port \(DINO_SEARCH_PORT\): .*65535.*99999"),
        ('keys = "maybe"', "keys .*'auto', 'required' or 'off'.*'maybe'"),
        ("port = ", "cannot be read"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, written: str, expected: str) -> None:
    config = tmp_path / "service.toml"
    config.write_text(written)
    with pytest.raises(SettingsInvalid, match=expected):
        ServiceSettings.load(config)
    with pytest.raises(SettingsInvalid, match="found none at"):
        ServiceSettings.load(tmp_path / "other.toml")


def test_the_password_of_a_database_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsInvalid) as caught:
        ServiceSettings.load(database=["postgresql://user:secret@host/name"])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "public"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("127.9.9.9", False), ("0.0.0.0", True), ("::", True),
     ("192.168.0.4", True), ("example.org", True)],
)  # fmt: skip
def test_which_addresses_others_can_reach(host: str, public: bool) -> None:
    assert ServiceSettings(host=host).is_public is public


def test_check_says_what_was_found(dino_search: Command, photos: Path, home: Path, tiny_model: Path) -> None:
    index_files(home, tiny_model, photos)
    ended = dino_search("serve", "--check", "--port", "0")
    assert ended.code == 0
    assert "default: 8 images, 0 failed" in ended.out
    assert f"default: {tiny_model} on cpu" in ended.out


def test_check_fails_where_the_service_would(
    dino_search: Command, photos: Path, home: Path, tmp_path: Path, tiny_model: Path
) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(tiny_model.read_bytes())
    index_files(home, own, photos)
    own.unlink()
    ended = dino_search("serve", "--check")
    assert (ended.code, "needs its model at" in ended.err) == (1, True)


def test_a_public_address_needs_keys_or_the_wish(dino_search: Command, home: Path) -> None:
    refused = dino_search("serve", "--check", "--host", "0.0.0.0")
    assert (refused.code, "--allow-public-without-keys" in refused.err) == (1, True)
    assert dino_search("serve", "--host", "0.0.0.0").code == 1
    assert dino_search("serve", "--check", "--host", "0.0.0.0", "--allow-public-without-keys").code == 0
    assert dino_search("serve", "--check").code == 0


def test_every_setting_is_documented() -> None:
    text = (Path(dino_search.api.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert [name for name in ServiceSettings.model_fields if f"`{name.upper()}`" not in text] == []
