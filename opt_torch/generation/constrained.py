"""Beam search for texts that hold given words: bookkeeping on the host, scores as in `beams`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opt_core import arguments
from opt_core.generation import Candidate, ForcedWords, Hypothesis
from opt_torch.generation import beams
from opt_torch.generation.beams import Beams, Candidates
from opt_torch.generation.collecting import Found, Notes
from opt_torch.generation.cuts import best
from opt_torch.generation.decoding import guided, hidden_nan
from opt_torch.generation.rules import Seen
from opt_torch.generation.setup import Run


def search(run: Run, notes: Notes) -> Found:
    """The best sequences of every text, which hold the words if any could be found that do.

    Raises:
        ValueError: scores that are NaN, or a text for which nothing could be chosen.
    """
    texts = [ForcedWords(run.asked, run.plan) for _ in range(len(run.prompt.text))]
    state, scores = beams.begin(run)
    for count in range(run.plan.max_new_tokens):
        ruled = _ruled(run, state, scores, texts, notes)
        running = [_step(run, state, row, text, ruled[row]) for row, text in enumerate(texts)]
        state = beams.follow(run, state, _candidates(running, state.tokens.device))
        if all(text.is_done for text in texts):
            break
        if count + 1 < run.plan.max_new_tokens:
            state, scores = beams.step(run, state)
    return _found(run, state, texts)


def _ruled(
    run: Run, state: Beams, scores: Tensor, texts: list[ForcedWords], notes: Notes
) -> Tensor:
    """Log-probabilities after the rules, `[B, K, V]`.

    Raises:
        ValueError: a score of a beam that runs is NaN or inf.
    """
    following = guided(run, scores)
    done = torch.tensor([text.is_done for text in texts], device=scores.device)
    live = ((state.scores > -torch.inf) & ~done[:, None]).flatten()
    seen = Seen(state.tokens[:, :, : state.length].flatten(0, 1), run.prompt, live=live)
    ruled = beams.ruled_logs(run, following, seen)
    notes.add(scores[: len(live)], ruled)
    highest = ruled.amax(1).masked_fill(hidden_nan(run, following), torch.nan)
    highest = highest.masked_fill(~live, 0).view(len(texts), -1)
    if not bool((highest < torch.inf).all()):
        raise beams.unsound(run, highest, int(state.length))
    return ruled.view(len(texts), run.asked.num_beams, -1)


def _step(run: Run, state: Beams, row: int, text: ForcedWords, ruled: Tensor) -> list[Candidate]:
    """The K candidates of one text that run next."""
    if text.is_done:
        return [Candidate(-torch.inf, 0, 0)] * len(ruled)
    V = ruled.shape[1]
    sums = ruled + state.scores[row, :, None]  # [K, V]
    values, places = best(sums.view(1, -1), run.asked.candidates)
    found = [
        Candidate(value, *divmod(place, V))
        for value, place in zip(values[0].tolist(), places[0].tolist(), strict=True)
    ]

    def total(beam: int, token: int) -> float:
        return float(sums[beam, token])

    return text.step(found, total, _ends(run, state, row, ruled))


def _ends(run: Run, state: Beams, row: int, ruled: Tensor) -> Callable[[int, int], bool]:
    """Whether a beam of a text would end with a token."""
    own = run._replace(
        prompt=run.prompt.row(row), stops=run.stops._replace(start=run.stops.start[row : row + 1])
    )
    alone = state._replace(tokens=state.tokens[row : row + 1], matched=state.matched[row : row + 1])

    def ends(beam: int, token: int) -> bool:
        place, chosen = (torch.tensor([[x]], device=ruled.device) for x in (beam, token))
        one = Candidates(ruled[place, chosen], place, chosen)
        return bool(beams.ended(own, alone, one, ruled, 0))

    return ends


def _candidates(running: list[list[Candidate]], device: torch.device) -> Candidates:
    def table(name: str, dtype: torch.dtype) -> Tensor:
        values = [[getattr(one, name) for one in row] for row in running]
        return torch.tensor(values, dtype=dtype, device=device)

    return Candidates(
        table("score", torch.float64), table("beam", torch.long), table("token", torch.long)
    )


def _found(run: Run, state: Beams, texts: list[ForcedWords]) -> Found:
    """The results of all texts, in the form of a pool."""
    found = [one for row, text in enumerate(texts) for one in _results(run, row, text)]
    P, N, K = run.plan.prompt_length, run.plan.max_new_tokens, run.asked.num_beams
    # Token i was fed as beam path[i + 1] of step i.
    slots = [[P + i * K + beam for i, beam in enumerate(one.path[1:])] for one in found]

    def table(rows: list[list[int]], fill: int) -> Tensor:
        filled = [[0] * P + row + [fill] * (N - len(row)) for row in rows]
        return torch.tensor(filled, device=state.tokens.device).view(len(texts), -1, P + N)

    tokens = table([one.tokens for one in found], run.asked.fill).to(state.tokens.dtype)
    scores = state.scores.new_tensor([one.score for one in found]).view(len(texts), -1)
    lengths = state.slots.new_tensor([len(one.tokens) for one in found]).view(len(texts), -1)
    first = torch.zeros_like(lengths)
    return beams.gathered(run, state, tokens, scores, lengths, table(slots, 0), first)


def _results(run: Run, row: int, text: ForcedWords) -> list[Hypothesis]:
    """What a text has found; as many as are returned, the last ones empty where fewer exist."""
    count = run.asked.num_return_sequences
    found = text.results(count)
    if not found:
        raise arguments.no_token_left(int((run.prompt.text[row] >= 0).sum()))
    return found + [Hypothesis(-torch.inf, [], [], True)] * (count - len(found))
