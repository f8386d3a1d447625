"""The adapter of opt_flax."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import opt_flax
from opt_core.config import OPTConfig
from opt_core.weights import Head, stored_name, table
from opt_flax.weights import path_of, tensors
from tests.cases import Arrays
from tests.wings import Wing

_MAPPINGS = Path("/proc/self/maps")
_MOST_MAPPINGS = 20_000


def give_back() -> None:
    """Drop all programs before there are too many.

    XLA crashes where Linux refuses a mapping more than 65,530, and a program has several.
    """
    if _MAPPINGS.is_file() and _MAPPINGS.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        jax.clear_caches()


class FlaxWing(Wing):
    """opt_flax on the CPU."""

    name = "flax"
    traces = True
    fused = "cudnn"

    def __init__(self) -> None:
        self.limit_threads()
        # What is left to JAX's taste here would be a mistake in a library.
        jax.config.update("jax_numpy_rank_promotion", "raise")
        jax.config.update("jax_numpy_dtype_promotion", "strict")

    def limit_threads(self) -> None:
        """XLA has no such switch within a process; it takes one thread for tiny arrays."""

    def model_class(self, head: Head) -> Any:
        return getattr(opt_flax, f"FlaxOPT{head.value}")

    def fresh(self, head: Head, config: OPTConfig, **options: Any) -> Any:
        return self.model_class(head)(config, **options)

    def build(
        self, head: Head, config: OPTConfig, weights: Arrays, dtype: str = "float32", **options: Any
    ) -> Any:
        kind = jnp.dtype(dtype)
        model = self.model_class(head)(
            config, dtype=kind, param_dtype=kind, _do_init=False, **options
        )
        rows = table(config, head)
        leaves = {}
        for name, values in weights.items():
            laid_out = values.T if rows[name].transposed("flax") else values
            leaves[path_of(rows[name], head)] = jnp.asarray(laid_out.astype(kind))
        model.params = unflatten_dict(leaves)
        return model

    def weights(self, model: Any) -> Arrays:
        return self._canonical(model, model.params)

    def call(self, model: Any, **inputs: Any) -> Any:
        return self.numpy(model(**self._arrays(inputs)))

    def modules(self, model: Any, **inputs: Any) -> Arrays:
        _, noted = jax.jit(
            lambda params, given: model.module.apply(
                {"params": params}, **given, capture_intermediates=True, mutable="intermediates"
            )
        )(model.params, self._arrays(inputs))
        prefix = ("model",) if model.head is Head.NONE else ()
        outputs: Arrays = {}
        for path, values in flatten_dict(noted["intermediates"]).items():
            whole = (*prefix, *path[:-1])
            # Dropout and the list of layers are modules of Flax, not of the checkpoint.
            if whole and not whole[-1].startswith("Dropout_") and whole[-1] != "layers":
                first = values[0]
                first = first if isinstance(first, jax.Array) else next(iter(_values(first)))
                outputs[".".join(whole)] = self.numpy(first)
        return outputs

    def gradients(self, model: Any, **inputs: Any) -> Arrays:
        given = self._arrays(inputs)
        found = jax.jit(jax.grad(lambda params: model(**given, params=params).loss))(model.params)
        return {n: self.numpy(jnp.asarray(v)) for n, v in self._canonical(model, found).items()}

    def array(self, values: Any) -> Any:
        return jnp.asarray(values)

    def numpy(self, values: Any) -> Any:
        if isinstance(values, jax.Array):
            half = values.dtype in (jnp.float16, jnp.bfloat16)
            return np.asarray(values.astype(jnp.float32) if half else values)
        if isinstance(values, dict):
            return type(values)((name, self.numpy(value)) for name, value in values.items())
        if type(values) is tuple:
            return tuple(self.numpy(value) for value in values)
        return values

    def traced(self, *, token: int, bias: float, vocab_size: int) -> tuple[Any, Any, Any]:
        def processor(input_ids: Any, scores: Any, cur_len: Any) -> Any:
            return scores.at[:, token].add(bias)

        def criterion(input_ids: Any, scores: Any, cur_len: Any) -> Any:
            return jnp.take(input_ids, cur_len - 1, axis=1) == token

        def prefix(batch_id: Any, input_ids: Any, cur_len: Any) -> Any:
            return jnp.arange(vocab_size) % 2 == cur_len % 2

        return processor, criterion, prefix

    def _canonical(self, model: Any, params: Any) -> Arrays:
        stored = tensors(params, model.config, model.head)
        names = table(model.config, model.head)
        return {name: stored[stored_name(name, model.head)].read().copy() for name in names}

    def _arrays(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        arrays = {n: v for n, v in inputs.items() if isinstance(v, np.ndarray)}
        return {**inputs, **{name: self.array(value) for name, value in arrays.items()}}


def _values(output: Any) -> Any:
    return output.values() if isinstance(output, dict) else output
