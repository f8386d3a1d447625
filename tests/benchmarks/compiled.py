"""The peers that compile: our Keras and Flax wings, KerasHub's OPT, and transformers 4's."""

from __future__ import annotations

import os
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from opt_core import __version__

Ids = np.ndarray[Any, Any]
LEARNING_RATE = 1e-4

#: How tokens are chosen, as options of our `generate` and of transformers'; `assistant_model` comes
#: on top of "assisted".
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "assisted": {},
}


class OursOnKeras:
    """opt_tf."""

    def __init__(self, folder: Path, threads: int, dtype: str) -> None:
        tf = _tensorflow(threads)
        self.tf, self.folder, self.dtype = tf, folder, dtype
        self.facts = {"optlm": __version__, "tensorflow": tf.__version__, "dtype": dtype}

    def load(self) -> None:
        from opt_tf import TFOPTForCausalLM

        self.model = TFOPTForCausalLM.from_pretrained(self.folder / "hf", dtype=self.dtype)
        self.forward = self.tf.function(lambda ids: self.model(ids)["logits"], jit_compile=True)

    def prefill(self, ids: Ids) -> None:
        self.forward(self.tf.constant(ids))

    def decode(self, ids: Ids, count: int, way: str) -> None:
        options = WAYS[way]
        if way == "assisted":
            options = {**options, "assistant_model": self._assistant}
        self.model.generate(
            self.tf.constant(ids), max_new_tokens=count, eos_token_id=None, **options
        ).numpy()

    @cached_property
    def _assistant(self) -> Any:
        from opt_tf import TFOPTForCausalLM

        return TFOPTForCausalLM.from_pretrained(self.folder / "assistant", dtype=self.dtype)

    def train(self, ids: Ids) -> None:
        if self.dtype != "float32":
            raise LookupError("float32 only")
        if not self.model.compiled:
            import keras

            self.model.compile(optimizer=keras.optimizers.AdamW(LEARNING_RATE), jit_compile=True)
        self.model.train_on_batch({"input_ids": ids, "labels": ids})


class OursOnJax:
    """opt_flax."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import flax
        import jax

        self.jax, self.folder, self.dtype = jax, folder, dtype
        self.facts = {
            "optlm": __version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
            "dtype": dtype,
        }
        self.step: Any = None
        self.params: Any = None
        self.state: Any = None

    def load(self) -> None:
        from opt_flax import FlaxOPTForCausalLM

        self.model = FlaxOPTForCausalLM.from_pretrained(self.folder / "hf", dtype=self.dtype)
        self.jax.block_until_ready(self.model.params)

    def prefill(self, ids: Ids) -> None:
        self.jax.block_until_ready(self.model(ids.astype(np.int32)).logits)

    def decode(self, ids: Ids, count: int, way: str) -> None:
        options = WAYS[way]
        if way == "assisted":
            options = {**options, "assistant_model": self._assistant}
        tokens = self.model.generate(
            ids.astype(np.int32), max_new_tokens=count, eos_token_id=None, **options
        )
        np.asarray(tokens)

    @cached_property
    def _assistant(self) -> Any:
        from opt_flax import FlaxOPTForCausalLM

        return FlaxOPTForCausalLM.from_pretrained(self.folder / "assistant", dtype=self.dtype)

    def train(self, ids: Ids) -> None:
        if self.dtype != "float32":
            raise LookupError("float32 only")
        if self.step is None:
            self.step = self._training_step()
        self.params, self.state, loss = self.step(self.params, self.state, ids.astype(np.int32))
        self.jax.block_until_ready(loss)

    def _training_step(self) -> Any:
        import optax

        optimizer, model = optax.adamw(LEARNING_RATE), self.model
        self.params, self.state = model.params, optimizer.init(model.params)

        def loss_of(params: Any, ids: Any) -> Any:
            return model(ids, params=params, labels=ids, use_cache=False).loss

        def step(params: Any, state: Any, ids: Any) -> Any:
            loss, gradients = self.jax.value_and_grad(loss_of)(params, ids)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, loss

        return self.jax.jit(step, donate_argnums=(0, 1))


class KerasHub:
    """KerasHub's OPT in the same shape on one of its backends; its random values are its own."""

    def __init__(self, backend: str, threads: int) -> None:
        os.environ["KERAS_BACKEND"] = backend
        if backend == "tensorflow":
            _tensorflow(threads)
        import keras

        self.backend, self.keras, self.way = backend, keras, "greedy"
        self.facts = {"keras_hub": version("keras-hub"), "backend": backend, "dtype": "float32"}

    def load(self) -> None:
        raise LookupError("KerasHub reads no such checkpoint")

    def _build(self) -> None:
        from keras_hub.models import OPTBackbone, OPTCausalLM

        backbone = OPTBackbone(
            vocabulary_size=50272,
            num_layers=12,
            num_heads=12,
            hidden_dim=768,
            intermediate_dim=3072,
            dropout=0.0,
            max_sequence_length=2048,
        )
        self.model = OPTCausalLM(backbone=backbone, preprocessor=None)
        self.model.compile(
            optimizer=self.keras.optimizers.AdamW(LEARNING_RATE),
            loss=self.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            sampler="greedy",
            jit_compile=True,
        )
        self.forward = self._compiled_forward()

    def _compiled_forward(self) -> Any:
        if self.backend == "tensorflow":
            import tensorflow as tf

            return tf.function(self.model, jit_compile=True)
        import jax

        weights = [v.value for v in self.model.trainable_variables]
        rest = [v.value for v in self.model.non_trainable_variables]
        call = jax.jit(lambda inputs: self.model.stateless_call(weights, rest, inputs)[0])
        return lambda inputs: jax.block_until_ready(call(inputs))

    def prefill(self, ids: Ids) -> None:
        self._ready()
        self.forward(_keras_inputs(ids))

    def decode(self, ids: Ids, count: int, way: str) -> None:
        self._ready()
        self._take(way)
        inputs = _keras_inputs(np.pad(ids, ((0, 0), (0, count))))
        inputs["padding_mask"][:, ids.shape[1] :] = 0
        self.model.generate(inputs, stop_token_ids=None)

    def _take(self, way: str) -> None:
        """Compile for a sampler, if that is another one than before."""
        from keras_hub.samplers import BeamSampler, ContrastiveSampler

        makes = {
            "greedy": lambda: "greedy",
            "beams": lambda: BeamSampler(num_beams=4),
            "contrastive": lambda: ContrastiveSampler(k=4, alpha=0.6),
        }
        if way not in makes:
            raise LookupError(f"KerasHub has no {way} decoding")
        if way != self.way:
            self.model.compile(sampler=makes[way](), jit_compile=True)
            self.way = way

    def train(self, ids: Ids) -> None:
        self._ready()
        self.model.train_on_batch(_keras_inputs(ids), np.roll(ids, -1, axis=1))

    def _ready(self) -> None:
        if not hasattr(self, "model"):
            self._build()


class TransformersOnKeras:
    """The OPT of transformers 4.53 on TensorFlow, compiled by XLA as a whole."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.tf, self.folder = _tensorflow(threads), folder
        self.facts = _of_version_4(tensorflow=self.tf.__version__)

    def load(self) -> None:
        from transformers import TFOPTForCausalLM  # type: ignore[attr-defined]

        self.model = TFOPTForCausalLM.from_pretrained(self.folder / "hf", from_pt=True)
        self.forward = self.tf.function(self.model, jit_compile=True)
        self.generate = self.tf.function(self.model.generate, jit_compile=True)

    def prefill(self, ids: Ids) -> None:
        self.forward(self.tf.constant(ids, self.tf.int32))

    def decode(self, ids: Ids, count: int, way: str) -> None:
        if way == "assisted":
            raise LookupError("transformers has no assisted decoding for TensorFlow")
        self.generate(self.tf.constant(ids, self.tf.int32), **_exactly(count), **WAYS[way])

    def train(self, ids: Ids) -> None:
        raise LookupError("the training of transformers 4 is not measured")


class TransformersOnJax:
    """The OPT of transformers 4.53 in Flax, compiled as a whole."""

    def __init__(self, folder: Path) -> None:
        import jax

        self.jax, self.folder = jax, folder
        self.facts = _of_version_4(jax=jax.__version__)

    def load(self) -> None:
        from transformers import FlaxOPTForCausalLM  # type: ignore[attr-defined]

        self.model = FlaxOPTForCausalLM.from_pretrained(self.folder / "hf", from_pt=True)
        self.forward = self.jax.jit(lambda params, ids: self.model(ids, params=params).logits)
        self.generate: dict[str, Any] = {}

    def prefill(self, ids: Ids) -> None:
        self.jax.block_until_ready(self.forward(self.model.params, ids.astype(np.int32)))

    def decode(self, ids: Ids, count: int, way: str) -> None:
        if way not in ("greedy", "beams"):
            raise LookupError(f"transformers has no {way} decoding for Flax")
        if way not in self.generate:
            options = {**_exactly(count), **WAYS[way]}
            self.generate[way] = self.jax.jit(
                lambda params, ids: self.model.generate(ids, params=params, **options).sequences
            )
        self.jax.block_until_ready(self.generate[way](self.model.params, ids.astype(np.int32)))

    def train(self, ids: Ids) -> None:
        raise LookupError("the training of transformers 4 is not measured")


def _of_version_4(**versions: str) -> dict[str, Any]:
    return {"transformers": version("transformers"), **versions, "dtype": "float32"}


def _exactly(count: int) -> dict[str, Any]:
    return {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}


def _keras_inputs(ids: Ids) -> dict[str, Ids]:
    return {"token_ids": ids.astype(np.int32), "padding_mask": np.ones_like(ids, np.int32)}


def _tensorflow(threads: int) -> Any:
    """TensorFlow on so many threads, without its notes about the processor."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    return tf
