"""What a call was given, checked and resolved once: mask, positions, cache and head factors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, export
from numpy.typing import NDArray

from opt_core import arguments
from opt_core.config import OPTConfig
from opt_core.config.rules import RULES
from opt_core.generation import bucket
from opt_core.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
)
from opt_flax.attention import Visible
from opt_flax.decoder import Cache, is_traced, positions_of


class Given(NamedTuple):
    """The arrays of a call, as a caller or a program passes them."""

    input_ids: Any = None
    attention_mask: Any = None
    position_ids: Any = None
    inputs_embeds: Any = None
    head_mask: Any = None
    past: Cache | None = None

    @property
    def tokens(self) -> Any:
        """Ids `[B, T]` or embeddings `[B, T, E]`."""
        return self.input_ids if self.inputs_embeds is None else self.inputs_embeds


class Resolved(NamedTuple):
    """A call's inputs as the decoder wants them."""

    positions: Array  # int [B or 1, T]
    visible: Visible
    cache: Cache | None
    head_mask: list[Array | None]


def known(values: Any) -> NDArray[Any] | None:
    """The values, where Python can look at them without waiting for an accelerator."""
    if values is None or is_traced(values):
        return None
    if not isinstance(values, jax.Array):
        return np.asarray(values)
    on_cpu = all(device.platform == "cpu" for device in values.devices())
    return np.asarray(values) if on_cpu and values.is_fully_addressable else None


def as_array(values: Any) -> Any:
    """An array as it is, anything else as NumPy's."""
    return values if values is None or hasattr(values, "shape") else np.asarray(values)


def check(config: OPTConfig, given: Given, *, keeps_mask: bool = False) -> Given:
    """The same inputs, found to be right as far as can be seen, in the form that programs take.

    That form has ids in int32, and a mask as long as the buffers of the cache, or none where
    nothing is padded unless the caller keeps it. Inside a program shapes are checked, and values
    that are out of range will give NaN.

    Raises:
        ValueError: an argument of the wrong shape or range, or too long an input.
    """
    given = Given._make([*map(as_array, given[:5]), given.past])
    either = (given.input_ids, given.inputs_embeds)
    B, T = arguments.check_tokens(config, *(None if x is None else told(x) for x in either))
    held = 0 if given.past is None else _held(given.past)
    ids, mask, positions = given.input_ids, given.attention_mask, given.position_ids
    if ids is not None:
        ids = checked_ids(config, ids)
    if mask is not None:
        mask = _mask(mask, B, held, T, given.past, keeps_mask)
    if positions is not None:
        arguments.check_position_shape(tuple(positions.shape), B, T)
        if (found := known(positions)) is not None:
            arguments.check_reach(config, int(found.max()), int(found.min()))
            positions = found.astype(np.int32)
    elif mask is None and held is not None:
        arguments.check_reach(config, held + T - 1)
    elif held is not None and (found := known(mask)) is not None:
        seen = found[:, : held + T]
        arguments.check_reach(config, int((np.cumsum(seen, axis=1) * seen)[:, -T:].max()) - 1)
    if given.head_mask is not None:
        arguments.kept_heads(config, tuple(given.head_mask.shape))
    return given._replace(input_ids=ids, attention_mask=mask, position_ids=positions)


def told(values: Any) -> arguments.Given:
    """An array as an error describes it."""
    is_float = jnp.issubdtype(values.dtype, jnp.inexact)
    return arguments.Given(tuple(values.shape), str(values.dtype), is_float)


def room_for(past: Cache | None, tokens: int) -> int:
    """The capacity of the buffers after a call: a token more fits, and programs are reused.

    Raises:
        ValueError: inside a program, where buffers cannot grow, they are too short.
    """
    if past is None:
        # A length that is a symbol, as in jax.export, has no bucket.
        return bucket(tokens + 1) if isinstance(tokens, int) else tokens + 1
    held = _held(past)
    if held is None and tokens > past.capacity:
        raise ValueError(
            f"past_key_values has room for {past.capacity} tokens, and the call brings {tokens}; "
            "inside a compiled program a cache cannot grow: start with a larger one (init_cache)"
        )
    if held is None or held + tokens <= past.capacity:
        return past.capacity
    return bucket(held + tokens + 1)


def fitted(given: Given, capacity: int) -> Given:
    """The same inputs with a cache, and a mask, of this capacity."""
    if given.past is None:
        return given
    mask = given.attention_mask
    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, capacity - mask.shape[1])))
    return given._replace(past=given.past.grown(capacity), attention_mask=mask)


def resolve(config: OPTConfig, given: Given, *, capacity: int | None, dtype: Any) -> Resolved:
    """Checked inputs of a program -> what its decoder wants.

    `capacity` is that of the cache to start where there is none, or None for no cache.
    """
    B, T = given.tokens.shape[:2]
    cache, mask = given.past, given.attention_mask
    start = 0 if cache is None else cache.length
    keys = T if cache is None else cache.capacity
    shown = None if mask is None else mask.astype(bool)
    positions = given.position_ids
    if positions is None and shown is None:
        positions = (jnp.arange(T, dtype=jnp.int32) + start)[None]
    elif positions is None:
        assert shown is not None
        positions = _these(positions_of(shown, keys), start, T)
    positions = positions.astype(jnp.int32)
    if mask is not None and mask.dtype != bool:
        # Not one of 0 and 1, such as a mask to add to scores: no position has a row for it.
        odd = ((mask != 0) & (mask != 1)).any(1, keepdims=True)
        positions = jnp.where(odd, -2, positions)
    if cache is None and capacity is not None:
        cache = Cache.empty(config, B, capacity, dtype)
    visible = Visible(start, T, keys, shown)
    return Resolved(positions, visible, cache, _head_factors(config, given.head_mask))


def shown_now(given: Given) -> Array | None:
    """What the mask of checked inputs says of the new tokens, bool `[B, T]`."""
    if given.attention_mask is None:
        return None
    shown = given.attention_mask.astype(bool)
    start = 0 if given.past is None else given.past.length
    return _these(shown, start, given.tokens.shape[1])


def _these(values: Array, start: Any, count: int) -> Array:
    """The columns of the new tokens."""
    return jax.lax.dynamic_slice_in_dim(values, start, count, axis=1)


def _held(past: Cache) -> int | None:
    """The number of tokens in a cache; None where only the program will know."""
    return None if is_traced(past.length) else int(past.length)


def checked_ids(config: OPTConfig, ids: Any) -> Any:
    """Ids in int32 on the host, where their values are known; else as they are.

    Raises:
        ValueError: one is outside the vocabulary.
    """
    # Narrow types have no room for the size of the vocabulary, which stands for what is no id.
    is_array, narrow = isinstance(ids, jax.Array), ids.dtype.itemsize < 4
    held = ids.astype(jnp.int32) if is_array and narrow else ids
    found = known(ids)
    if found is None:
        return held
    least, most = int(found.min()), int(found.max())
    if least < 0 or most >= config.vocab_size:
        wrong = least if least < 0 else most
        row, place = (int(x) for x in np.argwhere(found == wrong)[0])
        raise arguments.unknown_id(wrong, row, place, config.vocab_size)
    # An array of JAX stays where it is: it may be spread over devices.
    return held if is_array else found.astype(np.int32)


def _mask(mask: Any, B: int, held: int | None, T: int, past: Cache | None, keeps_mask: bool) -> Any:
    """A mask over past and new tokens as one over the buffers; None if nothing is padded."""
    capacity = T if past is None else past.capacity
    shape = tuple(mask.shape)
    if held is None or shape != (B, capacity):
        arguments.check_mask_shape(shape, B, capacity - T if held is None else held, T)
    if (found := known(mask)) is not None:
        if not ((found == 0) | (found == 1)).all():
            raise arguments.unknown_mask_values()
        found = found.astype(bool)
        if not keeps_mask and held is not None and found[:, : held + T].all():
            return None
        return np.pad(found, ((0, 0), (0, max(0, capacity - found.shape[1]))))
    return jnp.pad(mask, ((0, 0), (0, max(0, capacity - shape[1]))))


def _head_factors(config: OPTConfig, head_mask: Any) -> list[Array | None]:
    L, H = config.num_hidden_layers, config.num_attention_heads
    if head_mask is None:
        return [None] * L
    kept = arguments.kept_heads(config, tuple(head_mask.shape))
    rows = jnp.broadcast_to(jnp.atleast_2d(head_mask), (L, H))
    return [rows[i, np.array(keep)] for i, keep in enumerate(kept)]


class Asked(NamedTuple):
    """What a call wants back; None leaves it to the configuration."""

    output_attentions: bool | None
    output_hidden_states: bool | None
    return_dict: bool | None
    use_cache: bool | None


class Training(NamedTuple):
    """How a call says that it trains."""

    dropout_rng: Array | None
    deterministic: bool | None
    train: bool | None

    def is_deterministic(self) -> bool:
        """Whether nothing is dropped.

        Raises:
            ValueError: the two switches contradict each other.
        """
        if self.train is not None and self.deterministic is self.train:
            raise ValueError(
                f"train is {self.train} and deterministic is {self.deterministic}; they are "
                "opposites: give one of them"
            )
        if self.train is not None:
            return not self.train
        return True if self.deterministic is None else self.deterministic


@dataclass(frozen=True)
class Program:
    """What a call is compiled for besides shapes; equal where the same program serves."""

    module: nn.Module = field(compare=False)
    #: What the module is made of. It stands for the module itself, which has no hash.
    parts: tuple[Any, ...]
    output_attentions: bool
    output_hidden_states: bool
    deterministic: bool
    keeps_cache: bool
    capacity: int


#: Fields of a configuration that say nothing about what a module computes.
_SILENT = {
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "init_std"),
    *("bos_token_id", "eos_token_id", "id2label", "label2id", "dtype"),
}
_COMPUTED = tuple(name for name in RULES if name not in _SILENT)


def parts_of(module: Any) -> tuple[Any, ...]:
    """All that decides what a module of a model computes; fields of a configuration may change."""
    kinds = (jnp.dtype(module.dtype), jnp.dtype(module.param_dtype))
    fields = vars(module.config)
    options = (module.attn_implementation, module.checkpoint_every)
    return (type(module), *kinds, *options, *(str(fields[name]) for name in _COMPUTED))


@partial(jax.jit, static_argnums=0)
def run(
    program: Program, params: Any, given: Given, targets: dict[str, Any], rng: Array | None
) -> Any:
    """One call of a module, compiled once for each `Program` and shape, whichever model asks."""
    given = fitted(given, program.capacity)
    rngs = {}
    if rng is not None:
        rngs = dict(zip(("dropout", "layerdrop"), jax.random.split(rng), strict=True))
    return program.module.apply(
        {"params": params},
        given.input_ids,
        given.attention_mask,
        given.position_ids,
        program.output_attentions,
        program.output_hidden_states,
        True,
        program.deterministic,
        inputs_embeds=given.inputs_embeds,
        head_mask=given.head_mask,
        past_key_values=given.past,
        use_cache=program.keeps_cache,
        rngs=rngs,
        **targets,
    )


def counted(result: ModelOutput, given: Given) -> ModelOutput:
    """A result whose attention weights are over the tokens held, where their number is known."""
    if given.past is None or result.attentions is None or (held := _held(given.past)) is None:
        return result
    keys = held + given.tokens.shape[1]
    weights = tuple(
        x if is_traced(x) else jnp.asarray(np.asarray(x)[..., :keys]) for x in result.attentions
    )
    return type(result)({**result, "attentions": weights})


def _from_leaves(
    kind: type[ModelOutput], names: tuple[str, ...], values: Iterable[Any]
) -> ModelOutput:
    # Past the constructor: JAX also makes trees of what is no array, None among them.
    record = kind()
    dict.update(record, zip(names, values, strict=True))
    return record


def _leaves(out: ModelOutput) -> tuple[list[Any], tuple[str, ...]]:
    return [(jax.tree_util.GetAttrKey(name), out[name]) for name in out], tuple(out)


for _record in (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
):
    # Transformed functions find the arrays of an output through JAX's tree registry.
    jax.tree_util.register_pytree_with_keys(_record, _leaves, partial(_from_leaves, _record))
    export.register_pytree_node_serialization(
        _record,
        serialized_name=f"optlm.{_record.__name__}",
        serialize_auxdata=lambda names: ",".join(names).encode(),
        deserialize_auxdata=lambda data: tuple(data.decode().split(",")),
    )
export.register_pytree_node_serialization(
    Cache,
    serialized_name="optlm.Cache",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: (),
)
