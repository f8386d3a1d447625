"""Texts that grow by one token a step, whichever way it is chosen; greedy choice and draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from opt_core import arguments
from opt_core.generation import uniforms
from opt_core.reference.chain import Line, halted, score
from opt_core.reference.cuts import best, draw
from opt_core.reference.inputs import Floats, Ints
from opt_core.reference.setup import Run


class Choice(NamedTuple):
    """A token, and the smallest change that could have made it another one."""

    token: int
    margin: float


#: How a token is chosen from scores [V].
Choose = Callable[[Floats, Line], Choice]


class Step(NamedTuple):
    """What one step does for R texts."""

    #: int64 [R]: what was chosen, `GenerationConfig.fill` for texts that are finished.
    tokens: Ints
    #: float64 [R]: as `Generated.margins`.
    margins: Floats
    #: float64 [R, V]: what it was chosen from, and what the model gave. For finished texts too,
    #: where nobody reads them.
    scores: Floats
    logits: Floats


def plain(run: Run) -> Iterator[Step]:
    """Step by step the likeliest token, or a draw by the uniform of its row and step."""
    return choose_all(run, chooser(run))


def chooser(run: Run) -> Choose:
    """How `plain` chooses: the token after n new ones by uniform n of its row."""
    rows = len(run.texts)
    uniform = uniforms(run.asked.seed, rows, run.planned.max_new_tokens)[..., 0]  # [R, N]

    def choose(scores: Floats, line: Line) -> Choice:
        if run.asked.do_sample:
            return Choice(*draw(scores, uniform[line.row, len(line.new)]))
        return Choice(*best(scores))

    return choose


def choose_all(run: Run, choose: Choose) -> Iterator[Step]:
    """Step by step what `choose(scores [V], text)` chooses, until all texts have ended.

    Raises:
        ValueError: as `score`; no token is left to choose.
    """
    lines = [Line(row, []) for row in range(len(run.texts))]
    for _ in range(run.planned.max_new_tokens):
        scored = score(run, lines)
        chosen = [
            _chosen(run, scores, line, cut, choose)
            for scores, line, cut in zip(scored.scores, lines, scored.margins, strict=True)
        ]
        yield Step(
            np.array([choice.token for choice in chosen], np.int64),
            np.array([choice.margin for choice in chosen]),
            scored.scores,
            scored.logits,
        )
        lines = [
            line._replace(new=[*line.new, choice.token])
            for line, choice in zip(lines, chosen, strict=True)
        ]
        halts = halted(run, lines, scored.scores)
        lines = [
            line._replace(
                is_live=line.is_live and not halt and not run.is_ended(line.row, line.new)
            )
            for line, halt in zip(lines, halts, strict=True)
        ]
        if not any(line.is_live for line in lines):
            return


def _chosen(run: Run, scores: Floats, line: Line, cut: float, choose: Choose) -> Choice:
    if not line.is_live:
        return Choice(run.asked.fill, np.inf)
    if np.isneginf(scores).all():
        raise arguments.no_token_left(len(run.texts[line.row]) + len(line.new))
    choice = choose(scores, line)
    return choice._replace(margin=min(choice.margin, cut))
