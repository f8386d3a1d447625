"""The command: what it prints, how it fails, and that every backend says the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core import __version__, cli
from opt_core.assets import TINY_OPT
from opt_core.checkpoint import save
from opt_core.cli import backends, demo, terminal
from opt_core.cli import generate as generating
from opt_core.config import OPTConfig
from opt_core.generation import GenerationConfig
from opt_core.weights import CheckpointWarning, Head, count_parameters, initial, stored_name, table
from tests.hub_server import serve
from tests.tiny_tokenizer import VOCABULARY, tiny

BACKENDS = [*backends.installed(), backends.NUMPY]
CONFIG = OPTConfig(
    vocab_size=len(VOCABULARY) + 5,
    hidden_size=16,
    num_attention_heads=4,
    num_hidden_layers=2,
    ffn_dim=24,
    max_position_embeddings=48,
    init_std=0.3,
    architectures=["OPTForCausalLM"],
)


def weights(config: OPTConfig, head: Head = Head.CAUSAL_LM) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        stored_name(name, head): initial(row, random) for name, row in table(config, head).items()
    }


def make(folder: Path) -> Path:
    """A folder with everything that a command reads; its model has more ids than its tokenizer."""
    save(folder, weights(CONFIG))
    CONFIG.save_pretrained(folder)
    GenerationConfig.from_model_config(CONFIG).save_pretrained(folder)
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make(tmp_path / "opt")


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


# --- the command itself ------------------------------------------------------------------------


def script(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in a pipe."""
    code = "import sys; from opt_core.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONWARNINGS": "error"}
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=environment, **options
    )


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        run("--version")
    assert capsys.readouterr().out == f"optlm {__version__}\n"


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["generate"], ["inspect"], ["verify"], ["convert"], ["eval"]]
)
def test_every_command_explains_itself(
    capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        run(*command, "--help")
    shown = capsys.readouterr().out
    assert "exit code" in shown.lower() or "examples:" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["generate", "opt"], "required: --prompt"),
        (["generate", "opt", "--prompt", "a", "--top-k", "many"], "invalid int value: 'many'"),
        (["eval", "opt"], "required: --text"),
        (["eval", "opt", "--text", "a", "--backend", "fortran"], "invalid choice: 'fortran'"),
    ],
)
def test_wrong_usage_exits_with_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        run(*arguments)
    assert said in capsys.readouterr().err


def test_a_failure_is_one_message_on_standard_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("inspect", tmp_path) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(
        f"optlm: there are no weights in {tmp_path}: looked for model.safetensors"
    )
    assert "Traceback" not in err


def test_debug_shows_where_a_failure_comes_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("inspect", tmp_path, "--debug") == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert "CheckpointNotFound: there are no weights" in err


def test_an_error_of_a_foreign_kind_says_its_kind(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(backends, "load", broken)
    assert run("generate", checkpoint, "--prompt", "a") == 1
    assert capsys.readouterr().err == "optlm: ZeroDivisionError: by zero (--debug shows where)\n"


def test_an_interrupt_exits_with_130_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(backends, "load", interrupted)
    assert run("generate", checkpoint, "--prompt", "a") == 130
    assert capsys.readouterr().err == "\noptlm: interrupted\n"


def test_a_reader_that_leaves_ends_the_command_quietly(checkpoint: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody:
        code = "import sys; from opt_core.cli import main; sys.exit(main())"
        ended = subprocess.run(
            [sys.executable, "-c", code, "inspect", str(checkpoint)],
            stdout=nobody,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
        )
    assert (ended.returncode, ended.stderr) == (1, "")


def test_a_warning_is_one_line_on_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    def warned(*_: Any) -> int:
        warnings.warn("the head is new", CheckpointWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(generating, "run", warned)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # pytest shows warnings in its own way; this is Python's.
        monkeypatch.setattr(warnings, "_showwarnmsg_impl", _shown)
        warnings.showwarning = warnings._showwarning_orig  # type: ignore[attr-defined]
        assert run("generate", checkpoint, "--prompt", "a") == 0
    assert capsys.readouterr().err == "optlm: warning: the head is new\n"


def _shown(message: Any) -> None:
    print(warnings._formatwarnmsg(message), end="", file=sys.stderr)  # type: ignore[attr-defined]


def test_a_pipe_gets_plain_text_only(checkpoint: Path) -> None:
    ended = script("inspect", checkpoint, "--check")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "\x1b" not in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) < 200


# --- inspect -----------------------------------------------------------------------------------


def test_inspect_shows_format_configuration_and_tensors(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", checkpoint, "--check") == 0
    shown = capsys.readouterr().out
    size = (checkpoint / "model.safetensors").stat().st_size
    for line in (
        rf"checkpoint +{re.escape(str(checkpoint))}",
        "format +safetensors",
        rf"files +model.safetensors \({size / 1000:.1f} kB\)",
        r"types +float32 \(36\)",
        "model +OPTForCausalLM",
        rf"parameters +{count_parameters(CONFIG):,}, head tied",
        "hidden_size +16",
        r"activation_function +\"relu\"",
        r"model.decoder.layers.1.fc1.weight +float32 +24 x 16 +1.5 kB",
        "no problems found",
    ):
        assert re.search(f"(?m)^{line}$", shown), line


def test_inspect_shows_the_names_that_the_file_uses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG.replace(architectures=["OPTModel"])
    save(tmp_path, weights(config, Head.NONE), max_shard_size=4000)
    config.save_pretrained(tmp_path)
    assert run("inspect", tmp_path) == 0
    shown = capsys.readouterr().out
    assert re.search("model +OPTModel\n", shown)
    assert re.search("model.decoder.embed_tokens.weight .* decoder.embed_tokens.weight", shown)
    assert "model-00001-of-" in shown


def test_inspect_reports_every_problem_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = weights(CONFIG)
    del found["model.decoder.layers.0.fc1.bias"]
    found["model.decoder.layers.0.rotary"] = np.zeros(3, np.float32)
    found["model.decoder.layers.1.fc1.bias"] = np.full(24, np.nan, np.float32)
    save(tmp_path, found)
    CONFIG.save_pretrained(tmp_path)
    assert run("inspect", tmp_path) == 1
    shown = capsys.readouterr().out
    assert "problem: " in shown
    assert re.search(r"missing +model.decoder.layers.0.fc1.bias +\(24,\)", shown)
    assert re.search(r"unexpected +model.decoder.layers.0.rotary +\(3,\)", shown)
    assert "NaN" not in shown
    assert run("inspect", tmp_path, "--check") == 1
    said = "problem: there are NaN values in model.decoder.layers.1.fc1.bias"
    assert said in capsys.readouterr().out


def test_inspect_lists_tensors_even_where_the_configuration_is_bad(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"hidden_size": -1}), encoding="utf-8")
    assert run("inspect", checkpoint) == 1
    shown = capsys.readouterr().out
    assert "model.decoder.layers.0.fc1.bias" in shown
    assert "OPTConfig.hidden_size is -1; it must be" in shown


def test_inspect_notes_what_loading_would_warn_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, weights(CONFIG))
    CONFIG.replace(architectures=["OPTForQuestionAnswering"]).save_pretrained(tmp_path)
    assert run("inspect", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "note: " in shown
    assert "holds no qa_outputs.weight, qa_outputs.bias: the new head starts" in shown


# --- eval --------------------------------------------------------------------------------------


def test_eval_gives_the_same_numbers_from_every_backend(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("hello world's größe\n" * 9, encoding="utf-8")
    shown = []
    for backend in BACKENDS:
        assert run("eval", checkpoint, "--text", tmp_path / "text", "--backend", backend) == 0
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1
    figures = dict(line.split(maxsplit=1) for line in shown[0].splitlines())
    assert figures["characters"] == str(9 * 20)
    assert figures["bytes"] == str(9 * 22)
    assert figures["windows"].endswith("of at most 48 tokens, 24 apart")
    nats = float(shown[0].splitlines()[1].split()[-1])
    assert float(figures["perplexity"]) == pytest.approx(np.exp(nats), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--window", "49"], "--window is 49, but the model has 48 positions"),
        (["--window", "8", "--stride", "8"], "stride is 8 and window 8; the stride must be at"),
        (["--stride", "0"], "stride is 0 and window 48"),
    ],
)
def test_eval_refuses_windows_that_do_not_fit(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    (tmp_path / "text").write_text("hello", encoding="utf-8")
    arguments = ["--text", tmp_path / "text", "--backend", "numpy", *options]
    assert run("eval", checkpoint, *arguments) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "the text holds no token to score"), (b"\xff", "text is not UTF-8 text")],
)
def test_eval_refuses_a_text_that_cannot_be_scored(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    said: str,
) -> None:
    (tmp_path / "text").write_bytes(content)
    assert run("eval", checkpoint, "--text", tmp_path / "text", "--backend", "numpy") == 1
    assert said in capsys.readouterr().err


def test_eval_counts_line_ends_as_they_are(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_bytes(b"a\r\nb")
    assert run("eval", checkpoint, "--text", tmp_path / "text", "--backend", "numpy") == 0
    assert re.search("characters +4\n", capsys.readouterr().out)


# --- the hub -----------------------------------------------------------------------------------


def test_a_repository_stands_wherever_a_folder_may(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import huggingface_hub

    (tmp_path / "text").write_text("hello", encoding="utf-8")
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    commands = (
        ["generate", "--prompt", "hello", "--max-new-tokens", "4", "--backend", "numpy"],
        ["eval", "--text", str(tmp_path / "text"), "--backend", "numpy"],
        ["inspect"],
    )
    with serve({"facebook/opt-tiny": files}) as server:
        server.connect(monkeypatch, tmp_path / "home")
        for name, *options in commands:
            shown = []
            for source in ("facebook/opt-tiny", str(checkpoint)):
                assert run(name, source, *options) == 0
                shown.append(capsys.readouterr())
            assert shown[0].err == ""
            if name != "inspect":
                assert shown[0].out == shown[1].out
        huggingface_hub.close_session()
    assert run("inspect", "facebook/opt-tiny", "--local-files-only") == 0
    assert run("inspect", "facebook/opt-tiny", "--revision", "v9", "--local-files-only") == 1
    assert "(revision 'v9')" in capsys.readouterr().err


# --- demo --------------------------------------------------------------------------------------


def test_the_demo_finds_every_installed_wing_equal_to_the_reference(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("demo") == 0
    shown = capsys.readouterr().out
    assert "The continuations are equal everywhere" in shown
    for name in backends.installed():
        assert f"{backends.WINGS[name].title} {backends.WINGS[name].version}" in shown


def test_the_draws_of_the_demo_lie_far_enough_from_their_edges_to_be_compared() -> None:
    from opt_core.tokenizer import OPTTokenizer

    tokenizer, reference = OPTTokenizer.from_pretrained(TINY_OPT), backends.NumpyReference(TINY_OPT)
    prompt = np.array([tokenizer(demo.PROMPT)["input_ids"]])
    for options in (demo.GREEDY, demo.SAMPLED):
        steps = list(reference.tokens_with_margins(prompt, tokenizer, options))
        assert len(steps) == demo.NEW_TOKENS
        assert min(margin for _, margin in steps) > 1e-4


def test_the_demo_takes_one_thread_and_gives_the_others_back() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    with backends.WINGS["torch"].one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_notes_past_python_are_shown_only_if_the_import_fails(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with terminal.notes_held_back():
        os.write(2, b"a note about the processor\n")
    assert capfd.readouterr().err == ""

    def fail() -> None:
        with terminal.notes_held_back():
            os.write(2, b"why it cannot be imported\n")
            raise ImportError

    with pytest.raises(ImportError):
        fail()
    assert capfd.readouterr().err == "why it cannot be imported\n"


def test_without_a_wing_the_demo_says_how_to_add_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda module: None)
    assert run("demo") == 0
    shown = capsys.readouterr().out
    assert "No wing is installed, so nothing is compared. pip install 'optlm[torch]'" in shown


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"greedy": [5]}, "a wing: the greedy continuation is not the reference's"),
        ({"sampled": [5, 6, 8]}, "a wing: the sampled continuation is not the reference's"),
        ({"error": 2e-5}, "a wing: the logit error 2.0e-05 exceeds 1e-05"),
        ({"error": float("nan")}, "a wing: the logit error nan exceeds 1e-05"),
    ],
)
def test_the_demo_fails_where_a_wing_differs(
    capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    reference = demo.Outcome("NumPy", 0.0, [5, 6], [5, 6, 7], 10.0)
    same = reference._replace(title="a wing", error=1e-6)
    assert demo.report([reference, same], tiny()) == 0
    assert demo.report([reference, same._replace(**changes)], tiny()) == 1
    assert said in capsys.readouterr().out


def test_the_checkpoint_that_ships_has_a_name_unless_a_path_has_it(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    assert run("inspect", "tiny-opt") == 0
    assert str(TINY_OPT) in capsys.readouterr().out
    checkpoint.rename(tmp_path / "tiny-opt")
    monkeypatch.chdir(tmp_path)
    assert run("inspect", "tiny-opt") == 0
    assert str(TINY_OPT) not in capsys.readouterr().out
