"""`tf_model.h5`: read without TensorFlow or h5py, written as transformers writes it."""

import itertools
import json
import math
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion import open_checkpoint
from conversion.keras_file import read_tf
from conversion.keras_file.writing import Layout, hdf5_file
from conversion.views import Constant
from opt_core.checkpoint import CheckpointDamaged
from opt_core.config import OPTConfig
from opt_core.weights import CheckpointMismatch, Head, fit, switched_off
from tests.cases import SWITCHES, configs, tiny
from tests.written import assert_holds, assert_reads_by_part, dtypes, heads, weights_of, write

ROOT = Path(__file__).resolve().parents[2] / "shared" / "reference"
CASES = sorted({path.parent.name for path in ROOT.glob("opt/*/tf_model*")})
FILE = "tf_model.h5"
ONES = np.ones(4, np.float32)


# What others wrote


@pytest.mark.parametrize("case", CASES)
def test_a_reference_checkpoint_holds_the_values_of_its_safetensors(
    shared: Path, case: str, tmp_path: Path
) -> None:
    folder = shared / "reference/opt" / case
    for path in folder.glob("tf_model*"):
        shutil.copy(path, tmp_path)
    opened = open_checkpoint(tmp_path)
    assert opened.format == "tf"
    config = OPTConfig.from_pretrained(folder)
    wanted = {
        name: tensor.read().astype(np.float32)
        for name, tensor in open_checkpoint(folder).tensors.items()
        if name != "lm_head.weight"
    }
    assert_holds(tmp_path, "tf", wanted, only=False)
    beside = opened.tensors.keys() - wanted.keys()
    assert beside == switched_off(config, Head.CAUSAL_LM).keys()
    for name in beside:
        assert set(opened.tensors[name].read().ravel()) == {float(name.endswith("norm.weight"))}


def test_a_truncated_reference_file_is_refused_by_name(shared: Path) -> None:
    fault = rf"h5_truncated/{FILE} is damaged .*: it should have \d+ bytes .* and has \d+"
    with pytest.raises(CheckpointDamaged, match=fault):
        open_checkpoint(shared / "reference/bad/h5_truncated", prefer=["tf"])


def test_a_reference_file_with_a_wrong_shape_is_refused_with_both_shapes(shared: Path) -> None:
    folder = shared / "reference/bad/h5_wrong_shape"
    config = OPTConfig.from_pretrained(folder)
    found = open_checkpoint(folder, prefer=["tf"]).tensors
    with pytest.raises(CheckpointMismatch, match=r"expected \(\d+, \d+\), found \(\d+, \d+\)"):
        fit(config, Head.CAUSAL_LM, found, source=str(folder))


def test_a_file_has_the_names_and_lists_of_the_reference(shared: Path, tmp_path: Path) -> None:
    for case, head in [("lm_base", Head.CAUSAL_LM), ("model_post_ln_proj", Head.NONE)]:
        folder = shared / "reference/opt" / case
        config = OPTConfig.from_pretrained(folder)
        write(tmp_path / case, "tf", weights_of(config, head), config, head)
        assert described(tmp_path / case / FILE) == described(folder / FILE)


def test_shards_have_the_names_and_lists_of_the_reference(shared: Path, tmp_path: Path) -> None:
    folder = shared / "reference/opt/lm_sharded"
    config = OPTConfig.from_pretrained(folder)
    write(tmp_path, "tf", weights_of(config, Head.CAUSAL_LM), config, limit=40_000)
    ours, theirs = (
        json.loads((place / f"{FILE}.index.json").read_text())["weight_map"]
        for place in (tmp_path, folder)
    )
    assert ours.keys() == theirs.keys()
    for shard in set(ours.values()):
        names, groups = described(tmp_path / shard)
        assert names == {name.partition("/")[2] for name in ours if ours[name] == shard}
        assert groups == {"": {"layer_names": names}}


def described(path: Path) -> Any:
    """The datasets of a file, and each group's attributes, lists as sets."""
    names: set[str] = set()
    groups: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            names.add(name)
        elif item.attrs:
            groups[name] = {k: v if isinstance(v, str) else set(v) for k, v in item.attrs.items()}

    with h5py.File(path) as file:
        visit("", file)
        file.visititems(visit)
    return names, groups


# What we write


@given(config=configs(), head=heads, dtype=dtypes, limit=st.sampled_from([10**12, 3000]))
def test_every_checkpoint_comes_back_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory,
    config: OPTConfig,
    head: Head,
    dtype: np.dtype[Any],
    limit: int,
) -> None:
    folder = tmp_path_factory.mktemp("written")
    weights = weights_of(config, head, dtype)
    neutral = {
        name: np.full(row.shape, row.mean, dtype)
        for name, row in switched_off(config, head).items()
    }
    counted = write(folder, "tf", weights, config, head, limit=limit)
    assert counted == sum(values.nbytes for values in [*weights.values(), *neutral.values()])
    assert (folder / f"{FILE}.index.json").exists() == (limit == 3000)
    assert_holds(folder, "tf", weights | neutral)


@pytest.mark.parametrize("switch", SWITCHES)
def test_parts_are_read_alone(tmp_path: Path, switch: str) -> None:
    config = tiny(**SWITCHES[switch])
    weights = weights_of(config, Head.CAUSAL_LM)
    write(tmp_path, "tf", weights, config)
    neutral = {
        name: np.full(row.shape, row.mean, np.float32)
        for name, row in switched_off(config, Head.CAUSAL_LM).items()
    }
    assert_reads_by_part(tmp_path, "tf", weights | neutral)


def test_other_programs_read_the_values_of_a_half_type(tmp_path: Path) -> None:
    config = tiny()
    name = "model/tfopt_for_causal_lm/model/decoder/layers.1/fc1/kernel:0"
    for dtype in (np.float16, ml_dtypes.bfloat16):
        weights = weights_of(config, Head.CAUSAL_LM, dtype)
        write(tmp_path / str(np.dtype(dtype)), "tf", weights, config)
        with h5py.File(tmp_path / str(np.dtype(dtype)) / FILE) as file:
            values = np.asarray(file[name]).astype(np.float32)
        wanted = weights["model.decoder.layers.1.fc1.weight"].T.astype(np.float32)
        np.testing.assert_array_equal(values, wanted)


def test_the_same_weights_make_the_same_bytes(tmp_path: Path) -> None:
    weights = weights_of(tiny(), Head.CAUSAL_LM)
    for folder in "ab":
        write(tmp_path / folder, "tf", weights, tiny())
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


def test_tensors_can_be_used_where_they_lie(tmp_path: Path) -> None:
    config = tiny(ffn_dim=96)
    write(tmp_path, "tf", weights_of(config, Head.CAUSAL_LM, np.float16), config)
    for tensor in read_tf(tmp_path / FILE).values():
        assert tensor.offset % (64 if math.prod(tensor.shape) > 1024 else 8) == 0


def test_names_too_many_for_one_attribute_are_listed_in_parts(tmp_path: Path) -> None:
    config = tiny(num_hidden_layers=70)
    write(tmp_path, "tf", weights_of(config, Head.CAUSAL_LM), config)
    with h5py.File(tmp_path / FILE) as file:
        lists = {name: list(value) for name, value in file["model"].attrs.items()}
        assert list(lists) == ["weight_names0", "weight_names1"]
        listed = list(itertools.chain(*lists.values()))
        assert len(listed) == len(set(listed)) == 4 + 70 * 16
        assert all(name in file["model"] for name in listed)
    assert len(open_checkpoint(tmp_path).tensors) == len(listed)


def test_writing_takes_no_memory_that_grows_with_the_tensor(tmp_path: Path) -> None:
    large = Constant((4096, 16384), np.dtype(np.float32), 1.5)
    tracemalloc.start()
    with (tmp_path / FILE).open("xb") as handle:
        handle.writelines(hdf5_file(Layout({"model/x": large}), lambda size: None)[1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 * 2**20 < 256 * 2**20 <= (tmp_path / FILE).stat().st_size
    assert read_tf(tmp_path / FILE)["model/x"].read(slice(4095, 4096))[0, -1] == 1.5


# What else HDF5 files may hold


def made(path: Path, make: Callable[[Any], object], **options: Any) -> Path:
    """A file that h5py wrote."""
    with h5py.File(path, "w", **options) as file:
        make(file)
    return path


@pytest.mark.parametrize("libver", [None, "latest"])
@pytest.mark.parametrize(
    "values",
    [
        np.float32(3),
        np.zeros((3, 0), np.float32),
        np.arange(6, dtype=np.float64).reshape(1, 2, 3),
        np.arange(-3, 3, dtype=np.int8),
        np.arange(3, dtype=np.uint64),
        np.arange(3, dtype=">f4"),
        np.array([b"ab", b"c"]),
        np.array([True, False]),
    ],
    ids=lambda values: f"{values.dtype.str}-{values.ndim}",
)
def test_every_type_of_number_is_read(tmp_path: Path, values: Any, libver: str | None) -> None:
    path = made(
        tmp_path / FILE, lambda file: file.create_dataset("a/b", data=values), libver=libver
    )
    found = read_tf(path)["a/b"].read()
    assert found.shape == values.shape
    assert found.dtype == values.dtype or found.dtype.kind == "V"
    assert found.tobytes() == values.tobytes()


def test_values_inside_the_structure_are_read(tmp_path: Path) -> None:
    def compact(file: Any) -> None:
        how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        how.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((4,))
        h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, space, how).write(
            h5py.h5s.ALL, h5py.h5s.ALL, ONES
        )

    assert read_tf(made(tmp_path / FILE, compact))["x"].read().tolist() == [1, 1, 1, 1]


def test_a_model_of_another_name_is_read_and_its_optimizer_left(tmp_path: Path) -> None:
    def fill(file: Any) -> None:
        file["model_weights/model/my_model/model/decoder/layers.1/fc1/kernel:0"] = np.ones((2, 3))
        file["optimizer_weights/adam/m/x:0"] = ONES

    opened = open_checkpoint(made(tmp_path / FILE, fill))
    assert {k: v.shape for k, v in opened.tensors.items()} == {
        "model.decoder.layers.1.fc1.weight": (3, 2)
    }
    assert opened.left_out == ("optimizer_weights/adam/m/x:0",)
