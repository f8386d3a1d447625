"""Beam search for texts that hold given words."""

from __future__ import annotations

import numpy as np

from opt_core import arguments
from opt_core.generation import ForcedWords
from opt_core.reference.beams import Searched, top
from opt_core.reference.chain import Line, halted, score
from opt_core.reference.inputs import Floats
from opt_core.reference.setup import Run


def constrained(run: Run) -> Searched:
    """As `beams.search`, but which beams go on and what is kept is for `ForcedWords` to say.

    A criterion is asked about one text at a time.

    Raises:
        ValueError: as `search`.
    """
    K = run.asked.num_beams
    texts = [ForcedWords(run.asked, run.planned) for _ in run.texts]
    sums = [[0.0] + [-np.inf] * (K - 1) for _ in texts]
    result = Searched([], [], [])
    for _ in range(run.planned.max_new_tokens):
        lines = [
            Line(row, new, sums[row][beam] > -np.inf and not text.is_done)
            for row, text in enumerate(texts)
            for beam, new in enumerate(text.texts)
        ]
        scored = score(run, lines, as_logs=True)
        result.scores.append(scored.scores)
        result.logits.append(scored.logits)
        for row, text in enumerate(texts):
            if not text.is_done:
                own = scored.scores[row * K : (row + 1) * K]
                sums[row] = _step(run, row, text, own, np.array(sums[row])[:, None])
        if all(text.is_done for text in texts):
            break
    for row, text in enumerate(texts):
        result.found.append(text.results(run.asked.num_return_sequences))
        if not result.found[-1]:
            raise arguments.no_token_left(len(run.texts[row]))
    return result


def _step(run: Run, row: int, text: ForcedWords, scores: Floats, so_far: Floats) -> list[float]:
    """One step of one text, from scores [K, V] and its beams' sums [K, 1] to their sums [K]."""
    sums = scores + so_far

    def ends(beam: int, token: int) -> bool:
        line = Line(row, [*text.texts[beam], token])
        return run.is_ended(row, line.new) or bool(halted(run, [line], scores[[beam]])[0])

    candidates = top(sums, run.asked.candidates)
    running = text.step(candidates, lambda beam, token: float(sums[beam, token]), ends)
    return [candidate.score for candidate in running]
