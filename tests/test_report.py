"""The page of a verification: whole, sound, and true to what was found; nothing in it runs."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from conversion import Verification, verify
from conversion.comparing import Comparison, Result
from conversion.report import Logits, page, printable
from conversion.report.picture import picture, shade
from conversion.verifying import Stored, TensorResult
from tests.test_cli import CONFIG, weights
from tests.test_verify import BIAS, FC1, NORM, write

VOID = {"meta", "br", "rect", "link"}
WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
HOSTILE = '<script>alert("1")</script>&amp;\x1b[31m\u202e\'onload="x'


class Reader(HTMLParser):
    """A page as a browser takes it apart; notes what is opened, and demands that it is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID or (tag == "rect" and not str(self.get_starttag_text()).endswith("/>")):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


@pytest.fixture
def different(tmp_path: Path) -> Verification:
    found = weights(CONFIG)
    found[FC1][2, 3] += 4
    found[HOSTILE] = found.pop(BIAS)
    found[NORM] = found[NORM][:-1]
    b = write(tmp_path / "b", found, CONFIG.replace(dropout=0.3))
    return verify(write(tmp_path / "a"), b)


def shown(verified: Verification, *logits: Logits, not_run: tuple[str, ...] = ()) -> str:
    file = (verified.a.files[0], 1234, "0" * 64)
    return page(
        verified,
        given=("first", HOSTILE),
        files=([file], [file, (Path(HOSTILE), 5678901, "f" * 64)]),
        logits=logits,
        not_run=not_run,
        versions={"optlm": "1.2.3", "Python": "3.11"},
        when=WHEN,
    )


def test_a_page_is_sound_and_says_what_was_compared(different: Verification) -> None:
    read = Reader(shown(different))
    said = " ".join(read.texts)
    assert "✗ different: 4 of 37 tensors differ; the configurations differ in dropout" in said
    assert "2026-01-02 03:04:05 UTC" in said
    for row in (
        ["opened at", str(different.a.path), str(different.b.path)],
        ["format", "safetensors", "safetensors"],
        ["A", "model.safetensors", "1,234", "0" * 64],
        ["B", printable(Path(HOSTILE).name), "5,678,901", "f" * 64],
        ["dropout", "0.1", "0.3", "differs"],
        ["optlm", "1.2.3"],
        ["Python", "3.11"],
    ):
        assert row in read.rows, row


def test_a_page_lists_every_tensor_with_the_figures_that_were_found(
    different: Verification,
) -> None:
    rows = {row[0]: row for row in Reader(shown(different)).rows if len(row) == 8}
    assert list(rows)[1:5] == [printable(e.name) for e in different.differing]
    assert len(rows) == 1 + 37
    (entry,) = (e for e in different.tensors if e.name == FC1)
    a, b = entry.comparison.sha256
    share = f"{entry.comparison.relative:.1e}"
    figures = ["24 x 16", "float32", "different", "4", share, "1 first at [2, 3]"]
    assert rows[FC1] == [FC1, *figures, f"A: {a}B: {b}"]
    assert rows[NORM][1:4] == ["16 / 15", "float32", "shapes differ"]
    same = "model.decoder.layers.0.fc2.weight"
    total = next(e for e in different.tensors if e.name == same).comparison.sha256[0]
    assert rows[same] == [same, "16 x 24", "float32", "identical", "", "", "", total]


def test_nothing_that_a_file_says_becomes_markup(different: Verification) -> None:
    text = shown(different)
    read = Reader(text)
    tags = {tag for tag, _ in read.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "a", "base", "form"}
    allowed = {"onload", "onclick", "src", "href", "srcset", "action"}
    assert not any(allowed & attributes.keys() for _, attributes in read.tags)
    assert HOSTILE not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert '<script>alert("1")</script>' in " ".join(read.texts)
    assert not re.search(r"https?://|url\(|@import", text)


def test_a_browser_is_told_to_run_and_fetch_nothing(different: Verification) -> None:
    metas = [attributes for tag, attributes in Reader(shown(different)).tags if tag == "meta"]
    policy = {"http-equiv": "Content-Security-Policy"}
    policy["content"] = "default-src 'none'; style-src 'unsafe-inline'"
    assert policy in metas


def test_a_page_fits_light_dark_and_paper(different: Verification) -> None:
    text = shown(different)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    assert style.count("{") == style.count("}")
    used = set(re.findall(r"var\(--([\w-]+)\)", style))
    light, dark, paper = (set(re.findall(r"--([\w-]+): #", part)) for part in style.split("@media"))
    assert used == light == dark == paper
    read = Reader(text)
    classes = {str(found.get("class")).split()[0] for tag, found in read.tags if tag == "rect"}
    assert classes <= {found[1] for found in re.finditer(r"rect\.(\w+) \{ fill", style)}


def tensor(name: str, result: Result, relative: float = 0.0) -> TensorResult:
    stored = Stored(name, (2,), "float32")
    gap = Comparison(result, ("0", "1"), largest=relative, relative=relative)
    return TensorResult(name, stored, stored, gap)


@pytest.mark.parametrize(
    ("result", "relative", "expected"),
    [
        (Result.IDENTICAL, 0.0, "same"),
        (Result.EQUAL, 0.0, "same"),
        (Result.TIED, 0.0, "same"),
        (Result.NEUTRAL, 0.0, "same"),
        (Result.ROUNDED, 2e-3, "round"),
        (Result.DIFFERENT, 0.0, "d0"),
        (Result.DIFFERENT, 1e-30, "d0"),
        (Result.DIFFERENT, 1e-8, "d0"),
        (Result.DIFFERENT, 1.1e-8, "d1"),
        (Result.DIFFERENT, 2e-3, "d6"),
        (Result.DIFFERENT, 0.5, "d8"),
        (Result.DIFFERENT, 1.0, "d8"),
        (Result.DIFFERENT, 1.5, "d9"),
        (Result.DIFFERENT, float("inf"), "d9"),
        (Result.DIFFERENT, float("nan"), "d9"),
        (Result.SHAPES, 0.0, "gone"),
        (Result.ONLY_A, 0.0, "gone"),
    ],
)
def test_the_colour_is_the_power_of_ten_of_the_difference(
    result: Result, relative: float, expected: str
) -> None:
    assert shade(tensor("x", result, relative)) == expected


def test_the_picture_has_layers_down_in_order_and_the_rest_in_a_row_of_its_own() -> None:
    names = [f"model.decoder.layers.{i}.fc1.{leaf}" for i in (10, 2, 0) for leaf in ("a", "b")]
    drawn = picture(
        [tensor(name, Result.IDENTICAL) for name in names[:-1]]
        + [tensor(names[-1], Result.DIFFERENT, 1e-3), tensor("lm_head.weight", Result.ONLY_A)]
    )
    read = Reader(f"<div>{drawn}</div>")
    texts = [text for text in read.texts if text.strip()]
    rows = [text for text in texts if text.startswith(("layer ", "outside"))]
    assert rows == ["outside layers", "layer 0", "layer 2", "layer 10"]
    cells = [found for tag, found in read.tags if tag == "rect" and found["width"] == "28"]
    assert [found["class"] for found in cells] == [
        *("gone differs", "same", "d5 differs"),
        *["same"] * 4,
    ]
    across = [(found["x"], found["y"]) for found in cells[1:]]
    assert len(set(across)) == 6
    assert len({x for x, _ in across}) == 2


def test_a_model_of_many_layers_has_one_cell_for_every_tensor() -> None:
    names = [f"model.decoder.layers.{i}.p{j}" for i in range(96) for j in range(16)]
    drawn = picture([tensor(name, Result.IDENTICAL) for name in names])
    assert drawn.count("<title>") == 96 * 16
    assert 'viewBox="0 0 ' in drawn


def test_equal_checkpoints_have_a_green_verdict(tmp_path: Path) -> None:
    a = write(tmp_path / "a")
    text = shown(verify(a, a))
    assert '<p class="verdict good">✓ identical: 36 tensors, bit for bit</p>' in text
    assert "No field differs." in text
    assert "bad-text" not in text[text.index("</style>") :]


def test_a_missing_configuration_is_said(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", weights(CONFIG), None)
    assert "configurations were not compared" in shown(verify(a, b))


def test_logits_stand_in_a_table_with_those_that_were_not_run(different: Verification) -> None:
    scores = np.array([[1.0, -2.0]])
    off = scores + 1e-3
    rows = (
        Logits.of("NumPy", (scores, scores), (scores, scores), None, None),
        Logits.of("PyTorch", (scores, off), (scores, scores), 1e-5, None),
        Logits.of("Flax", ("no memory", scores), (scores, scores), 1e-5, 1e-5),
    )
    assert [row.holds for row in rows] == [True, False, False]
    read = Reader(shown(different, *rows, not_run=("Keras",)))
    assert "logits: PyTorch, Flax beyond the bound" in " ".join(read.texts)
    assert ["PyTorch", "0.0e+00", "5.0e-04", "5.0e-04", "B: 5.0e-04 exceeds 1e-05"] in read.rows
    assert ["Flax", "", "0.0e+00", "", "A was not run: no memory"] in read.rows
    assert "Not installed, and not run: Keras." in read.texts


def test_the_reference_is_not_held_to_itself() -> None:
    exact = (np.array([1.0]), np.array([2.0]))
    row = Logits.of("NumPy", exact, exact, None, 1e-5)
    assert (row.a, row.b, row.between) == (None, None, 1.0)
    assert row.said == "A to B: 1.0e+00 exceeds 1e-05"


def test_logits_that_are_not_numbers_are_beyond_any_bound() -> None:
    spoiled = np.array([1.0, np.nan])
    row = Logits.of("PyTorch", (spoiled, spoiled), (spoiled, spoiled + 0), 1e-5, 1e-5)
    assert not row.holds


def test_logits_of_two_vocabularies_are_not_compared() -> None:
    a, b = np.ones((2, 5)), np.ones((2, 6))
    row = Logits.of("PyTorch", (a, b), (a.copy(), b.copy()), 1e-5, None)
    assert (row.a, row.b, row.between, row.holds) == (0.0, 0.0, None, True)


def test_texts_hide_nothing() -> None:
    assert printable("layer é 層") == "layer é 層"
    assert printable("\x00\x1b\u202e\ud800\n") == "\\x00\\x1b\\u202e\\ud800\\n"


def test_names_of_every_length_are_drawn(different: Verification) -> None:
    long = replace(different.tensors[0], name="x" * 5000)
    drawn = picture([long])
    assert drawn.count("x" * 5000) == 1  # in the title; the label is cut
    assert "x" * 31 + "…" in drawn
