"""The recipe of the checkpoint that ships, run for two steps on made-up speeches."""

import csv
import hashlib
import importlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opt_core.evaluation import evaluate, windows
from opt_core.tokenizer import OPTTokenizer
from opt_torch import OPTForCausalLM

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
WORDS = ("my", "lord", "the", "king", "and", "of", "good", "not", "will", "be", "thy", "sweet")


def speeches(count: int) -> str:
    draw = random.Random(0)
    lines = (" ".join(draw.choices(WORDS, k=12)).capitalize() for _ in range(count))
    return "".join(f"{draw.choice(['ANNA', 'BERTRAM'])}:\n{line}.\n\n" for line in lines)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "train_tiny_opt.py"), *map(str, arguments)],
        # One thread: beside other work, two would spend their time waiting for each other.
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "speeches.txt"
    path.write_text(speeches(400), "utf-8")
    return path


@pytest.fixture(scope="module")
def train(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def trained(seed: str) -> Path:
        out = tmp_path_factory.mktemp("trained") / "small"
        done = run("--text", text, "--out", out, "--steps", "2", "--seed", seed)
        assert done.returncode == 0, done.stderr
        return out

    return trained


@pytest.fixture(scope="module")
def folder(train: Callable[[str], Path]) -> Path:
    return train("3")


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "training.json").read_text("utf-8"))
    return values


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("train_tiny_opt")


def weights_of(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_recipe_writes_a_checkpoint_that_loads_and_continues_a_prompt(folder: Path) -> None:
    model = OPTForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = OPTTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float16
    assert model.config.vocab_size == len(tokenizer)
    prompt = tokenizer("ANNA:\n", return_tensors="pt")["input_ids"]
    assert prompt[0, 0] == tokenizer.bos_token_id
    out = model.float().generate(prompt, max_new_tokens=4, eos_token_id=None)
    assert isinstance(out, torch.Tensor)
    assert out.shape == (1, prompt.shape[1] + 4)


def test_the_recipe_draws_its_losses(folder: Path, record: dict[str, Any]) -> None:
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    with open(folder / "loss.csv", encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["step"] == "2"
    assert float(row["validation"]) == pytest.approx(record["chosen"]["validation"], abs=1e-6)


def test_the_recipe_records_the_text_by_its_name_and_hash(
    folder: Path, record: dict[str, Any], text: Path
) -> None:
    expected = hashlib.sha256(text.read_bytes()).hexdigest()
    assert record["text"]["sha256"] == expected
    assert record["text"]["file"] == text.name
    card = (folder / "README.md").read_text("utf-8")
    assert expected in card
    assert "--text speeches.txt --out small --steps 2 --seed 3" in card
    assert str(text.parent) not in card


def test_the_recorded_loss_is_that_of_the_written_weights_on_the_held_out_text(
    folder: Path, record: dict[str, Any], text: Path
) -> None:
    held_out = text.read_text("utf-8")[record["text"]["train_characters"] :]
    assert len(held_out) == record["text"]["held_out_characters"]
    assert len(held_out) == pytest.approx(len(text.read_text("utf-8")) / 10, rel=0.1)
    model = OPTForCausalLM.from_pretrained(folder)
    ids = OPTTokenizer.from_pretrained(folder).encode(held_out)

    @torch.no_grad()
    def logits(rows: Any) -> Any:
        return np.asarray(model(torch.from_numpy(rows)).logits)

    result = evaluate(held_out, ids, logits, windows(len(ids), window=256, stride=128))
    assert result.nats_per_token == pytest.approx(record["held_out"]["nats_per_token"], rel=1e-5)
    assert result.nats_per_token < record["guess"]


def test_the_tokenizer_has_not_seen_the_held_out_text(
    text: Path, tmp_path: Path, folder: Path, record: dict[str, Any], recipe: Any
) -> None:
    train_part = text.read_text("utf-8")[: record["text"]["train_characters"]]
    again = recipe.train_tokenizer(train_part, recipe.Recipe(steps=1, seed=0).vocabulary)
    again.save_pretrained(tmp_path)
    name = "tokenizer.json"
    assert (tmp_path / name).read_text("utf-8") == (folder / name).read_text("utf-8")


def test_the_same_seed_writes_the_same_weights(folder: Path, train: Callable[[str], Path]) -> None:
    assert weights_of(train("3")) == weights_of(folder)


@pytest.mark.deep
def test_another_seed_writes_other_weights(folder: Path, train: Callable[[str], Path]) -> None:
    assert weights_of(train("4")) != weights_of(folder)


def test_half_of_the_rows_start_with_the_start_token_and_a_speech(recipe: Any) -> None:
    small = recipe.Recipe(steps=1, seed=0, context=4, rows_per_step=6)
    newline, speech = 9, 7
    ids = torch.tensor([speech, 5, 6, newline, newline] * 8)
    rows = next(recipe.batches(ids, newline, small))
    assert rows.shape == (6, 4)
    assert (rows[3:, :2] == torch.tensor([recipe.START, speech])).all()
    assert not (rows[:3] == recipe.START).any()


def test_every_held_out_token_but_the_last_few_is_predicted_once(recipe: Any) -> None:
    rows = recipe.held_out_rows(torch.arange(10, 21), 4)
    assert rows.tolist() == [[2, 10, 11, 12], [12, 13, 14, 15], [15, 16, 17, 18]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: --text, --out"),
        (("--text", "x", "--out", "y", "--steps", "0"), "--steps is 0; give at least 1"),
    ],
)
def test_a_bad_command_line_is_explained(arguments: Sequence[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_text_that_is_too_short_is_refused(recipe: Any) -> None:
    small = recipe.Recipe(steps=1, seed=0, context=8)
    with pytest.raises(ValueError, match="has 5 tokens to train on; give one with more than 8"):
        next(recipe.batches(torch.arange(5), 9, small))
    with pytest.raises(ValueError, match="held-out part has 5 tokens, expected at least 7: give"):
        recipe.held_out_rows(torch.arange(5), 8)
