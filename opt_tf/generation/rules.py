"""The rules that change a step's scores before a token is chosen, and the draw, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_core.generation import DecodeState, GenerationConfig, Plan
from opt_tf.decoder import Cache

#: As in the core, but `tokens` has the width S of the plan too, so that one program serves all
#: lengths.
State = DecodeState[Tensor, Cache]


class Rules(NamedTuple):
    """What a step is told about the choice, all of it tensors: a program is compiled once for all.

    A rule that is not active has the value that changes nothing.
    """

    penalty: Tensor  # float64 []
    temperature: Tensor  # float64 []
    top_k: Tensor  # int32 []; 0 leaves all
    top_p: Tensor  # float64 []
    min_p: Tensor  # float64 []
    samples: Tensor  # bool []
    stops: Tensor  # bool [V]: the stop tokens
    least: Tensor  # int32 []: below this length no stop token is chosen
    known: Tensor  # int32 []: ids from here on are never chosen
    fill: Tensor  # int32 []: what follows in a row that is finished

    @classmethod
    def of(cls, asked: GenerationConfig, planned: Plan, vocab_size: int, known: int) -> Rules:
        """The rules of one generation."""
        stops = np.zeros(vocab_size, np.bool_)
        stops[list(asked.stops)] = True

        def value(rule: str, given: float | None, neutral: float) -> Tensor:
            active = rule in asked.rules and given is not None
            return tf.constant(given if active else neutral, tf.float64)

        return cls(
            penalty=value("repetition_penalty", asked.repetition_penalty, 1.0),
            temperature=value("temperature", asked.temperature, 1.0),
            top_k=tf.cast(value("top_k", asked.top_k, 0), tf.int32),
            top_p=value("top_p", asked.top_p, 1.0),
            min_p=value("min_p", asked.min_p, 0.0),
            samples=tf.constant(asked.do_sample),
            stops=tf.constant(stops),
            least=tf.constant(planned.prompt_length + planned.min_new_tokens),
            known=tf.constant(known),
            fill=tf.constant(asked.fill),
        )

    @property
    def change_nothing(self) -> Tensor:
        """Bool []: the likeliest token is chosen from the scores as they are."""
        return ~self.samples & (self.penalty == 1.0)


def ruled(scores: Tensor, state: State, rules: Rules) -> Tensor:
    """The scores after the active rules, in their order: `[B, V]` -> `[B, V]` float64.

    A rule takes a token out of the choice by -inf. What each means stands in
    `opt_core.reference.rules`. A rule that is not active costs nothing when the program runs.
    """
    scores = tf.cast(scores, tf.float64)
    scores = _if(rules.penalty != 1.0, _penalised, scores, state, rules.penalty)
    scores = held_back(scores, state, rules) / rules.temperature
    scores = _if(rules.top_k > 0, _top_k, scores, rules.top_k)
    scores = _if(rules.top_p < 1.0, _top_p, scores, rules.top_p)
    return _if(rules.min_p > 0.0, _min_p, scores, rules.min_p)


def held_back(scores: Tensor, state: State, rules: Rules) -> Tensor:
    """`[B, V]` with the stop tokens taken out of the choice until the least length is reached."""
    return without(rules.stops & (state.length < rules.least), scores)


def without(dropped: Tensor, scores: Tensor) -> Tensor:
    """`[B, V]` with tokens taken out of the choice."""
    return tf.where(dropped, tf.constant(-np.inf, scores.dtype), scores)


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the cumulative distribution in token order: `[B, V]`, `[B]` -> int32 `[B]`."""
    best = tf.reduce_max(scores, axis=1, keepdims=True)
    cumulative = tf.cumsum(tf.exp(scores - best), axis=1)  # [B, V]
    is_beyond = cumulative > uniform[:, None] * cumulative[:, -1:]
    return tf.argmax(is_beyond, axis=1, output_type=tf.int32)


def _if(active: Tensor, rule: Callable[..., Tensor], scores: Tensor, *given: object) -> Tensor:
    return tf.cond(active, lambda: rule(scores, *given), lambda: scores)


def _penalised(scores: Tensor, state: State, penalty: Tensor) -> Tensor:
    B, V = scores.shape
    is_real = state.mask & (tf.range(state.mask.shape[1]) < state.length)  # [B, S]
    # Padding goes to a column of its own, since it may share its id with a real token.
    columns = tf.where(is_real, state.tokens, V)
    places = tf.stack([tf.broadcast_to(tf.range(B)[:, None], columns.shape), columns], axis=-1)
    seen = tf.scatter_nd(places, tf.ones(columns.shape, tf.int32), (B, V + 1))[:, :V] > 0
    return tf.where(seen, tf.where(scores < 0, scores * penalty, scores / penalty), scores)


def _top_k(scores: Tensor, count: Tensor) -> Tensor:
    ranks = _ranks(scores)

    def is_low_enough(level: Tensor) -> Tensor:
        return tf.reduce_sum(tf.cast(ranks >= level[:, None], tf.int32), axis=1) >= count

    return without(ranks < _highest(is_low_enough, scores)[:, None], scores)


def _top_p(scores: Tensor, mass: Tensor) -> Tensor:
    # A token stays if it and all that are no better weigh more than 1 - mass; of equals the lowest
    # id is the best. So whole levels of score stay or go, but for one.
    ranks, shares = _ranks(scores), tf.nn.softmax(scores)

    def below(level: Tensor) -> Tensor:
        return tf.reduce_sum(_where(ranks < level[:, None], shares), axis=1)

    level = _highest(lambda level: below(level) <= 1 - mass, scores)
    equals = _where(ranks == level[:, None], shares)
    up_to = below(level)[:, None] + tf.cumsum(equals, axis=1, reverse=True)
    dropped = (ranks < level[:, None]) | ((ranks == level[:, None]) & (up_to <= 1 - mass))
    return without(dropped & ~_is_best(scores), scores)


def _min_p(scores: Tensor, share: Tensor) -> Tensor:
    shares = tf.nn.softmax(scores)
    dropped = shares < share * tf.reduce_max(shares, axis=1, keepdims=True)
    return without(dropped & ~_is_best(scores), scores)


def _where(kept: Tensor, values: Tensor) -> Tensor:
    """The values that are kept, and 0 elsewhere."""
    return tf.where(kept, values, tf.zeros_like(values))


def _is_best(scores: Tensor) -> Tensor:
    """Bool `[B, V]`: the best token of every row, of equals the lowest id."""
    best = tf.argmax(scores, axis=1, output_type=tf.int32)
    return tf.range(scores.shape[1]) == best[:, None]


def _ranks(scores: Tensor) -> Tensor:
    """Whole numbers in the order of float64 scores: int64 `[B, V]`."""
    # -0.0 equals 0.0, but its bits do not.
    bits = tf.bitcast(_where(scores != 0, scores), tf.int64)
    return tf.where(bits < 0, tf.bitwise.bitwise_xor(bits, tf.int64.max), bits)


def _highest(holds: Callable[[Tensor], Tensor], scores: Tensor) -> Tensor:
    """The highest rank of which `holds` is true in each row: int64 `[B]`; true below, not above.

    One pass over the scores for each bit is several times faster than XLA's sort, and takes any
    count.
    """
    one = tf.constant(1, tf.int64)

    def refine(bit: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        # Adding the highest bit to the lowest number wraps round to 0.
        higher = level + tf.bitwise.left_shift(one, bit)
        return bit - 1, tf.where(holds(higher), higher, level)

    start = tf.fill((scores.shape[0],), tf.int64.min)
    bits = tf.constant(63, tf.int64)
    _, level = tf.while_loop(lambda bit, _: bit >= 0, refine, (bits, start))
    return level
