"""The rules that change a step's scores, up to the functions of the caller; none writes in place.

A rule takes scores `[B, V]`, what it looks at, and the arrays of `opt_core.generation.given`; what
it takes out of the choice becomes -inf. What each means stands in `opt_core.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core import arguments
from opt_core.generation import allowed_tokens


class Prompt(NamedTuple):
    """What every row starts with."""

    #: int `[B, P0]`, as it was given.
    given: Tensor
    #: int `[B, P]`: the real tokens of each row, moved up to the end, with -1 before them.
    text: Tensor
    #: int `[R, P]`: what the model is fed; under guidance the rows without their prompt follow.
    fed: Tensor
    #: bool `[R, P]`, or None where nothing is padded.
    shown: Tensor | None

    def repeated(self, copies: int) -> Prompt:
        """Every row several times, in place."""
        if copies == 1:
            return self
        shown = None if self.shown is None else self.shown.repeat_interleave(copies, 0)
        given, text, fed = (
            x.repeat_interleave(copies, 0) for x in (self.given, self.text, self.fed)
        )
        return Prompt(given, text, fed, shown)

    def behind(self, columns: int) -> Prompt:
        """The same behind columns that are in the cache, and no tokens of the text."""
        before, shown = (columns, 0), self.shown
        return self._replace(
            text=F.pad(self.text, before, value=-1),
            fed=F.pad(self.fed, before),
            shown=None if shown is None else F.pad(shown, before, value=True),
        )

    def row(self, place: int) -> Prompt:
        """One row alone, where nothing is guided."""
        only = slice(place, place + 1)
        shown = None if self.shown is None else self.shown[only]
        return Prompt(self.given[only], self.text[only], self.fed[only], shown)


class Seen(NamedTuple):
    """What rules look at, for N rows that go on from B prompts."""

    #: int `[N, length]`: a row's real tokens so far, -1 before them.
    text: Tensor
    prompt: Prompt
    #: int `[N, n]`: the tokens that earlier groups of beams have taken in this step, -1 for none.
    rivals: Tensor | None = None
    #: bool `[N]`: whether anybody asks for the next token; None for all.
    live: Tensor | None = None

    @property
    def length(self) -> int:
        """How many columns are settled."""
        return self.text.shape[1]

    @property
    def copies(self) -> int:
        """How many rows go on from each prompt."""
        return len(self.text) // len(self.prompt.given)

    @property
    def ids(self) -> Tensor:
        """Int `[N, P0 + n]`: the prompt as it was given, and what was chosen; a copy each time."""
        start = self.prompt.given.repeat_interleave(self.copies, 0)
        return torch.cat((start, self.text[:, self.prompt.text.shape[1] :]), dim=1)


def vocabulary(scores: Tensor, _: Seen, known: int) -> Tensor:
    """Ids that nobody can decode are never chosen."""
    if known >= scores.shape[1]:
        return scores
    return F.pad(scores[:, :known], (0, scores.shape[1] - known), value=-torch.inf)


def sequence_bias(scores: Tensor, seen: Seen, sequences: Tensor, bias: Tensor) -> Tensor:
    """Add to the last id of a sequence where the text ends with the ids before it."""
    before, last = sequences[:, :-1], sequences[:, -1]
    width = before.shape[1]
    ending = F.pad(seen.text[:, max(0, seen.length - width) :], (width, 0), value=-1)
    ending = ending[:, ending.shape[1] - width :]  # [B, L - 1]
    matches = ((before == -1) | (before == ending[:, None])).all(2)  # [B, n]
    added = torch.where(matches & (last >= 0), bias, 0.0)
    return scores.index_add(1, last.clamp(min=0), added)


#: A bias of -inf.
bad_words_ids = sequence_bias


def diversity_penalty(scores: Tensor, seen: Seen, penalty: float) -> Tensor:
    """Take off for every beam of an earlier group that took the token (1610.02424)."""
    if seen.rivals is None:
        return scores
    room = F.pad(scores, (0, 1))  # the last place takes what is no token
    rivals = torch.where(seen.rivals < 0, scores.shape[1], seen.rivals.long())
    return room.scatter_add(1, rivals, scores.new_full(rivals.shape, -penalty))[:, :-1]


def repetition_penalty(scores: Tensor, seen: Seen, penalty: float) -> Tensor:
    """Make the tokens that a row holds less likely (CTRL, 1909.05858)."""
    room = F.pad(scores, (0, 1))
    text = _places(seen.text, scores)
    held = room.gather(1, text)
    held = torch.where(held < 0, held * penalty, held / penalty)
    return room.scatter(1, text, held)[:, :-1]


def no_repeat_ngram_size(scores: Tensor, seen: Seen, size: int) -> Tensor:
    """Nothing that would end the same `size` tokens once more."""
    if seen.length < size:
        return scores
    ngrams = seen.text.unfold(1, size, 1)  # [B, length - size + 1, size]
    ending = seen.text[:, seen.length - size + 1 :]  # [B, size - 1]
    repeats = (ngrams[:, :, :-1] == ending[:, None]).all(2) & (ending >= 0).all(1, keepdim=True)
    banned = torch.where(repeats, ngrams[:, :, -1], -1)
    return F.pad(scores, (0, 1)).scatter(1, _places(banned, scores), -torch.inf)[:, :-1]


def min_new_tokens(scores: Tensor, seen: Seen, stops: Tensor, start: int) -> Tensor:
    """No stop token before column `start`."""
    return scores.masked_fill(stops, -torch.inf) if seen.length < start else scores


def forced_bos_token_id(scores: Tensor, seen: Seen, token: int) -> Tensor:
    """This token follows where a row holds one token alone."""
    forced = torch.full_like(scores, -torch.inf)
    forced[:, token] = 0
    return torch.where(_holds_one(seen.text)[:, None], forced, scores)


def forced_eos_token_id(scores: Tensor, seen: Seen, tokens: Tensor, last: int) -> Tensor:
    """One of these tokens is chosen in the last column."""
    if seen.length != last:
        return scores
    return torch.zeros_like(scores).masked_fill(~tokens, -torch.inf)


def remove_invalid_values(scores: Tensor, _: Seen) -> Tensor:
    """Numbers in the place of NaN and inf."""
    ends = torch.finfo(torch.float32)
    return scores.nan_to_num(0.0, ends.max, ends.min)


def exponential_decay_length_penalty(
    scores: Tensor, seen: Seen, stops: Tensor, start: int, factor: float
) -> Tensor:
    """Stop tokens grow likelier from column `start` on; what may not be chosen stays so."""
    if seen.length <= start:
        return scores
    # A tensor's power is inf where Python's raises an error.
    growth = float(torch.tensor(factor, dtype=torch.float64) ** (seen.length - start)) - 1
    grows = stops & (scores > torch.finfo(torch.float32).min) & (scores != 0)
    return torch.where(grows, scores + scores.abs() * growth, scores)


def suppress_tokens(scores: Tensor, _: Seen, tokens: Tensor) -> Tensor:
    """Never these tokens."""
    return scores.masked_fill(tokens, -torch.inf)


def begin_suppress_tokens(
    scores: Tensor, seen: Seen, tokens: Tensor, first: int, forced: bool
) -> Tensor:
    """These tokens do not begin what is new: behind a first token that is forced, if there is."""
    if not first <= seen.length <= first + forced:
        return scores
    is_forced = _holds_one(seen.text[:, :first]) & forced
    begins = is_forced if seen.length > first else ~is_forced
    return scores.masked_fill(begins[:, None] & tokens, -torch.inf)


# The functions of a call


def prefix_allowed_tokens_fn(
    scores: Tensor, seen: Seen, allowed: Callable[[int, Tensor], Any]
) -> Tensor:
    """Only the ids that the function names for a row of the batch and its text.

    Raises:
        ValueError: it gives something else than ids, or a bool for each; names it.
    """
    rows, V = scores.shape
    may_follow = np.ones((rows, V), np.bool_)
    live = [True] * rows if seen.live is None else seen.live.tolist()
    for row, text in enumerate(seen.ids):
        if live[row]:
            answer = allowed(row // seen.copies, text)
            answer = answer.cpu() if isinstance(answer, Tensor) else answer
            may_follow[row] = allowed_tokens(allowed, row // seen.copies, answer, V)
    forbidden = torch.from_numpy(~may_follow).to(scores.device)
    return scores.masked_fill(forbidden, -torch.inf)


def logits_processor(scores: Tensor, seen: Seen, functions: Iterable[Any]) -> Tensor:
    """Each function's scores in the place of those before it, float32 as a model gives them.

    Raises:
        ValueError: a function gives another shape, or no array; names it.
    """
    processed = scores.to(torch.float32, copy=True)
    allowed = (tuple(scores.shape),)
    for function in functions:
        answer = function(seen.ids, processed)
        processed = _answer(answer, function, "logits processor", allowed, scores.device)
    return processed.to(scores.dtype)


def stopping_criteria(scores: Tensor, seen: Seen, functions: Iterable[Any]) -> Tensor:
    """Bool `[N]`, the rows that a function ends, by the text and the scores behind it.

    Raises:
        ValueError: a function gives neither a bool nor one for each row; names it.
    """
    rows, device = len(seen.text), scores.device
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    for function in functions:
        answer = function(seen.ids, scores.to(torch.float32, copy=True))
        ended = (
            ended | _answer(answer, function, "stopping criterion", ((), (rows,)), device).bool()
        )
    return ended


def _answer(
    answer: Any,
    function: object,
    kind: str,
    allowed: tuple[tuple[int, ...], ...],
    device: torch.device,
) -> Tensor:
    """What a function gave, also as an array of NumPy.

    Raises:
        ValueError: it is no array of an allowed shape; names the function.
    """
    found = None
    # What has neither a length nor a type of numbers is refused below.
    with suppress(TypeError, ValueError, RuntimeError):
        found = torch.as_tensor(answer, device=device)
    shape = None if found is None else tuple(found.shape)
    arguments.check_answer(function, kind, shape, allowed)
    assert found is not None
    return found


def _holds_one(text: Tensor) -> Tensor:
    """Bool `[B]`: the row has one real token."""
    if text.shape[1] == 1:
        return torch.ones(len(text), dtype=torch.bool, device=text.device)
    return text[:, -2] < 0


def _places(text: Tensor, scores: Tensor) -> Tensor:
    """Ids to index `[B, V + 1]` with: what is no token goes to the last place."""
    return torch.where(text < 0, scores.shape[1], text).long()
