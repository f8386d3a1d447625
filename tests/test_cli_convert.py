"""`optlm convert`: the plan, what it does, and what it says when it does not."""

import os
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest

from opt_core import cli
from opt_core.assets import TINY_OPT
from opt_core.checkpoint import save
from opt_core.weights import EMBEDDING_NAME, Head
from tests.cases import random_weights, tiny
from tests.hub_server import serve
from tests.test_convert import assert_same, contents, make, read


def run(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments)])


def test_the_plan_comes_first_and_then_what_was_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = make(tmp_path / "a")
    assert run(tmp_path / "a", tmp_path / "b", "--to", "flax", "--check") == 0
    shown = capsys.readouterr()
    size = sum(values.nbytes for values in weights.values()) / 1000
    for said in (
        f"from     {tmp_path / 'a'} (safetensors)",
        f"to       {tmp_path / 'b'} (flax)",
        "OPTForCausalLM, 2 layers of width 16",
        f"{len(weights)}, float32",
        f"{size:.1f} kB",
        "flax_model.msgpack, config.json",
        "free",
        "every byte read back as it was written",
    ):
        assert said in shown.out
    assert shown.out.index("from") < shown.out.index("written")
    assert shown.err == ""  # no bar where there is no terminal
    assert_same(read(tmp_path / "b"), weights)


def test_a_dry_run_shows_the_plan_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "a")
    options = ["--to", "pytorch", "--max-shard-size", "4KB", "--dtype", "float16", "--dry-run"]
    assert run(tmp_path / "a", tmp_path / "b", *options) == 0
    shown = capsys.readouterr().out
    assert "pytorch_model-00001-of-0" in shown
    assert "tensors are rounded, from float32 to float16" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text("{}")
    assert run(tmp_path / "a", tmp_path / "b", *options) == 1
    assert "is there already; --force" in capsys.readouterr().err


def test_losses_stop_it_and_allowed_ones_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedding = random_weights(tiny(), Head.CAUSAL_LM)[EMBEDDING_NAME]
    embedding[1, 1] = np.nan
    spoiled: dict[str, Any] = {EMBEDDING_NAME: embedding}
    make(tmp_path / "a", **spoiled)
    assert run(tmp_path / "a", tmp_path / "b", "--to", "tf") == 1
    said = capsys.readouterr().err
    assert f"optlm: tensor '{EMBEDDING_NAME}' holds 1 values that are NaN" in said
    assert "--allow not-finite" in said
    assert run(tmp_path / "a", tmp_path / "b", "--to", "tf", "--allow", "not-finite") == 0
    assert f"{EMBEDDING_NAME} (1)" in capsys.readouterr().out


def test_what_does_not_fit_is_told_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "a")
    assert run(tmp_path / "a", tmp_path / "b", "--to", "tf", "--config", "125m") == 1
    said = capsys.readouterr().err
    assert "does not fit an OPT of 12 layers of width 768" in said
    assert said.rstrip().endswith("convert what is there and has a place")


def test_the_one_that_ships_and_its_configuration_have_a_name(tmp_path: Path) -> None:
    save(tmp_path / "a", read(TINY_OPT))
    assert run("tiny-opt", tmp_path / "b", "--to", "pytorch") == 0
    assert run(tmp_path / "a", tmp_path / "c", "--to", "pytorch", "--config", "tiny-opt") == 0
    assert contents(tmp_path / "c").keys() < contents(tmp_path / "b").keys()


def test_a_repository_tells_its_size_and_is_fetched_when_it_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / "vocab.json").write_text("{}")
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with serve({"facebook/opt-tiny": {**files, "tf_model.h5": b"not fetched"}}) as server:
        server.connect(monkeypatch, tmp_path / "home")
        arguments = ["facebook/opt-tiny", tmp_path / "b", "--to", "pytorch"]
        assert run(*arguments, "--dry-run") == 0
        told = capsys.readouterr().out
        assert server.fetched() == []
        assert run(*arguments) == 0
        assert sorted(server.fetched()) == ["config.json", "model.safetensors", "vocab.json"]
        huggingface_hub.close_session()
    size = sum(map(len, files.values())) / 1000
    listed = "model.safetensors, config.json, vocab.json"
    assert told == f"download  {size:.1f} kB in 3 files: {listed}\n"
    assert os.listdir(tmp_path / "b")
    assert (tmp_path / "b" / "vocab.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--to", "gguf"], "invalid choice: 'gguf' (choose from"),
        (["--to", "tf", "--allow", "all"], "invalid choice: 'all'"),
        ([], "the following arguments are required: --to"),
    ],
)
def test_wrong_usage_is_told(
    option: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "a", tmp_path / "b", *option)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
