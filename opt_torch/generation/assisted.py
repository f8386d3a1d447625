"""Assisted decoding: a pass settles several tokens, where drafts guess what the model chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core import arguments
from opt_torch.decoder import Cache
from opt_torch.evaluation import evaluating
from opt_torch.generation.collecting import Found, Notes
from opt_torch.generation.cuts import draw
from opt_torch.generation.decoding import (
    State,
    advance,
    apply_rules,
    kept,
    last,
    logits,
    prefill,
    select,
    whole_pass,
)
from opt_torch.generation.rules import Seen
from opt_torch.generation.setup import Run
from opt_torch.packed import packed

#: From a state and the most that can be of use to the tokens that may follow.
Draft = Callable[[State, int], list[int]]


def states(run: Run, notes: Notes) -> Iterator[State]:
    """The state after each choice, for one row.

    At every place the model chooses as it would without drafts, so they change no token.

    Raises:
        ValueError: several rows, scores that are NaN, or nothing that may be chosen.
    """
    if len(run.prompt.text) > 1:
        raise arguments.one_row_at_a_time(len(run.prompt.text))
    draft: Draft = _Assistant(run) if run.assistant is not None else _Lookup(run)
    P, N = run.plan.prompt_length, run.plan.max_new_tokens
    state, hidden = prefill(run)
    scores = logits(run, last(hidden, run.prompt.shown))
    drafts: list[int] = []
    while True:
        for place, row in enumerate(scores.split(1)):
            state, done = select(run, state, row, int(state.length) - P, notes)
            yield state
            if done or state.length == P + N:
                return
            if place < len(drafts) and int(state.tokens[0, state.length - 1]) != drafts[place]:
                break
        drafts = draft(state, P + N - int(state.length) - 1)
        state, scores = _verify(run, state, drafts)


def rows(run: Run, notes: Notes) -> Found:
    """What is found for several rows, one after the other."""
    each = []
    for row in range(len(run.prompt.text)):
        own = Notes(scores=notes.scores is not None, logits=notes.logits is not None)
        *_, final = states(_alone(run, row), own)
        each.append((final, own))
    length = max(int(state.length) for state, _ in each)
    P, V = run.plan.prompt_length, run.model.config.vocab_size
    for mine, name in ((notes.scores, "scores"), (notes.logits, "logits")):
        if mine is not None:
            nothing = run.prompt.text.new_zeros(1, V, dtype=torch.float32)
            steps = [getattr(own, name) for _, own in each]
            filled = [step + [nothing] * (length - P - len(step)) for step in steps]
            mine.extend(torch.cat(step) for step in zip(*filled, strict=True))
    tokens = torch.cat([state.tokens[:, P:length] for state, _ in each])
    lengths = torch.tensor([int(state.length) - P for state, _ in each], device=tokens.device)
    fed = partial(_together, [state.cache for state, _ in each], length - 1)
    return Found(tokens, kept(run, tokens, lengths, fed))


def _alone(run: Run, row: int) -> Run:
    past = run.past
    if past is not None:
        past = Cache.of([(k[row : row + 1], v[row : row + 1]) for k, v in past], len(past))
    return run._replace(
        prompt=run.prompt.row(row),
        uniforms=None if run.uniforms is None else run.uniforms[row : row + 1],
        stops=run.stops._replace(start=run.stops.start[row : row + 1]),
        past=past,
    )


def _together(caches: list[Cache], length: int) -> Cache:
    """One cache for the first columns of all rows."""
    pairs = []
    for layer in zip(*caches, strict=True):
        keys, values = (
            torch.cat([x[:, :, :length] for x in parts]) for parts in zip(*layer, strict=True)
        )
        pairs.append((keys, values))
    return cast(Cache, Cache.of(pairs, len(pairs)))


def _verify(run: Run, state: State, drafts: list[int]) -> tuple[State, Tensor]:
    """The scores `[1 + drafts, V]` behind the newest token and behind each draft."""
    length = int(state.length)
    state.cache.length = length - 1  # what was fed of drafts that did not hold is written over
    newest = state.tokens[:, length - 1, None]
    ids = torch.cat((newest, newest.new_tensor([drafts])), dim=1)
    mask = None
    if run.prompt.shown is not None:
        mask = state.mask.clone()
        mask[:, length : length + len(drafts)] = True
    places = torch.arange(ids.shape[1], device=ids.device)
    at = state.positions[:, None] + length - 1 - run.plan.prompt_length
    hidden, cache = advance(run, state.cache, ids, at + places, mask)
    return state._replace(cache=cache), logits(run, hidden[0])


class _Lookup:
    """Drafts copied from the text itself."""

    def __init__(self, run: Run) -> None:
        self.most = cast(int, run.asked.prompt_lookup_num_tokens)
        self.longest = run.asked.max_matching_ngram_size or 1

    def __call__(self, state: State, most: int) -> list[int]:
        """What followed the latest earlier occurrence of the longest ending of the text."""
        text = [token for token in state.tokens[0, : state.length].tolist() if token >= 0]
        for size in range(min(self.longest, len(text) - 1), 0, -1):
            ending = text[-size:]
            for start in range(len(text) - size - 1, -1, -1):
                if text[start : start + size] == ending:
                    return text[start + size :][: min(most, self.most)]
        return []


class _Assistant:
    """Drafts of another model, by the same rules and the same uniforms."""

    def __init__(self, run: Run) -> None:
        model, N = run.assistant, run.plan.max_new_tokens
        form = packed(model, N, one_row=len(run.prompt.fed) == 1)
        self.run = run._replace(model=evaluating(model), past=None, packed=form)
        self.cache = Cache(model.config.num_hidden_layers, capacity=run.plan.capacity)

    def __call__(self, state: State, most: int) -> list[int]:
        """The tokens that the assistant would choose next."""
        run, P, length = self.run, self.run.plan.prompt_length, int(state.length)
        config, real = run.model.config, int((state.tokens[0, :length] >= 0).sum())
        most = min(most, run.asked.num_assistant_tokens, config.max_position_embeddings - real + 1)
        text = state.tokens[:, :length]
        self.cache.length = min(self.cache.get_seq_length(), length - 1)
        drafts: list[int] = []
        for _ in range(most):
            ids = torch.cat((run.prompt.fed, text[:, P:]), dim=1)
            shown = run.prompt.shown
            if shown is not None:
                shown = F.pad(shown, (0, ids.shape[1] - P), value=True)
            hidden, self.cache = whole_pass(run, ids, shown, self.cache)
            scores = logits(run, last(hidden, shown))
            ruled = apply_rules(run, scores, Seen(text, run.prompt))
            chosen = ruled.argmax(1)
            if run.uniforms is not None:
                chosen = draw(ruled, run.uniforms[:, text.shape[1] - P, 0])
            drafts.append(int(chosen))
            text = torch.cat((text, chosen[:, None].to(text.dtype)), dim=1)
        return drafts
