"""The command: what it prints, how it fails, and that every backend says the same."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core import __version__, cli
from opt_core.assets import TINY_OPT
from opt_core.checkpoint import save
from opt_core.cli import asking, backends, demo, terminal
from opt_core.cli import generate as generating
from opt_core.config import OPTConfig
from opt_core.generation import OPTIONS, GenerationConfig
from opt_core.weights import CheckpointWarning, Head, count_parameters, initial, stored_name, table
from tests.hub_server import serve
from tests.tiny_tokenizer import VOCABULARY, ids, tiny

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


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with everything that a command reads; its model has more ids than its tokenizer."""
    folder = tmp_path / "opt"
    save(folder, weights(CONFIG))
    CONFIG.save_pretrained(folder)
    GenerationConfig.from_model_config(CONFIG).save_pretrained(folder)
    tiny().save_pretrained(folder)
    return folder


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


# --- generate ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--sample", "--seed", "3"],
        [
            "--temperature",
            "0.7",
            "--top-k",
            "9",
            "--top-p",
            "0.9",
            "--min-p",
            "0.01",
            "--seed",
            "5",
        ],
        ["--repetition-penalty", "1.5"],
        ["--ignore-eos", "--seed", "1"],
        ["--num-beams", "3", "--length-penalty", "0.5", "--early-stopping", "true"],
        "--num-beams 4 --num-return-sequences 4 --num-beam-groups 2 --diversity-penalty 1".split(),
        ["--num-beams", "3", "--force-word", " a|hello", "--ignore-eos"],
        ["--num-return-sequences", "2", "--seed", "5"],
        ["--penalty-alpha", "0.5", "--top-k", "4"],
        ["--prompt-lookup", "3", "--no-repeat-ngram-size", "2"],
        ["--guidance-scale", "1.5", "--negative-prompt", "hello"],
        ["--stop", "!", "--bad-word", "he", "--bias", "a=2", "--suppress-tokens", "5,6"],
    ],
    ids=lambda options: " ".join(options),
)
def test_every_backend_continues_a_text_in_the_same_way(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, options: list[str]
) -> None:
    shown = []
    for backend in BACKENDS:
        arguments = ["--prompt", "hello world", "--max-new-tokens", "20", "--backend", backend]
        assert run("generate", checkpoint, *arguments, *options) == 0
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1
    assert shown[0].startswith("hello world")
    assert shown[0].endswith("\n")


def test_ids_that_the_tokenizer_lacks_are_never_chosen(checkpoint: Path) -> None:
    spoiled = weights(CONFIG)
    # Every hidden state scores the unknown ids highest, or their opposites.
    spoiled["model.decoder.embed_tokens.weight"][len(VOCABULARY) :] *= 100
    save(checkpoint, spoiled)
    tokenizer, prompt = tiny(), np.array([[2, 5]])
    for name in BACKENDS:
        options = _options(backend=name)
        backend = backends.load(options, checkpoint)
        assert (backend.logits(prompt)[0, -1].argmax() >= len(VOCABULARY)).item()
        for sampling in ({"do_sample": False}, {"do_sample": True, "seed": 0, "top_k": 0}):
            asked = {"max_new_tokens": 12, "eos_token_id": None, **sampling}
            assert max(backend.tokens(prompt, tokenizer, asked)) < len(VOCABULARY)


def _options(**given: Any) -> Any:
    return type("Options", (), {"dtype": None, "device": None, "backend": None, **given})


def test_text_is_shown_token_by_token(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow:
        config = CONFIG

        def tokens(self, *_: Any) -> Iterator[int]:
            for word in ("Ġhello", "Ġworld"):
                seen.append(capsys.readouterr().out)
                yield VOCABULARY[word]

    seen: list[str] = []
    monkeypatch.setattr(backends, "load", lambda *_: Slow())
    assert run("generate", checkpoint, "--prompt", "a") == 0
    assert seen == ["", "a hello"]
    assert capsys.readouterr().out == " world\n"


def test_a_prompt_may_come_from_standard_input(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for prompt in ("hello world", "-"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello world"))
        assert run("generate", checkpoint, "--prompt", prompt, "--backend", "numpy") == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"do_sample": False}),
        (["--sample"], {"do_sample": True}),
        (["--seed", "4"], {"do_sample": True, "seed": 4}),
        (["--temperature", "0.5"], {"do_sample": True, "temperature": 0.5}),
        (["--repetition-penalty", "2"], {"do_sample": False, "repetition_penalty": 2.0}),
        (["--ignore-eos"], {"do_sample": False, "eos_token_id": None}),
        (["--typical-p", "0.5"], {"do_sample": True, "typical_p": 0.5}),
        (
            ["--penalty-alpha", "0.5", "--top-k", "4"],
            {"do_sample": False, "penalty_alpha": 0.5, "top_k": 4},
        ),
    ],
)
def test_any_option_of_sampling_means_sampling(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], expected: dict[str, Any]
) -> None:
    asked: list[dict[str, Any]] = []

    class Noting:
        config = OPTConfig()

        def tokens(self, _prompt: Any, _tokenizer: Any, given: dict[str, Any]) -> Iterator[int]:
            asked.append(given)
            return iter(())

    monkeypatch.setattr(backends, "load", lambda *_: Noting())
    assert run("generate", checkpoint, "--prompt", "a", *options) == 0
    assert asked == [{"max_new_tokens": 50, **expected}]


def test_without_a_length_a_long_prompt_gets_what_there_is_room_for(checkpoint: Path) -> None:
    options = cli.parser().parse_args(["generate", str(checkpoint), "--prompt", "a"])
    for room, expected in ((999, 50), (7, 7), (0, 1)):
        assert asking.asked(options, tiny(), room)["max_new_tokens"] == expected


#: A value for every option that has a flag of its name.
_VALUES: dict[str, tuple[list[str], Any]] = {
    "early_stopping": (["never"], "never"),
    "exponential_decay_length_penalty": (["3,1.5"], (3, 1.5)),
    "remove_invalid_values": ([], True),
    "renormalize_logits": ([], True),
    "suppress_tokens": (["5,6"], [5, 6]),
    "begin_suppress_tokens": (["5,6"], [5, 6]),
    "forced_eos_token_id": (["5"], [5]),
    "eos_token_id": (["5,6"], [5, 6]),
}


@pytest.mark.parametrize("flag", [f for flags in asking.FLAGS.values() for f in flags])
def test_every_flag_sets_the_option_of_its_name(flag: asking.Flag) -> None:
    written, expected = _VALUES.get(flag.option, (["3"], 3))
    name = f"--{flag.option.replace('_', '-')}"
    options = cli.parser().parse_args(["generate", "opt", "--prompt", "a", name, *written])
    assert asking.asked(options, tiny(), 99)[flag.option] == expected


def test_every_option_can_be_asked_for() -> None:
    """But those that say how a program calls, and those of which there are flags for texts."""
    flags = {flag.option for flags in asking.FLAGS.values() for flag in flags}
    texts = {"bad_words_ids", "sequence_bias", "force_words_ids", "stop_strings"}
    calls = {name for name in OPTIONS if name.startswith("output_")}
    calls |= {"return_dict_in_generate", "use_cache", "do_sample", "prompt_lookup_num_tokens"}
    calls |= {"bos_token_id", "pad_token_id"}
    assert flags | texts | calls == set(OPTIONS)


def test_texts_become_tokens(checkpoint: Path) -> None:
    given = ["--bad-word", "hello", "--bad-word", "ids:5,6", "--bias", "a==2.5", "--stop", "x"]
    given += ["--force-word", " world|ids:7", "--force-word", "hello", "--stop", "y"]
    options = cli.parser().parse_args(["generate", str(checkpoint), "--prompt", "a", *given])
    asked = asking.asked(options, tiny(), 99)
    assert asked["bad_words_ids"] == [ids("hello"), [5, 6]]
    assert asked["sequence_bias"] == [(ids("a", "="), 2.5)]
    assert asked["force_words_ids"] == [[ids("Ġworld"), [7]], ids("hello")]
    assert asked["stop_strings"] == ["x", "y"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--bad-word", ""], "'' has no tokens; give a text, or ids: and token ids"),
        (["--bad-word", "ids:a"], "'ids:a' should list token ids, such as ids:5,6"),
        (["--bias", "king"], "--bias 'king' should be a text, = and a number"),
        (["--bias", "king=x"], "--bias 'king=x' should be a text, = and a number"),
        (["--num-beams", "3", "--num-beam-groups", "2"], "num_beams is 3, which 2 groups"),
    ],
)
def test_texts_and_options_that_make_no_sense_are_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    assert run("generate", checkpoint, "--prompt", "a", "--backend", "numpy", *given) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_assistant_drafts_and_changes_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    config = CONFIG.replace(num_hidden_layers=1)
    save(tmp_path / "small", weights(config))
    config.save_pretrained(tmp_path / "small")
    shown = []
    for drafts in ([], ["--assistant", tmp_path / "small", "--num-assistant-tokens", 3]):
        asked = ["--prompt", "hello", "--max-new-tokens", 8, "--seed", 2, "--backend", backend]
        assert run("generate", checkpoint, *asked, *drafts) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_several_sequences_are_a_table_of_one_line_each(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Several:
        config = CONFIG

        def sequences(self, *_: Any) -> Any:
            return [ids("Ġhello", "Ċ"), ids("Ġworld", "</s>", "<pad>")], scores

    monkeypatch.setattr(backends, "load", lambda *_: Several())
    asked = ["--prompt", "a", "--num-beams", 2, "--num-return-sequences", 2]
    for scores, shown in (([-0.5, -1.25], ["-0.5000", "-1.2500"]), ([None, None], ["1", "2"])):
        assert run("generate", checkpoint, *asked) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == ["a", ""]
        rows = [line.split() for line in lines[4:]]
        assert rows == [[shown[0], "hello\\n"], [shown[1], "world"]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_room_for_the_tokens_is_said_before_anything_is_printed(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    arguments = ["--prompt", "hello world", "--max-new-tokens", "99", "--backend", backend]
    assert run("generate", checkpoint, *arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "max_position_embeddings is 48; ask for at most 45 new tokens" in err


def test_the_reference_refuses_a_type_and_a_device(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "a", "--backend", "numpy", "--dtype", "float16", "--device", "cuda"]
    assert run("generate", checkpoint, *options) == 1
    said = "--dtype and --device cannot be honoured: NumPy computes in float64 on the CPU"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", backends.WINGS)
def test_a_backend_that_is_not_installed_names_its_extra(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda module: None)
    assert run("generate", checkpoint, "--prompt", "a", "--backend", name) == 1
    wing = backends.WINGS[name]
    said = f"optlm: --backend {name} needs {wing.title}, which is not installed: pip install"
    assert capsys.readouterr().err == f"{said} 'optlm[{wing.extra}]'\n"


def test_without_any_wing_the_reference_computes(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda module: None)
    assert backends.installed() == []
    assert isinstance(backends.load(_options(), checkpoint), backends.NumpyReference)


def test_a_wing_computes_in_the_type_that_is_asked_for(checkpoint: Path) -> None:
    for name in backends.installed():
        half = backends.load(_options(backend=name, dtype="bfloat16"), checkpoint)
        full = backends.load(_options(backend=name), checkpoint)
        given = np.array([[2, 5, 6]])
        assert half.logits(given).dtype == np.float32
        difference = np.abs(half.logits(given) - full.logits(given)).max()
        assert 0 < difference < 0.1 * np.abs(full.logits(given)).max()


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
