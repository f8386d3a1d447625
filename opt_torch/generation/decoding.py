"""Prefill, step, choice and loop: greedy and sampled decoding, and what all strategies share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor

from opt_core import arguments
from opt_core.generation import DecodeState
from opt_torch.attention import Visible, choose
from opt_torch.decoder import Cache, Decoder, positions_of
from opt_torch.generation.collecting import Notes
from opt_torch.generation.cuts import draw, log_probabilities
from opt_torch.generation.rules import Seen, stopping_criteria
from opt_torch.generation.setup import FixedPass, Run, repeated_cache
from opt_torch.linear import linear

State = DecodeState[Tensor, Cache]

#: So many sets of shapes may have programs, where PyTorch takes a limit; its own is 8.
_PROGRAMS = 256


def states(run: Run, notes: Notes) -> Iterator[State]:
    """The state after each choice.

    Raises:
        ValueError: scores that are NaN, or nothing that may be chosen.
    """
    state, hidden = prefill(run)
    scores = logits(run, last(hidden, run.prompt.shown))
    for count in range(run.plan.max_new_tokens):
        state, done = select(run, state, scores, count, notes)
        yield state
        if done:
            return
        if count + 1 < run.plan.max_new_tokens:
            state, scores = step(run, state)


def prefill(run: Run) -> tuple[State, Tensor]:
    """The state of a prompt, and the hidden states `[R, T, E]` of the columns that were fed."""
    fed, shown = run.prompt.fed, run.prompt.shown
    R, P = fed.shape
    N, S = run.plan.max_new_tokens, run.plan.capacity
    text = run.prompt.text
    tokens = text.new_full((len(text), P + N), run.asked.fill)
    tokens[:, :P] = text
    mask = torch.zeros(R, S, dtype=torch.bool, device=fed.device)
    mask[:, :P] = True if shown is None else shown
    cache = run.past or Cache(run.model.config.num_hidden_layers, capacity=S)
    state = State(
        tokens=tokens,
        length=cast(Tensor, P),
        finished=torch.zeros(len(text), dtype=torch.bool, device=fed.device),
        matched=run.stops.start,
        positions=mask.sum(1),
        mask=mask,
        cache=cache,
    )
    hidden, cache = whole_pass(run, fed, shown, cache)
    if run.asked.use_cache:
        state = state._replace(cache=cache if run.program is None else cache.fixed())
    return state, hidden


def step(run: Run, state: State) -> tuple[State, Tensor]:
    """Feed every row's newest token: the state, and the scores `[R, V]` of the next."""
    P, length = run.prompt.fed.shape[1], int(state.length)
    rows = len(state.mask) // len(state.tokens)
    if not run.asked.use_cache:
        ids = torch.cat((run.prompt.fed, state.tokens[:, P:length].repeat(rows, 1)), dim=1)
        shown = None if run.prompt.shown is None else state.mask[:, :length]
        hidden, _ = whole_pass(run, ids, shown, state.cache)
        return state, logits(run, last(hidden, shown))
    newest = state.tokens[:, length - 1, None]
    newest = newest if rows == 1 else newest.repeat(rows, 1)  # [R, 1]
    mask = state.mask if run.prompt.shown is not None or run.program is not None else None
    hidden, cache = advance(run, state.cache, newest, state.positions[:, None], mask)
    state = state._replace(cache=cache, positions=state.positions + 1)
    return state, logits(run, hidden[:, -1])


def select(run: Run, state: State, scores: Tensor, count: int, notes: Notes) -> tuple[State, bool]:
    """Choose the token of every row from the scores `[R, V]`, and write it; see `settled`."""
    ruled, wrong = processed(run, state, scores, notes)
    best, chosen = ruled.max(1)  # the lowest id of equals; NaN where any score is
    nothing = best == -torch.inf
    if run.uniforms is not None:
        chosen = draw(ruled, run.uniforms[:, count, 0])
        nothing = best.isinf()
    return settled(run, state, chosen, ruled, wrong | best.isnan(), nothing)


def processed(run: Run, state: State, scores: Tensor, notes: Notes) -> tuple[Tensor, Tensor]:
    """What tokens are chosen from, `[B, V]`, and bool `[B]`: a score was NaN before the rules."""
    length = int(state.length)
    live = ~state.finished
    seen = Seen(state.tokens[:, :length], run.prompt, live=live)
    guiding = guided(run, scores)
    ruled = apply_rules(run, guiding, seen)
    notes.add(scores[: len(live)], ruled)
    return ruled, hidden_nan(run, guiding)


def settled(
    run: Run, state: State, chosen: Tensor, ruled: Tensor, wrong: Tensor, nothing: Tensor
) -> tuple[State, bool]:
    """Write the chosen tokens `[B]`: the state, and whether all rows are finished now.

    `wrong` and `nothing` are bool `[B]`: scores were NaN, or no token could be chosen since all
    were -inf, or one +inf beside which none can be weighed.

    Raises:
        ValueError: so it was in a row that is not finished.
    """
    live, length = ~state.finished, int(state.length)
    chosen = torch.where(live, chosen, run.asked.fill)
    state.tokens[:, length] = chosen
    state.mask[:, length] = True
    finished, matched = state.finished | run.stops.tokens[chosen], state.matched
    if run.stops.after is not None:
        matched = run.stops.after[matched, chosen]
        finished = finished | (matched == len(run.stops.after) - 1)
    if run.stops.criteria:
        seen = Seen(state.tokens[:, : length + 1], run.prompt)
        finished = finished | stopping_criteria(ruled, seen, run.stops.criteria)
    wrong, nothing = wrong & live, nothing & live
    # The one thing that a step waits for on an accelerator.
    is_wrong, is_nothing, done = torch.stack((wrong.any(), nothing.any(), finished.all())).tolist()
    if is_wrong:
        raise arguments.nan_scores(real_tokens(run, wrong, length))
    if is_nothing:
        is_infinite = bool((ruled[int(nothing.byte().argmax())] == torch.inf).any())
        error = arguments.infinite_scores if is_infinite else arguments.no_token_left
        raise error(real_tokens(run, nothing, length))
    longer = cast(Tensor, length + 1)
    return state._replace(length=longer, finished=finished, matched=matched), bool(done)


def real_tokens(run: Run, rows: Tensor, length: int) -> int:
    """How many real tokens the first of some rows bool `[B]` has in so many columns."""
    row = int(rows.byte().argmax())
    return int((run.prompt.text[row] >= 0).sum()) + length - run.prompt.text.shape[1]


def apply_rules(run: Run, scores: Tensor, seen: Seen) -> Tensor:
    """The scores after the active rules: `[N, V]` -> `[N, V]`, float64 where any is active."""
    if run.uniforms is not None or run.rules.keys() - {"vocabulary"}:
        scores = scores.double()
    for rule in run.rules.values():
        scores = rule(scores, seen)
    return scores


def hidden_nan(run: Run, scores: Tensor) -> Tensor:
    """Bool `[N]`: a score is NaN before the rules, which might hide it."""
    if not run.rules or "remove_invalid_values" in run.rules:
        return torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    return scores.amax(1).isnan()


# Passes


def whole_pass(run: Run, ids: Tensor, shown: Tensor | None, past: Cache) -> tuple[Tensor, Cache]:
    """Feed what follows the cache of int `[R, T]`: `[R, t, E]`, and the cache that holds all."""
    held, T = past.get_seq_length(), ids.shape[1]
    ids = ids[:, held:]
    if shown is None:
        positions = torch.arange(held, T, device=ids.device).expand_as(ids)
    else:
        positions = positions_of(shown, T - held)
    cache = past.extended(T - held, run.plan.capacity)
    return _decode(run, cache, ids, positions, Visible(held, T - held, T, shown)), cache


def advance(
    run: Run, cache: Cache, ids: Tensor, positions: Tensor, mask: Tensor | None
) -> tuple[Tensor, Cache]:
    """Feed int `[R, T]` behind the cache: `[R, T, E]`, and the cache that holds them too.

    `mask` is bool `[R, S]`, or None where nothing is padded; or `[R, T, S]` where tokens do not
    see each other in their order.
    """
    if run.program is not None:
        # Contiguous, since the stride of a column would tell the program how long the text gets.
        return run.program(run.model, ids.contiguous(), positions, mask, cache)
    T = ids.shape[1]
    cache = cache.extended(T, run.plan.capacity)
    held = cache.get_seq_length()
    mask = None if mask is None else mask[..., :held]
    return _decode(run, cache, ids, positions, _visible(held - T, T, held, mask)), cache


def _visible(start: int | Tensor, T: int, S: int, mask: Tensor | None) -> Visible:
    if mask is not None and mask.dim() == 3:
        return Visible(start, T, S, None, mask)
    return Visible(start, T, S, mask)


def _decode(run: Run, cache: Cache, ids: Tensor, positions: Tensor, visible: Visible) -> Tensor:
    """One pass over the decoder, by the fastest form of it."""
    if run.packed is None:
        # The layers may be spread over devices; what is chosen from stays where the prompt is.
        return _modules(run.model, cache, ids, positions, visible).to(ids.device)
    embeds = run.model.model.decoder.embed_tokens(ids)
    return run.packed(embeds, positions, _attend(run.model, embeds, visible), cache)


def _modules(model: Any, cache: Cache, ids: Tensor, positions: Tensor, visible: Visible) -> Tensor:
    decoder: Decoder = model.model.decoder
    embeds = decoder.embed_tokens(ids)
    nothing: list[Tensor | None] = [None] * len(decoder.layers)
    attend = _attend(model, embeds, visible)
    out = decoder(embeds, positions, attend, cache, nothing, False)
    return cast(Tensor, out.last)


def _attend(model: Any, embeds: Tensor, visible: Visible) -> Any:
    return choose(
        model.attn_implementation,
        visible,
        dropout=0.0,
        weights=False,
        dtype=embeds.dtype,
        device=embeds.device,
    )


def fixed_pass(
    model: Any, ids: Tensor, positions: Tensor, mask: Tensor, cache: Cache
) -> tuple[Tensor, Cache]:
    """As `advance`, in shapes that do not depend on how far it is.

    The cache is one of fixed shapes, and is written in place.
    """
    cache = cache.extended(ids.shape[1])
    visible = _visible(cache.start, ids.shape[1], mask.shape[-1], mask)
    return _modules(model, cache, ids, positions, visible), cache


@lru_cache(maxsize=8)
def compiled(backend: str) -> FixedPass:
    """`fixed_pass` by a backend of `torch.compile`: one program for each set of shapes."""
    known = signature(torch.compile).parameters
    more: dict[str, Any] = {"recompile_limit": _PROGRAMS} if "recompile_limit" in known else {}
    return torch.compile(fixed_pass, backend=backend, fullgraph=True, dynamic=False, **more)


def kept(run: Run, tokens: Tensor, lengths: Tensor, own: Callable[[], Cache]) -> Cache:
    """The cache that a record holds for int `[R, n]` new tokens: all columns but the last one.

    `own` gives what was fed on the way. The last token of a row that ended before the others,
    int `[R]` lengths, was not; then one pass over the sequences gives all.
    """
    if not (run.asked.use_cache and run.asked.return_dict_in_generate):
        return Cache(0)
    R, n = tokens.shape
    if bool((lengths == n).all()):
        return own()
    prompt, past = run.prompt, run.past
    rows = slice(len(prompt.given))
    fed, shown = prompt.fed[rows], prompt.shown
    shown = torch.ones_like(fed, dtype=torch.bool) if shown is None else shown[rows]
    is_real = torch.arange(n - 1, device=tokens.device) < lengths[:, None]
    fed, shown = (x.repeat_interleave(R // len(x), 0) for x in (fed, shown))
    if past is not None:
        past = repeated_cache(past, R // len(past[0][0]))
    room = past or Cache(run.model.config.num_hidden_layers, capacity=fed.shape[1] + n)
    ids, shown = torch.cat((fed, tokens[:, :-1]), 1), torch.cat((shown, is_real), 1)
    return whole_pass(run, ids, shown, room)[1]


def last(hidden: Tensor, shown: Tensor | None) -> Tensor:
    """The hidden state of each row's last real token: `[R, T, E]` -> `[R, E]`."""
    if shown is None:
        return hidden[:, -1]
    T = hidden.shape[1]
    places = torch.arange(T, device=shown.device)
    at = torch.where(shown[:, -T:], places, 0).amax(1).to(hidden.device)
    return hidden[torch.arange(len(at), device=at.device), at]


def logits(run: Run, hidden: Tensor) -> Tensor:
    """Scores of what follows hidden states: `[N, E]` -> `[N, V]`, float32 at least."""
    if run.packed is None:
        scores = linear(run.model.lm_head, hidden).to(hidden.device)
    else:
        scores = run.packed.head(hidden)
    return scores.float() if scores.itemsize < 4 else scores


def guided(run: Run, scores: Tensor) -> Tensor:
    """What the rules begin with: `[R, V]` -> `[B, V]`; classifier-free guidance, 2306.17806."""
    if not run.asked.is_guided:
        return scores
    following, without = log_probabilities(scores).chunk(2)
    scale = cast(float, run.asked.guidance_scale)
    return without + scale * (following - without)
