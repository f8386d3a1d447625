"""The pages that readers see: their code runs, their tables are true, their links lead on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from opt_core import cli
from opt_core.checkpoint import save
from opt_core.generation import GenerationConfig
from tests.tables import ROOT, pages, renewed
from tests.test_cli import CONFIG, weights
from tests.tiny_tokenizer import tiny
from tests.wings import QUICK_TO_COMPILE

PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
DIFFERENCES = "docs/coming-from-transformers.md"


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language, each with the number of the line before its first."""
    text = page.read_text(encoding="utf-8")
    found = _BLOCK.finditer(text)
    return [(text.count("\n", 0, m.start(2)), m[2]) for m in found if m[1] == language]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages speak of: a text, and small random weights for each source."""
    (tmp_path / "book.txt").write_text("To be, or not to be: hello world.\n" * 3, encoding="utf-8")
    for source in ("facebook/opt-125m", "my-opt"):
        config = CONFIG.replace(max_position_embeddings=128)
        save(tmp_path / source, weights(config))
        config.save_pretrained(tmp_path / source)
        GenerationConfig.from_model_config(config).save_pretrained(tmp_path / source)
        tiny().save_pretrained(tmp_path / source)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PAGES)
def test_every_python_block_of_a_page_runs(
    name: str, workplace: Path, pytestconfig: pytest.Config
) -> None:
    code = blocks(PAGES[name], "python")
    for wing, framework in {
        "opt_torch": "torch",
        "opt_tf": "tensorflow",
        "opt_flax": "flax",
    }.items():
        if any(wing in text for _, text in code) and find_spec(framework) is None:
            pytest.skip(f"the page uses {wing}, and {framework} is not installed")
    # As a reader runs it: in a process of its own, where nothing is imported or configured yet.
    script = workplace / "page.py"
    script.write_text(_script(code), encoding="utf-8")
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    if not pytestconfig.getoption("--hypothesis-profile"):
        environment["XLA_FLAGS"] = QUICK_TO_COMPILE
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


def _script(code: list[tuple[int, str]]) -> str:
    """The blocks of a page, each at its lines of the page."""
    script = ""
    for line, text in code:
        script += "\n" * (line - script.count("\n")) + text
    return script


@pytest.mark.parametrize("name", PAGES)
def test_every_command_of_a_page_runs(
    name: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _, text in blocks(PAGES[name], "console"):
        for line in text.splitlines():
            if not line.startswith("optlm ") or "--help" in line:
                continue
            assert cli.main(_words(line)[1:]) == 0, (line, capsys.readouterr().err)


def _words(line: str) -> list[str]:
    """A command line as a shell splits it."""
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    return shown.stdout.split("\0")[:-1]


@pytest.mark.parametrize("name", PAGES)
def test_every_table_that_comes_from_code_is_up_to_date(name: str) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    assert renewed(text) == text, "run `make docs`"


@pytest.mark.parametrize("name", [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md"])
def test_every_link_to_a_file_leads_to_one(name: str) -> None:
    page = ROOT / name
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_size_table_names_every_preset() -> None:
    from opt_core.config import PRESETS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in PRESETS)


def test_every_difference_has_a_test_and_every_test_its_difference() -> None:
    page = (ROOT / DIFFERENCES).read_text(encoding="utf-8")
    items = re.split(r"^- ", page, flags=re.MULTILINE)[1:]
    named = [re.findall(r"`(test_\w+)`", item.partition("\n\n")[0]) for item in items]
    assert all(named), items[named.index([])] if [] in named else ""
    sources = sorted((ROOT / "tests").glob("*/test_differences.py"))
    code = "".join(source.read_text(encoding="utf-8") for source in sources)
    written = re.findall(r"^def (test_\w+)", code, flags=re.MULTILINE)
    listed = [name for names in named for name in names]
    assert sorted(listed) == sorted(written)
