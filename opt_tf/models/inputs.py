"""What a call was given, named, checked and resolved once: mask, positions, cache, head factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_core import arguments
from opt_core.config import OPTConfig
from opt_tf.attention import Visible
from opt_tf.decoder import Cache, positions_of, size
from opt_tf.layers import check_ids


class Inputs(NamedTuple):
    """A call's inputs as the decoder wants them."""

    positions: Tensor  # int [B or 1, T]
    visible: Visible
    cache: Cache | None
    head_mask: list[Tensor | None]


def named(model: keras.Model, given: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; the first one may hold several, in a mapping or a list.

    Raises:
        TypeError: there are more than `call` takes, or one comes twice.
    """
    names = list(signature(type(model).call).parameters)[1:]
    first = given[0] if given else options.get(names[0])
    result = {**dict(zip(names, given, strict=False)), **options}
    if len(given) > len(names):
        raise TypeError(f"{type(model).__name__} takes {len(names)} inputs, found {len(given)}")
    if not isinstance(first, Mapping | list | tuple) or _holds_numbers(first):
        return result
    del result[names[0]]
    several = first if isinstance(first, Mapping) else dict(zip(names, first, strict=False))
    twice = [name for name in several if result.get(name) is not None]
    if twice or len(first) > len(names):
        raise TypeError(
            f"the first argument holds {len(first)} inputs of {len(names)}"
            + (f", and {', '.join(twice)} came again" if twice else "")
        )
    return {**result, **several}


def _holds_numbers(values: Any) -> bool:
    """Whether a list is itself ids, not a list of inputs."""
    while isinstance(values, list | tuple) and values:
        values = values[0]
    return isinstance(values, int)


def check_tokens(
    config: OPTConfig, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> Tensor:
    """The one of the two that was given.

    Raises:
        ValueError: both or none, another number of axes, no token, or an id outside the vocabulary.
    """
    arguments.check_tokens(config, given(input_ids), given(inputs_embeds))
    if input_ids is not None:
        check_ids(input_ids, config.vocab_size)
        # Tables are looked up by these two alone.
        wide = input_ids.dtype in (tf.int32, tf.int64)
        return input_ids if wide else tf.cast(input_ids, tf.int32)
    assert inputs_embeds is not None
    return inputs_embeds


def tensor(values: Any) -> Tensor | None:
    """What a caller passed as a tensor, of its own type; None stays."""
    return None if values is None else tf.convert_to_tensor(values)


def given(values: Tensor | None) -> arguments.Given | None:
    """A tensor as an error describes it; a length that tracing does not know is as good as any."""
    if values is None:
        return None
    shape = tuple(1 if length is None else length for length in values.shape)
    return arguments.Given(shape, values.dtype.name, values.dtype.is_floating)


def resolve(
    config: OPTConfig,
    tokens: Tensor,
    *,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    head_mask: Tensor | None,
    past: Cache | None,
    caching: bool,
) -> Inputs:
    """`[B, T, ...]` ids or embeddings and the other arguments of a call -> `Inputs`.

    Raises:
        ValueError: a mask, positions or head factors of the wrong shape, or too long an input.
    """
    T, keys = size(tokens, 1), size(tokens, 1)
    held: int | Tensor = 0
    if past is not None:
        held = past.length
        keys = past.capacity if past.held is not None else held + T
        if past.held is not None and tf.executing_eagerly():
            held = int(past.held)
            _check_room(past, held, T)
    cover = Visible(held, T, keys, None)
    fixed = past is not None and past.held is not None
    shown, sound = _shown(attention_mask, size(tokens, 0), cover, fixed)
    positions = _positions(config, position_ids, shown, size(tokens, 0), cover)
    if not isinstance(held, int):
        sound &= (held >= 0) & (held + T <= keys)
    # No program can be stopped by a wrong value: a position that is not there makes all of it NaN.
    positions = tf.where(sound, positions, config.max_position_embeddings)
    cache = past if past is not None else Cache() if caching else None
    return Inputs(positions, cover._replace(shown=shown), cache, _head_factors(config, head_mask))


def _check_room(past: Cache, held: int, T: int) -> None:
    if held + T > past.capacity:
        raise ValueError(
            f"the cache holds {held} tokens and has room for {past.capacity}: {T} more do not fit"
        )


def _shown(
    mask: Tensor | None, B: int | Tensor, cover: Visible, fixed: bool
) -> tuple[Tensor | None, Tensor]:
    """Bool `[B, S]`, or None if nothing is padded; and whether values and length are sound."""
    sound = tf.constant(True)
    if mask is None:
        return None, sound
    _check_mask_shape(mask, B, cover, fixed)
    shown, ones = mask != tf.zeros((), mask.dtype), mask == tf.ones((), mask.dtype)
    if not tf.executing_eagerly():
        sound = tf.reduce_all(shown == ones)
    elif not bool(tf.reduce_all(shown == ones)):
        raise arguments.unknown_mask_values()
    elif bool(tf.reduce_all(ones)):
        return None, sound
    if fixed:
        # In a buffer of fixed length the places after the mask's end are not there yet.
        length = size(mask, 1)
        sound &= (length == cover.keys) | (length == cover.start + cover.queries)
        shown = tf.pad(shown, [[0, 0], [0, cover.keys - length]])
    return tf.reshape(shown, (B, cover.keys)), sound


def _check_mask_shape(mask: Tensor, B: int | Tensor, cover: Visible, fixed: bool) -> None:
    shape, held, T = tuple(mask.shape), cover.start, cover.queries
    if None in shape or not all(isinstance(count, int) for count in (B, held, T, cover.keys)):
        # What tracing does not know, the reshape after it or the program's NaN will show.
        if len(shape) != 2:
            arguments.check_mask_shape(shape, -1, 0, -1)
    elif not (fixed and shape == (B, cover.keys)):
        arguments.check_mask_shape(shape, B, held, T)


def _positions(
    config: OPTConfig,
    position_ids: Tensor | None,
    shown: Tensor | None,
    B: int | Tensor,
    cover: Visible,
) -> Tensor:
    start, T = cover.start, cover.queries
    if position_ids is not None:
        if None not in (*position_ids.shape, None if isinstance(B, Tensor) else B):
            arguments.check_position_shape(tuple(position_ids.shape), B, T)
        if tf.executing_eagerly():
            least, most = tf.reduce_min(position_ids), tf.reduce_max(position_ids)
            arguments.check_reach(config, int(most), int(least))
        return tf.cast(position_ids, tf.int32)
    if shown is None:
        if isinstance(start, int) and isinstance(T, int):
            arguments.check_reach(config, start + T - 1)
        return tf.range(T)[None] + start
    positions = positions_of(shown)[:, start : start + T]
    if tf.executing_eagerly() and cover.keys > config.max_position_embeddings:
        arguments.check_reach(config, int(tf.reduce_max(positions)))
    return positions


def _head_factors(config: OPTConfig, head_mask: Tensor | None) -> list[Tensor | None]:
    L, H = config.num_hidden_layers, config.num_attention_heads
    if head_mask is None:
        return [None] * L
    kept = arguments.kept_heads(config, tuple(head_mask.shape))
    rows = tf.broadcast_to(head_mask, (L, H))
    return [rows[i] if len(keep) == H else tf.gather(rows[i], keep) for i, keep in enumerate(kept)]
