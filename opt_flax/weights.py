"""Weights as a tree of arrays: loaded from a checkpoint, fresh, handed out, spread over devices."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from conversion import open_pretrained as open_pretrained
from opt_core.checkpoint import Checkpoint, TensorSource, turned
from opt_core.config import OPTConfig
from opt_core.weights import Head, Weight, read, stored_name, table

if TYPE_CHECKING:
    from opt_flax.models import FlaxOPTPreTrainedModel

#: A tree of parameters: plain dictionaries, the leaves arrays or what describes them.
Params = dict[str, Any]


def path_of(row: Weight, head: Head) -> tuple[str, ...]:
    """Where a row of the table lies in the tree of a model with this head."""
    return tuple(stored_name(row.path("flax"), head).split("."))


def shape_of(row: Weight) -> tuple[int, ...]:
    """The shape of a row's array in Flax."""
    return row.shape[::-1] if row.transposed("flax") else row.shape


def tree(config: OPTConfig, head: Head, leaf: Callable[[Weight], Any]) -> Params:
    """A tree with a leaf for each row of the table."""
    rows = table(config, head).values()
    made: Params = unflatten_dict({path_of(row, head): leaf(row) for row in rows})
    return made


def shapes(config: OPTConfig, head: Head, dtype: Any) -> Params:
    """The tree of a model's shapes and types."""
    return tree(config, head, lambda row: jax.ShapeDtypeStruct(shape_of(row), dtype))


def load(
    config: OPTConfig,
    head: Head,
    checkpoint: Checkpoint,
    *,
    dtype: Any,
    key: Array,
    placements: Mapping[tuple[str, ...], Any] | None,
    check: bool,
) -> Params:
    """The tree of a checkpoint's weights, placed largest first and one at a time.

    `dtype` None keeps the stored type. `placements` says by path where an array goes. With
    `check`, NaN in a weight warns.

    Raises:
        CheckpointMismatch: the tensors are not those that the configuration asks for.
    """
    kind, found, newest = dtype or stored_dtype(checkpoint), {}, None
    for row, values in read(config, head, checkpoint, check=check):
        path = path_of(row, head)
        where = None if placements is None else placements[path]
        array = _drawn(row, key, kind) if values is None else _laid_out(row, values, kind)
        # Copies run behind Python: waiting for the one before keeps at most two tensors in memory
        # twice. Values that are already in place and in type stay in the file, which maps them.
        jax.block_until_ready(newest)
        newest = found[path] = jax.device_put(array, where)
    result: Params = unflatten_dict(found)
    return result


def stored_dtype(checkpoint: Checkpoint) -> Any:
    """The type of a checkpoint's tensors: of the first, in the order of the file."""
    return next(iter(checkpoint.tensors.values())).dtype


def _laid_out(row: Weight, values: NDArray[Any], dtype: Any) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        values = values.astype(dtype, copy=False)
    if not row.transposed("flax"):
        return np.ascontiguousarray(values)
    # What comes from a file of Flax's own was turned already, and is only turned back.
    return values.T if values.T.flags.c_contiguous else turned(values)


def fresh(config: OPTConfig, head: Head, key: Array, dtype: Any) -> Params:
    """A tree of fresh values of the table's distribution."""
    return tree(config, head, lambda row: _drawn(row, key, dtype))


def _drawn(row: Weight, key: Array, dtype: Any) -> Array:
    # A stream of its own for each name, so that values do not depend on what else is drawn.
    key = jax.random.fold_in(key, zlib.crc32(row.name.encode()))
    values: Array = _normal(key, shape_of(row), row.mean, row.std, row.zero_row, jnp.dtype(dtype))
    return values


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _normal(
    key: Array, shape: tuple[int, ...], mean: float, std: float, zero_row: int | None, dtype: Any
) -> Array:
    if not std:
        return jnp.full(shape, mean, dtype)
    values = jax.random.normal(key, shape, jnp.float32) * std + mean
    if zero_row is not None:
        values = values.at[zero_row].set(0.0)
    return values.astype(dtype)


def check_fit(config: OPTConfig, head: Head, params: Params) -> None:
    """See that a tree has the arrays of the table.

    Raises:
        ValueError: arrays are missing, unexpected or of another shape; names them all.
    """
    wanted = {"/".join(path_of(row, head)): row for row in table(config, head).values()}
    given = {"/".join(path): leaf for path, leaf in flatten_dict(params).items()}
    faults = [f"missing {name}" for name in wanted if name not in given]
    faults += [f"unexpected {name}" for name in given if name not in wanted]
    faults += [
        f"{name} is {tuple(given[name].shape)}, expected {shape_of(row)}"
        for name, row in wanted.items()
        if name in given and tuple(given[name].shape) != shape_of(row)
    ]
    if faults:
        raise ValueError(f"params do not fit the model: {'; '.join(faults)}")


def tensors(params: Params, config: OPTConfig, head: Head) -> dict[str, TensorSource]:
    """What a checkpoint of these parameters holds, by the names of the file; copied only when read.

    Raises:
        ValueError: they are not those of this configuration.
    """
    check_fit(config, head, params)
    leaves = flatten_dict(params)
    return {
        stored_name(name, head): _Stored(leaves[path_of(row, head)], row.transposed("flax"))
        for name, row in table(config, head).items()
    }


@dataclass(frozen=True)
class _Stored:
    """An array as a source of values for saving, in the stored layout."""

    array: Any
    is_transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.array.shape)
        return shape[::-1] if self.is_transposed else shape

    @property
    def dtype(self) -> np.dtype[Any]:
        kind: np.dtype[Any] = np.dtype(self.array.dtype)
        return kind

    def read(self, part: slice | None = None, *, axis: int = 0) -> NDArray[Any]:
        values = np.asarray(self.array)
        values = values.T if self.is_transposed else values
        if part is not None:
            values = np.moveaxis(np.moveaxis(values, axis, 0)[part], 0, axis)
        return np.ascontiguousarray(values)

    def map(self) -> NDArray[Any]:
        return self.read().copy()


# --- devices -----------------------------------------------------------------------------------


def shard(
    model: FlaxOPTPreTrainedModel,
    mesh: Mesh,
    *,
    axis: str = "model",
    params: Params | None = None,
) -> Params:
    """A model's parameters spread over a mesh; the model keeps them, if it keeps its own.

    Heads, feed-forward units and the vocabulary are cut along the mesh's `axis` (tensor
    parallelism) at the axes of the weight table; the rest, and every other axis of the mesh (such
    as one for data), holds whole arrays. JAX makes every program that reads them parallel.

    Raises:
        ValueError: as `shardings`, or the model holds no parameters and none were given.
    """
    placed: Params = jax.device_put(
        model.params if params is None else params,
        shardings(model.config, model.head, mesh, axis=axis),
    )
    if params is None:
        model.params = placed
    return placed


def shardings(config: OPTConfig, head: Head, mesh: Mesh, *, axis: str = "model") -> Params:
    """Where each parameter goes on a mesh: a tree of `NamedSharding`.

    Raises:
        ValueError: the mesh has no such axis, its size does not divide the model, or an axis is not
            `AxisType.Auto`.
    """
    check_mesh(config, mesh, axis)

    def place(row: Weight) -> NamedSharding:
        names: list[str | None] = [None] * len(row.shape)
        if row.split is not None:
            names[row.split] = axis
        return NamedSharding(
            mesh, PartitionSpec(*(names[::-1] if row.transposed("flax") else names))
        )

    return tree(config, head, place)


def check_mesh(config: OPTConfig, mesh: Mesh, axis: str) -> None:
    """See that a mesh can share out the model.

    Raises:
        ValueError: it cannot; says why.
    """
    explicit = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Auto
    ]
    if explicit:
        raise ValueError(
            f"axes {', '.join(map(str, explicit))} of the mesh are not of the type Auto, and the "
            "model leaves the placement inside it to the compiler; make the mesh with "
            "axis_types=(AxisType.Auto,) * number_of_axes"
        )
    if axis not in mesh.axis_names:
        raise ValueError(
            f"the mesh has the axes {', '.join(map(str, mesh.axis_names))}, and none of the name "
            f"{axis!r}; name the one that cuts layers, or give it the size 1"
        )
    count = mesh.shape[axis]
    uneven = [part for part, size in _shared(config).items() if size % count]
    if uneven:
        raise ValueError(
            f"{count} devices cannot share the model evenly: {'; '.join(uneven)}; choose a mesh "
            "whose size divides these (resize_token_embeddings can round the vocabulary up)"
        )


def _shared(config: OPTConfig) -> dict[str, int]:
    """What tensor parallelism shares out, in words, and how much of it there is."""
    layers: dict[int, list[str]] = {}
    for layer in range(config.num_hidden_layers):
        layers.setdefault(config.heads(layer), []).append(str(layer))
    parts = {f"{heads} heads in layers {', '.join(at)}": heads for heads, at in layers.items()}
    parts[f"ffn_dim {config.ffn_dim}"] = config.ffn_dim
    parts[f"vocab_size {config.vocab_size}"] = config.vocab_size
    return parts
