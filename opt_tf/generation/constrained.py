"""Beam search with forced words: scores are compiled, which beams go on is decided in Python."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow import Tensor

from opt_core import arguments
from opt_core.generation import Candidate, ForcedWords, Hypothesis
from opt_tf.generation.beams import State, log_probabilities, moved, started, step
from opt_tf.generation.collecting import Carried, Found, of_beams
from opt_tf.generation.cuts import INFINITE, NAN, SOUND, best
from opt_tf.generation.decoding import Net, Run
from opt_tf.generation.rules import Text, after, is_met, ruled, text_of
from opt_tf.generation.setup import Made, Setup, Told


class Offer(NamedTuple):
    """What the beams of a step could become."""

    ruled: Tensor  # float64 [B, K, V]: the log-probabilities of all pairs of beam and token
    values: Tensor  # float64 [B, M]: those of the best pairs
    places: Tensor  # int32 [B, M]: beam * V + token
    fault: Tensor  # int32 [B]
    seen: tuple[Tensor, ...]


class Constrained(Run):
    """The best texts that hold given words; see `ForcedWords`."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.texts = [ForcedWords(setup.asked, setup.plan) for _ in setup.prompt]

    def warm(self) -> None:
        """Make the programs: the loop is in Python, and runs for one step."""
        carried = self.first()
        self.go_on(carried, tf.minimum(carried.state.length + 1, self.told.end))

    def first(self) -> Carried:
        """The prompt is fed, and the first token of every beam chosen."""
        fed = self.fed()
        state = started(self.setup, fed.cache)
        offer = self.choice(_first_offer)(state, self.part("scores", fed.last), self.told)
        return self._chosen(state, offer)

    def go_on(self, carried: Carried, end: Tensor) -> Carried:
        """Feed and choose until `end` columns are settled, or every text is done."""
        program = self.program(_next_offer, self.setup.made)
        while self._is_asked(carried, int(end)):
            carried = self._chosen(*program(carried.state, self.told))
        return carried

    def is_done(self, state: Any) -> bool:
        """Whether every text is done."""
        return all(text.is_done for text in self.texts)

    def found(self, carried: Carried) -> Found:
        """The best hypotheses of each text."""
        setup, count, K = self.setup, self.setup.asked.num_return_sequences, self.setup.made.beams
        nothing = Hypothesis(-np.inf, [], [], True)
        each = [text.results(count) for text in self.texts]
        found = [one for some in each for one in (some + [nothing] * count)[:count]]
        texts = np.arange(len(each)).repeat(count)
        lengths = np.array([len(one.tokens) for one in found], np.int32)
        n, P = int(lengths.max()), setup.plan.prompt_length
        if not all(each):
            raise arguments.no_token_left(int(carried.state.length))
        tokens = np.full((len(found), n), setup.asked.fill, np.int32)
        path = np.full((len(found), n), -1, np.int32)
        for row, one in enumerate(found):
            tokens[row, : len(one.tokens)] = one.tokens
            path[row, : len(one.path)] = one.path
        # Token i was fed as the beam that token i + 1 followed.
        fed_as = np.roll(np.maximum(path, 0), -1, axis=1)
        slots = P + np.arange(n) * K + fed_as
        beams = np.where(path >= 0, path + (texts * K)[:, None], -1)
        return Found(
            tf.constant(tokens),
            lambda: of_beams(carried.state.cache, setup, texts, slots),
            tf.constant(texts, tf.int32),
            tf.constant([one.score for one in found], tf.float64),
            tf.constant(beams, tf.int32),
            lengths,
        )

    def _is_asked(self, carried: Carried, end: int) -> bool:
        return (
            bool(carried.is_sound)
            and int(carried.state.length) < end
            and not self.is_done(carried.state)
        )

    def _chosen(self, state: State, offer: Offer) -> Carried:
        """The state in which the beams go on that each text chooses."""
        B, K, V = offer.ruled.shape
        totals = (offer.ruled + state.scores[..., None]).numpy()
        values, places = offer.values.numpy(), offer.places.numpy()
        parents, tokens = np.zeros((B, K), np.int32), np.full((B, K), self.setup.asked.fill, "i4")
        scores = np.full((B, K), -np.inf)
        for row, text in enumerate(self.texts):
            if text.is_done:
                continue
            pairs = zip(values[row].tolist(), places[row].tolist(), strict=True)
            running = text.step(
                [Candidate(value, *divmod(place, V)) for value, place in pairs],
                partial(_total, totals[row]),
                partial(self._ends, state, offer, row),
            )
            scores[row], parents[row], tokens[row] = zip(*running, strict=True)
        chosen = (tf.constant(parents), tf.constant(tokens), tf.constant(scores))
        following = moved(state, *chosen, self.told)
        return Carried(following, offer.fault, offer.seen)

    def _ends(self, state: State, offer: Offer, row: int, beam: int, token: int) -> bool:
        if token in self.setup.asked.stops:
            return True
        told = self.told
        if told.table is not None:
            reached = int(after(told.table, state.matched[row, beam], tf.constant(token)))
            if reached == told.table.shape[0] - 1:
                return True
        criteria = self.setup.made.functions.criteria
        if not criteria:
            return False
        text = self._text(state, row, beam, token)
        scores = tf.cast(offer.ruled[row, beam][None], tf.float32)
        return any(bool(is_met(criterion, text, scores)[0]) for criterion in criteria)

    def _text(self, state: State, row: int, beam: int, token: int) -> Text:
        tokens = state.tokens[row, beam][None]
        tokens = tf.where(tf.range(tokens.shape[1]) == state.length, token, tokens)
        told = self.told._replace(written=self.told.written[row : row + 1])
        return text_of(tokens, state.length + 1, told)


def _total(totals: NDArray[Any], beam: int, token: int) -> float:
    return float(totals[beam, token])


def _first_offer(made: Made, state: State, scores: Tensor, told: Told) -> Offer:
    return offered(state, tf.repeat(scores[:, None], made.beams, axis=1), told, made)


def _next_offer(net: Net, made: Made, state: State, told: Told) -> tuple[State, Offer]:
    state, scores = step(net, state, told)
    return state, offered(state, scores, told, made)


def offered(state: State, scores: Tensor, told: Told, made: Made) -> Offer:
    """What the beams could become, from the model's scores `[R, K, V]`."""
    B, K, W = state.tokens.shape
    V = scores.shape[2]
    logs = tf.reshape(log_probabilities(scores, B, told), (B * K, V))
    text = text_of(tf.reshape(state.tokens, (B * K, W)), state.length, told, K)
    changed = ruled(logs, text, told.rules, made.functions)
    each = tf.reshape(changed, (B, K, V))
    totals = each + state.scores[..., None]
    is_bad = tf.math.is_nan(changed)
    if not told.is_mended:
        is_bad |= tf.math.is_nan(logs)
    is_bad = tf.reduce_any(tf.reshape(is_bad, (B, K * V)), axis=1)
    is_infinite = tf.reduce_any(each == np.inf, axis=(1, 2))
    fault = tf.where(is_infinite, INFINITE, tf.where(is_bad, NAN, SOUND))
    seen: tuple[Tensor, ...] = ()
    if made.collects:
        seen = tf.reshape(scores[:B], (B * K, V)), tf.cast(changed, tf.float32)
    return Offer(each, *best(tf.reshape(totals, (B, K * V)), made.candidates), fault, seen)
