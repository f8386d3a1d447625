"""Orbax's folders: read without Orbax, and restored by Orbax."""

import re
import sys
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
    CheckpointError,
)
from opt_core.config import OPTConfig
from opt_core.weights import Head, table
from tests.cases import Arrays, configs, tiny
from tests.written import assert_holds, assert_reads_by_part, dtypes, heads, weights_of, write

pytest.importorskip("tensorstore", reason="the extra [orbax] is not installed")


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


@pytest.mark.parametrize("axis", [0, 1])
def test_no_chunk_is_read_twice_by_parts_along_one_axis(
    axis: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorstore as ts

    def bytes_read() -> int:
        found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return sum(value["value"] for metric in found for value in metric["values"])

    monkeypatch.setattr(orbax_writing, "STRIPE_BYTES", 2**18)
    source = Constant((1024, 1024), np.dtype(np.float32), 1.0)
    write_orbax(tmp_path / "x", {"x": source}, lambda size: None)
    tensor = read_orbax(tmp_path / "x")["x"]
    assert tensor.store.chunk_layout.read_chunk.shape == (64, 64)
    before = bytes_read()
    for start in range(0, 1024, 16):
        assert (tensor.read(slice(start, start + 16), axis=axis) == 1).all()
    assert bytes_read() - before <= 1.1 * 4 * 2**20
