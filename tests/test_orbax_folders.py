"""Orbax's folders: read without Orbax, restored by Orbax, damaged, lying and leading outside."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion import open_checkpoint
from conversion.flax_file import orbax_folder, orbax_writing, read_orbax, write_orbax
from conversion.views import Constant
from opt_core.checkpoint import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnsafe,
)
from opt_core.config import OPTConfig
from opt_core.weights import Head, table
from tests.cases import Arrays, configs, tiny
from tests.written import assert_holds, assert_reads_by_part, dtypes, heads, weights_of, write

pytest.importorskip("tensorstore", reason="the extra [orbax] is not installed")

from tests.fuzz.checksums import mended
from tests.fuzz.mutating import fuzz
from tests.fuzz.orbax import files_of, target

CONFIG = tiny(vocab_size=12, num_hidden_layers=1, max_position_embeddings=6)
KERNEL = "model/decoder/layers/0/fc1/kernel"


def params_of(weights: Arrays, head: Head = Head.CAUSAL_LM, config: OPTConfig = CONFIG) -> Any:
    """The tree of a Flax model's parameters, made from the table alone."""
    tree: dict[str, Any] = {}
    for name, row in table(config, head).items():
        values = weights[name].T.copy() if row.transposed("flax") else weights[name]
        *above, leaf = (
            row.path("flax").removeprefix("model." if head is Head.NONE else "").split(".")
        )
        inner = tree
        for key in above:
            inner = inner.setdefault(key, {})
        inner[leaf] = values
    return tree


def leaves(tree: Any, above: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {above: tree}
    return {n: v for key, inner in tree.items() for n, v in leaves(inner, f"{above}/{key}").items()}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of which every matrix has several along both axes."""
    for module in (orbax_folder, orbax_writing):
        monkeypatch.setattr(module, "STRIPE_BYTES", 300)


# What Orbax wrote


@pytest.mark.parametrize(
    ("database", "zarr3", "dtype"),
    [
        (True, False, "bfloat16"),
        (True, True, np.float32),
        (False, False, np.float32),
        (False, True, "bfloat16"),
    ],
)
def test_what_orbax_saves_is_read(database: bool, zarr3: bool, dtype: Any, tmp_path: Path) -> None:
    orbax = pytest.importorskip("orbax.checkpoint")
    jnp = pytest.importorskip("jax.numpy")
    weights = weights_of(CONFIG, Head.CAUSAL_LM, jnp.dtype(dtype))
    tree = jnp_tree(jnp, params_of(weights))
    with orbax.PyTreeCheckpointer(use_ocdbt=database, use_zarr3=zarr3) as checkpointer:
        checkpointer.save(tmp_path / "params", tree)
    assert (tmp_path / "params/manifest.ocdbt").is_file() == database
    assert_holds(tmp_path, "orbax", weights)
    assert_reads_by_part(tmp_path, "orbax", weights)


def jnp_tree(jnp: Any, tree: Any) -> Any:
    return {
        key: jnp_tree(jnp, inner) if isinstance(inner, dict) else jnp.asarray(inner)
        for key, inner in tree.items()
    }


def standard(path: Path, tree: Any) -> None:
    orbax = pytest.importorskip("orbax.checkpoint")
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()


@pytest.mark.parametrize("head", Head)
def test_what_the_standard_checkpointer_saves_is_read_by_its_own_path(
    head: Head, tmp_path: Path
) -> None:
    weights = weights_of(CONFIG, head)
    standard(tmp_path / "step", params_of(weights, head))
    opened = open_checkpoint(tmp_path / "step")
    assert opened.format == "orbax"
    assert tmp_path / "step/manifest.ocdbt" in opened.files
    assert_holds(tmp_path / "step", "orbax", weights)


def test_the_parameters_of_a_training_are_read_and_the_rest_is_left(tmp_path: Path) -> None:
    weights = weights_of(CONFIG, Head.CAUSAL_LM)
    params = params_of(weights)
    state = {"params": params, "step": 3, "opt_state": [{"mu": params, "count": np.int32(1)}, None]}
    standard(tmp_path / "default", state)
    assert_holds(tmp_path, "orbax", weights)


# What we write


@given(config=configs(), head=heads, dtype=dtypes, stripe=st.sampled_from([300, 2**27]))
def test_what_is_written_is_read_back_bit_by_bit(
    config: OPTConfig, head: Head, dtype: Any, stripe: int, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("written")
    weights = weights_of(config, head, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orbax_writing, "STRIPE_BYTES", stripe)
        counted = write(folder, "orbax", weights, config, head)
    assert counted == sum(values.nbytes for values in weights.values())
    assert [path.name for path in folder.iterdir()] == ["params"]
    assert_holds(folder, "orbax", weights)


@pytest.mark.parametrize(
    ("head", "dtype"),
    [(Head.CAUSAL_LM, np.float32), (Head.NONE, "bfloat16"), (Head.QUESTION_ANSWERING, np.float16)],
)
@pytest.mark.usefixtures("small_chunks")
def test_orbax_restores_what_is_written(head: Head, dtype: Any, tmp_path: Path) -> None:
    orbax = pytest.importorskip("orbax.checkpoint")
    jnp = pytest.importorskip("jax.numpy")
    weights = weights_of(CONFIG, head, jnp.dtype(dtype))
    write(tmp_path, "orbax", weights, CONFIG, head)
    wanted = leaves(params_of(weights, head))
    target = jnp_tree(jnp, params_of(weights, head))
    with orbax.StandardCheckpointer() as checkpointer:
        plain = checkpointer.restore(tmp_path / "params")
        found = checkpointer.restore(tmp_path / "params", target)
    for tree in (plain, found):
        assert leaves(tree).keys() == wanted.keys()
        for name, values in leaves(tree).items():
            assert values.dtype == wanted[name].dtype
            assert np.asarray(values).tobytes() == wanted[name].tobytes()
    assert all(isinstance(leaf, jnp.ndarray) for leaf in leaves(found).values())


def test_orbax_restores_into_places_on_a_mesh(tmp_path: Path) -> None:
    orbax = pytest.importorskip("orbax.checkpoint")
    jax = pytest.importorskip("jax")
    weights = weights_of(CONFIG, Head.CAUSAL_LM)
    write(tmp_path, "orbax", weights, CONFIG)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), params_of(weights)
    )
    with orbax.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "params", shapes)
    assert {leaf.sharding for leaf in leaves(found).values()} == {place}


@pytest.mark.usefixtures("small_chunks")
def test_parts_of_tensors_in_many_chunks_are_those_of_the_whole(tmp_path: Path) -> None:
    weights = weights_of(CONFIG, Head.CAUSAL_LM)
    write(tmp_path, "orbax", weights, CONFIG)
    store = read_orbax(tmp_path / "params")[KERNEL].store
    assert store.chunk_layout.read_chunk.shape == (3, 4)
    assert_reads_by_part(tmp_path, "orbax", weights)


def test_chunks_and_rows_of_them_are_bounded_at_any_size() -> None:
    for shape in [(50272, 12288), (12288, 49152), (2**20, 2**16), (2**30,), (1, 2**31), (0, 5)]:
        source = Constant(shape, np.dtype(np.float32), 0.0)
        chunk = orbax_writing.chunk_shape(source)
        for axis, n in enumerate(chunk):
            rest = shape[:axis] + shape[axis + 1 :]
            assert n == 1 or 4 * n * int(np.prod(rest)) <= orbax_folder.STRIPE_BYTES
            assert 1 <= n <= max(1, shape[axis])
    assert orbax_writing.chunk_shape(Constant((), np.dtype(np.float32), 0.0)) == []


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    integers = Constant((2,), np.dtype(np.int64), 0.0)
    with pytest.raises(CheckpointError, match="'a': int64 has no place in a tree of parameters"):
        write_orbax(tmp_path / "a", {"a": integers}, print)
    with pytest.raises(CheckpointError, match="is both a tensor and the name of others"):
        write_orbax(tmp_path / "b", {"a": integers, "a/b": integers}, print)


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    (tmp_path / "params").mkdir()
    with pytest.raises(ImportError, match=re.escape("pip install 'optlm[orbax]'")):
        open_checkpoint(tmp_path)
    with pytest.raises(ImportError, match="tensorstore, which is not installed"):
        write_orbax(tmp_path / "x", {}, print)


# Damage


def ours(folder: Path) -> Path:
    write(folder, "orbax", weights_of(CONFIG, Head.CAUSAL_LM), CONFIG)
    return folder / "params"


def plain(folder: Path) -> Path:
    """A folder with a zarr array a tensor."""
    for name, content in target().seeds[2].items():
        (folder / "params" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "params" / name).write_bytes(content)
    return folder / "params"


def read_all(folder: Path) -> dict[str, bytes]:
    return {name: tensor.read().tobytes() for name, tensor in read_orbax(folder).items()}


@pytest.mark.parametrize("make", [ours, plain])
def test_a_file_that_is_missing_or_cut_short_never_changes_a_value(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = make(tmp_path)
    wanted = read_all(folder)
    noticed = set()
    for name, content in files_of(folder).items():
        for shorter in (b"", content[:-1], content[: len(content) // 2], None):
            if shorter is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(shorter)
            # A database keeps what belongs to none of its tensors any more: that may go.
            try:
                assert read_all(folder) == wanted
            except (CheckpointDamaged, CheckpointNotFound):
                noticed.add(name)
        (folder / name).write_bytes(content)
    unused = {name for name in files_of(folder) if name.startswith(("_CHECK", "array_", "d/"))}
    assert noticed >= files_of(folder).keys() - unused
    assert len(noticed) >= 3


def test_missing_values_do_not_read_as_zeros(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    (folder / KERNEL.replace("/", ".") / "0.0").unlink()
    tensors = read_orbax(folder)
    with pytest.raises(CheckpointDamaged, match=r"fc1/kernel' cannot be read.* missing"):
        tensors[KERNEL].read()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"shape": [4, 7]}, r"has shape \(4, 7\), but _METADATA says \[4, 6\]"),
        ({"chunks": [2**20, 2**20]}, "is more than its files could hold"),
        ({"chunks": [4, 3]}, "cannot be read"),
        ({"dtype": "<f8"}, "cannot be read"),
        ({"dtype": "|O"}, "cannot be opened"),
        ({"dtype": [["a", "<f4"], ["b", "<f4"]]}, "cannot be opened"),
        ({"compressor": {"id": "pickle"}}, "cannot be opened"),
        ({"zarr_format": 3}, "cannot be opened"),
    ],
)
def test_an_array_that_lies_is_refused(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    folder = plain(tmp_path)
    path = folder / KERNEL.replace("/", ".") / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointDamaged, match=fault) as caught:
        read_all(folder)
    assert KERNEL in str(caught.value)
    assert "tensorstore_spec" not in str(caught.value)


def test_a_claim_of_more_than_the_files_could_hold_takes_no_memory(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    tree = (folder / "_METADATA").read_text()
    (folder / "_METADATA").write_text(tree.replace("[4, 6]", f"[{2**40}, 6]"))
    path = folder / KERNEL.replace("/", ".") / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": [2**40, 6]}))
    with pytest.raises(CheckpointDamaged, match="is more than its files could hold"):
        read_orbax(folder)


def entry(*keys: object, kind: object = "np.ndarray") -> dict[str, Any]:
    parts = [{"key": key, "key_type": 2} for key in keys]
    return {"key_metadata": parts, "value_metadata": {"value_type": kind}}


@pytest.mark.parametrize(
    ("tree", "kind", "fault"),
    [
        ({}, CheckpointDamaged, "has no tree_metadata"),
        ({"tree_metadata": []}, CheckpointDamaged, "has no tree_metadata"),
        ({"tree_metadata": {"a": 1}}, CheckpointDamaged, "an entry has no keys or no type"),
        ({"tree_metadata": {"a": {}}}, CheckpointDamaged, "an entry has no keys or no type"),
        ({"tree_metadata": {"a": entry()}}, CheckpointDamaged, "an entry has keys"),
        ({"tree_metadata": {"a": entry(1)}}, CheckpointDamaged, "an entry has keys"),
        ({"tree_metadata": {"a": entry("")}}, CheckpointDamaged, "an entry has keys"),
        ({"tree_metadata": {"a": entry("x", kind="string")}}, CheckpointDamaged, "type 'string'"),
        ({"tree_metadata": {"a": entry("x"), "b": entry("x")}}, CheckpointDamaged, "'x' twice"),
        ({"tree_metadata": {"a": entry("../../x")}}, CheckpointUnsafe, "would lead out of the"),
        ({"tree_metadata": {"a": entry(".")}}, CheckpointUnsafe, "would lead out of the folder"),
        ({"tree_metadata": {"a": entry(".", "")}}, CheckpointDamaged, "an entry has keys"),
        ({"tree_metadata": {"a": entry("a\0")}}, CheckpointUnsafe, "would lead out of the folder"),
        ({"tree_metadata": {"a": entry("absent")}}, CheckpointDamaged, "cannot be opened"),
    ],
)
def test_a_tree_that_is_none_or_leads_outside_is_refused(
    tree: Any, kind: type[Exception], fault: str, tmp_path: Path
) -> None:
    (tmp_path / "_METADATA").write_text(json.dumps(tree))
    with pytest.raises(kind, match=re.escape(fault)) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_a_tree_is_refused(tmp_path: Path) -> None:
    (tmp_path / "params").mkdir()
    with pytest.raises(CheckpointNotFound, match=r"there is no file .*params/_METADATA"):
        open_checkpoint(tmp_path)
    (tmp_path / "params/_METADATA").write_text("[" * 100_000)
    with pytest.raises(CheckpointDamaged, match="_METADATA: it is no valid JSON"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("start", ["../", "d/../../", "d/./", "d//"])
def test_a_manifest_that_points_outside_is_refused(start: str, tmp_path: Path) -> None:
    import tensorstore as ts

    folder, values = tmp_path / "a/params", plain(tmp_path / "plain")
    base = {"driver": "file", "path": f"{folder}/"}
    spec = {"driver": "ocdbt", "base": base, "config": {"compression": None}}
    with ts.Transaction() as commit:  # of one data file
        database = ts.KvStore.open(spec).result().with_transaction(commit)
        for name, content in files_of(values).items():
            database[name] = content
    shutil.copy(values / "_METADATA", folder)
    read_all(folder)
    (inside,) = (name for name in files_of(folder) if name.startswith("d/"))
    outside = start + "x" * (len(inside) - len(start))
    for name, content in files_of(folder).items():
        moved = mended(name, content.replace(inside.encode(), outside.encode()))
        (folder / name).write_bytes(moved)
        if name == inside:
            (folder / outside).resolve().write_bytes(moved)
    with pytest.raises(CheckpointDamaged, match=f"Invalid key.*{re.escape(outside)}"):
        read_all(folder)


def test_a_pipe_in_the_folder_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    folder = ours(tmp_path)
    os.mkfifo(folder / "d/pipe")
    with pytest.raises(CheckpointUnsafe, match="d/pipe is no regular file"):
        read_orbax(folder)


def test_a_folder_that_changes_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    folder = ours(tmp_path)
    tensors = read_orbax(folder)
    os.utime(folder / "manifest.ocdbt", ns=(1, 1))
    with pytest.raises(CheckpointDamaged, match=r"manifest\.ocdbt has changed since"):
        tensors[KERNEL].read()
    tensors = read_orbax(folder)
    shutil.rmtree(folder)
    with pytest.raises((CheckpointDamaged, CheckpointNotFound)):
        tensors[KERNEL].map()


def test_mutated_folders_are_refused_or_read(tmp_path: Path) -> None:
    report = fuzz(target(), tmp_path, count=100, seed=2)
    assert report.failures == []
    assert {"read", "CheckpointDamaged"} <= report.outcomes.keys()
