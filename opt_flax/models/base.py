"""What the OPT classes share: building, calling, loading, saving, resizing, pruning."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import Mesh

from opt_core.checkpoint import TensorSource
from opt_core.config import DTYPES, OPTConfig
from opt_core.generation import GenerationConfig
from opt_core.pretrained import SavingMixin
from opt_core.weights import Head
from opt_flax import weights
from opt_flax.attention import IMPLEMENTATIONS
from opt_flax.decoder import Cache
from opt_flax.models import inputs
from opt_flax.models.inputs import Asked, Given, Program, Training
from opt_flax.models.surgery import ChangesMixin
from opt_flax.weights import Params


class FlaxOPTPreTrainedModel(ChangesMixin, SavingMixin):
    """A Linen module with its parameters, called as in Hugging Face transformers.

    Parameters are float32 unless `param_dtype` names another type; `dtype` is that of the
    computation. With `_do_init=False` the model holds none: `init_weights` makes them, and calls
    take them as `params`. A model holds its own copy of the configuration; fields that decide names
    and shapes of weights cannot change in it. `resize_token_embeddings` and `prune_heads` give the
    model a new one. `input_shape` is accepted as documented; no parameter depends on it.
    """

    head: ClassVar[Head]
    module_class: ClassVar[Any]
    config_class = OPTConfig
    main_input_name = "input_ids"
    base_model_prefix = "model"
    framework = "flax"

    config: OPTConfig
    generation_config: GenerationConfig

    def __init__(
        self,
        config: OPTConfig,
        input_shape: tuple[int, ...] = (1, 1),
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
        *,
        attn_implementation: str | None = None,
        param_dtype: Any = jnp.float32,
    ) -> None:
        if len(input_shape) != 2:
            raise ValueError(f"input_shape is {input_shape}, expected (batch, tokens)")
        # A locked one is another model's, which keeps it for itself.
        self.config = copy.deepcopy(config).locked()
        self.name_or_path = config.name_or_path
        self.generation_config = GenerationConfig.from_model_config(config)
        self.input_shape, self.key = tuple(input_shape), jax.random.key(seed)
        self._module = self.module_class(
            self.config, dtype=_dtype(dtype), param_dtype=_dtype(param_dtype)
        )
        if attn_implementation is None:
            attn_implementation = getattr(config, "_attn_implementation", None)
        self.set_attn_implementation("xla" if attn_implementation is None else attn_implementation)
        self._params: Params | None = None
        if _do_init:
            self._params = self.init_weights(self.key, self.input_shape)

    # --- what it is made of ------------------------------------------------------------------

    @property
    def module(self) -> Any:
        """The Linen module; `module.apply({"params": params}, input_ids)` runs it."""
        return self._module

    @property
    def params(self) -> Params:
        """The parameters, plain dictionaries by the checkpoint's path.

        Raises:
            ValueError: the model was made with `_do_init=False` and given none since.
        """
        if self._params is None:
            raise ValueError(
                "the model holds no params, since it was made with _do_init=False; pass params= to "
                "the call, or set model.params"
            )
        return self._params

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        plain = unfreeze(dict(params))
        weights.check_fit(self.config, self.head, plain)
        self._params = plain

    @property
    def params_shape_tree(self) -> Params:
        """The tree of the parameters' shapes and types."""
        return weights.shapes(self.config, self.head, self._module.param_dtype)

    @property
    def required_params(self) -> set[tuple[str, ...]]:
        """The path of every parameter."""
        return set(flatten_dict(self.params_shape_tree))

    @property
    def dtype(self) -> Any:
        """The type that the model computes in."""
        return jnp.dtype(self._module.dtype)

    @property
    def attn_implementation(self) -> str:
        """How queries meet keys: one of `opt_flax.attention.IMPLEMENTATIONS`."""
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
        self._module = self._module.clone(attn_implementation=name)

    def init_weights(
        self,
        rng: Array,
        input_shape: tuple[int, ...] = (1, 1),
        params: Mapping[str, Any] | None = None,
    ) -> Params:
        """Fresh parameters of the weight table's distribution; those that are given stay."""
        made = weights.fresh(self.config, self.head, rng, self._module.param_dtype)
        if params is None:
            return made
        full: Params = unflatten_dict(
            {**flatten_dict(made), **flatten_dict(unfreeze(dict(params)))}
        )
        weights.check_fit(self.config, self.head, full)
        return full

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for so many rows and tokens; calls with it keep its shapes."""
        return Cache.empty(self.config, batch_size, max_length, self._module.dtype)

    def num_parameters(self) -> int:
        """The number of parameters; a tied one counts once."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params_shape_tree))

    def _adopt(self, config: OPTConfig) -> None:
        config._attn_implementation = self.attn_implementation
        self.config, self._module = config, self._module.clone(config=config)

    # --- calling -----------------------------------------------------------------------------

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        dropout_rng: Array | None = None,
        deterministic: bool | None = None,
        *,
        train: bool | None = None,
        inputs_embeds: Any = None,
        head_mask: Any = None,
        use_cache: bool | None = None,
    ) -> Any:
        """`[B, T]` ids, or `[B, T, E]` embeddings -> `[B, T, E]` hidden states.

        `attention_mask` is 0 or 1, `[B, past + T]`, or as long as the buffers of the cache; without
        it everything counts. `position_ids` start at 0 and come from the mask unless given.
        `head_mask` is `[L, H]` or `[H]`: a factor for each head. `past_key_values` is what an
        earlier call returned, `init_cache`, or pairs per layer. Training, `train=True` or
        `deterministic=False`, draws from `dropout_rng`. The call is one compiled program, kept for
        its shapes; inside a program of the caller's it becomes a part of that, and ids or positions
        out of range give NaN, where otherwise they raise.

        Raises:
            ValueError: an argument of the wrong shape or range, or a call that the chosen
                attention implementation cannot run.
        """
        return self._call(
            Given(input_ids, attention_mask, position_ids, inputs_embeds, head_mask),
            past_key_values,
            {},
            params,
            Asked(output_attentions, output_hidden_states, return_dict, use_cache),
            Training(dropout_rng, deterministic, train),
        )

    def _call(
        self,
        given: Given,
        past: Any,
        targets: dict[str, Any],
        params: Any,
        asked: Asked,
        training: Training,
    ) -> Any:
        config, deterministic = self.config, training.is_deterministic()
        given = given._replace(past=Cache.of(past, config.num_hidden_layers))
        pools = self.head is Head.SEQUENCE_CLASSIFICATION
        given = inputs.check(config, given, keeps_mask=pools)
        if not deterministic and training.dropout_rng is None and self._draws():
            raise ValueError(
                "training with dropout or layerdrop needs dropout_rng: pass a key of jax.random, "
                "a new one for each step, or set the rates of the configuration to 0"
            )
        program = Program(
            self._module,
            inputs.parts_of(self._module),
            _or(asked.output_attentions, config.output_attentions),
            _or(asked.output_hidden_states, config.output_hidden_states),
            deterministic,
            self._caches(asked.use_cache, deterministic),
            inputs.room_for(given.past, given.tokens.shape[1]),
        )
        rng = None if deterministic else training.dropout_rng
        result = inputs.run(program, self.params if params is None else params, given, targets, rng)
        result = inputs.counted(result, given)
        return result if _or(asked.return_dict, config.return_dict) else result.to_tuple()

    def _draws(self) -> bool:
        c = self.config
        return max(c.dropout, c.attention_dropout, c.layerdrop) > 0

    def _caches(self, use_cache: bool | None, deterministic: bool) -> bool:
        """Whether this call returns a cache: never where layers are run again or left out."""
        unsteady = self._module.checkpoint_every > 0 or self.config.layerdrop > 0
        if deterministic or not unsteady:
            return _or(use_cache, self.config.use_cache)
        if use_cache:
            warnings.warn(
                "use_cache is off while training with gradient checkpointing or layerdrop",
                stacklevel=4,
            )
        return False

    # --- files -------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        dtype: Any = None,
        *,
        config: OPTConfig | str | os.PathLike[str] | None = None,
        torch_dtype: Any = None,
        param_dtype: Any = None,
        seed: int = 0,
        input_shape: tuple[int, ...] = (1, 1),
        _do_init: bool = True,
        mesh: Mesh | None = None,
        axis: str = "model",
        attn_implementation: str | None = None,
        check: bool = True,
        **options: Any,
    ) -> Self:
        """Load a checkpoint: a folder, a file, an index, or a repository of the hub.

        The model computes in, and its parameters have, the type `dtype` (or `torch_dtype`): float32
        unless named, "auto" for the type of the file. `param_dtype` names another type for the
        parameters alone. With `_do_init=False` the result is the model, which holds no parameters,
        and the parameters. With a `mesh` they are spread as by `opt_flax.shard`, tensor by tensor.
        `seed` is that of a head which is in no file. `check=False` leaves out the search for NaN.
        Further options are those of the hub (`revision`, `token`, `cache_dir`, `local_files_only`,
        `force_download`, `subfolder`), the hints `from_pt`, `from_tf` and `from_flax` (which
        files to look for first), and fields of the configuration.

        Raises:
            CheckpointNotFound: there is no checkpoint, or a file of it is missing.
            CheckpointMismatch: its tensors are not those that the configuration asks for.
            CheckpointDamaged: a file cannot be read as what it claims to be.
            CheckpointUnsafe: a file asks for something that no checkpoint may.
            HubError: the repository cannot be read.
            ValueError: a bad configuration or argument, or a mesh that cannot share out the model.
        """
        wanted = dtype if dtype is not None else torch_dtype
        opened = weights.open_pretrained(source, config=config, options=options)
        stored = weights.stored_dtype(opened.checkpoint)
        kind = stored if wanted == "auto" else _dtype(wanted)
        kept = kind if param_dtype is None else _dtype(param_dtype)
        model = cls(
            opened.config,
            input_shape,
            seed,
            kind,
            False,
            attn_implementation=attn_implementation,
            param_dtype=kept,
        )
        places = (
            None if mesh is None else weights.shardings(model.config, cls.head, mesh, axis=axis)
        )
        params = weights.load(
            model.config,
            cls.head,
            opened.checkpoint,
            dtype=kept,
            key=model.key,
            placements=None if places is None else flatten_dict(places),
            check=check,
        )
        model.config.dtype = jnp.dtype(kept).name
        model.generation_config = opened.generation_config
        if not _do_init:
            # Typed as the usual result, for those who load the usual way.
            return model, params  # type: ignore[return-value]
        model._params = params
        return model

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        params: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        *,
        max_shard_size: int | str = "5GB",
        **hub_options: Any,
    ) -> None:
        """As `SavingMixin.save_pretrained`; `params` are saved in place of the model's own."""
        SavingMixin.save_pretrained(
            self._with(params),
            folder,
            max_shard_size=max_shard_size,
            push_to_hub=push_to_hub,
            **hub_options,
        )

    def push_to_hub(
        self,
        repo_id: str,
        params: Mapping[str, Any] | None = None,
        *,
        max_shard_size: int | str = "5GB",
        **options: Any,
    ) -> str:
        """As `SavingMixin.push_to_hub`; `params` are pushed in place of the model's own."""
        held = self._with(params)
        return SavingMixin.push_to_hub(held, repo_id, max_shard_size=max_shard_size, **options)

    def _with(self, params: Mapping[str, Any] | None) -> Self:
        """This model, or one that shares everything with it but the parameters."""
        if params is None:
            return self
        other = copy.copy(self)
        other.params = params
        return other

    def _stored_tensors(self) -> Mapping[str, TensorSource]:
        return weights.tensors(self.params, self.config, self.head)

    def _stored_dtype(self) -> str:
        name: str = jnp.dtype(jax.tree.leaves(self.params)[0].dtype).name
        return name


def _or(option: bool | None, default: bool) -> bool:
    return default if option is None else bool(option)


def _dtype(value: Any) -> Any:
    if value is None:
        return jnp.dtype(jnp.float32)
    try:
        kind = jnp.dtype(str(value).removeprefix("torch.") if isinstance(value, str) else value)
    except TypeError:
        kind = None
    if kind is None or kind.name not in DTYPES:
        raise ValueError(f"dtype is {value!r}; it must be auto or one of {', '.join(DTYPES)}")
    return kind
