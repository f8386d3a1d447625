"""Beam search: plain, drawn, or in groups; keys and values stay where they were written."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core import arguments
from opt_core.generation import BeamState
from opt_torch.decoder import Cache
from opt_torch.generation.collecting import Found, Notes, own_cache
from opt_torch.generation.cuts import best, draw_several, log_probabilities
from opt_torch.generation.decoding import (
    advance,
    apply_rules,
    guided,
    hidden_nan,
    kept,
    last,
    logits,
    prefill,
    real_tokens,
    whole_pass,
)
from opt_torch.generation.rules import Seen, stopping_criteria
from opt_torch.generation.setup import Run

Beams = BeamState[Tensor, Cache]


class Candidates(NamedTuple):
    """What could follow the beams of a group, M for each text, best first."""

    #: float64 `[B, M]`: running sums; -inf for what does not exist.
    scores: Tensor
    #: int `[B, M]`: places among all K beams, and tokens.
    beams: Tensor
    tokens: Tensor


def search(run: Run, notes: Notes) -> Found:
    """The best sequences of every text.

    Raises:
        ValueError: scores that are NaN or inf, or a text for which nothing could be chosen.
    """
    state, scores = begin(run)
    for count in range(run.plan.max_new_tokens):
        length = int(state.length)
        state, highest = _settle(run, state, scores, count, notes)
        is_sound, is_done = torch.stack(((highest < torch.inf).all(), state.done.all())).tolist()
        if not is_sound:
            raise unsound(run, highest, length)
        if is_done:
            break
        if count + 1 < run.plan.max_new_tokens:
            state, scores = step(run, state)
    return _found(run, state)


def begin(run: Run) -> tuple[Beams, Tensor]:
    """The beams of a prompt, of which the first of each group exists, and scores `[R * K, V]`."""
    row, hidden = prefill(run)
    B, W = row.tokens.shape
    K, G = run.asked.num_beams, run.asked.num_beam_groups
    tokens = row.tokens[:, None].repeat(1, K, 1)
    running = torch.full((B, G, K // G), -torch.inf, dtype=torch.float64, device=tokens.device)
    running[:, :, 0] = 0
    nowhere = torch.full_like(running, -torch.inf).view(B, K)
    slots = torch.zeros(B, K, W, dtype=torch.long, device=tokens.device)
    state = Beams(
        tokens=tokens,
        length=row.length,
        scores=running.view(B, K),
        matched=row.matched[:, None].repeat(1, K),
        slots=slots,
        mask=row.mask[:, None].repeat(1, K, 1),
        positions=row.positions[:, None].repeat(1, K),
        pool=tokens.clone(),
        pool_scores=nowhere,
        pool_lengths=torch.zeros_like(slots[:, :, 0]),
        pool_slots=slots.clone(),
        done=torch.zeros(B, G, dtype=torch.bool, device=tokens.device),
        cache=row.cache,
    )
    scores = logits(run, last(hidden, run.prompt.shown))
    return state, scores.repeat_interleave(K, 0)


def step(run: Run, state: Beams) -> tuple[Beams, Tensor]:
    """Feed every beam's newest token: the state, and the scores `[R * K, V]` of the next."""
    P, length = run.plan.prompt_length, int(state.length)
    R, K = state.positions.shape
    copies = R // len(state.tokens)
    if not run.asked.use_cache:
        new = state.tokens[:, :, P:length].repeat(copies, 1, 1).flatten(0, 1)
        ids = torch.cat((run.prompt.fed.repeat_interleave(K, 0), new), dim=1)
        shown = run.prompt.shown
        if shown is not None:
            shown = F.pad(shown.repeat_interleave(K, 0), (0, length - P), value=True)
        hidden, _ = whole_pass(run, ids, shown, state.cache)
        return state, logits(run, last(hidden, shown))
    newest = state.tokens[:, :, length - 1].repeat(copies, 1)  # [R, K]
    hidden, cache = advance(run, state.cache, newest, state.positions, state.mask)
    state = state._replace(cache=cache, positions=state.positions + 1)
    return state, logits(run, hidden.flatten(0, 1))


def follow(run: Run, state: Beams, chosen: Candidates) -> Beams:
    """The state in which K candidates `[B, K]` run: tokens, slots and masks move, nothing else."""
    length, P, K = int(state.length), run.plan.prompt_length, run.asked.num_beams
    copies = len(state.mask) // len(state.tokens)
    tokens = _taken(state.tokens, chosen.beams)
    tokens[:, :, length] = chosen.tokens
    places = torch.arange(K, device=tokens.device)
    own = P + (length - P) * K + places
    slots, mask = _taken(state.slots, chosen.beams), state.mask
    slots[:, :, length] = own
    if run.asked.use_cache:
        mask = _taken(mask, chosen.beams.repeat(copies, 1))
        mask[:, places, own] = True
    return state._replace(
        tokens=tokens,
        length=cast(Tensor, length + 1),
        scores=chosen.scores,
        matched=matched(run, state, chosen),
        slots=slots,
        mask=mask,
    )


def matched(run: Run, state: Beams, chosen: Candidates) -> Tensor:
    """How much of a stop string each candidate ends with, `[B, M]`."""
    before = state.matched.gather(1, chosen.beams)
    return before if run.stops.after is None else run.stops.after[before, chosen.tokens].long()


def _settle(
    run: Run, state: Beams, scores: Tensor, count: int, notes: Notes
) -> tuple[Beams, Tensor]:
    """One step's choice, group by group: the state that runs on, and what `unsound` looks at."""
    B, K = state.scores.shape
    k = K // run.asked.num_beam_groups
    following = guided(run, scores)
    done = state.done[:, :, None].expand(-1, -1, k).reshape(B, K)
    live = (state.scores > -torch.inf) & ~done
    hidden = hidden_nan(run, following).view(B, K)
    following = following.view(B, K, -1)
    groups, all_ruled = [], []
    rivals = state.tokens.new_zeros(B, 0)
    for start in range(0, K, k):
        group = slice(start, start + k)
        found, ruled = candidates_of(run, state, following[:, group], group, rivals, count)
        settled = _settle_group(run, state, group, found, ruled, count)
        groups.append(settled)
        all_ruled.append(ruled.view(B, k, -1))
        if group.stop < K:
            rivals = torch.cat((rivals, settled.taken), dim=1)
    ruled = _joined(all_ruled)  # [B, K, V]
    notes.add(scores[: B * K], ruled.flatten(0, 1))
    highest = ruled.amax(2).masked_fill(hidden, torch.nan).masked_fill(~live, 0)
    pool, scores, lengths, slots = map(_joined, zip(*(g.pool for g in groups), strict=True))
    state = state._replace(
        pool=pool,
        pool_scores=scores,
        pool_lengths=lengths,
        pool_slots=slots,
        done=_joined([g.done for g in groups]),
    )
    running = map(_joined, zip(*(g.running for g in groups), strict=True))
    return follow(run, state, Candidates(*running)), highest


def unsound(run: Run, highest: Tensor, length: int) -> ValueError:
    """The error for beams whose highest score, `[B, K]`, is NaN or inf: sums of that mean nothing.

    Inf comes before NaN, which it makes of what is computed from it.
    """
    infinite = highest == torch.inf
    if bool(infinite.any()):
        return arguments.infinite_scores(real_tokens(run, infinite.any(1), length))
    return arguments.nan_scores(real_tokens(run, highest.isnan().any(1), length))


def _joined(groups: Sequence[Tensor]) -> Tensor:
    """What belongs to all beams, from what belongs to those of each group."""
    return groups[0] if len(groups) == 1 else torch.cat(list(groups), dim=1)


class _Group(NamedTuple):
    """What a step makes of a group of k beams."""

    #: `[B, k]` each.
    running: Candidates
    #: Sequences `[B, k, W]`, scores, lengths `[B, k]` and slots `[B, k, W]`, as in `BeamState`.
    pool: tuple[Tensor, Tensor, Tensor, Tensor]
    #: bool `[B, 1]`.
    done: Tensor
    #: int `[B, k]`: the tokens that lower their scores for the groups that follow, -1 for none.
    taken: Tensor


def _settle_group(
    run: Run, state: Beams, group: slice, found: Candidates, ruled: Tensor, count: int
) -> _Group:
    """Keep the candidates that end, let the best of the others run, see whether that is all."""
    asked, k = run.asked, group.stop - group.start
    is_last = count + 1 == run.plan.max_new_tokens
    ends = ended(run, state, found, ruled, group.start)
    was_done = state.done[:, group.start // k, None]
    pool = _pooled(run, state, group, found, (ends | is_last) & ~was_done)
    # Candidates are sorted: the first k that do not end, then, as beams that are none, the others.
    order = ends.byte().argsort(dim=1, stable=True)[:, :k]
    scores = found.scores.masked_fill(ends, -torch.inf)
    running = Candidates(*(x.gather(1, order) for x in (scores, found.beams, found.tokens)))
    # Also in the last step, which ends all, groups are to differ from each other.
    taken = running.tokens.masked_fill((running.scores == -torch.inf) | was_done, -1)
    highest, worst = running.scores[:, :1], pool[1][:, -1:]
    longest = asked.early_stopping == "never" and asked.length_penalty > 0
    length = run.plan.max_new_tokens if longest else count + 1
    done = worst > -torch.inf
    if asked.early_stopping is not True:
        # With groups the best candidate counts even if it has just ended, as in transformers.
        hope = highest if asked.num_beam_groups == 1 else found.scores[:, :1]
        done = done & (hope / length**asked.length_penalty <= worst)
    is_dead = highest == -torch.inf
    done = was_done | done | is_dead
    if asked.waits_for_batch:
        # While one text goes on, the others may still find something better.
        done = done.all() | is_dead
    return _Group(running, pool, done, taken)


def _pooled(
    run: Run, state: Beams, group: slice, found: Candidates, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A group's pool with those of its best k candidates that end."""
    k, length = group.stop - group.start, int(state.length)
    scores, beams, tokens = (x[:, :k] for x in found)
    old = (
        state.pool[:, group],
        state.pool_scores[:, group],
        state.pool_lengths[:, group],
        state.pool_slots[:, group],
    )
    enters = ends[:, :k] & (scores > -torch.inf)
    if enters.device.type == "cpu" and not bool(enters.any()):
        return old
    count = length + 1 - run.plan.prompt_length
    scores = (scores / count**run.asked.length_penalty).masked_fill(~enters, -torch.inf)
    texts = _taken(state.tokens, beams)
    texts[:, :, length] = tokens
    new = (texts, scores, torch.full_like(beams, count), _taken(state.slots, beams))
    both = [torch.cat(pair, dim=1) for pair in zip(old, new, strict=True)]
    # Of equals the older one stays first.
    order = both[1].argsort(dim=1, descending=True, stable=True)[:, :k]
    pool, pool_scores, lengths, slots = (_taken(x, order) for x in both)
    return pool, pool_scores, lengths, slots


def ended(run: Run, state: Beams, found: Candidates, ruled: Tensor, first: int) -> Tensor:
    """Bool `[B, M]`: the candidates that end their text.

    Criteria see each with the scores of the beam that it follows, from those `[B * k, V]` of the
    beams from the place `first` on.
    """
    ends = run.stops.tokens[found.tokens]
    if run.stops.after is not None:
        ends = ends | (matched(run, state, found) == len(run.stops.after) - 1)
    if run.stops.criteria:
        length = int(state.length)
        texts = _taken(state.tokens, found.beams)[:, :, : length + 1]
        texts[:, :, length] = found.tokens
        seen = Seen(texts.flatten(0, 1), run.prompt)
        behind = _taken(ruled.view(len(texts), -1, ruled.shape[1]), found.beams - first)
        ended = stopping_criteria(behind.flatten(0, 1), seen, run.stops.criteria)
        ends = ends | ended.view(ends.shape)
    return ends


def candidates_of(
    run: Run, state: Beams, scores: Tensor, group: slice, rivals: Tensor | None, count: int
) -> tuple[Candidates, Tensor]:
    """The candidates of a group from the scores `[B, k, V]` of its beams, and those scores ruled.

    Where nothing looks at all log-probabilities, they are computed for the best tokens alone, and
    the second result is the sum `[B * k, 1]` that they would be taken from: NaN where a score is.
    """
    B, k, V = scores.shape
    M = min(run.asked.candidates, k * V)
    running = state.scores[:, group, None]  # [B, k, 1]
    text = state.tokens[:, group, : state.length].flatten(0, 1)
    if _is_plain(run):
        flat = scores.reshape(B * k, V)
        whole = flat.logsumexp(1, keepdim=True)
        values, tokens = best(apply_rules(run, flat, Seen(text, run.prompt)), M)
        sums = (values.double() - whole).view(B, k, -1) + running
        total, order = sums.flatten(1).sort(dim=1, descending=True, stable=True)
        total, order = total[:, :M], order[:, :M]
        at = tokens.reshape(B, -1).gather(1, order)
        return Candidates(total, order // values.shape[1] + group.start, at), whole
    live = (running[..., 0] > -torch.inf) & ~state.done[:, group.start // k, None]
    rows = None if rivals is None else rivals.repeat_interleave(k, 0)
    ruled = ruled_logs(run, scores.reshape(B * k, V), Seen(text, run.prompt, rows, live.flatten()))
    sums = (ruled.view(B, k, V) + running).view(B, k * V)
    if run.uniforms is None:
        total, places = best(sums, M)
    else:
        total, places = _drawn(sums, run.uniforms[:, count])
    return Candidates(total, places // V + group.start, places % V), ruled


def _is_plain(run: Run) -> bool:
    """Whether nothing needs the log-probability of every token."""
    asked = run.asked
    looks = asked.is_guided or asked.output_scores or run.stops.criteria or asked.force_words_ids
    return run.uniforms is None and not looks and not run.rules.keys() - {"vocabulary"}


def ruled_logs(run: Run, scores: Tensor, seen: Seen) -> Tensor:
    """Log-probabilities after the rules; guidance has taken the logarithm already."""
    if not run.asked.is_guided:
        scores = log_probabilities(scores)
    return apply_rules(run, scores, seen).double()


def _drawn(sums: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and places `[B, M]` of draws, best first, of equals the lowest place."""
    places, are_real = draw_several(sums, uniforms)
    places, order = places.sort(dim=1)
    total = sums.gather(1, places).masked_fill(~are_real.gather(1, order), -torch.inf)
    total, order = total.sort(dim=1, descending=True, stable=True)
    return total, places.gather(1, order)


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """`[B, n, ...]`, int `[B, m]` -> `[B, m, ...]`."""
    return x[torch.arange(len(x), device=x.device)[:, None], places]


# What is returned


def _found(run: Run, state: Beams) -> Found:
    order = state.pool_scores.argsort(dim=1, descending=True, stable=True)
    order = order[:, : run.asked.num_return_sequences]
    parts = (state.pool, state.pool_scores, state.pool_lengths, state.pool_slots)
    tokens, scores, lengths, slots = (_taken(x, order) for x in parts)
    empty = scores[:, 0] == -torch.inf
    if bool(empty.any()):
        raise arguments.no_token_left(real_tokens(run, empty, run.plan.prompt_length))
    k = run.asked.num_beams // run.asked.num_beam_groups
    if run.asked.num_beam_groups > 1:
        tokens = _with_first_stop(run, tokens, lengths)
    return gathered(run, state, tokens, scores, lengths, slots, order // k * k)


def _with_first_stop(run: Run, tokens: Tensor, lengths: Tensor) -> Tensor:
    """With groups, the first stop token stands for whichever ended a text, as in transformers."""
    if not run.asked.stops:
        return tokens
    at = (run.plan.prompt_length + lengths - 1).clamp(min=0)[..., None]
    last_ones = tokens.gather(2, at)
    shown = last_ones.masked_fill(run.stops.tokens[last_ones], run.asked.stops[0])
    return tokens.scatter(2, at, shown)


def gathered(
    run: Run,
    state: Beams,
    tokens: Tensor,
    scores: Tensor,
    lengths: Tensor,
    slots: Tensor,
    first: Tensor,
) -> Found:
    """What is returned for each text: `[B, r, W]` and `[B, r]` -> `Found`.

    `first` is the beam that the first token followed.
    """
    P, K = run.plan.prompt_length, run.asked.num_beams
    n = int(lengths.max())
    B = len(scores)
    places = torch.arange(n, device=tokens.device)
    is_there = places < lengths[..., None]  # [B, r, n]
    beams = torch.cat((first[..., None], (slots[:, :, P : P + n - 1] - P) % K), dim=2)
    texts = torch.arange(B, device=tokens.device)[:, None, None] * K
    indices = (beams + texts).masked_fill(~is_there, -1).flatten(0, 1)
    new = tokens[:, :, P : P + n].flatten(0, 1)
    own = partial(own_cache, run, state.cache, slots[:, :, : P + n - 1])
    return Found(new, kept(run, new, lengths.flatten(), own), scores.flatten(), indices)
