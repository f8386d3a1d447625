"""The adapter of opt_tf."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import tensorflow as tf

import opt_tf
from opt_core.config import OPTConfig
from opt_core.weights import Head, stored_name, table
from opt_tf.weights import tensors, variable
from tests.cases import Arrays
from tests.wings import Wing


class TfWing(Wing):
    """opt_tf on the CPU."""

    name = "tf"
    traces = True

    def limit_threads(self) -> None:
        # TensorFlow settles its threads when it first computes; what comes later is too late.
        try:
            tf.config.threading.set_intra_op_parallelism_threads(1)
            tf.config.threading.set_inter_op_parallelism_threads(1)
        except RuntimeError:
            pass

    def model_class(self, head: Head) -> Any:
        return getattr(opt_tf, f"TFOPT{head.value}")

    def fresh(self, head: Head, config: OPTConfig, **options: Any) -> Any:
        return self.model_class(head)(config, **options)

    def build(
        self, head: Head, config: OPTConfig, weights: Arrays, dtype: str = "float32", **options: Any
    ) -> Any:
        model = self.fresh(head, config, dtype=dtype, **options)
        for name, row in table(model.config, head).items():
            values = weights[name].T if row.transposed("keras") else weights[name]
            variable(model, row, head).assign(values)
        return model

    def weights(self, model: Any) -> Arrays:
        stored = tensors(model, model.config, model.head)
        names = table(model.config, model.head)
        return {name: stored[stored_name(name, model.head)].read() for name in names}

    def call(self, model: Any, **inputs: Any) -> Any:
        return self.numpy(model(**self._tensors(inputs)))

    def modules(self, model: Any, **inputs: Any) -> Arrays:
        outputs: Arrays = {}
        prefix = "model" if model.head is Head.NONE else ""
        with ExitStack() as patches:
            for path, layer in _layers(model):
                whole = ".".join(part for part in (prefix, path) if part)
                patches.enter_context(_noting(layer, whole, outputs))
            result = self.call(model, **inputs)
        if prefix:
            outputs[prefix] = result.last_hidden_state
        return {path: self.numpy(values) for path, values in outputs.items()}

    def gradients(self, model: Any, **inputs: Any) -> Arrays:
        rows = table(model.config, model.head)
        variables = [variable(model, row, model.head) for row in rows.values()]
        with tf.GradientTape() as tape:
            loss = model(**self._tensors(inputs)).loss
        found = tape.gradient(loss, [v.value for v in variables])
        return {
            name: self.numpy(tf.transpose(slope) if row.transposed("keras") else slope)
            for (name, row), slope in zip(rows.items(), found, strict=True)
        }

    def array(self, values: Any) -> Any:
        return tf.constant(values)

    def numpy(self, values: Any) -> Any:
        if tf.is_tensor(values):
            half = values.dtype in (tf.float16, tf.bfloat16)
            return (tf.cast(values, tf.float32) if half else values).numpy()
        if isinstance(values, dict):
            return type(values)((name, self.numpy(value)) for name, value in values.items())
        if type(values) is tuple:
            return tuple(self.numpy(value) for value in values)
        return values

    def generate_lightly(self, model: Any, input_ids: Any = None, **options: Any) -> Any:
        # The same graph without XLA takes a third of the time.
        return self.generate(model, input_ids, **{"compiled": False, **options})

    def traced(self, *, token: int, bias: float, vocab_size: int) -> tuple[Any, Any, Any]:
        def processor(input_ids: Any, scores: Any, cur_len: Any) -> Any:
            place = tf.one_hot(token, scores.shape[-1], dtype=scores.dtype)
            return scores + place * tf.cast(bias, scores.dtype)

        def criterion(input_ids: Any, scores: Any, cur_len: Any) -> Any:
            return tf.gather(input_ids, cur_len - 1, axis=1) == token

        def prefix(batch_id: Any, input_ids: Any, cur_len: Any) -> Any:
            return tf.range(vocab_size) % 2 == cur_len % 2

        return processor, criterion, prefix

    def _tensors(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        arrays = {n: v for n, v in inputs.items() if isinstance(v, np.ndarray)}
        return {**inputs, **{name: self.array(value) for name, value in arrays.items()}}


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Every layer inside a model, by its path."""
    for layer in model._flatten_layers(include_self=False, recursive=False):
        yield layer.name, layer
        for path, inner in _layers(layer):
            yield f"{layer.name}.{path}", inner


@contextmanager
def _noting(layer: Any, path: str, outputs: Arrays) -> Iterator[None]:
    """Note the first output of a layer's calls."""
    call = layer.call

    def noting(*given: Any, **options: Any) -> Any:
        result = call(*given, **options)
        first = result
        if isinstance(first, dict):
            first = first["last_hidden_state"]
        outputs[path] = first[0] if isinstance(first, tuple) else first
        return result

    with patch.object(layer, "call", noting):
        yield
