"""What a generation leaves behind: its sequences, and the record of how they came about."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core.outputs import GenerateOutput
from opt_torch.attention import Visible, choose
from opt_torch.decoder import Cache, positions_of
from opt_torch.generation.setup import Run


class Notes:
    """The scores of every step, as far as they were asked for."""

    def __init__(self, *, scores: bool = False, logits: bool = False) -> None:
        self.scores: list[Tensor] | None = [] if scores else None
        self.logits: list[Tensor] | None = [] if logits else None

    @classmethod
    def of(cls, run: Run) -> Notes:
        """Those of a call."""
        return cls(scores=run.asked.output_scores, logits=run.asked.output_logits)

    def add(self, raw: Tensor, ruled: Tensor) -> None:
        """Take a step's scores before and after the rules."""
        if self.logits is not None:
            self.logits.append(raw.float())
        if self.scores is not None:
            self.scores.append(ruled.float())


class Found(NamedTuple):
    """What a strategy has found, for R returned sequences."""

    #: int `[R, n]`.
    tokens: Tensor
    #: Keys and values of all columns but the last one.
    cache: Cache
    #: float `[R]`, by which beams were ranked.
    scores: Tensor | None = None
    #: int `[R, n]`, as in `GenerateOutput`.
    beam_indices: Tensor | None = None


def sequences(run: Run, found: Found) -> Tensor:
    """Int `[R, P0 + n]`, the prompts as they were given included."""
    given = run.prompt.given
    return torch.cat((given.repeat_interleave(len(found.tokens) // len(given), 0), found.tokens), 1)


def record(run: Run, found: Found, notes: Notes) -> GenerateOutput:
    """The whole record of a generation."""
    states, weights = _inside(run, found)
    return GenerateOutput(
        sequences=sequences(run, found),
        sequences_scores=found.scores,
        scores=None if notes.scores is None else tuple(notes.scores),
        logits=None if notes.logits is None else tuple(notes.logits),
        beam_indices=found.beam_indices,
        attentions=weights,
        hidden_states=states,
        past_key_values=_past(run, found) if run.asked.use_cache else None,
    )


def _past(run: Run, found: Found) -> Cache | None:
    """The keys and values of the returned sequences alone, without what guidance has added."""
    cache = found.cache.counted()
    if not run.asked.is_guided:
        return cache
    rows, hidden = len(found.tokens), run.prompt.fed.shape[1] - run.prompt.given.shape[1]
    pairs = [tuple(x[:rows, :, hidden:].contiguous() for x in layer) for layer in cache]
    return Cache.of(pairs, len(pairs))


def _inside(run: Run, found: Found) -> tuple[Any, Any]:
    """Hidden states and attention weights of every step, from one pass over what is returned."""
    asked = run.asked
    if not (asked.output_hidden_states or asked.output_attentions):
        return None, None
    ids, shown = _returned(run, found)
    T = ids.shape[1]
    decoder = run.model.model.decoder
    embeds = decoder.embed_tokens(ids)
    attend = choose(
        run.model.attn_implementation,
        Visible(0, T, T, shown),
        dropout=0.0,
        weights=asked.output_attentions,
        dtype=embeds.dtype,
        device=embeds.device,
    )
    nothing: list[Tensor | None] = [None] * len(decoder.layers)
    out = decoder(embeds, positions_of(shown, T), attend, None, nothing, asked.output_hidden_states)
    held = 0 if run.past is None else run.past.get_seq_length()
    width = T - found.tokens.shape[1] + 1
    steps = [(held, width)] + [(column, column + 1) for column in range(width, T)]
    return (
        asked.output_hidden_states
        and tuple(tuple(x[:, a:b] for x in out.hidden_states) for a, b in steps)
    ) or None, (
        asked.output_attentions
        and tuple(tuple(x[:, :, a:b, :b] for x in out.attentions) for a, b in steps)
    ) or None


def _returned(run: Run, found: Found) -> tuple[Tensor, Tensor]:
    """What was fed for the returned sequences, the last token left out, and what of it is shown."""
    given, new = run.prompt.given, found.tokens[:, :-1]
    copies = len(new) // len(given)
    P = given.shape[1]
    shown = torch.ones_like(given, dtype=torch.bool)
    if run.prompt.shown is not None:
        shown = run.prompt.shown[: len(given), -P:]
    shown = F.pad(shown.repeat_interleave(copies, 0), (0, new.shape[1]), value=True)
    return torch.cat((given.repeat_interleave(copies, 0), new), 1), shown


def own_cache(run: Run, cache: Cache, slots: Tensor) -> Cache:
    """The keys and values of sequences whose columns lie in slots int `[B, r, n]` of a cache."""
    B, _, width = slots.shape
    P = run.plan.prompt_length
    columns = torch.arange(width, device=slots.device)
    slots = torch.where(columns < P, columns, slots)
    rows = torch.arange(B, device=slots.device)[:, None, None]
    pairs = []
    for layer in zip(cache.keys, cache.values, strict=True):
        # [B, H, S, D] -> [B, r, width, H, D] -> [B * r, H, width, D]
        key, value = (cast(Tensor, x).transpose(1, 2)[rows, slots] for x in layer)
        pairs.append((key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1).transpose(1, 2)))
    return cast(Cache, Cache.of(pairs, len(pairs)))
