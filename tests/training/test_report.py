from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dino_index.errors import OutputUnwritable
from dino_training.recipe import Recipe
from dino_training.report import MAX_ATTENTION_SHEETS, draw_chart, evenly_chosen, thin, write_report
from dino_training.sheets import TILE, draw_attention, draw_views

K = 1024
TITLES = [
    "Figures on the probed images", "KL divergence of student and teacher", "Loss", "Entropy of the teacher’s output",
    "Spread of the embeddings", "Images a second", "Learning rate", "Weight decay", "Momentum of the teacher",
    "Temperature of the teacher",
]  # fmt: skip
Record = dict[str, Any]


class Page(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag and wanted.items() <= found.items()]

    @property
    def charts(self) -> dict[str, str]:
        """What each chart says to those who do not see it, by its title."""
        labels = [str(chart["aria-label"]).partition(": ") for chart in self.all("svg", role="img")]
        return {title: summary for title, _, summary in labels}


def step(number: int, **changed: Any) -> Record:
    return {
        "event": "step", "step": number, "epoch": number / 100, "images": number * 64, "loss": 7 - number / 1000,
        "teacher_entropy": 6 - number / 1000, "mean_entropy": 6.5, "kl": 0.2, "learning_rate": 1e-4,
        "weight_decay": 0.04, "momentum": 0.99, "teacher_temperature": 0.04, "grad_norm": 1.0,
        "images_per_second": 1234.5, "skipped_steps": 0, "unreadable": 0,
    } | changed  # fmt: skip


def evaluation(number: int, knn_top1: float | None, copies_found: float) -> Record:
    return {
        "event": "evaluation", "step": number, "epoch": number / 100, "images": number * 64, "knn_top1": knn_top1,
        "copies_found": copies_found, "embedding_std": 0.9, "best": False,
    }  # fmt: skip


def remark(number: int, message: str) -> Record:
    return {"event": "remark", "step": number, "message": message}


def write_run(folder: Path, *records: Record, info: Record | None = None, ending: str = "", **recipe: Any) -> Path:
    folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {"name": "flowers", "num_prototypes": K} | recipe
    (folder / "recipe.yaml").write_text(Recipe(**settings).to_yaml(), "utf-8")
    known = {"status": "running", "images": 5000, "unreadable": 2, "num_prototypes": K, "warnings": []} | (info or {})
    (folder / "run.json").write_text(json.dumps(known), "utf-8")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + ending, "utf-8")
    return folder


def page_of(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    evaluations = [evaluation(100, 0.25, 0.5), evaluation(200, 0.5, 0.6), evaluation(300, 0.375, 0.7)]
    run = write_run(
        tmp_path / "run",
        *[step(number) for number in range(10, 310, 10)],
        *evaluations,
        remark(250, "collapse ahead"),
        info={"started": "2026-03-01T11:00:00+01:00", "warnings": ["few images"]},
    )
    (run / "attention").mkdir()
    for path in (run / "views.png", run / "attention/step-00000100.png", run / "attention/step-00000300.png"):
        Image.new("RGBA", (40, 20), (200, 30, 30, 255)).save(path)
    return run


def test_the_page_shows_how_the_run_goes(run: Path) -> None:
    page = page_of(run)
    assert "flowers running" in page.text
    assert "on 5,000 images, 1,024 prototypes · started 2026-03-01 10:00 UTC" in page.text
    assert "loss, last 6.7 best k-NN accuracy 50.0% epoch 2 last k-NN accuracy 37.5% epoch 3" in page.text
    assert "images seen 19,200 epoch 3 of 100 images/s 1,234 unreadable images 2 skipped steps 0" in page.text
    assert "Remarks and warnings few images Step 250: collapse ahead" in page.text


def test_every_curve_is_drawn_and_told(run: Path) -> None:
    page = page_of(run)
    assert list(page.charts) == TITLES
    assert page.charts["Loss"] == "loss from 6.99 to 6.7, lowest 6.7, highest 6.99"
    assert page.charts["Figures on the probed images"].startswith("k-NN accuracy from 25% to 37.5%, lowest 25%")
    assert len(page.all("polyline")) == len(TITLES) + 2  # two of them have two curves
    assert page.text.count("ln K = 6.931") == 2 + 1  # loss, entropy, and in words
    assert "19,200 images, epoch 3 loss: 6.7" in page.text  # to be read when the mouse is there


def test_pictures_are_inside_the_page(run: Path) -> None:
    images = page_of(run).all("img")
    assert [str(image["alt"])[-8:] for image in images] == ["step 100", "step 300", "al views"]
    for image in images:
        head, data = str(image["src"]).split(",")
        assert head == "data:image/webp;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (40, 20)


def test_the_page_stands_alone(run: Path) -> None:
    page = page_of(run)
    assert "http" not in page.source
    assert "url(" not in page.source
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert all(str(value).startswith("data:") for _, attributes in page.tags
               for name, value in attributes.items() if name in ("src", "href", "srcset"))  # fmt: skip
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_every_setting_is_listed(run: Path) -> None:
    page = page_of(run)
    for key, value in (("architecture", "vit_small_patch16_224"), ("multi_crop", "true"), ("blur_sigma", "[0.1, 2.0]")):
        assert f"{key} {value}" in page.text


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "\"><img src='x'>", "&lt;b&gt; {{ 7*7 }}"])
def test_texts_are_text_and_never_markup(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run", step(10), remark(10, text), info={"warnings": [text], "status": text}, name=text)
    page = page_of(run)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not page.all("img")
    # The name in two titles and the settings, the status in its badge and the settings, the remark, the warning.
    assert "".join(page.texts).count(text) == 3 + 2 + 1 + 1


def test_a_run_without_metrics_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    page = page_of(run)
    assert page.charts == {}
    assert page.text.count("Nothing measured yet.") == len(TITLES)
    assert "images seen 0" in page.text
    assert "Remarks" not in page.text


def test_an_empty_folder_has_a_page(tmp_path: Path) -> None:
    assert "Neither recipe.yaml nor run.json is in the folder." in page_of(tmp_path).text


def test_a_last_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", step(10), step(20), ending='{"event": "step", "step": 30, "lo')
    page = page_of(run)
    assert "images seen 1,280" in page.text
    assert "Remarks" not in page.text


def test_what_is_damaged_is_left_out_and_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", step(10), ending='{"event": "st{"event": "step"}\n' + json.dumps(step(20)) + "\n")
    (run / "recipe.yaml").write_text("a: [", "utf-8")
    (run / "run.json").write_text('{"status": "runn', "utf-8")
    (run / "views.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    text = page_of(run).text
    assert "images seen 1,280" in text
    for problem in (
        "recipe.yaml cannot be read: while parsing",
        "run.json cannot be read: ",
        "views.png cannot be read as a picture",
        "lines of metrics.jsonl passed over because they are damaged: 1",
    ):
        assert problem in text


def test_steps_that_a_resumed_run_repeats_count_once(tmp_path: Path) -> None:
    first = [step(10), step(20), evaluation(20, None, 0.9), step(30, loss=5.0), remark(30, "slow")]
    again = [step(20), evaluation(20, None, 0.5), remark(30, "slow"), step(30, loss=6.5), step(40)]
    page = page_of(write_run(tmp_path / "run", *first, *again))
    assert page.charts["Loss"] == "loss from 6.99 to 6.96, lowest 6.5, highest 6.99"
    assert "best copies found 50.0%" in page.text
    assert page.text.count("Step 30: slow") == 1


def test_numbers_that_are_none_or_infinite_leave_gaps(tmp_path: Path) -> None:
    losses = [7.0, math.nan, 6.0, math.inf]
    page = page_of(write_run(tmp_path / "run", *[step(10 + n, loss=loss) for n, loss in enumerate(losses)]))
    assert page.charts["Loss"] == "loss from 7 to 6, lowest 6, highest 7"
    assert "loss, last inf" in page.text
    assert not re.search(r'(points|cx|cy|x|y)="[^"]*(nan|inf)', page.source)


@pytest.mark.parametrize("loss", ["mse", "infonce"])
def test_a_loss_without_prototypes_has_no_entropies(tmp_path: Path, loss: str) -> None:
    records = [step(n, teacher_entropy=None, mean_entropy=None, kl=None) for n in (10, 20)]
    page = page_of(write_run(tmp_path / "run", *records, info={"num_prototypes": None}, loss=loss))
    assert "Entropy of the teacher’s output" not in page.text
    assert "ln K =" not in page.text
    assert "Loss" in page.charts


def test_attention_is_shown_in_order_of_time_and_not_too_often(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "attention").mkdir()
    for number in range(40):
        Image.new("RGB", (4, 4)).save(run / f"attention/step-{number * 100:08d}.png")
    steps = [int(str(image["alt"]).rsplit(maxsplit=1)[1].replace(",", "")) for image in page_of(run).all("img")]
    assert len(steps) == MAX_ATTENTION_SHEETS
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 3900)


def test_a_page_that_cannot_be_written_leaves_nothing_behind(run: Path) -> None:
    (run / "report.html").mkdir()
    with pytest.raises(OutputUnwritable, match=r"report\.html cannot be written: "):
        write_report(run)
    assert sorted(path.name for path in run.iterdir() if "report" in path.name) == ["report.html"]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=900), st.integers(4, 400))
def test_thinning_keeps_the_outline(values: list[float], at_most: int) -> None:
    points = [(float(place), value) for place, value in enumerate(values)]
    kept = thin(points, at_most)
    assert len(kept) <= at_most
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert (min(y for _, y in kept), max(y for _, y in kept)) == (min(values), max(values))


@given(st.lists(st.floats(-1e9, 1e9).map(lambda value: round(value, 7)), min_size=1, max_size=20), st.booleans())
def test_a_chart_holds_all_of_its_values(values: list[float], from_zero: bool) -> None:
    records = [{"images": place * 64, "v": value} for place, value in enumerate(values)]
    chart = draw_chart(records, {"v": "value"}, from_zero=from_zero)
    assert chart is not None
    assert all(chart.left <= x <= chart.right and chart.top <= y <= chart.bottom for x, y in chart.curves[0].points)
    assert 2 <= len(chart.y_ticks) <= 8
    assert len({label for _, label in chart.y_ticks}) == len(chart.y_ticks)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 0.00012], ["0", "5e-5", "1.0e-4", "1.5e-4"]),
        ([0.99, 0.9972], ["0.990", "0.992", "0.994", "0.996", "0.998"]),
        ([0.996], ["0.985", "0.990", "0.995", "1.000", "1.005", "1.010"]),
        ([0.99996, 0.99999], ["0.99996", "0.99997", "0.99998", "0.99999"]),
        ([0.0, 1400.0], ["0", "500", "1,000", "1,500"]),
    ],
)
def test_ticks_are_round_numbers(values: list[float], labels: list[str]) -> None:
    chart = draw_chart([{"images": 64 * n, "v": value} for n, value in enumerate(values)], {"v": "value"}, small=True)
    assert chart is not None
    assert [label for _, label in chart.y_ticks] == labels


def test_evenly_chosen_items_are_spread() -> None:
    assert evenly_chosen(range(9), 5) == [0, 2, 4, 6, 8]
    assert evenly_chosen(range(3), 5) == [0, 1, 2]


def test_views_stand_in_columns_and_images_in_rows() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (3, 10, 3), np.uint8)
    views = [
        np.broadcast_to(colours[view][:, None, None], (10, side, side, 3)) for view, side in enumerate((32, 32, 12))
    ]
    sheet = np.asarray(draw_views(views).convert("RGB"))
    assert sheet.shape[0] // TILE == 8
    for row in range(8):
        for view in range(3):
            middle = sheet[row * (TILE + 2) + TILE // 2, view * (TILE + 2) + TILE // 2]
            assert np.array_equal(middle, colours[view, row])


def test_heat_is_brightest_where_attention_is_highest() -> None:
    pictures_BHWC = np.full((18, 32, 32, 3), 128, np.uint8)
    maps_BHhw = torch.full((18, 3, 4, 4), 0.01)
    maps_BHhw[:, :, 0, 3] = 0.5
    sheet = draw_attention(pictures_BHWC, maps_BHhw)
    assert sheet.height // TILE == 2  # sixteen, eight a row
    heat = np.asarray(sheet.convert("L"))[:TILE, TILE + 2 : 2 * TILE + 2]
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert row < TILE / 4
    assert column > 3 * TILE / 4
    assert heat[TILE // 2 :].max() < 60 < 160 < heat.max()


def test_a_single_picture_with_even_attention_can_be_drawn() -> None:
    sheet = draw_attention(np.zeros((1, 8, 8, 3), np.uint8), torch.full((1, 2, 3, 3), 0.1))
    assert sheet.size == (2 * TILE + 2, TILE)
