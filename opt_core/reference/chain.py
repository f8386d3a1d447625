"""From the model's scores to those that a token is chosen from: guidance, rules, functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from opt_core import arguments
from opt_core.generation import ORDER, Strategy, allowed_tokens
from opt_core.reference.cuts import CUTS, log_softmax, margin
from opt_core.reference.inputs import Floats, Ints, Mask
from opt_core.reference.rules import RULES, Place, suppress_tokens
from opt_core.reference.setup import Run

#: Where the functions of the user stand between the rules.
_FUNCTIONS = ORDER.index("logits_processor")
#: What adds scores up, or sets them against something else.
_WEIGHING = (Strategy.BEAMS, Strategy.CONSTRAINED, Strategy.CONTRASTIVE)


class Line(NamedTuple):
    """One text whose next token is sought, alone or one of several that continue a prompt."""

    #: The number of its prompt.
    row: int
    #: What follows the prompt.
    new: list[int]
    #: Whether anybody asks for the next token: not of a finished text, or of a beam that is none.
    is_live: bool = True
    #: As `Place.taken`.
    taken: Sequence[int] = ()


class Scored(NamedTuple):
    """What a step computes for R texts."""

    #: float64 [R, V]: as the model gives them.
    logits: Floats
    #: float64 [R, V]: what a token is chosen from.
    scores: Floats
    #: float64 [R]: the smallest change of a score or a probability that would have made any cut
    #: keep another set of tokens; inf without cuts.
    margins: Floats


def score(run: Run, lines: Sequence[Line], *, as_logs: bool = False) -> Scored:
    """The scores of what follows each text, through all that was asked for.

    `as_logs` begins with log-probabilities, as beams do. Guidance takes those anyway: after
    `scale * (with - without) + without` they sum to something else than 1, and stay so for beams.

    Raises:
        ValueError: a score is NaN, or +inf but for greedy choice; a function gives what it must
            not.
    """
    logits = np.stack([run.logits(line.row, line.new) for line in lines])  # [R, V]
    guided = [_guided(run, line, row) for line, row in zip(lines, logits, strict=True)]
    start = [log_softmax(row) for row in guided] if as_logs and not run.asked.is_guided else guided
    scores, margins = process(run, np.stack(start), lines)
    return Scored(logits, scores, margins)


def process(run: Run, scores: Floats, lines: Sequence[Line]) -> tuple[Floats, Floats]:
    """All rules and functions in their order: [R, V] -> [R, V], and the margins [R] of `Scored`.

    Raises:
        ValueError: as `score`.
    """
    if not run.asked.remove_invalid_values:
        _check(run, scores, lines)
    scores = np.stack([_ruled(run, row, line) for row, line in zip(scores, lines, strict=True)])
    for function in run.call.logits_processor:
        found = function(ids_of(run, lines), scores)
        scores = _answer(function, "logits processor", found, (scores.shape,)).astype(np.float64)
    if run.asked.do_sample or run.asked.strategy in _WEIGHING:
        _check_finite(run, scores, lines)
    pairs = [_cut(run, row) for row in scores]
    scores = np.stack([row for row, _ in pairs])
    _check(run, scores, lines)
    return scores, np.array([found for _, found in pairs])


def halted(run: Run, lines: Sequence[Line], scores: Floats) -> Mask:
    """Which texts the functions of a call end, with the new token in them -> bool [R].

    Raises:
        ValueError: a function gives something else than a bool or bool [R].
    """
    result = np.zeros(len(lines), np.bool_)
    for function in run.call.stopping_criteria:
        found = function(ids_of(run, lines), scores.copy())
        result |= _answer(function, "stopping criterion", found, ((), (len(lines),))).astype(bool)
    return result


def _answer(
    function: object, kind: str, answer: Any, allowed: tuple[tuple[int, ...], ...]
) -> npt.NDArray[Any]:
    found = np.asarray(answer)
    is_number = found.dtype == np.bool_ or np.issubdtype(found.dtype, np.number)
    arguments.check_answer(function, kind, found.shape if is_number else None, allowed)
    return found


def ids_of(run: Run, lines: Sequence[Line]) -> Ints:
    """What functions see: the prompts as given, the new tokens, `fill` behind shorter texts."""
    width = max(len(line.new) for line in lines)
    rows = [
        [*run.prompt[line.row], *line.new, *[run.asked.fill] * (width - len(line.new))]
        for line in lines
    ]
    return np.array(rows, np.int64)


def _guided(run: Run, line: Line, logits: Floats) -> Floats:
    """Classifier-free guidance (2306.17806): lead away from what is likely without the prompt."""
    if not run.asked.is_guided:
        return logits
    scale = run.asked.guidance_scale or 0.0
    following = log_softmax(logits)
    without = log_softmax(run.head(run.hidden(run.bare[line.row] + line.new)[-1]))
    return scale * (following - without) + without


def _ruled(run: Run, scores: Floats, line: Line) -> Floats:
    at = Place(run.texts[line.row] + line.new, len(line.new), line.taken)
    allow = run.call.prefix_allowed_tokens_fn
    for name in ORDER[:_FUNCTIONS]:
        if name == "vocabulary":
            scores = suppress_tokens(scores, range(run.known, len(scores)))
        elif name == "prefix_allowed_tokens_fn" and allow is not None and line.is_live:
            answer = allow(line.row, ids_of(run, [line])[0])
            allowed = allowed_tokens(allow, line.row, answer, len(scores))
            scores = np.where(allowed, scores, -np.inf)
        elif name in run.asked.rules:
            scores = RULES[name](scores, at, run.asked, run.planned)
    return scores


def _cut(run: Run, scores: Floats) -> tuple[Floats, float]:
    closest = np.inf
    for name in ORDER[_FUNCTIONS + 1 :]:
        if name in run.asked.rules and np.isfinite(scores).any():
            before, scores = scores, CUTS[name](scores, run.asked)
            closest = min(closest, margin(name, run.asked, before, scores))
    return scores, closest


def _check_finite(run: Run, scores: Floats, lines: Sequence[Line]) -> None:
    """Before the cuts, which would hide it. Greedy choice just takes the token."""
    for row, line in zip(scores, lines, strict=True):
        if line.is_live and np.isposinf(row).any():
            raise arguments.infinite_scores(len(run.texts[line.row]) + len(line.new))


def _check(run: Run, scores: Floats, lines: Sequence[Line]) -> None:
    for row, line in zip(scores, lines, strict=True):
        if line.is_live and np.isnan(row).any():
            raise arguments.nan_scores(len(run.texts[line.row]) + len(line.new))
