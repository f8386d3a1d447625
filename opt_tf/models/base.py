"""What the OPT classes share: building, loading, saving, resizing, pruning, checkpointing."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar, Self

import keras
import tensorflow as tf

from opt_core.checkpoint import TensorSource
from opt_core.config import DTYPES, OPTConfig
from opt_core.generation import GenerationConfig
from opt_core.outputs import ModelOutput
from opt_core.pretrained import SavingMixin
from opt_core.surgery import vocabulary_size
from opt_core.weights import Head, table
from opt_tf import weights
from opt_tf.attention import IMPLEMENTATIONS
from opt_tf.decoder import Cache, Decoder
from opt_tf.models import inputs, surgery
from opt_tf.training import TrainingMixin, in_step

#: Keras's policies that compute in a half type over float32 weights.
MIXED = ("mixed_float16", "mixed_bfloat16")


_CALLED_DIRECTLY: ContextVar[Any] = ContextVar("called_directly", default=None)


class TFOPTPreTrainedModel(SavingMixin, TrainingMixin, keras.Model):
    """The part of every OPT class that is not its call.

    A model has all its weights from the start. It holds its own copy of the configuration; fields
    that decide names and shapes of weights cannot change in it. `resize_token_embeddings` and
    `prune_heads` give the model a new one.
    """

    head: ClassVar[Head]
    config_class = OPTConfig
    main_input_name = "input_ids"
    base_model_prefix = "model"

    def __init__(
        self,
        config: OPTConfig | Mapping[str, Any],
        *,
        attn_implementation: str | None = None,
        name: str | None = None,
        dtype: Any = None,
        trainable: bool = True,
        _values: bool | None = True,
    ) -> None:
        # Only floats that a layer computes with are cast to its type; labels stay as they are.
        super().__init__(name=name, dtype=dtype, trainable=trainable, autocast=False)
        if isinstance(config, Mapping):
            config = OPTConfig.from_dict(config)
        # A locked one is another model's, which keeps it for itself.
        self.config = copy.deepcopy(config).locked()
        self.name_or_path = config.name_or_path
        self.generation_config = GenerationConfig.from_model_config(config)
        if attn_implementation is None:
            attn_implementation = getattr(config, "_attn_implementation", None)
        self.set_attn_implementation(
            "eager" if attn_implementation is None else attn_implementation
        )
        self._add_parts()
        if _values is not None:  # None: a part of another model, which builds it
            self._finish(_values)

    def _add_parts(self) -> None:
        """Make the layers of this class."""
        raise AssertionError("every class says what it is made of")

    def _finish(self, values: bool) -> None:
        """Make the weights, and give them fresh values unless a checkpoint will."""
        self._adopt(self.config)
        self.build()
        if values:
            weights.fresh(self, table(self.config, self.head).values(), self.head)

    def _adopt(self, config: OPTConfig) -> None:
        for layer in self._flatten_layers():
            if isinstance(getattr(layer, "config", None), OPTConfig):
                layer.config = config
        # Programs that were compiled for other shapes.
        self.train_function = self.test_function = self.predict_function = None

    def get_config(self) -> dict[str, Any]:
        """All that `from_config` makes an equal model of, but for the values of its weights."""
        return {
            "config": self.config.to_dict(),
            "attn_implementation": self.attn_implementation,
            "name": self.name,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "trainable": self.trainable,
            "generation_config": self.generation_config.to_dict(),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Any = None) -> Self:
        """A model as `get_config` describes it, its weights fresh."""
        fields = dict(config)
        generation = fields.pop("generation_config", None)
        model = cls(**fields)
        if generation is not None:
            model.generation_config = GenerationConfig.from_dict(generation)
        return model

    def build_from_config(self, config: Any) -> None:
        """Nothing: a model is built when it is made."""

    def __call__(self, *given: Any, **options: Any) -> Any:
        """Call the model: by keywords, or with everything in the first argument."""
        directly = tf.executing_eagerly() and not in_step() and self._is_outermost()
        token = _CALLED_DIRECTLY.set(self if directly else None)
        try:
            return super().__call__(**inputs.named(self, given, options))
        finally:
            _CALLED_DIRECTLY.reset(token)

    # --- outputs -----------------------------------------------------------------------------

    def _is_outermost(self) -> bool:
        """Whether no other layer is calling this one."""
        if self._get_call_context().entry_layer is not self:
            return False
        # Asking has opened a context; the call will open its own.
        self._maybe_reset_call_context()
        return True

    @property
    def _is_called_directly(self) -> bool:
        """Whether Python itself called this model: no layer, no step of `fit`, no program."""
        # A symbolic call begins in Python and is traced.
        return _CALLED_DIRECTLY.get() is self and tf.executing_eagerly()

    def _caches(self, use_cache: bool | None, training: bool | None) -> bool:
        """Whether this call returns a cache: never where layers are run again or left out."""
        default = self.config.use_cache and self._is_called_directly
        if not (training and (self._decoder().checkpoint_every or self.config.layerdrop)):
            return default if use_cache is None else use_cache
        if use_cache:
            warnings.warn(
                "use_cache is off while training with gradient checkpointing or layerdrop",
                stacklevel=3,
            )
        return False

    def _answer(self, record: ModelOutput, return_dict: bool | None) -> Any:
        """The record for who called directly, for Keras and compiled programs a plain dictionary.

        There a cache that grows is pairs, of which Keras and SavedModel know what to make.
        """
        if self._is_called_directly:
            wanted = self.config.return_dict if return_dict is None else return_dict
            return record if wanted else record.to_tuple()
        plain = dict(record)
        cache = plain.get("past_key_values")
        if isinstance(cache, Cache) and cache.held is None:
            plain["past_key_values"] = tuple(cache)
        return plain if return_dict is not False else tuple(plain.values())

    # --- parts -------------------------------------------------------------------------------

    def _decoder(self) -> Decoder:
        # No property: Keras would save its weights a second time, under that name.
        decoder: Decoder = self.decoder if self.head is Head.NONE else self.model.decoder
        return decoder

    @property
    def attn_implementation(self) -> str:
        """How queries meet keys: "eager" is what there is."""
        name: str = self.config._attn_implementation
        return name

    def set_attn_implementation(self, name: str) -> None:
        """Choose another attention implementation.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in IMPLEMENTATIONS:
            raise ValueError(
                f"there is no attention implementation {name!r}; there are "
                f"{', '.join(IMPLEMENTATIONS)}"
            )
        self.config._attn_implementation = name

    # --- files -------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        config: OPTConfig | str | os.PathLike[str] | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        attn_implementation: str | None = None,
        name: str | None = None,
        check: bool = True,
        **options: Any,
    ) -> Self:
        """Load a checkpoint: a folder, a file, an index, or a repository of the hub.

        The model computes by Keras's own policy (float32 unless you set another) unless `dtype` (or
        `torch_dtype`) names a type or a policy, or is "auto": the type of the file. `check=False`
        leaves out the search for NaN. Further options are those of the hub (`revision`, `token`,
        `cache_dir`, `local_files_only`, `force_download`, `subfolder`), the hints `from_pt`,
        `from_tf` and `from_flax` (which files to look for first), and fields of the
        configuration.

        Raises:
            CheckpointNotFound: there is no checkpoint, or a file of it is missing.
            CheckpointMismatch: its tensors are not those that the configuration asks for.
            CheckpointDamaged: a file cannot be read as what it claims to be.
            CheckpointUnsafe: a file asks for something that no checkpoint may.
            HubError: the repository cannot be read.
            ValueError: a bad configuration or argument.
        """
        wanted = dtype if dtype is not None else torch_dtype
        found = weights.open_pretrained(source, config=config, options=options)
        policy = weights.stored_dtype(found.checkpoint) if wanted == "auto" else _policy(wanted)
        model = cls(
            found.config,
            attn_implementation=attn_implementation,
            name=name,
            dtype=policy,
            _values=False,
        )
        weights.load(model, model.config, cls.head, found.checkpoint, check=check)
        model.config.dtype = model.variable_dtype
        model.generation_config = found.generation_config
        return model

    def _stored_tensors(self) -> Mapping[str, TensorSource]:
        return weights.tensors(self, self.config, self.head)

    def _stored_dtype(self) -> str:
        return str(self.variable_dtype)

    # --- embeddings and heads ----------------------------------------------------------------

    def get_input_embeddings(self) -> keras.layers.Embedding:
        """The token embedding."""
        return self._decoder().embed_tokens

    def set_input_embeddings(self, value: keras.layers.Embedding) -> None:
        """Replace the token embedding; a tied head follows."""
        surgery.put(self._decoder(), "embed_tokens", value)

    def get_output_embeddings(self) -> keras.layers.Layer | None:
        """What scores tokens: the head, the embedding if they are tied, or None without a head."""
        if self.head is not Head.CAUSAL_LM:
            return None
        return self.get_input_embeddings() if self.config.tie_word_embeddings else self.lm_head

    def set_output_embeddings(self, value: keras.layers.Layer) -> None:
        """Replace the language-model head.

        Raises:
            ValueError: this class has none of its own.
        """
        if self.head is not Head.CAUSAL_LM or self.config.tie_word_embeddings:
            raise ValueError(f"{type(self).__name__} has no output embeddings to set")
        surgery.put(self, "lm_head", value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> keras.layers.Embedding:
        """Change the size of the vocabulary, keeping the rows that stay and the tie.

        New rows are drawn as fresh ones are. Returns the embedding; unchanged if no size is given.
        A compiled model must be compiled again: its optimizer knows the old weights.

        Raises:
            ValueError: a size below 1, or one that leaves a special token outside.
        """
        size = vocabulary_size(self.config, new_num_tokens, pad_to_multiple_of)
        if size != self.config.vocab_size:
            surgery.resize(self, size)
        return self.get_input_embeddings()

    def prune_heads(self, heads_to_prune: Mapping[int, Iterable[int]]) -> None:
        """Remove attention heads for good: `{layer: heads}`, numbered as in the whole model.

        Raises:
            ValueError: there is no such layer or head, or a layer would keep none.
        """
        surgery.prune(self, heads_to_prune)

    # --- training ----------------------------------------------------------------------------

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return self._decoder().checkpoint_every > 0

    def gradient_checkpointing_enable(self, every_n_layers: int = 1) -> None:
        """Trade time for memory in training: activations of layers are computed again going back.

        Programs that were traced before keep to what they were traced with; `fit` traces anew.
        """
        self._decoder().checkpoint_every = every_n_layers
        self.train_function = None

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.gradient_checkpointing_enable(0)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters; a tied one counts once."""
        chosen = self.trainable_weights if only_trainable else self.weights
        left_out = set()
        if exclude_embeddings:
            left_out = {id(v) for v in self._decoder().embed_tokens.weights}
            left_out |= {id(v) for v in self._decoder().embed_positions.weights}
        return sum(int(tf.size(v)) for v in chosen if id(v) not in left_out)


def _policy(value: Any) -> Any:
    """The policy that a type, its name or a policy stands for; None for Keras's own.

    Raises:
        ValueError: nothing that a model computes in.
    """
    if value is None or isinstance(value, keras.DTypePolicy):
        return value
    name = value.name if isinstance(value, tf.DType) else str(value).removeprefix("torch.")
    known = (*DTYPES, *MIXED)
    if name not in known:
        raise ValueError(f"dtype is {value!r}; it must be auto or one of {', '.join(known)}")
    return name
