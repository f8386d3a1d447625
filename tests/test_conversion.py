"""Opening checkpoints of any format and age: formats, names, and every broken one of them."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from conversion import (
    FORMATS,
    WEIGHT_FILES,
    canonical_name,
    open_checkpoint,
    stored_names,
)
from conversion.names import HUGGING_FACE
from conversion.views import Constant
from opt_core.checkpoint import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnsafe,
    save,
)

ROOT = Path(__file__).resolve().parents[2] / "shared" / "reference"
CASES = sorted(path.parent.name for path in ROOT.glob("opt/*/config.json"))
FILES = [
    (case, ending)
    for case in CASES
    for ending in (".safetensors", ".bin")
    if any(ROOT.glob(f"opt/{case}/*{ending}"))
]
VALUES = {"model.decoder.embed_tokens.weight": np.arange(6.0).reshape(2, 3)}


# The reference checkpoints


def state_dict_of(folder: Path, ending: str) -> dict[str, Any]:
    """All tensors of a folder's files with this ending, as torch and safetensors read them."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(folder.glob(f"*{ending}")):
        found |= load_file(path) if ending == ".safetensors" else torch.load(path)
    return found


@pytest.mark.parametrize(("case", "ending"), FILES)
def test_a_reference_checkpoint_opens_with_the_values_that_torch_reads(
    shared: Path, case: str, ending: str, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    folder = shared / "reference/opt" / case
    wanted = state_dict_of(folder, ending)
    for path in folder.glob(f"*{ending}*"):
        shutil.copy(path, tmp_path)
    opened = open_checkpoint(tmp_path)
    dropped = wanted.keys() - opened.original_names.values()
    assert all(name.endswith("decoder.version") for name in dropped)
    for name, tensor in opened.tensors.items():
        original = wanted[opened.original_names[name]]
        assert tensor.shape == tuple(original.shape)
        for values in (tensor.read(), tensor.map()):
            assert values.dtype.name == str(original.dtype).removeprefix("torch.")
            bits = torch.from_numpy(values.reshape(-1).view(np.uint8))
            assert torch.equal(bits, original.contiguous().reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("lm_old_keys")])
def test_old_names_open_under_todays_names(shared: Path, case: str) -> None:
    todays = "lm_post_ln_proj" if case.endswith("proj_dim") else "lm_fp16"
    wanted = set(open_checkpoint(shared / "reference/opt" / todays).tensors)
    if case.endswith("without_final_ln"):
        wanted -= {f"model.decoder.final_layer_norm.{leaf}" for leaf in ("weight", "bias")}
    if case.endswith("lm_head"):
        wanted |= {"lm_head.weight"}
    assert set(open_checkpoint(shared / "reference/opt" / case).tensors) == wanted


@pytest.mark.parametrize(
    ("case", "kind", "fault"),
    [
        (
            "safetensors_truncated_body",
            CheckpointDamaged,
            "model.safetensors of 13636 bytes is cut",
        ),
        ("safetensors_truncated_header", CheckpointDamaged, "model.safetensors of 40 bytes is cut"),
        ("safetensors_empty_file", CheckpointDamaged, "model.safetensors of 0 bytes is cut short"),
        ("safetensors_header_length_beyond_file", CheckpointDamaged, "header too large"),
        ("safetensors_unknown_dtype", CheckpointDamaged, "unknown variant `F33`"),
        ("bin_truncated", CheckpointDamaged, "pytorch_model.bin is cut short or damaged"),
        ("bin_empty_file", CheckpointDamaged, "pytorch_model.bin is empty, damaged or no file"),
        ("bin_random_bytes", CheckpointDamaged, "pytorch_model.bin is empty, damaged or no file"),
        ("bin_malicious_pickle", CheckpointUnsafe, "asks for 'posix.system'"),
        ("bin_malicious_pickle_legacy_format", CheckpointUnsafe, "asks for 'posix.system'"),
        ("bin_value_is_not_a_tensor", CheckpointDamaged, "layers.0.fc1.bias' is no tensor but a"),
        ("index_points_to_missing_shard", CheckpointNotFound, "model-00004-of-00004.safetensors"),
        ("index_path_traversal", CheckpointUnsafe, "said to be in '../../x'"),
        ("index_path_traversal_to_a_real_file", CheckpointUnsafe, "_outside/shard.safetensors'"),
        ("index_names_a_tensor_no_shard_has", CheckpointDamaged, "nothing.weight' should be in"),
        ("index_is_not_json", CheckpointDamaged, "index.json: it is no valid JSON"),
        ("index_shard_truncated", CheckpointDamaged, "model-00001-of-00004.safetensors of 3036"),
        ("no_weights", CheckpointNotFound, "there are no weights in"),
    ],
)
def test_a_broken_checkpoint_is_refused_and_nothing_in_it_runs(
    shared: Path,
    case: str,
    kind: type[Exception],
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(kind) as caught:
        open_checkpoint(shared / "reference/bad" / case)
    assert fault in str(caught.value)
    assert case in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_every_case_of_weights_that_files_alone_do_not_betray_opens(shared: Path) -> None:
    cases = json.loads((shared / "reference/bad/cases.json").read_text())
    opening = {
        case["case"] for case in cases if case["kind"] in ("safetensors", "bin", "sharded")
    } - {
        mark.args[1][i][0]
        for mark in test_a_broken_checkpoint_is_refused_and_nothing_in_it_runs.pytestmark  # type: ignore[attr-defined]
        for i in range(len(mark.args[1]))
    }
    assert len(opening) >= 10
    for case in opening:
        assert open_checkpoint(shared / "reference/bad" / case).tensors


# Formats


def test_a_folder_a_file_of_any_name_and_an_index_open_alike(tmp_path: Path) -> None:
    save(tmp_path / "one", VALUES)
    shutil.copy(tmp_path / "one/model.safetensors", tmp_path / "renamed.data")
    many = VALUES | {"lm_head.weight": np.ones((2, 3))}
    save(tmp_path / "many", many, max_shard_size=1)
    for path in ("one", "one/model.safetensors", "renamed.data"):
        opened = open_checkpoint(tmp_path / path)
        assert opened.format == "safetensors"
        assert opened.metadata == {"format": "pt"}
        assert opened.path == tmp_path / path
        assert [name for name in opened.tensors] == list(VALUES)
    for path in ("many", "many/model.safetensors.index.json"):
        opened = open_checkpoint(str(tmp_path / path))
        assert len(opened.files) == 3
        assert opened.metadata == {"total_size": "96"}
        assert opened.tensors.keys() == many.keys()


def test_safetensors_are_preferred_and_one_file_to_shards(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"decoder.embed_tokens.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).format == "pytorch"
    save(tmp_path / "shards", {"a": np.zeros(1), "b": np.zeros(1)}, max_shard_size=1)
    shutil.copytree(tmp_path / "shards", tmp_path, dirs_exist_ok=True)
    assert open_checkpoint(tmp_path).files[0].name == "model.safetensors.index.json"
    shutil.copy(tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).files[0].name == "model.safetensors"
    assert WEIGHT_FILES[:4] == [
        ["model.safetensors"],
        ["model.safetensors.index.json"],
        ["pytorch_model.bin"],
        ["pytorch_model.bin.index.json"],
    ]
    assert [row.name for row in FORMATS][:2] == ["safetensors", "pytorch"]


def test_a_folder_without_weights_says_what_was_looked_for_and_what_is_there(
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFound, match=r"pytorch_model\.bin.*found an empty folder"):
        open_checkpoint(tmp_path / "empty")
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(CheckpointNotFound, match=r"looked for model.*found empty, model\.gguf"):
        open_checkpoint(tmp_path)


def test_a_path_to_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"no checkpoint at .*gone: no such file"):
        open_checkpoint(tmp_path / "gone")


def test_an_unknown_format_is_named_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"GGUF1234")
    with pytest.raises(CheckpointError, match=r"begins with b'GGUF1234'; known are safetensors"):
        open_checkpoint(tmp_path / "weights.gguf")


def test_one_weight_under_two_names_is_refused(tmp_path: Path) -> None:
    names = ["decoder.layer_norm.bias", "model.decoder.final_layer_norm.bias"]
    save_file({name: np.zeros(1) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointDamaged, match=f"twice, as '{names[0]}' and as '{names[1]}'"):
        open_checkpoint(tmp_path)


# Names


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("model.decoder.layers.3.fc1.weight", "model.decoder.layers.3.fc1.weight"),
        ("decoder.layers.0.final_layer_norm.bias", "model.decoder.layers.0.final_layer_norm.bias"),
        ("layers.11.self_attn.q_proj.bias", "model.decoder.layers.11.self_attn.q_proj.bias"),
        ("embed_positions.weight", "model.decoder.embed_positions.weight"),
        ("decoder.layer_norm.weight", "model.decoder.final_layer_norm.weight"),
        ("layer_norm.weight", "model.decoder.final_layer_norm.weight"),
        ("model.decoder.project_in_dim.weight", "model.decoder.project_in.weight"),
        ("project_out_dim.weight", "model.decoder.project_out.weight"),
        ("decoder.version", None),
        ("version", None),
        ("versions", "versions"),
        ("lm_head.weight", "lm_head.weight"),
        ("score.weight", "score.weight"),
        ("qa_outputs.bias", "qa_outputs.bias"),
        ("encoder.layers.0.fc1.weight", "encoder.layers.0.fc1.weight"),
        ("decoder.rotary.inv_freq", "decoder.rotary.inv_freq"),
    ],
)
def test_a_stored_name_has_one_canonical_name(stored: str, canonical: str | None) -> None:
    assert canonical_name(stored) == canonical


PARTS = ["embed_tokens", "final_layer_norm", "project_in", "project_out", "layers.7.fc2"]
HEADS = ["lm_head.weight", "score.weight", "qa_outputs.weight", "qa_outputs.bias"]
CANONICAL = [f"model.decoder.{part}.weight" for part in PARTS] + HEADS


@given(st.sampled_from(CANONICAL))
def test_every_spelling_of_a_name_leads_back_to_it(canonical: str) -> None:
    spellings = stored_names(canonical)
    assert spellings[0] == canonical
    assert len(set(spellings)) == len(spellings)
    assert {canonical_name(name) for name in spellings} == {canonical}


def test_no_two_names_share_a_spelling() -> None:
    spellings = list(itertools.chain.from_iterable(map(stored_names, CANONICAL)))
    assert len(set(spellings)) == len(spellings)


def test_names_are_kept_in_the_order_of_the_file() -> None:
    names = ["decoder.version", "lm_head.weight", "decoder.embed_tokens.weight"]
    stored = {name: Constant((2, 2), np.dtype(np.float32), 0.0) for name in names}
    assert list(HUGGING_FACE.opened(stored, "here").original_names.items()) == [
        ("lm_head.weight", "lm_head.weight"),
        ("model.decoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    ]
