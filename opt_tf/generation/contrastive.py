"""Contrastive search: likely tokens that do not repeat what the text says already."""

from __future__ import annotations

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_tf.decoder import Cache
from opt_tf.generation.collecting import Carried
from opt_tf.generation.cuts import SOUND, best, fault_of
from opt_tf.generation.decoding import Net, Plain, State, noted
from opt_tf.generation.rules import guided, ruled, text_of
from opt_tf.generation.setup import Made, Told


class Known(NamedTuple):
    """What a step needs besides the state; in it the newest token was fed as a candidate."""

    #: [B, E]: the last hidden state of the newest token.
    hidden: Tensor
    #: float32 [B, W, E]: those of all columns so far, of length 1.
    context: Tensor


class Contrastive(Plain):
    """Contrastive search (2202.06417)."""

    def first(self) -> Carried:
        """The prompt is fed, and the first token of every text chosen among its candidates."""
        setup, fed = self.setup, self.fed()
        units = _units(fed.states)
        room = [[0, 0], [0, setup.plan.width - units.shape[1]], [0, 0]]
        known = Known(fed.last, tf.pad(units, room))
        V = setup.model.config.vocab_size
        seen = (tf.zeros((len(setup.prompt), V), fed.last.dtype), tf.zeros((len(setup.prompt), V)))
        carried = Carried(
            self.started(fed.cache),
            tf.fill(len(setup.prompt), SOUND),
            seen if setup.made.collects else (),
            known,
        )
        return self.go_on(carried, self.told.start + 1)

    def go_on(self, carried: Carried, end: Tensor) -> Carried:
        """Choose and feed candidates until `end` columns are settled."""
        result: Carried = self.program(loop, self.setup.made)(carried, self.told, end)
        return result


def loop(net: Net, made: Made, carried: Carried, told: Told, end: Tensor) -> Carried:
    """Choose until `end` columns are settled, every text is finished, or a score is bad."""

    def is_asked(carried: Carried) -> Tensor:
        state = carried.state
        return (state.length < end) & carried.is_sound & ~tf.reduce_all(state.finished)

    def one_more(carried: Carried) -> tuple[Carried]:
        return (step(net, carried.state, carried.besides, told, made),)

    (carried,) = tf.while_loop(is_asked, one_more, (carried,))
    return carried


def step(net: Net, state: State, known: Known, told: Told, made: Made) -> Carried:
    """Feed the likeliest tokens side by side, and keep the one that says something new."""
    raw = net.scores(known.hidden)  # [B, V]
    text = text_of(state.tokens, state.length, told)
    asked = guided(raw, told)
    changed = tf.cast(ruled(asked, text, told.rules, made.functions), tf.float64)
    count = min(made.candidates, changed.shape[1])
    values, candidates = best(changed, count)  # [B, k]
    # A probability beside +inf is as little one to weigh as one to draw by.
    kind = {"is_mended": told.is_mended, "is_drawn": True}
    fault = fault_of(raw, asked, changed, candidates[:, 0], **kind)
    places = tf.range(state.mask.shape[1]) == state.length + tf.range(count)[:, None]
    mask = state.mask[:, None] | places  # [B, k, S]: the past, and itself
    positions = tf.repeat(state.positions[:, None], count, axis=1)
    hidden, cache = net.feed(candidates, positions, mask, state.cache)  # [B, k, E]
    units = _units(hidden)
    likeness = tf.matmul(units, known.context, transpose_b=True)  # [B, k, W]
    is_text = state.mask[:, None, : known.context.shape[1]]
    likeness = tf.reduce_max(tf.where(is_text, likeness, -np.inf), axis=2)
    shares = tf.exp(values - tf.reduce_logsumexp(changed, axis=1, keepdims=True))
    (alpha,) = told.numbers
    merits = (1 - alpha) * shares - alpha * tf.cast(likeness, tf.float64)
    merits = tf.where(values > -np.inf, merits, tf.constant(-np.inf, tf.float64))
    place = tf.argmax(merits, axis=1, output_type=tf.int32)  # [B]
    state = state._replace(
        cache=_moved(cache, state.length, count, place), positions=state.positions + 1
    )
    chosen = tf.gather(candidates, place, batch_dims=1)
    is_new = (tf.range(known.context.shape[1]) == state.length)[:, None]
    context = tf.where(is_new, tf.gather(units, place, batch_dims=1)[:, None], known.context)
    carried = noted(state, chosen, raw, changed, fault, told, made)
    hidden = tf.gather(hidden, place, batch_dims=1)
    return carried._replace(besides=Known(hidden, context))


def _units(hidden: Tensor) -> Tensor:
    """Hidden states of length 1, float32."""
    return tf.math.l2_normalize(tf.cast(hidden, tf.float32), axis=-1, epsilon=0.0)


def _moved(cache: Cache, start: Tensor, count: int, place: Tensor) -> Cache:
    """A joined cache in which the chosen one of `count` candidates from `start` on is the first."""

    def moved(room: Tensor) -> Tensor:
        rows, _, D = room.shape
        fresh = tf.slice(room, (0, start, 0), (rows, count, D))
        chosen = tf.gather(fresh, tf.repeat(place, rows // place.shape[0])[:, None], batch_dims=1)
        return keras.ops.slice_update(room, (0, start, 0), chosen)

    return cache.mapped(moved, start + 1)
