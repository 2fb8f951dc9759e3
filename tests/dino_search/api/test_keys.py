from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

import databases
from commands_in_process import Command
from databases import open_catalog
from dino_index.errors import KeyNotFound
from dino_search.api.keys import SCOPES, ApiKeys, Scope, find_key

pytestmark = pytest.mark.usefixtures("database")


@pytest.fixture
def keys(home: Path) -> Iterator[ApiKeys]:
    with closing(ApiKeys(home, databases.url_of(home))) as keys:
        yield keys


def test_a_key_is_long_random_and_stored_as_its_hash_alone(keys: ApiKeys, home: Path) -> None:
    known, key = keys.add("laptop", scope="read")
    _, another = keys.add("laptop", scope="read")
    assert key.startswith("ds_")
    assert len(key) == len("ds_") + 43  # 32 bytes
    assert key != another
    assert key.startswith(known.prefix)
    assert known.sha256 == hashlib.sha256(key.encode()).digest()
    with open_catalog(home).reading() as session:
        rows = session.execute(text("SELECT * FROM api_key")).all()
    assert key not in repr(rows)
    assert key[len(known.prefix) :] not in repr(known) + repr(known.to_json())


def test_a_key_is_found_among_others_and_nothing_like_it_is(keys: ApiKeys) -> None:
    made = [keys.add(f"key {number}", scope="read") for number in range(5)]
    for known, key in made:
        assert find_key(key, keys.listed()) == known
    key = made[2][1]
    for wrong in ("", "ds_", key[:-1], key + "a", key.upper(), key[:-1] + "é", "\udcff", " " + key):
        assert find_key(wrong, keys.listed()) is None


@pytest.mark.parametrize("scope", SCOPES)
def test_each_scope_includes_those_before_it(keys: ApiKeys, scope: Scope) -> None:
    known, _ = keys.add("a", scope=scope)
    allowed = [other for other in SCOPES if known.allows(other)]
    assert allowed == list(SCOPES[: SCOPES.index(scope) + 1])


def test_a_key_is_for_all_collections_unless_it_names_some(keys: ApiKeys) -> None:
    every, _ = keys.add("all", scope="read")
    some, _ = keys.add("some", scope="read", collections=["b", "a", "b"])
    none, _ = keys.add("none", scope="read", collections=[])
    assert [key.reaches("a") for key in (every, some, none)] == [True, True, False]
    assert [key.reaches("c") for key in (every, some, none)] == [True, False, False]
    assert [key.collections for key in keys.listed()] == [None, ("a", "b"), ()]


def test_a_key_ends_when_it_expires(keys: ApiKeys) -> None:
    known, _ = keys.add("a", scope="read", expires_days=0.5)
    assert known.expires_at is not None
    assert known.is_valid(known.expires_at - timedelta(seconds=1))
    assert not known.is_valid(known.expires_at)
    assert known.status(known.expires_at) == "expired"


def test_a_key_that_is_revoked_stays_in_the_list(keys: ApiKeys) -> None:
    known, _ = keys.add("a", scope="read")
    revoked = keys.revoke(known.id)
    assert not revoked.is_valid(datetime.now(UTC))
    assert keys.revoke(known.id).revoked_at == revoked.revoked_at
    assert [key.status(datetime.now(UTC)) for key in keys.listed()] == ["revoked"]
    with pytest.raises(KeyNotFound, match="found 77"):
        keys.revoke(77)


def test_a_last_use_never_moves_back(keys: ApiKeys) -> None:
    known, _ = keys.add("a", scope="read")
    now = datetime.now(UTC)
    keys.note_uses({known.id: now, 77: now})
    keys.note_uses({known.id: now - timedelta(hours=1)})
    assert keys.listed()[0].last_used_at == now


def test_looking_for_keys_makes_no_home(keys: ApiKeys, home: Path) -> None:
    assert keys.listed() == []
    with pytest.raises(KeyNotFound):
        keys.revoke(1)
    assert not home.exists()


# --- the command


def test_the_command_shows_a_key_once(dino_search: Command) -> None:
    added = dino_search("keys", "add", "laptop", "--scope", "write", "-c", "birds", "--expires", "30", "--json")
    facts = added.json()
    key = facts.pop("key")
    assert facts["prefix"] == key[:9]
    assert (facts["id"], facts["name"], facts["scope"], facts["status"]) == (1, "laptop", "write", "valid")
    assert facts["collections"] == ["birds"]
    listed = dino_search("keys", "list", "--json").json()
    assert listed == {"keys": [facts]}
    assert key not in dino_search("keys", "list").out
    assert dino_search("keys", "revoke", "1", "--json").json()["status"] == "revoked"
    assert "revoked\twrite\tbirds\tnever used\tlaptop" in dino_search("keys", "list").out


def test_the_command_prints_the_key_alone_for_people_and_scripts(dino_search: Command) -> None:
    added = dino_search("keys", "add", "page", "--scope", "read")
    assert added.code == 0
    (key,) = added.out.split()
    assert key.startswith("ds_")
    assert key not in added.err
    assert "not shown again" in added.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [(("add", "a", "--scope", "owner"), 2, "read, write, admin"), (("add", "a"), 2, "--scope"),
     (("add", "a", "--scope", "read", "--expires", "0"), 2, "more than 0"), (("revoke", "9"), 1, "keys list")],
)  # fmt: skip
def test_wrong_usage_makes_no_key(dino_search: Command, arguments: tuple[str, ...], code: int, message: str) -> None:
    ended = dino_search("keys", *arguments)
    assert ended.code == code
    assert message in ended.err
    assert dino_search("keys", "list", "--json").json() == {"keys": []}
