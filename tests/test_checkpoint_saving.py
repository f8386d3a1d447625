"""Saving a checkpoint: what is written, and that the folder always reads as the old or the new."""

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save as library_bytes

from opt_core.checkpoint import (
    CheckpointNotFound,
    StoredFile,
    StoredTensor,
    read_index,
    read_safetensors,
    read_safetensors_metadata,
    save,
    size_in_bytes,
    write_file,
)

Array = NDArray[Any]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDED = 3000  # bytes; three shards of the tensors below


def weights(value: float = 1.0) -> dict[str, Array]:
    """Seven tensors of 1000 bytes."""
    return {f"model.decoder.layers.{i}.fc1.bias": np.full(250, value, np.float32) for i in range(7)}


def read(folder: Path) -> dict[str, Array]:
    """All tensors, found as readers find them."""
    single = folder / SINGLE
    found = (
        read_safetensors(single)
        if single.exists()
        else read_index(folder / INDEX, read_safetensors)
    )
    return {name: tensor.read() for name, tensor in found.items()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def shards(count: int) -> set[str]:
    return {f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}


dtypes = st.sampled_from([np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int8])
shapes = st.lists(st.integers(0, 4), max_size=3)


@given(
    tensors=st.dictionaries(st.text('abcé."\\', min_size=1), st.tuples(dtypes, shapes), min_size=1)
)
def test_a_file_is_byte_for_byte_that_of_the_safetensors_library(
    tensors: dict[str, tuple[type, list[int]]], tmp_path: Path
) -> None:
    arrays: dict[str, Array] = {
        name: np.asarray(10 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)
        for name, (dtype, shape) in tensors.items()
    }
    save(tmp_path, arrays)
    assert (tmp_path / SINGLE).read_bytes() == library_bytes(arrays, {"format": "pt"})


def test_shards_have_the_names_the_index_and_the_metadata_of_hugging_face(tmp_path: Path) -> None:
    written = save(tmp_path, weights(), max_shard_size=SHARDED, extra_files={"config.json": b"{}"})
    assert {path.name for path in written} == shards(3) | {INDEX, "config.json"} == names(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 7000}
    held = [read_safetensors(tmp_path / shard) for shard in sorted(shards(3))]
    assert [len(tensors) for tensors in held] == [3, 3, 1]
    assert sum(tensor.shape[0] * 4 for tensors in held for tensor in tensors.values()) == 7000
    for shard in shards(3):
        assert read_safetensors_metadata(tmp_path / shard) == {"format": "pt"}


def test_transformers_reads_one_file_and_shards(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "ffn_dim": 16, "num_attention_heads": 2}
    config = transformers.OPTConfig(vocab_size=20, word_embed_proj_dim=8, **sizes)
    model = transformers.OPTForCausalLM(config)
    state = {k: v.numpy() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for folder, size in ((tmp_path / "one", "5GB"), (tmp_path / "many", 2000)):
        for _ in range(2):  # the second time, shards get other names
            save(folder, state, max_shard_size=size)
        config.save_pretrained(folder)
        loaded = transformers.OPTForCausalLM.from_pretrained(folder).state_dict()
        assert all(np.array_equal(loaded[name].numpy(), state[name]) for name in state)


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(tmp_path: Path) -> None:
    tensors = {"a": np.zeros(10), "b": np.zeros(1000), "c": np.zeros(10), "d": np.zeros(10)}
    save(tmp_path, tensors, max_shard_size=200)
    held = [set(read_safetensors(tmp_path / name)) for name in sorted(shards(3))]
    assert held == [{"a"}, {"b"}, {"c", "d"}]


def test_strided_and_lazy_tensors_are_written_in_c_order(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "raw").write_bytes(values.tobytes())
    lazy = StoredTensor(StoredFile.of(tmp_path / "raw"), 0, (3, 2), values.dtype, (1, 3))
    save(tmp_path, {"array": values.T, "lazy": lazy})
    assert all(np.array_equal(found, values.T) for found in read(tmp_path).values())


def test_memory_stays_below_one_tensor_for_large_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opt_core.checkpoint.saving._BLOCK_BYTES", 1 << 20)
    save(tmp_path, {f"x{i}": np.zeros((64, 32_768), np.float32) for i in range(3)})
    tensors = read_safetensors(tmp_path / SINGLE)
    tracemalloc.start()
    save(tmp_path / "copy", tensors, max_shard_size="10MB")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 << 20
    assert all(not found.any() and found.shape == (64, 32_768) for found in read(tmp_path).values())


def test_a_checkpoint_may_be_saved_over_the_files_it_is_read_from(tmp_path: Path) -> None:
    save(tmp_path, weights(3))
    tensors = read_safetensors(tmp_path / SINGLE)
    mapped = {name: tensor.map() for name, tensor in tensors.items()}
    save(tmp_path, tensors, max_shard_size=SHARDED)
    assert all((found == 3).all() for found in read(tmp_path).values())
    assert all((array == 3).all() for array in mapped.values())
    save(tmp_path, read_index(tmp_path / INDEX, read_safetensors), max_shard_size=SHARDED)
    save(tmp_path, mapped)
    assert all((found == 3).all() for found in read(tmp_path).values())


@pytest.mark.parametrize("before", [None, "5GB", SHARDED, 2000])
@pytest.mark.parametrize("after", ["5GB", SHARDED])
def test_a_save_leaves_its_own_files_and_those_of_others(
    tmp_path: Path, before: int | str | None, after: int | str
) -> None:
    others = {"pytorch_model.bin", "model-notes.txt", "tokenizer.json"}
    for name in others:
        (tmp_path / name).write_text("kept")
    if before is not None:
        save(tmp_path, weights(1), max_shard_size=before)
    (tmp_path / ".saving-0123abcd-model.safetensors.partial").write_text("left by a killed save")
    written = save(tmp_path, weights(2), max_shard_size=after)
    assert names(tmp_path) == others | {path.name for path in written}
    assert all((found == 2).all() for found in read(tmp_path).values())


def test_shards_get_plain_names_unless_the_old_checkpoint_uses_them(tmp_path: Path) -> None:
    save(tmp_path, weights(1), max_shard_size=SHARDED)
    save(tmp_path, weights(2), max_shard_size=2000)
    assert names(tmp_path) == shards(4) | {INDEX}
    save(tmp_path, weights(3), max_shard_size=2000)
    assert len(names(tmp_path)) == 5
    assert not names(tmp_path) & shards(4)


# Every call that changes the folder is preceded and followed by a moment at which the process is
# killed; after each, the folder must read as one of the two checkpoints, and the next save must
# leave nothing of the killed one.
KILLS = """
import os, shutil, signal, sys
from pathlib import Path
from tests.test_checkpoint_saving import read, save, weights

work, before, after = Path(sys.argv[1]), eval(sys.argv[2]), eval(sys.argv[3])
moment = 0
os.fsync = lambda handle: None  # a killed process loses no write that it has made

def killed_around(call, moments):
    def around(*arguments, **options):
        next(moments, None) or os.kill(os.getpid(), signal.SIGKILL)
        result = call(*arguments, **options)
        next(moments, None) or os.kill(os.getpid(), signal.SIGKILL)
        return result
    return around

def child(folder):
    moments = iter([True] * moment)
    for name in ("replace", "unlink", "fsync", "open"):
        setattr(os, name, killed_around(getattr(os, name), moments))
    save(folder, weights(2), max_shard_size=after, extra_files={"config.json": b"2"})
    os._exit(0)

seen = set()
while True:
    folder = work / str(moment)
    if before is not None:
        save(folder, weights(1), max_shard_size=before, extra_files={"config.json": b"1"})
    pid = os.fork()
    if pid == 0:
        child(folder)
    status = os.waitpid(pid, 0)[1]
    try:
        values = {float(v) for found in read(folder).values() for v in found}
    except FileNotFoundError:
        assert before is None, moment
        values = {0.0}
    assert values in ({1.0}, {2.0}) or (before is None and values == {0.0}), (moment, values)
    seen |= values
    written = save(folder, weights(3), max_shard_size=after)
    left = {path.name for path in folder.iterdir()} - {path.name for path in written}
    assert left <= {"config.json"}, (moment, left)
    shutil.rmtree(folder)
    if status == 0:
        break
    moment += 1
print(moment, sorted(seen))
"""


@pytest.mark.parametrize("before", [None, "'5GB'", 3000, 2000])
@pytest.mark.parametrize("after", ["'5GB'", 3000])
def test_a_save_that_is_killed_at_any_moment_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, before: object, after: object
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), str(before), str(after)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    moments, seen = run.stdout.split(" ", 1)
    assert int(moments) >= 8
    assert seen.strip() == ("[0.0, 2.0]" if before is None else "[1.0, 2.0]")


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("size", ["5GB", SHARDED])
@pytest.mark.parametrize("old_size", ["5GB", SHARDED])
def test_a_full_disk_is_reported_and_leaves_the_old_files_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    size: int | str,
    old_size: int | str,
) -> None:
    save(tmp_path, weights(1), max_shard_size=old_size)
    before = names(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"saving into .* failed .*No space.*were there are whole"):
        save(tmp_path, weights(2), max_shard_size=size)
    monkeypatch.undo()
    assert names(tmp_path) == before
    assert all((found == 1).all() for found in read(tmp_path).values())


def test_old_files_that_cannot_be_removed_are_reported_after_the_new_ones_are_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, weights(1), max_shard_size=SHARDED)

    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "unlink", denied)
    with pytest.raises(PermissionError, match="new checkpoint is complete, but old files could"):
        save(tmp_path, weights(2))
    assert all((found == 2).all() for found in read(tmp_path).values())


def test_a_single_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "config.json", b"old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match=r"saving into .*disk full.*were there are whole"):
            write_file(tmp_path / "config.json", b"new")
    assert names(tmp_path) == {"config.json"}
    assert (tmp_path / "config.json").read_bytes() == b"old"
    write_file(tmp_path / "config.json", b"new")
    assert (tmp_path / "config.json").read_bytes() == b"new"
    with pytest.raises(FileNotFoundError, match=r"saving into .*gone failed"):
        write_file(tmp_path / "gone" / "config.json", b"new")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"saving into .*file failed"):
        save(tmp_path / "file", weights())


def test_a_second_save_at_once_is_an_error_and_not_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, weights(1), max_shard_size=2000)
    replace = os.replace

    def after_another(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        save(tmp_path, weights(3), max_shard_size=SHARDED)
        replace(source, target)

    monkeypatch.setattr(os, "replace", after_another)
    with pytest.raises(FileNotFoundError, match="the files that were there are whole"):
        save(tmp_path, weights(2))
    assert all((found == 3).all() for found in read(tmp_path).values())
    assert len(names(tmp_path)) == 4


def test_a_tensor_whose_file_is_gone_is_named_and_nothing_is_replaced(tmp_path: Path) -> None:
    save(tmp_path / "from", weights(2))
    save(tmp_path / "to", weights(1))
    tensors = read_safetensors(tmp_path / "from" / SINGLE)
    (tmp_path / "from" / SINGLE).unlink()
    with pytest.raises(CheckpointNotFound, match="is gone now"):
        save(tmp_path / "to", tensors)
    assert names(tmp_path / "to") == {SINGLE}


def test_saved_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    save(tmp_path, weights())
    assert (tmp_path / SINGLE).stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (7, 7),
        ("1KB", 1000),
        ("300MB", 300_000_000),
        ("5GB", 5 * 10**9),
        ("1.5 GiB", 3 << 29),
        ("2tb", 2 * 10**12),
    ],
)
def test_sizes_are_numbers_or_texts(size: int | str, count: int) -> None:
    assert size_in_bytes(size) == count


@pytest.mark.parametrize(
    "size", [0, -1, True, 1.5, "", "5", "GB", "-1GB", "0MB", "5 parsecs", None]
)
def test_a_bad_shard_size_is_named(tmp_path: Path, size: Any) -> None:
    with pytest.raises(ValueError, match=f"max_shard_size is a positive.*found {size!r}"):
        save(tmp_path / "new", weights(), max_shard_size=size)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("tensors", "extras", "fault"),
    [
        ({}, {}, "at least one tensor, found none"),
        ({"__metadata__": np.zeros(1)}, {}, "'__metadata__' is no name for a tensor"),
        ({"a": np.zeros(1, complex)}, {}, "tensor 'a' has type complex128, expected one of bool"),
        ({"a": np.zeros(1)}, {"../x": b""}, "extra file '../x': expected a plain name"),
        ({"a": np.zeros(1)}, {SINGLE: b""}, "extra file 'model.safetensors': expected a plain"),
    ],
)
def test_what_cannot_be_saved_is_named_before_anything_is_written(
    tmp_path: Path, tensors: dict[str, Array], extras: dict[str, bytes], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        save(tmp_path / "new", tensors, extra_files=extras)
    assert not (tmp_path / "new").exists()


def test_progress_counts_every_byte_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, weights(), max_shard_size=SHARDED, progress=True)
    assert "7.00k/7.00k" in capsys.readouterr().err


def test_a_tensor_without_axes_is_saved(tmp_path: Path) -> None:
    save(tmp_path, {"array": np.array(7), "number": np.array(np.float32(1.5))})
    found = read_safetensors(tmp_path / "model.safetensors")
    assert [found[name].read()[()] for name in ("array", "number")] == [7, 1.5]
