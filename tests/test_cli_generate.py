"""`optlm generate`: every backend says the same, and every option can be asked for."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from opt_core import cli
from opt_core.checkpoint import save
from opt_core.cli import asking, backends
from opt_core.config import OPTConfig
from opt_core.generation import OPTIONS, GenerationConfig
from tests.test_cli import BACKENDS, CONFIG, make, run, weights
from tests.tiny_tokenizer import VOCABULARY, ids, tiny


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make(tmp_path / "opt")


#: Each is compiled anew by two frameworks.
LINES = (
    "--sample --seed 3",
    "--num-beams 4 --num-return-sequences 4",
    "--stop ! --bad-word he --bias a=2 --suppress-tokens 5,6",
)
MORE_LINES = (
    "",
    "--guidance-scale 1.5 --negative-prompt hello",
    "--temperature 0.7 --top-k 9 --top-p 0.9 --min-p 0.01 --seed 5",
    "--repetition-penalty 1.5",
    "--ignore-eos --seed 1",
    "--num-beams 3 --length-penalty 0.5 --early-stopping true",
    "--num-beams 4 --num-beam-groups 2 --diversity-penalty 1",
    "--num-beams 3 --force-word ids:7|hello --ignore-eos",
    "--num-return-sequences 2 --seed 5",
    "--penalty-alpha 0.5 --top-k 4",
    "--prompt-lookup 3 --no-repeat-ngram-size 2",
)


@pytest.mark.parametrize(
    "options",
    [
        *map(str.split, LINES),
        *(pytest.param(line.split(), marks=pytest.mark.deep) for line in MORE_LINES),
    ],
    ids=" ".join,
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
        config, generation = CONFIG, GenerationConfig()

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
        ([], {}),
        (["--sample"], {"do_sample": True}),
        (["--seed", "4"], {"do_sample": True, "seed": 4}),
        (["--temperature", "0.5"], {"do_sample": True, "temperature": 0.5}),
        (["--no-sample"], {"do_sample": False}),
        (["--repetition-penalty", "2"], {"repetition_penalty": 2.0}),
        (["--ignore-eos"], {"eos_token_id": None}),
        (["--typical-p", "0.5"], {"do_sample": True, "typical_p": 0.5}),
        (
            ["--penalty-alpha", "0.5", "--top-k", "4"],
            {"penalty_alpha": 0.5, "top_k": 4},
        ),
    ],
)
def test_any_option_of_sampling_means_sampling(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], expected: dict[str, Any]
) -> None:
    asked: list[dict[str, Any]] = []

    class Noting:
        config, generation = OPTConfig(), GenerationConfig()

        def tokens(self, _prompt: Any, _tokenizer: Any, given: dict[str, Any]) -> Iterator[int]:
            asked.append(given)
            return iter(())

    monkeypatch.setattr(backends, "load", lambda *_: Noting())
    assert run("generate", checkpoint, "--prompt", "a", *options) == 0
    assert asked == [{"max_new_tokens": 50, **expected}]


def test_the_models_own_options_count_where_no_flag_says_otherwise(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": None, "num_return_sequences": 2}
    told: dict[tuple[str, ...], dict[str, Any]] = {
        (): {"num_beams": 3},
        ("--num-beams", "2", "--max-new-tokens", "2"): {"num_beams": 2, "max_new_tokens": 2},
        ("--num-beams", "1", "--seed", "4"): {"num_beams": 1, "do_sample": True, "seed": 4},
    }
    GenerationConfig(**own, num_beams=3).save_pretrained(checkpoint)
    for flags, options in told.items():
        assert run("generate", checkpoint, "--prompt", "a", "--backend", "numpy", *flags) == 0
        shown = capsys.readouterr().out
        prompt = np.array([tiny()("a")["input_ids"]])
        backend = backends.NumpyReference(checkpoint)
        rows, _ = backend.sequences(prompt, tiny(), {**own, **options})
        assert len(rows) == 2
        assert all(tiny().decode(row, skip_special_tokens=True) in shown for row in rows)


def test_flags_that_contradict_each_other_are_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", checkpoint, "--prompt", "a", "--ignore-eos", "--eos-token-id", "5") == 1
    assert "--ignore-eos never stops at a token that --eos-token-id" in capsys.readouterr().err


def test_without_a_length_a_long_prompt_gets_what_there_is_room_for(checkpoint: Path) -> None:
    options = cli.parser().parse_args(["generate", str(checkpoint), "--prompt", "a"])
    for room, expected in ((999, 50), (7, 7), (0, 1)):
        assert asking.asked(options, tiny(), room, GenerationConfig())["max_new_tokens"] == expected


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
    assert asking.asked(options, tiny(), 99, GenerationConfig())[flag.option] == expected


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
    asked = asking.asked(options, tiny(), 99, GenerationConfig())
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
    class Several(NamedTuple):
        scores: list[float | None]
        config: OPTConfig = CONFIG
        generation: GenerationConfig = GenerationConfig()

        def sequences(self, *_: Any) -> Any:
            return [ids("Ġhello", "Ċ"), ids("Ġworld", "</s>", "<pad>")], self.scores

    asked = ["--prompt", "a", "--num-beams", 2, "--num-return-sequences", 2]
    for scores, shown in (([-0.5, -1.25], ["-0.5000", "-1.2500"]), ([None, None], ["1", "2"])):
        several = Several(list(scores))
        monkeypatch.setattr(backends, "load", lambda *_, several=several: several)
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
