"""Changes of a built model's shape: another vocabulary, fewer heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_core.surgery import pruned, resized

if TYPE_CHECKING:
    from opt_tf.models.base import TFOPTPreTrainedModel


def resize(model: TFOPTPreTrainedModel, size: int) -> None:
    """Give the embedding, and an untied head, room for `size` tokens."""
    old = model.config
    config = resized(old, size, stacklevel=3).locked()
    config._attn_implementation = model.attn_implementation
    embedding = model.get_input_embeddings()
    replace(embedding, "embeddings", _resized(embedding.embeddings, size, 0, old.init_std))
    embedding.input_dim = size
    head = model.get_output_embeddings()
    if head is not None and head is not embedding:
        replace(head, "kernel", _resized(head.kernel, size, 1, old.init_std))
        head.units = size
    model._adopt(config)


def prune(model: TFOPTPreTrainedModel, heads: Mapping[int, Iterable[int]]) -> None:
    """Cut the units of q, k and v, and the inputs of the output projection, of the named heads."""
    width = model.config.head_dim
    config, keeps = pruned(model.config, heads)
    config = config.locked()
    config._attn_implementation = model.attn_implementation
    for layer, keep in keeps.items():
        places = [head * width + i for head in keep for i in range(width)]
        attention = model._decoder().layers[layer].self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            replace(projection, "kernel", tf.gather(projection.kernel.value, places, axis=1))
            if projection.use_bias:
                replace(projection, "bias", tf.gather(projection.bias.value, places))
            projection.units = len(places)
        out = attention.out_proj
        replace(out, "kernel", tf.gather(out.kernel.value, places, axis=0))
        out.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: len(places)})
    model._adopt(config)


def _resized(variable: keras.Variable, size: int, axis: int, std: float) -> Tensor:
    values = variable.value
    more = size - values.shape[axis]
    if more <= 0:
        return tf.gather(values, tf.range(size), axis=axis)
    shape = [more if at == axis else length for at, length in enumerate(values.shape)]
    return tf.concat((values, keras.random.normal(shape, 0.0, std, values.dtype.name)), axis)


def replace(layer: keras.layers.Layer, leaf: str, values: Tensor) -> None:
    """Give a built layer a variable of another shape under the same path.

    Keras locks what a layer holds when it is built, and unlocks it for its own quantization alone:
    hence the protected names.
    """
    old: Any = getattr(layer, leaf)
    layer._untrack_variable(old)
    layer._tracker.unlock()
    with ExitStack() as scopes:
        for name in layer.path.split("/")[:-1]:
            scopes.enter_context(keras.name_scope(name))
        new = layer.add_weight(
            name=leaf,
            shape=values.shape,
            initializer=lambda _shape, dtype: tf.cast(values, dtype),
            trainable=old.trainable,
        )
    setattr(layer, leaf if leaf == "bias" else f"_{leaf}", new)
    layer._tracker.lock()


def put(owner: keras.layers.Layer, name: str, layer: keras.layers.Layer) -> None:
    """Put a layer in the place of another one in a built layer."""
    owner._tracker.unlock()
    setattr(owner, name, layer)
    owner._tracker.lock()
