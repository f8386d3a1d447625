"""Contrastive search: likely tokens that do not repeat what the text says already (2202.06417)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from opt_torch.decoder import Cache
from opt_torch.generation.collecting import Notes
from opt_torch.generation.cuts import best
from opt_torch.generation.decoding import (
    State,
    advance,
    last,
    logits,
    prefill,
    processed,
    settled,
)
from opt_torch.generation.setup import Run


def states(run: Run, notes: Notes) -> Iterator[State]:
    """The state after each choice; its cache holds the newest token, too.

    Raises:
        ValueError: scores that are NaN, or nothing that may be chosen.
    """
    state, hidden = prefill(run)
    context = _context(run, hidden)
    scores = logits(run, last(hidden, run.prompt.shown))
    for count in range(run.plan.max_new_tokens):
        ruled, wrong = processed(run, state, scores, notes)
        values, tokens = best(ruled, cast(int, run.asked.top_k))  # [B, k]
        hidden, cache = _feed(run, state, tokens)
        place = _rank(run, ruled, values, F.normalize(hidden.float(), dim=-1), context, state)
        rows = torch.arange(len(place), device=place.device)
        chosen = hidden[rows, place]  # [B, E]
        context[:, state.length] = F.normalize(chosen.float(), dim=-1)
        _keep(cache, place)
        state = state._replace(cache=cache, positions=state.positions + 1)
        wrong, nothing = wrong | values[:, 0].isnan(), values[:, 0].isinf()
        state, done = settled(run, state, tokens[rows, place], ruled, wrong, nothing)
        yield state
        if done:
            return
        if count + 1 < run.plan.max_new_tokens:
            scores = logits(run, chosen)


def _context(run: Run, hidden: Tensor) -> Tensor:
    """Room for the directions of all hidden states, `[B, P + N, E]`, with those of the prompt."""
    B, P, E = hidden.shape
    result = hidden.new_zeros(B, P + run.plan.max_new_tokens, E, dtype=torch.float32)
    result[:, :P] = F.normalize(hidden.float(), dim=-1)
    return result


def _feed(run: Run, state: State, tokens: Tensor) -> tuple[Tensor, Cache]:
    """Hidden states `[B, k, E]` of candidates `[B, k]`: each sees the text and itself."""
    k, length = tokens.shape[1], int(state.length)
    mask = state.mask[:, None].repeat(1, k, 1)  # [B, k, S]
    places = torch.arange(k, device=mask.device)
    mask[:, places, length + places] = True
    return advance(run, state.cache, tokens, state.positions[:, None].repeat(1, k), mask)


def _rank(
    run: Run, ruled: Tensor, values: Tensor, hidden: Tensor, context: Tensor, state: State
) -> Tensor:
    """The place int `[B]` of the candidate with the best balance, of equals the likelier one.

    A token that the rules forbid is no candidate, however few are left.
    """
    length = int(state.length)
    likeness = hidden @ context[:, :length].transpose(1, 2)  # [B, k, length]
    if run.prompt.shown is not None:
        likeness = likeness.masked_fill(~state.mask[:, None, :length], -torch.inf)
    alpha = cast(float, run.asked.penalty_alpha)
    probability = (values - ruled.logsumexp(1, keepdim=True)).exp()
    merit = (1 - alpha) * probability - alpha * likeness.amax(2)
    return merit.masked_fill(values == -torch.inf, -torch.inf).max(1).indices


def _keep(cache: Cache, place: Tensor) -> None:
    """Move the chosen candidate's keys and values to the first candidate's slot, drop the rest."""
    start = cache.start
    if place.device.type != "cpu" or bool(place.any()):
        rows = torch.arange(len(place), device=place.device)
        for buffer in (*cache.keys, *cache.values):
            assert buffer is not None
            at = (start + place).to(buffer.device)
            buffer[:, :, start] = buffer[rows.to(buffer.device), :, at]
    cache.length = start + 1
