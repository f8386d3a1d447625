"""The rules that change a step's scores before a token is chosen, and the draw, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opt_core.generation import DecodeState, GenerationConfig
from opt_torch.decoder import Cache

State = DecodeState[Tensor, Cache]


def ruled(
    scores: Tensor,
    state: State,
    asked: GenerationConfig,
    *,
    known: int,
    suppresses_stops: bool,
) -> Tensor:
    """The scores after the active rules, in their order: `[B, V]` -> `[B, V]` float64.

    A rule takes a token out of the choice by -inf. What each means stands in
    `opt_core.reference.rules`. Ids from `known` on are never chosen. Where nothing is active the
    scores stay as they are.
    """
    if known < scores.shape[1]:
        unknown = torch.arange(known, scores.shape[1], device=scores.device)
        scores = scores.index_fill(1, unknown, -torch.inf)
    if not asked.rules and not asked.do_sample:
        return scores
    scores = scores.double()
    rules: dict[str, Callable[[], Tensor]] = {
        "repetition_penalty": lambda: _penalised(scores, state, asked.repetition_penalty or 1.0),
        "min_new_tokens": lambda: _without_stops(scores, asked, suppresses_stops),
        "temperature": lambda: scores / (asked.temperature or 1.0),
        "top_k": lambda: _top_k(scores, asked.top_k or 0),
        "top_p": lambda: _top_p(scores, 1.0 if asked.top_p is None else asked.top_p),
        "min_p": lambda: _min_p(scores, asked.min_p or 0.0),
    }
    for name in asked.rules:
        scores = rules[name]()
    return scores


def _penalised(scores: Tensor, state: State, penalty: float) -> Tensor:
    length = int(state.length)
    seen = torch.zeros_like(scores, dtype=torch.bool)
    # Padding may share its id with a real token, so a hidden place must not clear a seen one.
    rows, places = state.mask[:, :length].nonzero(as_tuple=True)
    seen[rows, state.tokens[rows, places]] = True
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _without_stops(scores: Tensor, asked: GenerationConfig, active: bool) -> Tensor:
    if not active:
        return scores
    stops = torch.tensor(asked.stops, device=scores.device)
    return scores.index_fill(1, stops, -torch.inf)


def _top_k(scores: Tensor, count: int) -> Tensor:
    least = scores.topk(min(count, scores.shape[1])).values[:, -1:]
    return scores.masked_fill(scores < least, -torch.inf)


def _top_p(scores: Tensor, mass: float) -> Tensor:
    # Best first, of equals the lowest id; the sum of a token and all that are no better runs back.
    ranked, order = scores.sort(dim=1, descending=True, stable=True)
    up_to = ranked.softmax(1).flip(1).cumsum(1).flip(1)
    dropped = up_to <= 1 - mass
    dropped[:, 0] = False
    return scores.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)


def _min_p(scores: Tensor, share: float) -> Tensor:
    probability = scores.softmax(1)
    best, place = probability.max(1, keepdim=True)
    return scores.masked_fill((probability < share * best).scatter(1, place, False), -torch.inf)


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the cumulative distribution in token order: `[B, V]`, `[B]` -> `[B]`."""
    cumulative = (scores - scores.amax(1, keepdim=True)).exp().cumsum(1)
    aim = uniform[:, None] * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, aim, right=True)[:, 0]
    return places.clamp(max=scores.shape[1] - 1)
