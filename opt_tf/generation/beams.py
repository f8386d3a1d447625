"""Beam search, in groups or by draws: the beams of a text share one row of the cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow import Tensor

from opt_core.generation import BeamState
from opt_tf.decoder import Cache
from opt_tf.generation import cuts
from opt_tf.generation.collecting import Carried, Found, of_beams
from opt_tf.generation.cuts import INFINITE, NAN, NOTHING, SOUND, best, draw_several
from opt_tf.generation.decoding import Net, Run
from opt_tf.generation.rules import after, guided, is_met, ruled, text_of
from opt_tf.generation.setup import Made, Setup, Told

#: As in the core; the cache is joined.
State = BeamState[Tensor, Cache]


class Beams(Run):
    """The best texts of several that run side by side."""

    def first(self) -> Carried:
        """The prompt is fed, and the first token of every beam chosen."""
        fed = self.fed()
        state = started(self.setup, fed.cache)
        chosen: Carried = self.choice(_first_choice)(
            state, self.part("scores", fed.last), self.told
        )
        return chosen

    def go_on(self, carried: Carried, end: Tensor) -> Carried:
        """Feed and choose until `end` columns are settled, or every group is done."""
        result: Carried = self.program(loop, self.setup.made)(carried, self.told, end)
        return result

    def is_done(self, state: Any) -> bool:
        """Whether every group is done."""
        return bool(tf.reduce_all(state.done))

    def found(self, carried: Carried) -> Found:
        """The best of each text's pools."""
        setup, state = self.setup, carried.state
        scores, P = state.pool_scores.numpy(), setup.plan.prompt_length
        count, K = setup.asked.num_return_sequences, setup.made.beams
        places = np.argsort(-scores, axis=1, kind="stable")[:, :count].reshape(-1)
        texts = np.arange(len(scores)).repeat(count)
        lengths = state.pool_lengths.numpy()[texts, places]
        columns = np.s_[P : P + int(lengths.max())]
        slots = state.pool_slots.numpy()[texts, places, columns]
        first = places // (K // setup.made.groups) * (K // setup.made.groups)
        beams = _chosen_from((slots - P) % K, first, texts, K)
        is_there = np.arange(slots.shape[1]) < lengths[:, None]
        tokens = state.pool.numpy()[texts, places, columns]
        if setup.made.groups > 1:
            _show_first_stop(setup, tokens, lengths)
        return Found(
            tf.constant(tokens),
            lambda: of_beams(state.cache, setup, texts, slots),
            tf.constant(texts, tf.int32),
            tf.constant(scores[texts, places]),
            tf.constant(np.where(is_there, beams, -1)),
            lengths,
        )


def started(setup: Setup, cache: Cache) -> State:
    """The state before the first choice: in each group one beam exists."""
    B, K, G = len(setup.prompt), setup.made.beams, setup.made.groups
    P, S, W = setup.plan.prompt_length, setup.plan.capacity, setup.plan.width
    mask = np.pad(setup.shown, [(0, 0), (0, S - P)])
    scores = np.full((B, G, K // G), -np.inf)
    scores[:, :, 0] = 0
    nothing = tf.fill((B, K, W), setup.asked.fill)
    return State(
        tokens=tf.constant(setup.compacted()[:, None].repeat(K, axis=1)),
        length=tf.constant(P),
        scores=tf.constant(scores.reshape(B, K)),
        matched=tf.constant(setup.matched[:, None].repeat(K, axis=1)),
        slots=tf.zeros((B, K, W), tf.int32),
        mask=tf.constant(mask[:, None].repeat(K, axis=1)),
        positions=tf.constant(setup.shown.sum(1, dtype=np.int32)[:, None].repeat(K, axis=1)),
        pool=nothing,
        pool_scores=tf.fill((B, K), tf.constant(-np.inf, tf.float64)),
        pool_lengths=tf.zeros((B, K), tf.int32),
        pool_slots=tf.zeros((B, K, W), tf.int32),
        done=tf.zeros((B, G), tf.bool),
        cache=cache,
    )


def _first_choice(made: Made, state: State, scores: Tensor, told: Told) -> Carried:
    alike = tf.repeat(scores[:, None], made.beams, axis=1)  # [R, K, V]
    return select(state, alike, told, made)


def loop(net: Net, made: Made, carried: Carried, told: Told, end: Tensor) -> Carried:
    """Feed and choose until `end` columns are settled, all is done, or a score is bad."""

    def is_asked(carried: Carried) -> Tensor:
        state = carried.state
        return (state.length < end) & carried.is_sound & ~tf.reduce_all(state.done)

    def one_more(carried: Carried) -> tuple[Carried]:
        return (select(*step(net, carried.state, told), told, made),)

    (carried,) = tf.while_loop(is_asked, one_more, (carried,))
    return carried


def step(net: Net, state: State, told: Told) -> tuple[State, Tensor]:
    """Feed every beam's newest token: the state, and the scores `[R, K, V]` of the next."""
    R, K, _ = state.mask.shape
    B, _, W = state.tokens.shape
    if told.fed is not None:
        settled = tf.range(W)
        tokens = tf.tile(state.tokens, (R // B, 1, 1))
        ids = tf.where(settled < told.start, told.fed[:, None], tokens)
        shown = tf.where(settled < told.start, state.mask[:, :, :W], settled < state.length)
        hidden = net.whole(tf.reshape(ids, (R * K, W)), tf.reshape(shown, (R * K, W)))
        return state, net.scores(tf.reshape(hidden, (R, K, hidden.shape[-1])))
    newest = tf.gather(state.tokens, state.length - 1, axis=2)  # [B, K]
    ids = tf.tile(newest, (R // B, 1))  # [R, K]
    hidden, cache = net.feed(ids, state.positions, state.mask, state.cache)
    return state._replace(cache=cache, positions=state.positions + 1), net.scores(hidden)


class Step(NamedTuple):
    """What a group of k beams becomes."""

    parents: Tensor  # int32 [B, k]: the place of the beam that each goes on from
    tokens: Tensor  # int32 [B, k]
    scores: Tensor  # float64 [B, k]
    kept: Tensor  # int32 [B, k]: an old place in the pool, or k + the rank of a candidate
    kept_scores: Tensor  # float64 [B, k]
    leaders: Tensor  # int32 [B, k]: the parents of the best k candidates
    leading: Tensor  # int32 [B, k]: and their tokens
    taken: Tensor  # int32 [B, k]: what other groups shall avoid; -1 is no token
    done: Tensor  # bool [B]
    fault: Tensor  # int32 [B]
    ruled: Tensor  # [B, k, V]


def select(state: State, scores: Tensor, told: Told, made: Made) -> Carried:
    """Choose what every beam becomes from scores `[R, K, V]`, and note it."""
    B, K, _ = state.tokens.shape
    V, k = scores.shape[2], K // made.groups
    logs = log_probabilities(scores, B, told)
    taken = None if made.groups == 1 else tf.zeros((B, 1, V), tf.float64)
    steps = []
    for group in range(made.groups):
        one = _group(state, logs[:, group * k : (group + 1) * k], group, taken, told, made)
        steps.append(one)
        if taken is not None:
            counted = tf.one_hot(one.taken, V, dtype=tf.float64)
            taken += tf.reduce_sum(counted, axis=1, keepdims=True)
    joined = _waiting(Step(*map(_beside, *steps)), told)
    seen: tuple[Tensor, ...] = ()
    if made.collects:
        seen = (
            tf.reshape(scores[:B], (B * K, V)),
            tf.cast(tf.reshape(joined.ruled, (B * K, V)), tf.float32),
        )
    return Carried(_noted(state, joined, told, made), _fault(state, joined), seen)


def log_probabilities(scores: Tensor, B: int, told: Told) -> Tensor:
    """`[R, K, V]` -> float64 `[B, K, V]`; guidance gives what need not sum to 1."""
    _, K, V = scores.shape
    flat = tf.reshape(scores, (-1, V))
    if told.guidance is None:
        logs = cuts.log_probabilities(tf.cast(flat, tf.float64))
    else:
        logs = guided(flat, told)
    return tf.reshape(logs, (B, K, V))


def _waiting(step: Step, told: Told) -> Step:
    """The step in which texts that wait for the batch search on, if that was asked for."""
    *_, waits = told.numbers
    B, groups = step.done.shape
    runs_on = tf.reduce_any(tf.reshape(step.scores, (B, groups, -1)) > -np.inf, axis=2)
    goes_on = waits & ~tf.reduce_all(step.done) & runs_on
    return step._replace(done=step.done & ~goes_on)


def _beside(*parts: Tensor) -> Tensor:
    """What groups found: their beams one after the other, or one value for each group."""
    return tf.stack(parts, axis=1) if parts[0].shape.rank == 1 else tf.concat(parts, axis=1)


def _group(
    state: State, logs: Tensor, group: int, taken: Tensor | None, told: Told, made: Made
) -> Step:
    """One step of one group, from its log-probabilities `[B, k, V]`."""
    B, k, V = logs.shape
    own = slice(group * k, (group + 1) * k)
    tokens, W = state.tokens[:, own], state.tokens.shape[2]
    text = text_of(tf.reshape(tokens, (B * k, W)), state.length, told, k)._replace(taken=taken)
    changed = ruled(tf.reshape(logs, (B * k, V)), text, told.rules, made.functions)
    changed = tf.reshape(changed, (B, k, V))
    totals = tf.reshape(changed + state.scores[:, own, None], (B, k * V))
    if told.uniforms is None:
        values, places = best(totals, made.candidates)  # [B, M]
    else:
        drawn = tf.gather(told.uniforms, state.length, axis=1)  # [B, M]
        values, places = draw_several(totals, drawn)
    parents, chosen = places // V, places % V
    lowest = tf.constant(-np.inf, values.dtype)
    stops = _ends(state, changed, parents, chosen, own, told, made)
    # The last step ends all, but in it, too, groups are to differ from each other.
    staying, ranks = best(tf.where(stops, lowest, values), k)
    was = state.done[:, group, None]
    taken = tf.where(was | (staying == lowest), -1, tf.gather(chosen, ranks, batch_dims=1))
    is_last = state.length + 1 == told.end
    going = tf.where(is_last, lowest, staying)
    pool, kept, done = _pooled(state, values, stops | is_last, going, own, group, told)
    is_bad = tf.math.is_nan(changed)
    if not told.is_mended:
        is_bad |= tf.math.is_nan(logs)
    return Step(
        parents=tf.where(was, tf.range(k), tf.gather(parents, ranks, batch_dims=1)) + group * k,
        tokens=tf.where(was, told.fill, tf.gather(chosen, ranks, batch_dims=1)),
        scores=tf.where(was, state.scores[:, own], going),
        kept=kept,
        kept_scores=pool,
        leaders=parents[:, :k] + group * k,
        leading=chosen[:, :k],
        taken=taken,
        done=done,
        fault=tf.where(tf.reduce_any(is_bad, axis=(1, 2)), NAN, SOUND),
        ruled=changed,
    )


def _ends(
    state: State,
    changed: Tensor,
    parents: Tensor,
    chosen: Tensor,
    own: slice,
    told: Told,
    made: Made,
) -> Tensor:
    """Whether each candidate ends its text, be it the last step or not: bool `[B, M]`."""
    ends = tf.gather(told.stops, chosen)
    if told.table is not None:
        states = after(told.table, tf.gather(state.matched[:, own], parents, batch_dims=1), chosen)
        ends |= states == told.table.shape[0] - 1
    if made.functions.criteria:
        B, M = chosen.shape
        W = state.tokens.shape[2]
        texts = tf.gather(state.tokens[:, own], parents, batch_dims=1)
        texts = tf.where(tf.range(W) == state.length, chosen[..., None], texts)
        text = text_of(tf.reshape(texts, (B * M, W)), state.length + 1, told, M)
        scores = tf.cast(tf.gather(changed, parents, batch_dims=1), tf.float32)
        for criterion in made.functions.criteria:
            met = is_met(criterion, text, tf.reshape(scores, (B * M, -1)))
            ends |= tf.reshape(met, (B, M))
    return ends


def _pooled(
    state: State,
    values: Tensor,
    ends: Tensor,
    going: Tensor,
    own: slice,
    group: int,
    told: Told,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores of a group's pool, where each comes from, and whether the group is done."""
    k = own.stop - own.start
    n = tf.cast(state.length + 1 - told.start, tf.float64)
    penalty, is_eager, counts_on, _ = told.numbers
    old, was = state.pool_scores[:, own], state.done[:, group]
    may = ends[:, :k] & ~was[:, None]
    lowest = tf.constant(-np.inf, tf.float64)
    finished = tf.where(may, values[:, :k] / n**penalty, lowest)
    # The older come first, and so they are the first of equals.
    pool, kept = best(tf.concat([old, finished], axis=1), k)
    longest = tf.where(counts_on, tf.cast(told.end - told.start, tf.float64), n)
    # As in transformers, what has just ended counts among the candidates that groups are judged by.
    judged = going if k == state.tokens.shape[1] else values
    hope = tf.reduce_max(judged, axis=1) / longest**penalty
    is_full = tf.reduce_all(pool > -np.inf, axis=1)
    is_settled = is_full & (is_eager | (hope <= tf.reduce_min(pool, axis=1)))
    return pool, kept, was | is_settled | tf.reduce_all(going == lowest, axis=1)


def _fault(state: State, step: Step) -> Tensor:
    """What is wrong with the scores of each text that goes on: int32 `[B]`."""
    goes_on = ~tf.reduce_all(state.done, axis=1)
    alive = tf.reduce_any(step.scores > -np.inf, axis=1)
    ended = tf.reduce_any(step.kept_scores > -np.inf, axis=1)
    nothing = tf.where(alive | ended, SOUND, NOTHING)
    is_nan = tf.reduce_any(step.fault == NAN, axis=1)
    found = tf.where(is_nan, NAN, nothing)
    is_infinite = tf.reduce_any(step.ruled == np.inf, axis=(1, 2))
    return tf.where(goes_on, tf.where(is_infinite, INFINITE, found), SOUND)


def _noted(state: State, step: Step, told: Told, made: Made) -> State:
    """The state after a step, its pools among it."""
    B, K, W = state.tokens.shape
    k = K // made.groups
    is_new = tf.range(W) == state.length

    def of_parents(values: Tensor, parents: Tensor) -> Tensor:
        return tf.gather(values, parents, batch_dims=1)

    def pooled(old: Tensor, found: Tensor) -> Tensor:
        # In each group its pool, then the best candidates.
        shape = old.shape[2:]
        both = [tf.reshape(part, (B, made.groups, k, *shape)) for part in (old, found)]
        places = tf.reshape(step.kept, (B, made.groups, k))
        chosen = tf.gather(tf.concat(both, axis=2), places, batch_dims=2)
        return tf.reshape(chosen, (B, K, *shape))

    leading = tf.where(is_new, step.leading[..., None], of_parents(state.tokens, step.leaders))
    lengths = tf.fill((B, K), state.length + 1 - told.start)
    return moved(state, step.parents, step.tokens, step.scores, told)._replace(
        pool=pooled(state.pool, leading),
        pool_scores=step.kept_scores,
        pool_lengths=pooled(state.pool_lengths, lengths),
        pool_slots=pooled(state.pool_slots, of_parents(state.slots, step.leaders)),
        done=step.done,
    )


def moved(state: State, parents: Tensor, tokens: Tensor, scores: Tensor, told: Told) -> State:
    """Beams that go on from others, `[B, K]` each: tables move, keys and values do not."""
    K, W = state.tokens.shape[1:]
    is_new = tf.range(W) == state.length
    slots = state.length + (state.length - told.start) * (K - 1) + tf.range(K)  # [K]
    copies = state.mask.shape[0] // state.tokens.shape[0]
    mask = tf.gather(state.mask, tf.tile(parents, (copies, 1)), batch_dims=1)
    matched = tf.gather(state.matched, parents, batch_dims=1)
    if told.table is not None:
        matched = after(told.table, matched, tokens)
    texts, past = (tf.gather(x, parents, batch_dims=1) for x in (state.tokens, state.slots))
    return state._replace(
        tokens=tf.where(is_new, tokens[..., None], texts),
        length=state.length + 1,
        scores=scores,
        matched=matched,
        slots=tf.where(is_new, slots[:, None], past),
        mask=mask | (tf.range(mask.shape[2]) == slots[:, None]),
    )


# --- what is returned --------------------------------------------------------------------------


def _show_first_stop(setup: Setup, tokens: NDArray[Any], lengths: NDArray[Any]) -> None:
    """With groups, the first stop token stands for whichever ended a text, as in transformers."""
    last = np.arange(len(tokens)), lengths - 1
    is_stopped = np.isin(tokens[last], setup.asked.stops)
    tokens[last] = np.where(is_stopped, (*setup.asked.stops, 0)[0], tokens[last])


def _chosen_from(
    fed_as: NDArray[Any], first: NDArray[Any], texts: NDArray[Any], K: int
) -> NDArray[Any]:
    """The running beam `text * K + beam` from which each token was chosen: `[R, n]`.

    It is the one that fed the token before it; the first beam of its group chose the first token.
    """
    before = np.concatenate([first[:, None], fed_as[:, :-1]], axis=1)
    return np.asarray(before + texts[:, None] * K, np.int32)
