"""Weights of a model: loaded from a checkpoint, fresh, handed out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from conversion import open_pretrained as open_pretrained
from opt_core.checkpoint import Checkpoint, TensorSource
from opt_core.config import OPTConfig
from opt_core.weights import Head, Weight, read, stored_name, table


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The type of a checkpoint's tensors: of the first, in the order of the file."""
    return next(iter(checkpoint.tensors.values())).dtype.name


def load(
    model: keras.Model, config: OPTConfig, head: Head, checkpoint: Checkpoint, *, check: bool
) -> None:
    """Give a model built without values its weights, largest first, one at a time.

    A value goes from the file's memory map into its variable, cast and turned round on the way.

    Raises:
        CheckpointMismatch: the tensors are not those that the configuration asks for.
    """
    for row, values in read(config, head, checkpoint, check=check):
        if values is None:
            fresh(model, [row], head)
            continue
        place = variable(model, row, head)
        # Cast before TensorFlow copies: its allocator keeps a block as large as the largest.
        kind = place.value.dtype.as_numpy_dtype
        kept = tf.convert_to_tensor(values.astype(kind, copy=False))
        place.assign(tf.transpose(kept) if row.transposed("keras") else kept)


def fresh(model: keras.Model, rows: Iterable[Weight], head: Head) -> None:
    """Fill variables with fresh values of the table's distribution, from Keras's generator."""
    for row in rows:
        place = variable(model, row, head)
        if row.std:
            values = keras.random.normal(place.shape, row.mean, row.std, place.dtype)
        else:
            values = tf.fill(place.shape, tf.cast(row.mean, place.dtype))
        if row.zero_row is not None:
            values = tf.tensor_scatter_nd_update(
                values, [[row.zero_row]], tf.zeros((1, place.shape[1]), place.dtype)
            )
        place.assign(values)


def tensors(model: keras.Model, config: OPTConfig, head: Head) -> dict[str, TensorSource]:
    """What a checkpoint of this model holds, by the names of the file; copied only when read.

    Where Keras has put a low-rank adapter on a layer, its kernel is the merged one.

    Raises:
        ValueError: Keras has quantized a layer.
    """
    found = {
        stored_name(name, head): _Stored(variable(model, row, head), row.transposed("keras"))
        for name, row in table(config, head).items()
    }
    for name, source in found.items():
        kind = tf.as_dtype(source.variable.dtype)
        if not kind.is_floating:
            raise ValueError(
                f"{name} is {kind.name}: what Keras has quantized cannot be saved as a checkpoint; "
                "save it before"
            )
    return dict(found)


def variable(model: keras.Model, row: Weight, head: Head) -> keras.Variable:
    """The variable of one row of the table."""
    at: Any = model
    for part in stored_name(row.path("keras"), head).split("."):
        at = at[int(part)] if part.isdigit() else getattr(at, part)
    return at


@dataclass(frozen=True)
class _Stored:
    """A variable as a source of values for saving, in the stored layout."""

    variable: keras.Variable
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.variable.shape)
        return shape[::-1] if self.transposed else shape

    @property
    def dtype(self) -> np.dtype[Any]:
        name = keras.backend.standardize_dtype(self.variable.dtype)
        kind: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
        return kind

    def read(self, part: slice | None = None, *, axis: int = 0) -> NDArray[Any]:
        values = self.map()
        if part is not None:
            values = np.moveaxis(np.moveaxis(values, axis, 0)[part], 0, axis)
        return np.array(values, order="C")

    def map(self) -> NDArray[Any]:
        values: NDArray[Any] = tf.convert_to_tensor(self.variable).numpy()
        return values.T if self.transposed else values
