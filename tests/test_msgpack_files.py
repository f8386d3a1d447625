"""`flax_model.msgpack`: read without Flax, written as Flax writes it, damaged in every way."""

import re
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion import open_checkpoint
from conversion.flax_file import is_msgpack, msgpack_writing, read_msgpack, write_msgpack
from conversion.views import Constant
from opt_core.checkpoint import CheckpointDamaged, CheckpointError
from opt_core.config import OPTConfig
from opt_core.weights import Head, switched_off
from tests.cases import SWITCHES, configs, tiny
from tests.fuzz.msgpack import target
from tests.fuzz.mutating import fuzz
from tests.written import assert_holds, assert_reads_by_part, dtypes, heads, weights_of, write

ROOT = Path(__file__).resolve().parents[2] / "shared" / "reference"
CASES = sorted({path.parent.name for path in ROOT.glob("opt/*/flax_model*")})
FILE = "flax_model.msgpack"


def tree_of(name: str, value: Any) -> dict[str, Any]:
    """One value under its keys."""
    first, _, rest = name.partition("/")
    return {first: tree_of(rest, value) if rest else value}


# What others wrote


@pytest.mark.parametrize("case", CASES)
def test_a_reference_checkpoint_holds_the_values_of_its_safetensors(
    shared: Path, case: str, tmp_path: Path
) -> None:
    folder = shared / "reference/opt" / case
    for path in folder.glob("flax_model*"):
        shutil.copy(path, tmp_path)
    opened = open_checkpoint(tmp_path)
    assert opened.format == "flax"
    wanted = {name: t.read() for name, t in open_checkpoint(folder).tensors.items()}
    assert_holds(tmp_path, "flax", wanted, only=False)
    config = OPTConfig.from_pretrained(folder)
    beside = opened.tensors.keys() - wanted.keys()
    assert beside == switched_off(config, Head.CAUSAL_LM).keys()
    for name in beside:
        assert set(opened.tensors[name].read().ravel()) == {float(name.endswith("norm.weight"))}


@pytest.mark.parametrize("case", ["msgpack_garbage", "msgpack_truncated"])
def test_a_broken_reference_file_is_refused_by_name(shared: Path, case: str) -> None:
    with pytest.raises(CheckpointDamaged, match=rf"{case}/flax_model\.msgpack of \d+ bytes is cut"):
        open_checkpoint(shared / "reference/bad" / case)


def test_an_empty_first_shard_is_read_past(shared: Path) -> None:
    index = shared / "reference/opt/lm_sharded/flax_model.msgpack.index.json"
    first = index.parent / "flax_model-00001-of-00006.msgpack"
    assert first.read_bytes() == b"\x80"
    assert read_msgpack(first) == {}
    assert len(open_checkpoint(index).tensors) == 52


def test_the_parameters_of_a_training_are_read_and_the_rest_is_left(tmp_path: Path) -> None:
    serialization = pytest.importorskip("flax.serialization")
    weights = weights_of(tiny(), Head.CAUSAL_LM)
    write(tmp_path, "flax", weights, tiny())
    params = serialization.msgpack_restore((tmp_path / FILE).read_bytes())
    state = {
        "step": 7,
        "params": params,
        "opt_state": {"0": {"count": np.int32(7), "mu": params}, "1": {}, "lr": 0.5, "name": "é"},
        "dropout_rng": np.arange(2, dtype=np.uint32),
        "tx": [None, True, -3, -300, 2**40, b"x", 1.5 + 2j, {"a": [[]]}],
    }
    (tmp_path / FILE).write_bytes(serialization.msgpack_serialize(state))
    assert_holds(tmp_path, "flax", weights)


def test_transposed_types_and_old_names_come_back_canonical(tmp_path: Path) -> None:
    serialization = pytest.importorskip("flax.serialization")
    kernel = np.arange(6, dtype=np.float64).reshape(2, 3)
    tree = {
        "decoder": {"layers": {"0": {"fc1": {"kernel": kernel}}}, "layer_norm": {"bias": kernel[0]}}
    }
    (tmp_path / FILE).write_bytes(serialization.msgpack_serialize(tree))
    opened = open_checkpoint(tmp_path)
    assert dict(opened.original_names) == {
        "model.decoder.layers.0.fc1.weight": "decoder/layers/0/fc1/kernel",
        "model.decoder.final_layer_norm.bias": "decoder/layer_norm/bias",
    }
    weights = {"model.decoder.layers.0.fc1.weight": kernel.T.copy()}
    weights["model.decoder.final_layer_norm.bias"] = kernel[0]
    assert_holds(tmp_path, "flax", weights)


# What we write


@given(config=configs(), head=heads, dtype=dtypes, limit=st.sampled_from([3000, 10**9]))
def test_what_is_written_is_read_back_bit_by_bit(
    config: OPTConfig,
    head: Head,
    dtype: Any,
    limit: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("written")
    weights = weights_of(config, head, dtype)
    counted = write(folder, "flax", weights, config, head, limit=limit)
    assert (limit == 3000) == (folder / f"{FILE}.index.json").is_file()
    opened = open_checkpoint(folder)
    assert counted == sum(t.read().nbytes for t in opened.tensors.values())
    assert opened.tensors.keys() == weights.keys() | switched_off(config, head).keys()
    assert_holds(folder, "flax", weights, only=False)


@pytest.mark.parametrize(
    ("switch", "chunk_bytes"),
    [*((switch, 2**30) for switch in SWITCHES), *(("untied", size) for size in (1000, 64, 6))],
)
def test_flax_writes_the_same_bytes_and_reads_ours(
    switch: str, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serialization = pytest.importorskip("flax.serialization")
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk_bytes)
    monkeypatch.setattr(msgpack_writing, "_CHUNK_BYTES", chunk_bytes)
    config = tiny(**SWITCHES[switch], vocab_size=9, max_position_embeddings=5)
    weights = weights_of(config, Head.CAUSAL_LM, np.float16)
    write(tmp_path, "flax", weights, config)
    assert_holds(tmp_path, "flax", weights, only=switch != "no_bias")
    data = (tmp_path / FILE).read_bytes()
    tree = serialization.msgpack_restore(data)
    kernel = tree["model"]["decoder"]["layers"]["0"]["fc1"]["kernel"]
    np.testing.assert_array_equal(kernel, weights["model.decoder.layers.0.fc1.weight"].T)
    assert serialization.to_bytes(tree) == data


@pytest.mark.parametrize("chunk_bytes", [4, 20, 100, 2000])
def test_parts_of_tensors_in_pieces_are_those_of_the_whole(
    chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(msgpack_writing, "_CHUNK_BYTES", chunk_bytes)
    config = tiny(vocab_size=9, max_position_embeddings=5, num_hidden_layers=1)
    weights = weights_of(config, Head.CAUSAL_LM)
    write(tmp_path, "flax", weights, config)
    assert_reads_by_part(tmp_path, "flax", weights)


@pytest.mark.parametrize("head", Head)
def test_names_are_those_of_transformers(head: Head, tmp_path: Path) -> None:
    write(tmp_path, "flax", weights_of(tiny(), head), tiny(), head)
    names = read_msgpack(tmp_path / FILE).keys()
    prefix = "" if head is Head.NONE else "model/"
    assert f"{prefix}decoder/layers/0/self_attn/q_proj/kernel" in names
    assert f"{prefix}decoder/layers/1/self_attn_layer_norm/scale" in names
    assert f"{prefix}decoder/embed_tokens/embedding" in names


def test_a_name_that_is_a_tensor_and_a_folder_cannot_be_written(tmp_path: Path) -> None:
    tensor = Constant((2,), np.dtype(np.float32), 0.0)
    for names in (["a", "a/b"], ["a/b", "a"]):
        with pytest.raises(CheckpointError, match="is both a tensor and the name of others"):
            write_msgpack(tmp_path / "-".join(names)[:2], dict.fromkeys(names, tensor), print)
    complexes = Constant((2,), np.dtype(np.complex64), 0.0)
    with pytest.raises(CheckpointError, match="complex64 has no place in a file of Flax's"):
        write_msgpack(tmp_path / "c", {"a": complexes}, print)


# Any size


def test_a_tensor_of_gigabytes_is_opened_and_read_by_part(tmp_path: Path) -> None:
    import msgpack

    rows, width = 700, 2**20
    with (tmp_path / FILE).open("wb") as out:
        for data in msgpack_writing._tree(msgpack.Packer(), {"x": _Hole((rows, width))}):
            if isinstance(data, memoryview):
                out.seek(len(data), 1)
            else:
                out.write(data)
        out.truncate(out.tell())
    assert (tmp_path / FILE).stat().st_size > 4 * rows * width
    tracemalloc.start()
    opened = read_msgpack(tmp_path / FILE)["x"]
    assert opened.shape == (rows, width)
    assert not opened.read(slice(rows - 1, None)).any()
    assert tracemalloc.get_traced_memory()[1] < 3 * 4 * width
    tracemalloc.stop()


class _Hole(Constant):
    """Values that nobody looks at, of more bytes than one piece may have."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape, np.dtype(np.float32), 0.0)

    def read(self, part: slice | None = None, *, axis: int = 0) -> Any:
        assert part is not None
        assert axis == 0
        rows = len(range(*part.indices(self.shape[0])))
        return np.empty((rows, self.shape[1]), np.float32)


# Damage


def array(inner: bytes, kind: int = 1) -> bytes:
    """A file of one tensor, as its extension holds it."""
    return b"\x81\xa1x\xc9" + struct.pack(">Ib", len(inner), kind) + inner


def described(shape: bytes, kind: bytes = b"\xa7float32", data: bytes = b"\xc4\x041234") -> bytes:
    return b"\x93" + shape + kind + data


GOOD = array(described(b"\x91\x01"))


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "it is cut short"),
        (b"\x93\x01\x02\x03", "it begins with 0x93, expected a map of parameters"),
        (b"\x05", "it begins with 0x05"),
        (b"\xdf\xff\xff\xff\xff", "it is cut short"),
        (b"\x81\x01\x01", "a key is no text but 0x01"),
        (b"\x81\xdb\xff\xff\xff\xff", "a key takes 4294967295 bytes, expected at most 1024"),
        (b"\x81\xa1\xff\x01", "a key is no text: 'utf-8' codec"),
        (b"\x82\xa1a\x80\xa1a\x80", "'a' is there twice"),
        (b"\x80\x00", "1 bytes follow the end of its tree"),
        (b"\x81\xa1x\x01", "entry 'x' is no tensor but a int"),
        (b"\x81\xa1x\xc0", "entry 'x' is no tensor but a NoneType"),
        (b"\x81\xa1x\xc1", "'x' has the unknown code 0xc1"),
        (b"\x81\xa1x\xda\xff\xff", "it is cut short"),
        (b"\x81\xa1x" * 70 + b"\x80", "it holds more, or deeper, maps than any model"),
        (b"\x81\xa1x" + b"\x91" * 100_000, "it holds more, or deeper, maps than any model"),
        (b"\x81\xa1x\xdd\x00\x02\x00\x00" + b"\xc0" * 2**17, "more, or deeper, maps than any"),
        (b"\x81\xa1x\xc9\xff\xff\xff\xff\x01", "'x' takes 4294967295 bytes, 0 are left"),
        (array(b"12345678", kind=2), "entry 'x' is no tensor but a NoneType"),
        (array(b"\xc0"), "'x' is no shape, type and bytes"),
        (array(b"\x93\xc0"), "'x' is no shape, type and bytes"),
        (array(b"\x92\x90"), "'x' has 2 parts, expected 3, or too many axes"),
        (array(described(b"\xdc\x00\x21" + b"\x01" * 33)), "or too many axes"),
        (array(described(b"\x91\xff")), "'x' has an axis that is no length within this file"),
        (array(described(b"\x92\x00\xcf" + b"\x7f" * 8, data=b"\xc4\x00")), "an axis that is no"),
        (array(described(b"\x91\x02")), "shape (2,) and type float32 lies in 4 bytes, of which 4"),
        (array(described(b"\x91\x01", data=b"\xc4\x0412345")), "lies in 4 bytes, of which 5 are"),
        (array(described(b"\x91\x01", kind=b"\xa6object")), "'x' has type 'object', expected one"),
        (array(described(b"\x91\x01", kind=b"\x07")), "the type of 'x' is no text but 0x07"),
        (array(described(b"\x91\x01", data=b"\xa41234")), "'x' has no bytes but 0xa4"),
        (GOOD[:-1], "'x' takes 17 bytes, 16 are left"),
        (b"\x82\xa3a/b" + GOOD[3:] + b"\xa1a\x81\xa1b" + GOOD[3:], "holds 'a/b' twice"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path, data: bytes, fault: str) -> None:
    path = tmp_path / FILE
    path.write_bytes(data)
    with pytest.raises(CheckpointDamaged, match=re.escape(fault)) as caught:
        read_msgpack(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_the_tensor_that_those_are_made_of_is_sound(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(GOOD)
    assert read_msgpack(tmp_path / FILE)["x"].read().tobytes() == b"1234"
    for kind in (b"\xa2V2", b"\xa6void16", b"\xa8bfloat16"):
        (tmp_path / FILE).write_bytes(array(described(b"\x91\x02", kind=kind)))
        assert read_msgpack(tmp_path / FILE)["x"].dtype.name == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"shape": {"0": 5}}, "in pieces of 4 values"),
        ({"shape": {"0": 1, "1": 2, "2": 2}}, "in one or two axes"),
        ({"shape": {}}, "in pieces of 4 values"),
        ({"shape": {"0": None}}, "are no tensor"),
        ({"shape": {"0": 2, "2": 2}}, "are no tensor"),
        ({"chunks": {}}, "are no tensor"),
        ({"chunks": {"0": np.zeros(2), "1": np.zeros(2, np.float32)}}, "are no tensor"),
        ({"chunks": {"0": np.zeros((2, 2))}}, "in one or two axes"),
        ({"chunks": {"0": np.zeros(4), "1": 1}}, "are no tensor"),
        ({"more": 1}, "are no tensor"),
    ],
)
def test_pieces_that_make_no_tensor_are_refused(
    tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    serialization = pytest.importorskip("flax.serialization")
    whole = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 2}}
    whole |= {"chunks": {"0": np.zeros(3), "1": np.zeros(1)}}
    (tmp_path / FILE).write_bytes(serialization.msgpack_serialize({"a": {"b": whole}}))
    assert read_msgpack(tmp_path / FILE)["a/b"].shape == (2, 2)
    (tmp_path / FILE).write_bytes(serialization.msgpack_serialize({"a": {"b": whole | changes}}))
    with pytest.raises(CheckpointDamaged, match=fault):
        read_msgpack(tmp_path / FILE)


def test_files_are_known_by_how_they_begin(tmp_path: Path) -> None:
    for start in (b"\x80", b"\x81\xa5model", b"\xde\x00\x10\xa1x", b"\xdf\x00\x00\x00\x10\xd9\x20"):
        assert is_msgpack(tmp_path, start)
    for start in (b"", b"\x80\x02}q", b"\x81", b"\x81\x01", b"\x91\xa1x", b"PK\x03\x04", b"\xde"):
        assert not is_msgpack(tmp_path, start)
    shutil.copyfile(__file__, tmp_path / "x.msgpack")
    with pytest.raises(CheckpointDamaged, match="it begins with 0x22, expected a map"):
        open_checkpoint(tmp_path / "x.msgpack")


def test_mutated_files_are_refused_or_read(tmp_path: Path) -> None:
    report = fuzz(target(), tmp_path, count=800, seed=2)
    assert report.failures == []
    assert min(report.outcomes["read"], report.outcomes["CheckpointDamaged"]) > 100
