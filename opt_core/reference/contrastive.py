"""Contrastive search: likely tokens that do not repeat what the text says already."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from opt_core.reference.chain import Line
from opt_core.reference.cuts import ranking, softmax
from opt_core.reference.inputs import Floats
from opt_core.reference.setup import Run
from opt_core.reference.steps import Choice, Step, choose_all


def contrastive(run: Run) -> Iterator[Step]:
    """Step by step the token with the best balance of probability and novelty (2202.06417).

    Of the `top_k` likeliest tokens the one with the largest (1 - alpha) * probability - alpha *
    (the largest cosine between its last hidden state and those of the text, prompt included); of
    equals the likelier one. A token that the rules forbid is no candidate, however few are left
    (in transformers it is one of probability 0).
    """

    def choose(scores: Floats, line: Line) -> Choice:
        text = run.texts[line.row] + line.new
        probability = softmax(scores)
        order = ranking(scores)
        count = run.asked.top_k or 0
        candidates = [int(token) for token in order[:count] if np.isfinite(scores[token])]
        alpha = run.asked.penalty_alpha or 0.0
        merits = np.array(
            [
                (1 - alpha) * probability[token] - alpha * _likeness(run.hidden([*text, token]))
                for token in candidates
            ]
        )
        place = int(merits.argmax())
        lead = merits[place] - np.max(np.delete(merits, place), initial=-np.inf)
        # How near another token was to being a candidate.
        edge = np.inf
        if len(candidates) == count < len(order):
            edge = probability[order[count - 1]] - probability[order[count]]
        return Choice(candidates[place], float(min(lead, edge)))

    return choose_all(run, choose)


def _likeness(hidden: Floats) -> float:
    """The largest cosine of the last hidden state with those before it; [T, E]."""
    unit = hidden / np.sqrt((hidden**2).sum(axis=1, keepdims=True))
    return float((unit[:-1] @ unit[-1]).max())
