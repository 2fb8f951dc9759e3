from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dino_index.errors import OutputUnwritable, RecipeError
from dino_training import Recipe, load_recipe
from dino_training.recipe import recipe_from, recipe_names, save_recipe


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


# --- shipped recipes


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_sound_and_can_be_resolved(name: str) -> None:
    needs_teacher = name == "distilled"
    recipe = load_recipe(name, ["teacher_model=bundled"] if needs_teacher else [])
    resolved, _ = recipe.resolve(10_000)
    assert "auto" not in [getattr(resolved, key) for key in ("epochs", "num_prototypes", "momentum", "decode_size")]


def test_the_default_recipe_is_the_small_one() -> None:
    assert load_recipe() == load_recipe("small")
    assert load_recipe().name == "small"


# --- files


def test_a_recipe_file_holds_only_what_differs(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "mine.yaml", "epochs: 7\nglobal_scale: [0.3, 1]\n"))
    assert recipe == Recipe(epochs=7, global_scale=(0.3, 1.0))


def test_an_empty_recipe_file_is_the_published_settings(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path / "empty.yaml", "# nothing\n")) == Recipe()


def test_a_recipe_goes_out_from_its_base_and_that_from_its_own(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "first.yaml", "base: small\nepochs: 3\nseed: 1\n")
    write(tmp_path / "second.yaml", "base: deep/first.yaml\nseed: 2\n")  # as seen from the file, not from here
    recipe = load_recipe(tmp_path / "second.yaml", ["batch_size=32"])
    small = load_recipe("small")
    assert (recipe.architecture_args, recipe.epochs, recipe.seed, recipe.batch_size) == (
        small.architecture_args, 3, 2, 32,
    )  # fmt: skip


@pytest.mark.parametrize("base", ["mine.yaml", "./mine.yaml", "other.yaml"])
def test_a_recipe_that_starts_from_itself_is_refused(tmp_path: Path, base: str) -> None:
    write(tmp_path / "other.yaml", "base: ./mine.yaml\n")
    with pytest.raises(RecipeError, match="starts from itself"):
        load_recipe(write(tmp_path / "mine.yaml", f"base: {base}\n"))


@pytest.mark.parametrize("name", ["nothing", "no/such/file.yaml", "", "~nobody-of-that-name/x.yaml", "/"])
def test_a_recipe_that_is_not_there_is_named_with_those_that_are(name: str) -> None:
    with pytest.raises(RecipeError, match=r"expected a YAML file or one of .*small") as caught:
        load_recipe(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epochs: [", "is not YAML"),
        (b"\xff\xfe\x00epochs", "cannot be read"),
        (b"- epochs\n", "expected lines of `key: value`, found list"),
        (b"epochs", "expected lines of `key: value`, found str"),
        (b"base: nothing\n", "no recipe 'nothing'"),
        (b"1: 2\n", "unknown recipe key 1"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 300, "\0"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(name)


def test_unknown_keys_name_the_nearest_known_one_and_where_they_stand(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "learning_rte: 1\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml: unknown recipe key 'learning_rte'; did you mean 'learning_r"):
        load_recipe(path, ["epochs=3"])
    with pytest.raises(RecipeError, match=r"^--set: unknown recipe key 'epoch'; did you mean 'epochs'\?$"):
        load_recipe("small", ["epoch=3"])
    with pytest.raises(RecipeError, match=r"unknown recipe key 'xyzzy'; the keys stand in training/README\.md"):
        load_recipe("small", ["xyzzy=3"])


# --- --set


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("epochs=3", 3),
        ("epochs=auto", "auto"),
        ("learning_rate=1e-4", 1e-4),
        ("learning_rate=1", 1.0),
        (" warmup_epochs = 2 ", 2.0),
        ("momentum=.5", 0.5),
        ("momentum=auto", "auto"),
        ("global_scale=[0.2, 1]", (0.2, 1.0)),
        ("jitter=[1e-1, 0, 0, 0]", (0.1, 0.0, 0.0, 0.0)),
        ("edits={reencode: 1e-1, paste: 1}", {"reencode": 0.1, "paste": 1.0}),
        ("architecture_args={depth: 2, qkv_bias: off}", {"depth": 2, "qkv_bias": False}),
        ("compile=on", "on"),
        ("compile=off", "off"),
        ("compile=auto", "auto"),
        ("multi_crop=off", False),
        ("predictor=true", True),
        ("labels=none", "none"),
        ("labels=null", "none"),
        ("labels=/a/b.csv", "/a/b.csv"),
        ("teacher_model=none", None),
        ("teacher_model=~", None),
        ("centring=none", "none"),
        ("name=a=b", "a=b"),
    ],
)
def test_settings_are_read_as_yaml(override: str, value: Any) -> None:
    recipe = load_recipe("small", [override])
    found = getattr(recipe, override.split("=")[0].strip())
    assert (found, type(found)) == (value, type(value))


def test_the_last_of_several_settings_counts() -> None:
    assert load_recipe("small", ["epochs=3", "seed=1", "epochs=4"]).epochs == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "expected key=value to set, found 'epochs'"),
        ("=3", "unknown recipe key ''"),
        ("epochs=[", "the value of epochs is not YAML"),
        # of the wrong kind
        ("epochs=", "epochs must be a whole number or 'auto', found None"),
        ("epochs=many", "epochs must be a whole number or 'auto', found 'many'"),
        ("epochs=1.5", "epochs must be a whole number or 'auto', found 1.5"),
        ("epochs=true", "epochs must be a whole number or 'auto', found True"),
        ("learning_rate=fast", "learning_rate must be a number, found 'fast'"),
        ("learning_rate=.nan", "learning_rate must be a number, found nan"),
        ("learning_rate=-.inf", "learning_rate must be a number, found -inf"),
        ("learning_rate=inf", "learning_rate must be a number, found inf"),
        (f"learning_rate=1{'0' * 400}", "learning_rate must be a number, found 1000"),
        ("learning_rate=yes", "learning_rate must be a number, found True"),
        ("global_scale=0.5", "global_scale must be a list of numbers, found 0.5"),
        ("global_scale=[a, b]", "global_scale must be a list of numbers"),
        ("edits=[reencode]", r"edits must be a mapping, found \['reencode'\]"),
        ("edits={reencode: often}", "edits must be a mapping"),
        ("multi_crop=maybe", "multi_crop must be true or false, found 'maybe'"),
        ("loss=l2", "loss must be 'cross_entropy' or 'kl' or 'mse' or 'infonce', found 'l2'"),
        ("loss=[mse]", "loss must be"),
        ("device=tpu", "device must be 'auto' or 'cpu' or 'cuda', found 'tpu'"),
        ("teacher_model=3", "teacher_model must be text or none, found 3"),
        # out of range
        ("num_prototypes=0", "num_prototypes must be 1 or more, found 0"),
        ("num_prototypes=-5", "num_prototypes must be 1 or more, found -5"),
        ("epochs=0", "epochs must be 1 or more, found 0"),
        ("batch_size=0", "batch_size must be 1 or more, found 0"),
        ("seed=-1", "seed must be 0 or more"),
        ("global_size=7", "global_size must be 8 or more"),
        ("learning_rate=-1", "learning_rate must be 0 or more"),
        ("num_evaluated=7", "num_evaluated must be 8 or more"),
        ("log_every_steps=0", "log_every_steps must be 1 or more"),
        ("head_layers=-1", "head_layers must be 0 or more"),
        ("flip_prob=1.5", "flip_prob must be between 0 and 1, found 1.5"),
        ("momentum=-0.1", "momentum must be between 0 and 1"),
        ("student_temperature=0", "student_temperature must be above 0"),
        ("teacher_temperature=-1", "teacher_temperature must be above 0"),
        ("drop_path=1", "drop_path must be at least 0 and below 1"),
        ("patch_drop=-.5", "patch_drop must be at least 0 and below 1"),
        ("global_scale=[1]", "global_scale must be a list of 2 numbers"),
        ("global_scale=[0.9, 0.1]", "global_scale must be two fractions"),
        ("local_scale=[0, 0.5]", "local_scale must be two fractions"),
        ("local_scale=[0.5, 1.5]", "local_scale must be two fractions"),
        ("aspect_ratio=[0, 1]", "aspect_ratio must be two numbers above 0"),
        ("blur_sigma=[2, 1]", "blur_sigma must be two numbers above 0"),
        ("blur_prob=[0, 0, 2]", "blur_prob must be three probabilities"),
        ("jitter=[0, 0, 0, 0.6]", "jitter must be four strengths"),
        ("jitter=[-1, 0, 0, 0]", "jitter must be four strengths"),
        ("mean=[0.5]", "mean must be one number for each of 3 channels"),
        ("std=[0.5, 0.5, 0]", "std must be above 0"),
        ("in_chans=2", r"in_chans must be 1 \(grey\) or 3 \(colour\), found 2"),
        ("edits={burn: 0.5}", "edits must be among .*reencode.*, found 'burn'"),
        ("edits={reencode: 2}", "edits must be probabilities"),
        # that do not go together
        ("gradient_accumulation=7", "batch_size 64 must be a multiple of gradient_accumulation 7"),
        ("teacher=frozen", r"teacher: frozen needs a teacher_model \(--teacher NAME\|FILE\)"),
        ("teacher_model=bundled", "teacher_model is for teacher: frozen, found teacher: momentum"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("small", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher": "frozen", "teacher_model": "x"}, "takes loss infonce .* or mse .*, found 'cross_entropy'"),
        ({"num_global_views": 1, "multi_crop": False}, "needs two views of an image"),
        ({"num_global_views": 1, "num_local_views": 0}, "needs two views of an image"),
        ({"centring": "sinkhorn", "loss": "mse"}, "sinkhorn is for losses over prototypes"),
        ({"center_of": "probabilities", "loss": "infonce"}, "probabilities is for losses over prototypes"),
        ({"loss": "infonce", "batch_size": 1}, "infonce needs a batch_size of 2"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**values)


def test_a_recipe_made_in_python_is_held_to_the_same() -> None:
    with pytest.raises(RecipeError, match="global_scale must be a list of numbers"):
        Recipe(global_scale=[0.4, 1.0])  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="num_prototypes must be 1 or more"):
        Recipe(num_prototypes=0)


# --- what is saved with a run

FLOATS = st.floats(min_value=1e-12, max_value=1.0)


@given(
    numbers=st.tuples(FLOATS, FLOATS, FLOATS),
    seed=st.integers(0, 2**63),
    name=st.text(st.characters(exclude_categories=["Cs"])),
    sharpening=st.booleans(),
    grey=st.booleans(),
)
def test_a_recipe_survives_being_saved(
    numbers: tuple[float, float, float], seed: int, name: str, sharpening: bool, grey: bool
) -> None:
    recipe = Recipe(
        name=name,
        seed=seed,
        sharpening=sharpening,
        learning_rate=numbers[0],
        min_learning_rate=numbers[1],
        momentum=numbers[2],
        in_chans=1 if grey else 3,
        mean=numbers[:1] if grey else numbers,
        std=numbers[:1] if grey else numbers,
        edits={"paste": numbers[0]},
        architecture_args={"depth": 2, "mlp_ratio": numbers[0], "qkv_bias": False},
    )
    assert recipe_from(yaml.safe_load(recipe.to_yaml()), "itself") == recipe


def test_a_saved_recipe_is_a_recipe_file(tmp_path: Path) -> None:
    recipe, _ = load_recipe("small", ["compile=on", "labels=folders", "learning_rate=1e-4"]).resolve(3000)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    with pytest.raises(OutputUnwritable, match="cannot be written"):
        save_recipe(recipe, tmp_path / "missing" / "recipe.yaml")


# --- what is chosen for a number of images


def test_auto_follows_the_number_of_images() -> None:
    recipe = load_recipe("small")
    chosen = {number: recipe.resolve(number)[0] for number in (8, 5000, 60_000, 150_000, 300_000, 5_000_000)}
    table = {
        number: (one.num_prototypes, one.momentum, one.initial_teacher_temperature, one.teacher_temperature, one.epochs)
        for number, one in chosen.items()
    }
    assert table == {
        8: (1024, 0.99, 0.02, 0.04, 300),
        5000: (1024, 0.99, 0.02, 0.04, 200),
        60_000: (4096, 0.992, 0.03, 0.04, 17),
        150_000: (16384, 0.992, 0.03, 0.04, 10),
        300_000: (32768, 0.996, 0.04, 0.04, 10),
        5_000_000: (65536, 0.996, 0.04, 0.04, 10),
    }


def test_what_was_chosen_is_told_and_the_rest_stays() -> None:
    recipe = load_recipe("small", ["momentum=0.9", "epochs=50"])
    resolved, remarks = recipe.resolve(5000)
    assert remarks == [
        "chosen for 5,000 images: num_prototypes 1024, initial_teacher_temperature 0.02, teacher_temperature 0.04"
    ]
    assert (resolved.momentum, resolved.epochs, resolved.num_prototypes) == (0.9, 50, 1024)
    unchanged = set(asdict(recipe)) - {
        "num_prototypes", "initial_teacher_temperature", "teacher_temperature", "decode_size",
    }  # fmt: skip
    assert {key: getattr(resolved, key) for key in unchanged} == {key: getattr(recipe, key) for key in unchanged}
    assert resolved.resolve(5000) == (resolved, [])


def test_images_are_decoded_as_large_as_the_smallest_local_view_needs() -> None:
    recipe = Recipe(local_size=96, local_scale=(0.05, 0.4), global_size=224)
    assert recipe.resolve(100)[0].decode_size == math.ceil(96 / 0.05**0.5) == 430
    assert Recipe(multi_crop=False).resolve(100)[0].decode_size == math.ceil(224 / 0.4**0.5)
    assert Recipe(global_size=16, local_size=16, local_scale=(0.001, 1)).resolve(9)[0].decode_size == 64
    assert Recipe(decode_size=50).resolve(9)[0].decode_size == 50


def test_warm_ups_longer_than_half_of_the_run_shrink_and_it_is_told() -> None:
    recipe = Recipe(epochs=10, warmup_epochs=10, teacher_temperature_warmup_epochs=30, freeze_last_layer_epochs=1)
    resolved, remarks = recipe.resolve(100)
    assert (resolved.warmup_epochs, resolved.teacher_temperature_warmup_epochs) == (1, 3)
    assert resolved.freeze_last_layer_epochs == 1
    assert remarks == [
        "warmup_epochs shrunk from 10 to 1, as the run has 10 epochs",
        "teacher_temperature_warmup_epochs shrunk from 30 to 3, as the run has 10 epochs",
    ]


def test_no_warm_up_takes_more_than_half_of_the_run() -> None:
    resolved, _ = Recipe(epochs=1, warmup_epochs=90, freeze_last_layer_epochs=1).resolve(100)
    assert (resolved.warmup_epochs, resolved.freeze_last_layer_epochs) == (0.5, 0.01)


def test_the_heads_warm_up_counts_only_with_weights_to_start_from() -> None:
    recipe = Recipe(epochs=1, warmup_epochs=0, freeze_last_layer_epochs=0, init_head_warmup_epochs=1)
    assert recipe.resolve(100)[1] == []
    resolved, remarks = recipe.resolve(100, from_weights=True)
    assert resolved.init_head_warmup_epochs == 0.01
    assert remarks == ["init_head_warmup_epochs shrunk from 1 to 0.01, as the run has 1 epochs"]
