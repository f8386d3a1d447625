"""`.keras` and `.weights.h5` of our models: written without Keras, read as Keras writes them."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

from conversion import open_checkpoint
from conversion.keras_file import is_keras, read_keras
from opt_core.checkpoint import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnsafe,
)
from opt_core.config import OPTConfig
from opt_core.weights import Head
from tests.cases import configs, tiny
from tests.fuzz.h5 import trained
from tests.fuzz.mutating import write as write_files
from tests.written import assert_holds, assert_reads_by_part, dtypes, heads, weights_of, write

FILE = "model.keras"
WEIGHTS = "model.weights.h5"


@given(config=configs(), head=heads, dtype=dtypes)
def test_every_model_comes_back_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, config: OPTConfig, head: Head, dtype: np.dtype[Any]
) -> None:
    folder = tmp_path_factory.mktemp("written")
    weights = weights_of(config, head, dtype)
    assert write(folder, "keras", weights, config, head) == sum(v.nbytes for v in weights.values())
    assert [path.name for path in folder.iterdir()] == [FILE]
    assert_holds(folder, "keras", weights)
    with zipfile.ZipFile(folder / FILE) as archive:
        assert archive.testzip() is None
        archive.extract(WEIGHTS, folder)
    (folder / FILE).unlink()
    assert_holds(folder, "keras", weights)


def test_parts_are_read_alone(tmp_path: Path) -> None:
    weights = weights_of(tiny(), Head.QUESTION_ANSWERING)
    write(tmp_path, "keras", weights, tiny(), Head.QUESTION_ANSWERING)
    assert_reads_by_part(tmp_path, "keras", weights)


def test_the_same_weights_make_the_same_bytes(tmp_path: Path) -> None:
    weights = weights_of(tiny(), Head.CAUSAL_LM)
    for folder in "ab":
        write(tmp_path / folder, "keras", weights, tiny())
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


def test_large_tensors_can_be_used_where_they_lie(tmp_path: Path) -> None:
    config = tiny(vocab_size=999)
    write(tmp_path, "keras", weights_of(config, Head.CAUSAL_LM, np.float16), config)
    tensors, _ = read_keras(tmp_path / FILE)
    assert tensors["layers/tfopt_model/decoder/embed_tokens/vars/0"].offset % 64 == 0


@pytest.mark.parametrize("head", Head)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_model_is_described_by_its_class_configuration_and_type(
    tmp_path: Path, head: Head, dtype: Any
) -> None:
    config = tiny(num_labels=3)
    write(tmp_path, "keras", weights_of(config, head, dtype), config, head)
    with zipfile.ZipFile(tmp_path / FILE) as archive:
        described = json.loads(archive.read("config.json"))
        assert archive.namelist() == ["metadata.json", "config.json", WEIGHTS]
    assert described["class_name"] == f"TFOPT{head.value}"
    assert described["registered_name"] == f"optlm>TFOPT{head.value}"
    assert described["config"]["config"] == json.loads(json.dumps(config.to_dict()))
    assert described["config"]["dtype"]["config"] == {"name": np.dtype(dtype).name}


def test_the_state_of_a_training_is_left_out(tmp_path: Path) -> None:
    write_files(tmp_path / "sharded", {n: d for n, d in trained().items() if "00001" not in n})
    one = open_checkpoint(tmp_path / "sharded" / "model_00000.weights.h5")
    assert one.left_out == ("optimizer/vars/0",)
    assert {name: tensor.dtype.name for name, tensor in one.tensors.items()} == {
        "model.decoder.layers.0.fc1.weight": "bfloat16",
        "model.decoder.layers.0.fc1.bias": "float32",
    }


# Shards, which Keras can make of `.weights.h5`


def sharded(folder: Path, weight_map: object) -> Path:
    for number, name in enumerate(["kernel", "bias"]):
        with h5py.File(folder / f"model_{number}.weights.h5", "w") as file:
            file[f"decoder/layers/decoder_layer/fc1/vars/{number}"] = np.ones(2)
            file.attrs["what"] = name
    (folder / "model.weights.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


BOTH = ["model_0.weights.h5", "model_1.weights.h5"]


def test_a_layer_may_be_spread_over_shards(tmp_path: Path) -> None:
    opened = open_checkpoint(sharded(tmp_path, {"/decoder/layers/decoder_layer/fc1/vars": BOTH}))
    assert opened.format == "keras"
    assert [path.name for path in opened.files] == ["model.weights.json", *BOTH]
    fc1 = "model.decoder.layers.0.fc1"
    assert opened.tensors.keys() == {f"{fc1}.weight", f"{fc1}.bias"}


@pytest.mark.parametrize(
    ("weight_map", "error", "fault"),
    [
        ({"a": "../x.weights.h5"}, CheckpointUnsafe, "Nothing outside it was opened"),
        ({"a": ["/etc/passwd"]}, CheckpointUnsafe, "Nothing outside it was opened"),
        ({"a": [7]}, CheckpointUnsafe, "names the shard 7"),
        ({"a": "x.weights.h5"}, CheckpointNotFound, r"lacks the shard x\.weights\.h5"),
        ({"a": "x" * 5000}, CheckpointNotFound, "lacks the shard"),
        ({"a": "model.weights.json"}, None, ""),
        ({"a": ["b.weights.json"]}, CheckpointDamaged, "no sound HDF5 file"),
        ({}, CheckpointDamaged, "has no weight_map"),
        ([], CheckpointDamaged, "has no weight_map"),
    ],
)
def test_an_index_names_files_of_its_own_folder(
    tmp_path: Path, weight_map: object, error: type[Exception] | None, fault: str
) -> None:
    folder = sharded(tmp_path, weight_map)
    (folder / "b.weights.json").write_text('{"weight_map": {"a": "model.weights.json"}}')
    if error is None:
        assert open_checkpoint(folder).tensors == {}
    else:
        with pytest.raises(error, match=fault):
            open_checkpoint(folder)


def test_two_shards_with_the_same_weight_are_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"a": BOTH})
    (folder / BOTH[1]).write_bytes((folder / BOTH[0]).read_bytes())
    with pytest.raises(CheckpointDamaged, match="two shards hold 'decoder/layers"):
        open_checkpoint(folder)


# Which file is whose


def test_weights_under_any_name_are_known_by_their_numbers(tmp_path: Path) -> None:
    write(tmp_path, "keras", weights_of(tiny(), Head.CAUSAL_LM), tiny())
    with zipfile.ZipFile(tmp_path / FILE) as archive:
        (tmp_path / "opt.h5").write_bytes(archive.read(WEIGHTS))
    assert open_checkpoint(tmp_path / "opt.h5").format == "keras"
    assert not is_keras(tmp_path / "opt.h5", b"PK\x03\x04")
    write(tmp_path, "tf", weights_of(tiny(), Head.CAUSAL_LM), tiny())
    assert open_checkpoint(tmp_path / "tf_model.h5").format == "tf"


# What is damaged


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write(tmp_path, "keras", weights_of(tiny(), Head.CAUSAL_LM), tiny())
    return tmp_path / FILE


def repacked(model: Path, compression: int, without: str = "") -> None:
    with zipfile.ZipFile(model) as archive:
        content = {name: archive.read(name) for name in archive.namelist() if name != without}
    with zipfile.ZipFile(model, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def test_a_compressed_archive_is_refused_with_what_to_do(model: Path) -> None:
    repacked(model, zipfile.ZIP_STORED)
    assert len(open_checkpoint(model).tensors) == 36
    repacked(model, zipfile.ZIP_DEFLATED)
    fault = rf"entry '{re.escape(WEIGHTS)}' is compressed or encrypted.*unpack the archive"
    with pytest.raises(CheckpointDamaged, match=fault):
        open_checkpoint(model)


def test_an_archive_without_weights_is_refused(model: Path) -> None:
    repacked(model, zipfile.ZIP_STORED, without=WEIGHTS)
    with pytest.raises(CheckpointDamaged, match=rf"holds no {re.escape(WEIGHTS)}"):
        open_checkpoint(model)


def test_an_archive_cut_anywhere_is_damaged(model: Path) -> None:
    content = model.read_bytes()
    for size in [*range(0, 200, 40), *range(200, len(content), 4999), len(content) - 1]:
        model.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=re.escape(str(model))):
            open_checkpoint(model)
