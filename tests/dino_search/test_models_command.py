"""`dino-search models`: what it lists and fetches, against a hub on this machine, good or bad."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

from dino_index.backbones import Backbone
from dino_index.hub import FetchedFile
from dino_index.model_files import resolve_model
from dino_search import Collection
from dino_search.models import Models
from foreign_checkpoints import dino_full_checkpoint, random_model
from forked_commands import CommandLine, Finished
from hub_server import COMMIT, Hub, serving, silent_hub, wait_until
from sample_collections import save_tiny_model
from small_disks import mounted

NAME = "test_vit.r160_in1k"
REPOSITORY = f"timm/{NAME}"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Of a tiny model that timm publishes, but random."""
    torch.manual_seed(5)
    return dict(timm.create_model("test_vit").state_dict())


@pytest.fixture
def hub(weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    # None that this machine may have from elsewhere.
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("DINO_SEARCH_HUB_TIMEOUT", "20")
    with serving({REPOSITORY: {"model.safetensors": save(weights), "config.json": b"{}"}}) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        yield served


@pytest.fixture
def dino_search(tmp_path: Path) -> Iterator[CommandLine]:
    commands = CommandLine(tmp_path / "commands")
    yield commands
    commands.end()


def stored(home: Path) -> list[str]:
    """Names of the files that a home keeps models in, but for the lock."""
    folder = home / "models"
    return sorted(path.name for path in folder.iterdir() if path.name != ".fetching.lock") if folder.exists() else []


def assert_failed(ended: Finished, *words: str, home: Path) -> None:
    """In one line that names what works, leaving nothing."""
    assert ended.exit_code == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    for word in words:
        assert word in ended.stderr
    assert stored(home) == []


# --- get


def test_get_fetches_weights_that_index_then_takes_by_name(
    hub: Hub, dino_search: CommandLine, home: Path, photos: Path, weights: dict[str, torch.Tensor]
) -> None:
    ended = dino_search.run("models", "get", NAME)
    assert (ended.exit_code, ended.stderr) == (0, f"use it: dino-search index PATH --model {NAME} -c NAME\n")
    assert ended.stdout.startswith(f"{NAME}: ")
    assert stored(home) == [f"{NAME}.json", f"{NAME}.safetensors"]
    found = load_file(home / "models" / f"{NAME}.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    ended = dino_search.run("index", photos, "--model", NAME)
    assert (ended.exit_code, ended.stdout.splitlines()[1]) == (0, f"8 images in collection 'default' ({NAME})")
    assert "ships with dino-search" not in ended.stderr


def test_get_reports_no_usage_and_asks_for_nothing_else(hub: Hub, dino_search: CommandLine) -> None:
    assert dino_search.run("models", "get", NAME).exit_code == 0
    assert {asked.split(" ")[1] for asked in hub.asked} == {f"/{REPOSITORY}/resolve/main/model.safetensors"}
    assert [agent for agent in hub.agents if "torch" in agent or "agent/" in agent] == []


def test_the_embeddings_are_those_of_timms_model(
    hub: Hub, dino_search: CommandLine, home: Path, weights: dict[str, torch.Tensor]
) -> None:
    assert dino_search.run("models", "get", NAME).exit_code == 0
    backbone = Backbone(resolve_model(NAME, models=home / "models"), device="cpu", dtype=torch.float32)
    model: Any = timm.create_model("test_vit").eval()
    model.load_state_dict(weights)
    pixels = torch.randint(0, 256, (2, 160, 160, 3)).float()
    mean, std = (torch.tensor(values) for values in (backbone.spec.mean, backbone.spec.std))
    with torch.inference_mode():
        expected = model.forward_features(((pixels / 255 - mean) / std).permute(0, 3, 1, 2))
    torch.testing.assert_close(backbone.embed_tensor(pixels)[0], expected[:, 0], rtol=1e-3, atol=1e-3)


def test_a_pickled_file_is_taken_where_the_repository_has_no_safetensors(
    hub: Hub, dino_search: CommandLine, home: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(weights, tmp_path / "weights.bin")
    hub.files = {REPOSITORY: {"pytorch_model.bin": (tmp_path / "weights.bin").read_bytes()}}
    assert dino_search.run("models", "get", NAME).exit_code == 0
    found = load_file(home / "models" / f"{NAME}.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_name_without_tag_is_timms_default_one(hub: Hub, dino_search: CommandLine, home: Path) -> None:
    assert dino_search.run("models", "get", "test_vit").stdout.startswith(f"{NAME}: ")
    assert resolve_model("test_vit", models=home / "models").name == NAME


def test_what_is_there_is_not_fetched_again(hub: Hub, dino_search: CommandLine) -> None:
    assert dino_search.run("models", "get", NAME).exit_code == 0
    asked = len(hub.asked)
    assert dino_search.run("models", "get", NAME).exit_code == 0
    assert len(hub.asked) == asked


def test_weights_in_the_hubs_cache_of_this_machine_need_no_hub(
    home: Path, weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / f"models--timm--{NAME}"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    save_file(weights, cache / "snapshots" / "abc" / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("dino_index.hub.fetch_file", None)
    said: list[str] = []
    assert Models(home).get(NAME, on_remark=said.append).name == NAME
    assert said == [f"{NAME} was in the hub's cache on this machine already"]


def test_what_is_fetched_is_the_same_model_as_dinos_published_file(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "vit_small_patch16_224.dino"
    state = timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()
    torch.save(dino_full_checkpoint(state), tmp_path / "dino_deitsmall16_pretrain_full_checkpoint.pth")

    def fetch_file(*arguments: object, **options: object) -> FetchedFile:
        save_file(state, tmp_path / "model.safetensors")
        return FetchedFile(path=tmp_path / "model.safetensors", commit=COMMIT)

    monkeypatch.setattr("dino_index.hub.fetch_file", fetch_file)
    monkeypatch.setattr("dino_index.timm_weights.cached_file", lambda weights: None)
    fetched = Models(home).get(name)
    assert (fetched.dim, fetched.licence) == (384, "Apache-2.0")
    converted = resolve_model(tmp_path / "dino_deitsmall16_pretrain_full_checkpoint.pth", models=tmp_path / "elsewhere")
    assert converted.fingerprint == resolve_model(name, models=home / "models").fingerprint


# --- the default


def test_default_is_what_a_new_collection_gets_and_an_old_one_does_not(
    hub: Hub, dino_search: CommandLine, photos: Path, tiny_model: Path, home: Path
) -> None:
    assert dino_search.run("index", photos, "--model", tiny_model).exit_code == 0
    assert dino_search.run("models", "get", NAME, "--default").exit_code == 0
    assert dino_search.run("index", photos, "-c", "new").stdout.splitlines()[1].endswith(f"({NAME})")
    assert dino_search.run("index", photos).stdout.splitlines()[1].endswith(f"({tiny_model})")
    assert dino_search.run("search", photos / "cat" / "0.jpg", "-c", "new").exit_code == 0
    shutil.rmtree(home / "models")
    ended = dino_search.run("index", photos, "-c", "newer")
    assert ended.exit_code == 1
    assert f"the default model of this home is '{NAME}'" in ended.stderr
    assert f"dino-search models get {NAME}" in ended.stderr
    assert dino_search.run("models", "get", "bundled", "--default").exit_code == 0
    ended = dino_search.run("index", photos, "-c", "newest")
    assert ended.stdout.splitlines()[1].endswith("(bundled_v5)")
    assert "dino-search models get vit_small_patch16_224.dino --default" in ended.stderr


def test_a_moved_home_finds_its_models(hub: Hub, dino_search: CommandLine, photos: Path, home: Path) -> None:
    assert dino_search.run("models", "get", NAME).exit_code == 0
    assert dino_search.run("index", photos, "--model", NAME).exit_code == 0
    moved = home.with_name("moved")
    home.rename(moved)
    (photos / "cat" / "new.jpg").write_bytes((photos / "dog" / "0.jpg").read_bytes()[:-2] + b"\xff\xd9\n")
    assert dino_search.run("index", photos, "--home", moved).exit_code == 0
    with Collection.open(home=moved) as collection:
        assert collection.search(Image.open(photos / "cat" / "0.jpg"), k=1).results[0].path.endswith("0.jpg")


def test_a_collection_whose_fetched_model_has_gone_says_how_to_get_it(
    hub: Hub, dino_search: CommandLine, photos: Path, home: Path
) -> None:
    assert dino_search.run("models", "get", NAME).exit_code == 0
    assert dino_search.run("index", photos, "--model", NAME).exit_code == 0
    shutil.rmtree(home / "models")
    ended = dino_search.run("index", photos, "--rehash")
    assert (ended.exit_code, f"fetch it: dino-search models get {NAME}, " in ended.stderr) == (1, True)
    assert dino_search.run("models", "get", NAME).exit_code == 0
    assert dino_search.run("index", photos, "--rehash").exit_code == 0


# --- weights files at the command line


def test_a_hostile_checkpoint_is_one_line_and_no_collection(
    dino_search: CommandLine, photos: Path, home: Path, tmp_path: Path
) -> None:
    class RunsCode:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"teacher": RunsCode()}, protocol=2))
    ended = dino_search.run("index", photos, "--model", tmp_path / "evil.pth")
    assert_failed(ended, "evil.pth", "mkdir, which could run code; nothing in it was run", home=home)
    assert not (tmp_path / "ran").exists()
    assert not home.exists()


def test_weights_of_another_architecture_than_described_leave_no_collection(
    dino_search: CommandLine, photos: Path, tmp_path: Path
) -> None:
    path = save_tiny_model(tmp_path / "weights.safetensors", architecture="resnet10t", architecture_args={})
    ended = dino_search.run("index", photos, "--model", path)
    assert (ended.exit_code, ended.stderr.count("\n")) == (1, 1)
    assert re.search(r"does not fit resnet10t .*: missing bn1\.bias; .*; and \d+ more$", ended.stderr.strip())
    assert dino_search.run("info").exit_code == 1


def test_the_input_size_is_part_of_the_model_and_remembered(dino_search: CommandLine, photos: Path, home: Path) -> None:
    assert dino_search.run("index", photos, "--input-size", 64).exit_code == 0
    assert json.loads(dino_search.run("info", "--json").stdout)["input_size"] == 64
    (photos / "new.jpg").write_bytes((photos / "cat" / "0.jpg").read_bytes() + b" ")
    assert dino_search.run("index", photos).stdout.startswith("1 added")
    ended = dino_search.run("index", photos, "--input-size", 128)
    assert (ended.exit_code, "was built with bundled_v5 at 64 px" in ended.stderr) == (1, True)
    ended = dino_search.run("index", photos, "--input-size", 100, "-c", "other")
    assert (ended.exit_code, "multiple of the patch size 8" in ended.stderr) == (1, True)


# --- list


def test_list_shows_the_bundled_the_fetched_and_the_converted(
    hub: Hub, dino_search: CommandLine, home: Path, photos: Path, tmp_path: Path
) -> None:
    model = random_model("vit_tiny_patch16_224", depth=1, img_size=32)
    torch.save(dino_full_checkpoint(model.state_dict()), tmp_path / "mine.pth")
    ended = dino_search.run("index", photos, "--model", tmp_path / "mine.pth", "-c", "mine")
    assert ended.exit_code == 0
    assert "mine.pth: the projection head is left out (2 tensors)\n" in ended.stderr
    assert dino_search.run("models", "get", NAME, "--default").exit_code == 0
    ended = dino_search.run("models", "list", "--json")
    rows = {row["name"]: row for row in json.loads(ended.stdout)}
    (converted,) = (name for name in rows if name.startswith("mine-"))
    assert [(row["source"], row["dim"], row["licence"], row["default"]) for row in rows.values()] == [
        ("bundled", 192, "Apache-2.0", False),
        ("file", 192, None, False),
        ("hub", 64, "Apache-2.0", True),
    ]
    assert list(rows) == ["bundled_v5", converted, NAME]
    for name, row in rows.items():
        assert row["megabytes"] == round(Path(row["path"]).stat().st_size / 1e6, 1), name
    card = json.loads((home / "models" / f"{NAME}.json").read_text())["card"]
    assert card["origin"] == f"{REPOSITORY}@{COMMIT}"
    table = dino_search.run("models").stdout.splitlines()
    assert table[0].split() == ["name", "MB", "descriptor", "source", "licence"]
    assert [line.split()[0] for line in table[1:]] == list(rows)
    assert table[-1].split()[-1] == "default"


# --- what cannot be fetched


@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("vit_smal_patch16_224.dino", "vit_small_patch16_224.dino"),
        ("vit_small_patch14_dinov2.lvd124m", "vit_small_patch14_dinov2.lvd142m"),
        ("dinov2_vits14", "vit_small_patch14_dinov2.lvd142m"),
    ],
)
def test_a_name_that_timm_lacks_is_answered_with_similar_ones(
    hub: Hub, dino_search: CommandLine, home: Path, name: str, similar: str
) -> None:
    assert_failed(dino_search.run("models", "get", name), f"no weights '{name}'", similar, home=home)
    assert hub.asked == []


def test_index_with_a_name_that_was_not_fetched_says_how_and_asks_nobody(
    hub: Hub, dino_search: CommandLine, home: Path, photos: Path
) -> None:
    ended = dino_search.run("index", photos, "--model", NAME)
    assert_failed(ended, f"dino-search models get {NAME}", "here now: bundled", home=home)
    assert hub.asked == []
    assert not home.exists()


def test_without_a_hub_the_error_names_what_works(
    dino_search: CommandLine, home: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    ended = dino_search.run("models", "get", NAME)
    assert_failed(ended, "http://127.0.0.1:9 cannot be reached", "bundled", ".safetensors", home=home)


def test_a_hub_that_accepts_and_never_answers_is_left_soon(
    dino_search: CommandLine, home: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINO_SEARCH_HUB_TIMEOUT", "1")
    with silent_hub() as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        started = time.monotonic()
        ended = dino_search.run("models", "get", NAME)
        assert time.monotonic() - started < 30
    assert_failed(ended, "cannot be reached", "bundled", home=home)


def test_a_download_that_stops_half_way_is_left_soon_and_leaves_nothing(
    dino_search: CommandLine, home: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINO_SEARCH_HUB_TIMEOUT", "1")
    hub.pauses_after = 100_000
    started = time.monotonic()
    ended = dino_search.run("models", "get", NAME)
    assert time.monotonic() - started < 30
    assert_failed(ended, "nothing has arrived for 1 s", "bundled", home=home)


def test_a_slow_hub_is_waited_for(
    dino_search: CommandLine, hub: Hub, monkeypatch: pytest.MonkeyPatch, weights: dict[str, torch.Tensor]
) -> None:
    monkeypatch.setenv("DINO_SEARCH_HUB_TIMEOUT", "2")
    size = sum(value.numel() * value.element_size() for value in weights.values())
    hub.chunk_pause_s = 4 / (size / 1000)  # twice as long as the hub may keep silent
    assert dino_search.run("models", "get", NAME).exit_code == 0


@pytest.mark.parametrize("status", [401, 500, 503])
def test_a_hub_that_refuses_is_an_error_at_once(dino_search: CommandLine, home: Path, hub: Hub, status: int) -> None:
    hub.status = status
    ended = dino_search.run("models", "get", NAME)
    assert_failed(ended, str(status), home=home)
    assert len(hub.asked) == 1


def test_weights_behind_terms_say_how_to_accept_them(dino_search: CommandLine, home: Path, hub: Hub) -> None:
    hub.gated = True
    assert_failed(dino_search.run("models", "get", NAME), "accept them there, then set HF_TOKEN", home=home)


def test_a_repository_without_weights_is_named(dino_search: CommandLine, home: Path, hub: Hub) -> None:
    hub.files = {REPOSITORY: {"README.md": b"nothing here"}}
    assert_failed(dino_search.run("models", "get", NAME), f"expected weights in {REPOSITORY}", home=home)


@pytest.mark.parametrize("fault", ["one tensor less", "one tensor more", "cut short", "no safetensors"])
def test_weights_that_do_not_fit_are_refused_and_leave_nothing(
    dino_search: CommandLine, home: Path, hub: Hub, weights: dict[str, torch.Tensor], fault: str
) -> None:
    changed = dict(weights)
    if fault == "one tensor less":
        del changed["norm.bias"]
    if fault == "one tensor more":
        changed["extra.weight"] = torch.zeros(2)
    content = save(changed)
    if fault == "cut short":
        content = content[:-1000]
    if fault == "no safetensors":
        content = b"<html>please log in</html>"
    hub.files = {REPOSITORY: {"model.safetensors": content}}
    named = {"one tensor less": "norm.bias", "one tensor more": "extra.weight"}.get(fault, "no readable safetensors")
    assert_failed(dino_search.run("models", "get", NAME), named, home=home)


def test_a_connection_that_breaks_leaves_nothing_and_a_second_try_works(
    dino_search: CommandLine, home: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINO_SEARCH_HUB_TIMEOUT", "3")
    hub.body_ends_after = 0
    assert_failed(dino_search.run("models", "get", NAME), "cannot be reached", home=home)
    hub.body_ends_after = None
    assert dino_search.run("models", "get", NAME).exit_code == 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_fetch_leaves_no_model_and_does_not_block_the_next(
    dino_search: CommandLine, home: Path, hub: Hub, how: signal.Signals
) -> None:
    hub.pauses_after = 100_000
    running = dino_search.start("models", "get", NAME)
    wait_until(lambda: any(asked.startswith("GET") for asked in hub.asked))
    running.send(how)
    assert running.wait().exit_code == 128 + how
    if how != signal.SIGKILL:
        assert stored(home) == []
    assert NAME not in dino_search.run("models", "list").stdout
    hub.pauses_after = None
    assert dino_search.run("models", "get", NAME).exit_code == 0
    assert stored(home) == [f"{NAME}.json", f"{NAME}.safetensors"]


def test_two_fetches_at_once_do_not_mix(dino_search: CommandLine, home: Path, hub: Hub) -> None:
    hub.pauses_after = 100_000
    first = dino_search.start("models", "get", NAME)
    wait_until(lambda: any(asked.startswith("GET") for asked in hub.asked))
    second = dino_search.run("models", "get", NAME)
    assert (second.exit_code, "another process fetches a model" in second.stderr) == (1, True)
    first.send(signal.SIGTERM)
    assert first.wait().exit_code == 143


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_cannot_be_written_is_an_error(dino_search: CommandLine, home: Path, hub: Hub) -> None:
    home.mkdir(mode=0o500)
    assert_failed(dino_search.run("models", "get", NAME), "cannot be written", home=home)


@pytest.mark.mounts
def test_a_full_disk_is_named_as_that(dino_search: CommandLine, hub: Hub, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "1m") as disk:
        ended = dino_search.run("models", "get", NAME, "--home", disk / "home")
        assert (ended.exit_code, ended.stderr.count("\n")) == (1, 1)
        assert "No space left on device" in ended.stderr
        assert "cannot be reached" not in ended.stderr
        assert stored(disk / "home") == []


@pytest.mark.parametrize("command", ["list", "get"])
def test_help_of_each_part_ends_with_a_line_to_paste(dino_search: CommandLine, command: str) -> None:
    lines = dino_search.run("models", command, "--help").stdout.strip().splitlines()
    assert lines[-1].strip().startswith(f"dino-search models {command}")


@pytest.mark.parametrize("given", ["soon", "0", "-1", "inf"])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(
    dino_search: CommandLine, home: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("DINO_SEARCH_HUB_TIMEOUT", given)
    assert_failed(dino_search.run("models", "get", NAME), "DINO_SEARCH_HUB_TIMEOUT", home=home)


def test_progress_is_told_in_bytes(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.chunk_pause_s = 0.002
    told: list[tuple[int, int | None]] = []
    Models(home).get(NAME, on_progress=lambda done, total: told.append((done, total)))
    assert {total for _, total in told} == {len(hub.files[REPOSITORY]["model.safetensors"])}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len({done for done, _ in told}) > 2
