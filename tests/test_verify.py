"""Two checkpoints verified: what counts as different, what the command says, and its exit codes."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion import FORMATS, Verification, open_checkpoint, verify
from conversion.comparing import Result
from conversion.verifying import FieldResult, Verdict, size_to_verify
from opt_core import cli
from opt_core.assets import TINY_OPT
from opt_core.checkpoint import CheckpointDamaged, save
from opt_core.cli import backends, logits
from opt_core.config import OPTConfig
from opt_core.hub import SourceMissing
from opt_core.weights import EMBEDDING_NAME, LM_HEAD_NAME
from tests.test_cli import CONFIG, run, weights

FC1 = "model.decoder.layers.1.fc1.weight"
NORM = "model.decoder.layers.0.final_layer_norm.weight"
BIAS = "model.decoder.layers.0.fc1.bias"
BARE = CONFIG.replace(enable_bias=False, layer_norm_elementwise_affine=False)


def write(
    folder: Path, tensors: dict[str, Any] | None = None, config: OPTConfig | None = CONFIG
) -> Path:
    """A checkpoint in a folder: of fresh weights, unless others are given."""
    save(folder, weights(config or CONFIG) if tensors is None else tensors)
    if config is not None:
        config.save_pretrained(folder)
    return folder


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return write(tmp_path / "a")


def against(a: Path, tensors: dict[str, Any], config: OPTConfig | None = CONFIG) -> Verification:
    """A verified against other tensors, beside it."""
    return verify(a, write(a.parent / "b", tensors, config))


def results(verified: Verification) -> dict[str, Result]:
    """What is not simply identical."""
    found = {entry.name: entry.result for entry in verified.tensors}
    return {name: result for name, result in found.items() if result is not Result.IDENTICAL}


# --- what counts -------------------------------------------------------------------------------


def test_the_same_tensors_are_identical_with_the_checksums_of_their_bytes(a: Path) -> None:
    verified = verify(a, a)
    assert (verified.verdict, verified.sentence) == (
        Verdict.IDENTICAL,
        "identical: 36 tensors, bit for bit",
    )
    for entry in verified.tensors:
        total = hashlib.sha256(weights(CONFIG)[entry.name].tobytes()).hexdigest()
        assert entry.comparison.sha256 == (total, total)


def test_safetensors_and_a_torch_file_of_old_names_are_identical(a: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    old = {
        name.removeprefix("model."): torch.from_numpy(values)
        for name, values in weights(CONFIG).items()
    }
    torch.save(old, tmp_path / "pytorch_model.bin")
    verified = verify(a, tmp_path / "pytorch_model.bin")
    assert verified.verdict is Verdict.IDENTICAL
    assert (verified.a.format, verified.b.format) == ("safetensors", "pytorch")
    entry = next(entry for entry in verified.tensors if entry.name == FC1)
    assert entry.b is not None
    assert entry.b.name == FC1.removeprefix("model.")
    assert verified.fields is None


@given(st.data())
def test_any_single_flipped_bit_of_a_checkpoint_is_found_and_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    found = weights(CONFIG)
    name = data.draw(st.sampled_from(sorted(found)))
    bit = data.draw(st.integers(0, 8 * found[name].nbytes - 1))
    first = write(folder / "a", found, None)
    found[name].reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
    verified = verify(first, write(folder / "b", found, None))
    assert results(verified) == {name: Result.DIFFERENT}
    (entry,) = verified.differing
    place = np.unravel_index(bit // 32, found[name].shape)
    assert entry.comparison.first == tuple(map(int, place))
    assert verified.sentence == "different: 1 of 36 tensors differ"


def test_missing_extra_and_misshapen_tensors_are_named_the_missing_first(a: Path) -> None:
    found = weights(CONFIG)
    found[FC1] = found[FC1] + np.float32(1)
    found["model.decoder.rotary"] = found.pop(BIAS)
    found[NORM] = found[NORM][:-1]
    verified = against(a, found)
    assert results(verified) == {
        BIAS: Result.ONLY_A,
        "model.decoder.rotary": Result.ONLY_B,
        NORM: Result.SHAPES,
        FC1: Result.DIFFERENT,
    }
    assert verified.differing[-1].name == FC1
    by_name = {entry.name: entry.comparison.sha256 for entry in verified.tensors}
    assert by_name[BIAS][1] is by_name["model.decoder.rotary"][0] is None
    assert None not in by_name[NORM]


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_a_rounded_checkpoint_is_equal_after_rounding_both_ways(a: Path, kind: Any) -> None:
    half = {name: values.astype(kind) for name, values in weights(CONFIG).items()}
    b = write(a.parent / "b", half)
    name = np.dtype(kind).name
    for verified in (verify(a, b), verify(b, a)):
        assert verified.verdict is Verdict.ROUNDED
        assert verified.sentence == f"equal after rounding to {name}: 36 tensors"
    wide = {name: values.astype(np.float32) for name, values in half.items()}
    verified = verify(b, write(a.parent / "c", wide))
    assert verified.verdict is Verdict.EQUAL
    assert verified.sentence == "equal in value, stored in different types: 36 tensors"
    wide[FC1][0, 0] *= np.float32(1.1)
    verified = verify(b, write(a.parent / "d", wide))
    assert results(verified)[FC1] is Result.DIFFERENT


@pytest.mark.parametrize("swapped", [False, True])
def test_a_tied_head_in_one_file_alone_is_no_difference(a: Path, swapped: bool) -> None:
    found = weights(CONFIG)
    found[LM_HEAD_NAME] = found[EMBEDDING_NAME].copy()
    b = write(a.parent / "b", found)
    verified = verify(b, a) if swapped else verify(a, b)
    assert results(verified) == {LM_HEAD_NAME: Result.TIED}
    assert verified.verdict is Verdict.IDENTICAL
    found[LM_HEAD_NAME][0, 0] += 1
    verified = against(a, found)
    assert results(verified) == {LM_HEAD_NAME: Result.ONLY_B}


def test_a_tied_pair_may_be_stored_as_the_head_alone(a: Path) -> None:
    found = weights(CONFIG)
    found[LM_HEAD_NAME] = found.pop(EMBEDDING_NAME)
    verified = against(a, found)
    assert results(verified) == {LM_HEAD_NAME: Result.TIED}
    embedding = next(entry for entry in verified.tensors if entry.name == EMBEDDING_NAME)
    assert embedding.b is not None
    assert embedding.b.name == LM_HEAD_NAME


def test_a_head_that_is_not_tied_must_be_there(a: Path) -> None:
    untied = CONFIG.replace(tie_word_embeddings=False)
    found = weights(CONFIG)
    found[LM_HEAD_NAME] = found[EMBEDDING_NAME].copy()
    without = write(a.parent / "without", weights(CONFIG), untied)
    verified = verify(write(a.parent / "with", found, untied), without)
    assert results(verified)[LM_HEAD_NAME] is Result.ONLY_A


def test_what_the_configuration_switches_off_may_be_there_if_it_changes_nothing(a: Path) -> None:
    bare = write(a.parent / "bare", weights(BARE), BARE)
    found = weights(BARE)
    found[NORM], found[BIAS] = np.ones(16, np.float32), np.zeros(24, np.float32)
    verified = verify(bare, write(a.parent / "whole", found, BARE))
    assert results(verified) == {NORM: Result.NEUTRAL, BIAS: Result.NEUTRAL}
    assert verified.verdict is Verdict.IDENTICAL
    found[NORM][3], found[BIAS] = 2, np.zeros(23, np.float32)
    verified = verify(bare, write(a.parent / "wrong", found, BARE))
    assert results(verified) == {NORM: Result.ONLY_B, BIAS: Result.ONLY_B}


def test_zeros_count_where_the_side_without_them_needs_them(a: Path) -> None:
    found = weights(CONFIG)
    found[BIAS][:] = 0
    whole = write(a.parent / "whole", found)
    del found[BIAS]
    assert results(verify(whole, write(a.parent / "b", found))) == {BIAS: Result.ONLY_A}


def test_fields_of_the_configuration_count_unless_they_say_nothing_of_the_model(a: Path) -> None:
    b = write(a.parent / "b", None, CONFIG.replace(architectures=["Other"], dtype="float16"))
    verified = verify(a, b)
    assert {field.name for field in verified.fields or ()} == {"architectures", "torch_dtype"}
    assert verified.verdict is Verdict.IDENTICAL
    CONFIG.replace(activation_function="gelu").save_pretrained(b)
    verified = verify(a, b)
    assert verified.fields == (FieldResult("activation_function", '"relu"', '"gelu"'),)
    assert verified.sentence == "different: the configurations differ in activation_function"


def test_a_field_left_at_its_default_is_that_of_a_file_that_writes_it(a: Path) -> None:
    b = write(a.parent / "b")
    values = json.loads((b / "config.json").read_text())
    del values["activation_function"]
    (b / "config.json").write_text(json.dumps(values))
    assert verify(a, b).fields == ()


def test_a_configuration_out_of_order_is_compared_as_it_is_written(a: Path) -> None:
    b = write(a.parent / "b")
    values = json.loads((b / "config.json").read_text()) | {"hidden_size": -1}
    (b / "config.json").write_text(json.dumps(values))
    assert FieldResult("hidden_size", "16", "-1") in (verify(a, b).fields or ())


def test_files_beside_the_weights_are_listed_and_not_weighed(a: Path) -> None:
    b = write(a.parent / "b")
    for folder, name, text in (
        (a, "vocab.json", '{"a": 1, "b": 2}'),
        (b, "vocab.json", '{"b": 2,\n "a": 1}'),
        (a, "merges.txt", "a b"),
        (b, "merges.txt", "b a"),
        (a, "tokenizer.json", "{"),
        (b, "tokenizer_config.json", "{}"),
    ):
        (folder / name).write_text(text)
    shutil.copy(a / "config.json", a / "generation_config.json")
    shutil.copy(a / "config.json", b / "generation_config.json")
    verified = verify(a, b)
    assert {file.name: file.said for file in verified.files} == {
        "generation_config.json": "identical",
        "tokenizer.json": "only in A",
        "tokenizer_config.json": "only in B",
        "vocab.json": "same content",
        "merges.txt": "different",
    }
    assert verified.verdict is Verdict.IDENTICAL


def test_a_pattern_chooses_tensors_and_must_name_some(a: Path) -> None:
    found = weights(CONFIG)
    found[FC1] = -found[FC1]
    b = write(a.parent / "b", found)
    verified = verify(a, b, tensors="*.layers.0.*")
    assert len(verified.tensors) == 16
    assert verified.sentence == "identical: 16 tensors that '*.layers.0.*' names, bit for bit"
    with pytest.raises(ValueError, match=r"has a tensor named 'model\.none'"):
        verify(a, b, tensors="model.none")


def test_bytes_are_counted_as_they_are_read(a: Path) -> None:
    counted: list[int] = []
    opened = open_checkpoint(a)
    verify(opened, opened, count=counted.append)
    assert sum(counted) == size_to_verify(opened, opened)
    assert size_to_verify(opened, opened, FC1) == 2 * 24 * 16 * 4


def test_what_cannot_be_opened_or_changes_meanwhile_is_an_error(a: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceMissing, match="there is no file or folder"):
        verify(a, tmp_path / "none")
    opened = open_checkpoint(a)
    with (a / "model.safetensors").open("ab") as handle:
        handle.write(b"more")
    with pytest.raises(CheckpointDamaged, match="has changed since the checkpoint was opened"):
        verify(opened, opened)


# --- the command -------------------------------------------------------------------------------


def test_the_command_says_what_differs_the_worst_first_and_fails(
    a: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = weights(CONFIG)
    found[FC1][2, 3] += 4
    found[NORM][5] = np.nan
    del found[BIAS]
    b = write(a.parent / "b", found, CONFIG.replace(dropout=0.3))
    assert run("verify", a, b) == 1
    shown = capsys.readouterr().out
    for line in (
        rf"A +{re.escape(str(a))} \(safetensors, 36 tensors, .* kB\)",
        "identical +33",
        "different +2",
        "only in A +1",
        rf"{FC1} +different +4 +\S+ +1 +\[2, 3\] *",
        rf"{NORM} +different; 1 NaN against a number +inf +inf +1 +\[5\] *",
        rf"{BIAS} +only in A *",
        r"note: config.json: dropout is 0\.1 in A, 0\.3 in B",
        "different: 3 of 36 tensors differ; the configurations differ in dropout",
    ):
        assert re.search(f"(?m)^{line}$", shown), line
    assert shown.index(BIAS) < shown.index(NORM) < shown.index(FC1)


def test_a_long_list_of_differences_is_cut(a: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {name: values + np.float32(1) for name, values in weights(CONFIG).items()}
    assert run("verify", a, write(a.parent / "b", found)) == 1
    shown = capsys.readouterr().out
    assert "… and 16 more" in shown
    assert shown.count("\nmodel.decoder.") == 20


def test_equal_checkpoints_are_a_success_in_few_lines(
    a: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {name: values.astype(np.float16) for name, values in weights(CONFIG).items()}
    found[LM_HEAD_NAME] = found[EMBEDDING_NAME].copy()
    assert run("verify", a, write(a.parent / "b", found)) == 0
    shown = capsys.readouterr().out
    assert "lm_head.weight is only in B, a copy of the embedding: no difference" in shown
    assert shown.endswith("equal after rounding to float16: 37 tensors\n")
    assert len(shown.splitlines()) <= 12


def test_switched_off_tensors_are_one_note(a: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {**weights(BARE), BIAS: np.zeros(24, np.float32), NORM: np.ones(16, np.float32)}
    bare = write(a.parent / "bare", None, BARE)
    assert run("verify", bare, write(a.parent / "b", found, BARE)) == 0
    assert "2 biases and norms that the configuration switches off" in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_opened_fails_with_one_message(
    a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert run("verify", a, tmp_path / "empty") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("optlm: there are no weights in")


def test_a_report_replaces_no_file_unless_asked_to(
    a: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = a.parent / "page.html"
    assert run("verify", a, a, "--report", page) == 0
    assert f"report: {page}\n" in capsys.readouterr().out
    first = page.read_text(encoding="utf-8")
    page.write_text("mine")
    assert run("verify", a, a, "--report", page) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"optlm: --report {page} is there already; --force replaces it\n")
    assert page.read_text() == "mine"
    assert run("verify", a, a, "--report", page, "--force") == 0
    assert len(page.read_text(encoding="utf-8")) == len(first)
    for place in (a, a / "none" / "page.html"):
        assert run("verify", a, a, "--report", place, "--force") == 1
        assert "that is no file in a folder that is there" in capsys.readouterr().err


def test_two_revisions_are_options_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    options = cli.parser().parse_args(["verify", "x/y", "x/y", "--revision-b", "v2"])
    assert (options.revision_a, options.revision_b) == (None, "v2")


# --- logits ------------------------------------------------------------------------------------


def test_every_installed_wing_is_run_on_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(TINY_OPT, tmp_path / "half")
    tensors = open_checkpoint(TINY_OPT).tensors
    half = {name: source.read().astype(ml_dtypes.bfloat16) for name, source in tensors.items()}
    save(tmp_path / "half", half)
    page = tmp_path / "page.html"
    assert run("verify", "tiny-opt", tmp_path / "half", "--run", "--report", page) == 0
    shown, written = capsys.readouterr().out, page.read_text(encoding="utf-8")
    assert re.search(r"NumPy, float64 +\d\.\de-0\d", shown)
    for name in backends.installed():
        wing = backends.WINGS[name]
        row = re.search(rf"{re.escape(wing.title)} \S+ float32 +(\S+) +(\S+) +(\S+)", shown)
        assert row
        a, b, between = map(float, row.groups())
        assert 0 < a < 1e-5 > b > 0
        assert 1e-5 < between < 2e-2
        assert f"<td>{wing.title} {wing.version}, float32</td><td>{row[1]}</td>" in written


def test_a_wing_that_is_not_installed_is_named_as_not_run(
    a: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda module: None)
    page = a.parent / "page.html"
    assert run("verify", a, a, "--run", "--report", page) == 0
    said = "PyTorch, TensorFlow, Flax"
    assert f"not installed, and not run: {said}" in capsys.readouterr().out
    assert f"Not installed, and not run: {said}." in page.read_text(encoding="utf-8")


class Wrong(backends.NumpyReference):
    """A wing whose logits are a little off, on B alone."""

    def __init__(self, source: Path, *_: Any) -> None:
        super().__init__(source)
        self.error = 3e-5 if source.name == "b" else 0.0

    def logits(self, ids: Any, mask: Any = None) -> Any:
        return super().logits(ids, mask) * (1 + self.error)


def test_logits_beyond_the_bound_fail_though_the_weights_are_equal(
    a: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wing = backends.WINGS["torch"]._replace(title="Wrong", module="numpy", load=Wrong)
    monkeypatch.setattr(logits, "WINGS", {"wrong": wing})
    monkeypatch.setattr(logits, "installed", lambda: ["wrong"])
    assert run("verify", a, write(a.parent / "b"), "--run") == 1
    shown = capsys.readouterr().out
    assert "B: 3.0e-05 exceeds 1e-05; A to B: 3.0e-05 exceeds 1e-05" in shown
    assert shown.endswith("identical: 36 tensors, bit for bit\n")


def test_a_model_that_cannot_be_run_is_said_in_its_row(
    a: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda module: None)
    found = weights(CONFIG)
    del found[BIAS]
    assert run("verify", a, write(a.parent / "b", found), "--run") == 1
    shown = capsys.readouterr().out
    assert re.search("NumPy, float64 +B was not run: .* does not fit an OPT", shown)


def test_models_without_logits_are_refused_before_anything_is_compared(
    a: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {**weights(CONFIG), "score.weight": np.zeros((2, 16), np.float32)}
    assert run("verify", a, write(a.parent / "b", found), "--run") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "is an OPTForSequenceClassification; leave it out to compare the weights" in err


def test_the_tokens_of_a_run_fit_any_model_and_some_are_padding() -> None:
    ids, mask = logits.batch(vocabulary=50272, positions=2048)
    assert ids.shape == mask.shape == (3, 8)
    assert mask.sum(axis=1).tolist() == [8, 5, 6]
    assert len(np.unique(ids)) == 24
    for vocabulary, positions in ((1, 1), (3, 2), (24, 8)):
        ids, mask = logits.batch(vocabulary=vocabulary, positions=positions)
        assert ids.shape == (3, min(8, positions))
        assert 0 <= ids.min() <= ids.max() < vocabulary
        assert mask.any(axis=1).all()


# --- the reference data ------------------------------------------------------------------------


def test_all_formats_of_each_reference_case_hold_the_same_values(shared: Path) -> None:
    pairs = 0
    for config in sorted((shared / "reference" / "opt").glob("*/config.json")):
        opened = {}
        for row in FORMATS:
            checkpoint = open_checkpoint(config.parent, prefer=[row.name])
            opened[checkpoint.format] = checkpoint  # another one, if the case lacks this format
        first, *others = opened.values()
        for other in others:
            pairs += 1
            verified = verify(first, other)
            # TensorFlow's files are in single precision whatever the others are.
            allowed = {Verdict.IDENTICAL} | ({Verdict.EQUAL} if other.format == "tf" else set())
            assert verified.verdict in allowed, (config.parent.name, other.format)
    assert pairs > 20, pairs
