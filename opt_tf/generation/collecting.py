"""What a generation carries and returns: tokens, the record, the cache inside and outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow import Tensor

from opt_core.generation import GenerationConfig
from opt_core.outputs import GenerateOutput
from opt_tf.decoder import Cache
from opt_tf.generation.cuts import SOUND
from opt_tf.generation.setup import Setup


class Carried(NamedTuple):
    """What goes through the loop."""

    state: Any
    fault: Tensor  # int32 [B]: see `cuts`
    #: Where they are collected: the scores of the last step as the model gave them, and ruled.
    seen: tuple[Tensor, ...] = ()
    #: What a strategy needs besides its state.
    besides: Any = ()

    @property
    def is_sound(self) -> Tensor:
        """Whether every text could go on: bool []."""
        return tf.reduce_all(self.fault == SOUND)


class Fed(NamedTuple):
    """What a pass over the prompt leaves."""

    last: Tensor  # [R, E]: the hidden state of each row's last real token
    cache: Cache
    states: Tensor | None  # [R, room, E]: those of all that was fed


class Found(NamedTuple):
    """What a strategy found: R returned sequences, n the most new tokens of one."""

    tokens: Tensor  # int32 [R, n]
    #: Made when it is asked for; of no use where `lengths` differ.
    cache: Callable[[], Cache | None]
    #: Which text each sequence belongs to.
    texts: Tensor  # int32 [R]
    scores: Tensor | None = None  # float64 [R]
    beams: Tensor | None = None  # int32 [R, n]
    #: int [R]: how many tokens each has, where the last one of a shorter one may not be fed yet.
    lengths: NDArray[Any] | None = None


def sequences(setup: Setup, found: Found) -> Tensor:
    """The texts as they were given, and what follows them: `[R, P + n]`."""
    prompts = tf.gather(setup.prompt, found.texts)
    return tf.concat([prompts, tf.cast(found.tokens, prompts.dtype)], axis=1)


def newest(setup: Setup, carried: Carried, start: int) -> Iterator[Tensor]:
    """The tokens `[B]` of each choice from column `start` on."""
    for column in range(start, int(carried.state.length)):
        yield tf.cast(carried.state.tokens[:, column], setup.prompt.dtype)


def record(setup: Setup, found: Found, seen: list[tuple[Tensor, ...]]) -> GenerateOutput:
    """The record of a generation; `seen` has the scores of each step where they are collected."""
    asked, whole = setup.asked, sequences(setup, found)
    logits, scores = zip(*seen, strict=True) if seen else ((), ())
    passed = _passed(setup, whole, found.texts)
    return GenerateOutput(
        sequences=whole,
        sequences_scores=None if found.scores is None else tf.cast(found.scores, tf.float32),
        scores=scores if asked.output_scores else None,
        logits=logits if asked.output_logits else None,
        beam_indices=found.beams,
        attentions=_cut(setup, passed.get("attentions"), whole, of_keys=True),
        hidden_states=_cut(setup, passed.get("hidden_states"), whole, of_keys=False),
        past_key_values=_cache(setup, whole, found),
    )


def _passed(setup: Setup, whole: Tensor, texts: Tensor) -> dict[str, Any]:
    """One pass over the returned sequences, all but their last column."""
    asked: GenerationConfig = setup.asked
    if not (asked.output_attentions or asked.output_hidden_states):
        return {}
    out = setup.model(
        whole[:, :-1],
        attention_mask=tf.constant(_mask(setup, whole, texts)),
        use_cache=False,
        output_attentions=asked.output_attentions,
        output_hidden_states=asked.output_hidden_states,
        return_dict=True,
    )
    return dict(out)


def _cache(setup: Setup, whole: Tensor, found: Found) -> Cache | None:
    """Keys and values of the returned sequences, all but their last column.

    A sequence that ended before the others did not feed its last token: a pass feeds all again.
    """
    lengths = found.lengths
    if lengths is None or lengths.min() == lengths.max() or not setup.asked.use_cache:
        return found.cache()
    mask, P = _mask(setup, whole, found.texts), setup.prompt.shape[1]
    mask[:, P:] = np.arange(mask.shape[1] - P) < lengths[:, None]
    past = setup.past
    if past is not None:
        past = past.mapped(lambda room: tf.gather(room, found.texts))
    out = setup.model.model(
        whole[:, setup.held : -1],
        attention_mask=tf.constant(mask),
        past_key_values=past,
        use_cache=True,
        output_attentions=False,
        output_hidden_states=False,
        return_dict=True,
    )
    cache: Cache = out["past_key_values"]
    return cache


def _mask(setup: Setup, whole: Tensor, texts: Tensor) -> NDArray[np.int32]:
    """Which columns of the returned sequences count, all but the last: int32 `[R, P + n - 1]`."""
    shown = setup.shown[: len(setup.prompt), setup.widened :]
    mask = np.ones((whole.shape[0], whole.shape[1] - 1), np.int32)
    mask[:, : shown.shape[1]] = shown[texts.numpy()]
    return mask


def _cut(setup: Setup, layers: Any, whole: Tensor, *, of_keys: bool) -> Any:
    """`[R, H, L, L]` or `[R, L, C]` a layer, cut into what each step computed."""
    if layers is None:
        return None
    P, n = setup.prompt.shape[1], whole.shape[1] - setup.prompt.shape[1]
    starts = [setup.held, *range(P, P + n - 1)]
    ends = range(P, P + n)

    def part(layer: Tensor, start: int, end: int) -> Tensor:
        return layer[:, :, start:end, :end] if of_keys else layer[:, start:end]

    return tuple(
        tuple(part(layer, start, end) for layer in layers)
        for start, end in zip(starts, ends, strict=True)
    )


# --- the cache of a loop -----------------------------------------------------------------------


def in_room(cache: Cache, length: Tensor, capacity: int) -> Cache:
    """A cache in fixed shapes that holds its first `length` tokens, and else zero."""

    def put(room: Tensor) -> Tensor:
        size = room.shape[-2]
        is_held = (tf.range(size) < length)[:, None]  # [S, 1]
        held = tf.where(is_held, room, tf.zeros_like(room))
        return tf.pad(held, [*[[0, 0]] * (room.shape.rank - 2), [0, capacity - size], [0, 0]])

    return cache.mapped(put, length)


def joined(cache: Cache) -> Cache:
    """Fixed shapes with rows and heads in one axis, `[B * H, S, D]`.

    XLA multiplies matrices along one batch axis. With two it would copy every buffer twice in every
    step: once to write into, once to look at in the other shape.
    """
    return cache.mapped(lambda room: tf.reshape(room, (-1, *room.shape[2:])), cache.held)


def parted(cache: Cache, R: int) -> Cache:
    """Joined rows and heads in axes of their own again, `[R, H, S, D]`."""
    return cache.mapped(lambda room: tf.reshape(room, (R, -1, *room.shape[1:])), cache.held)


def kept(cache: Cache, setup: Setup, length: int) -> Cache | None:
    """What a loop leaves in its joined cache, for the texts alone: `[B, H, length, D]`."""
    if not cache.keys:
        return None
    B, first = len(setup.prompt), setup.widened
    return parted(cache, len(setup.ids)).mapped(lambda room: room[:B, :, first:length])


def of_beams(cache: Cache, setup: Setup, texts: NDArray[Any], slots: NDArray[Any]) -> Cache | None:
    """The cache of sequences of one length, but for their last column: `[R, H, P + n - 1, D]`."""
    if not cache.keys:
        return None
    prompt = np.arange(setup.widened, setup.plan.prompt_length)
    places = np.concatenate([np.tile(prompt, (len(texts), 1)), slots[:, :-1]], axis=1)

    def gathered(room: Tensor) -> Tensor:
        by_slot = tf.transpose(tf.gather(room, texts), (0, 2, 1, 3))  # [R, S, H, D]
        found = tf.gather(by_slot, places, batch_dims=1)  # [R, P + n - 1, H, D]
        return tf.transpose(found, (0, 2, 1, 3))

    return parted(cache, len(setup.ids)).mapped(gathered)


def beside(caches: list[Cache]) -> Cache:
    """The caches of several rows of one length in one."""
    keys = zip(*(cache.keys for cache in caches), strict=True)
    values = zip(*(cache.values for cache in caches), strict=True)
    return Cache(*(tuple(tf.concat(rows, axis=0) for rows in rooms) for rooms in (keys, values)))
