"""Beam search: plain, drawn, or in groups that differ from each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from opt_core import arguments
from opt_core.generation import Candidate, Hypothesis, uniforms
from opt_core.reference.chain import Line, halted, score
from opt_core.reference.cuts import ranking
from opt_core.reference.inputs import Floats
from opt_core.reference.setup import Run


class Beam(NamedTuple):
    """A text that runs on."""

    #: The sum of the log-probabilities of its new tokens; -inf: there is no such beam.
    score: float
    #: Its new tokens.
    tokens: list[int]
    #: The place, among all K beams of its text, of the beam that each token followed.
    path: list[int]


class Searched(NamedTuple):
    """What a search finds in B texts of K beams."""

    #: The best `num_return_sequences` of each text, best first; fewer where no more exist.
    found: list[list[Hypothesis]]
    #: One float64 [B * K, V] a step: log-probabilities after the rules, and the model's scores.
    scores: list[Floats]
    logits: list[Floats]


@dataclass
class Group:
    """The beams of one text that compete with each other, and what they have finished."""

    run: Run
    #: The place of its first beam among the K of the text, and how many it has.
    first: int
    size: int
    beams: list[Beam] = field(init=False)
    pool: list[Hypothesis] = field(default_factory=list)
    is_done: bool = False

    def __post_init__(self) -> None:
        self.beams = self._filled([Beam(0.0, [], [])])

    def advance(self, candidates: list[tuple[Candidate, bool]]) -> None:
        """Take the best candidates that go on as beams, and keep those that end.

        Each comes with whether it ends; those that do count among the first `size` only.
        """
        running: list[Beam] = []
        for rank, (candidate, ends) in enumerate(candidates):
            followed = self.beams[candidate.beam]
            beam = Beam(
                candidate.score,
                [*followed.tokens, candidate.token],
                [*followed.path, self.first + candidate.beam],
            )
            if not ends:
                running.append(beam)
            elif rank < self.size:
                self._keep(beam)
        self.beams = self._filled(running[: self.size])
        # With groups the best candidate counts even if it has just ended, as in transformers.
        alone = self.run.asked.num_beam_groups == 1
        self.is_done = not running or self._is_settled(
            running[0].score if alone else candidates[0][0].score
        )

    @property
    def is_empty(self) -> bool:
        """Whether nothing runs on."""
        return self.beams[0].score == -np.inf

    def _keep(self, beam: Beam) -> None:
        score = beam.score / len(beam.tokens) ** self.run.asked.length_penalty
        found = [*self.pool, Hypothesis(score, beam.tokens, beam.path, True)]
        # A stable sort: of equals the older one stays first.
        self.pool = sorted(found, key=lambda one: -one.score)[: self.size]

    def _is_settled(self, best: float) -> bool:
        """Whether the pool is full, and a text of this sum is not expected to enter it."""
        asked = self.run.asked
        if len(self.pool) < self.size:
            return False
        if asked.early_stopping is True:
            return True
        longest = asked.early_stopping == "never" and asked.length_penalty > 0
        length = self.run.planned.max_new_tokens if longest else len(self.beams[0].tokens)
        return bool(best / length**asked.length_penalty <= self.pool[-1].score)

    def _filled(self, running: list[Beam]) -> list[Beam]:
        """Beams that do not exist make up the number."""
        length = len(running[0].tokens) if running else 0
        nothing = Beam(-np.inf, [self.run.asked.fill] * length, [self.first] * length)
        return running + [nothing] * (self.size - len(running))


def search(run: Run) -> Searched:
    """Search every text with `num_beams` beams, until it is done.

    Each text decides for itself; with `waits_for_batch` all search on until all are done.

    A step adds to each beam's sum the processed log-probability of every token. The best M of
    these (beam, token) pairs (see `GenerationConfig.candidates`) are candidates, of equals the one
    with the lowest beam * V + token first; `do_sample` draws them instead (see `drawn`). A
    candidate ends by a stop token, a stop string, a criterion, or because it is the last step.
    Group by group, the tokens of the best K / G that did not end but by that lower their scores
    for the groups that follow; groups that were done before lower nothing.

    Raises:
        ValueError: as `score`; a text for which no token could be chosen.
    """
    asked, count = run.asked, run.asked.num_beam_groups
    size, steps = asked.num_beams // count, run.planned.max_new_tokens
    M = asked.candidates
    draws = M if asked.do_sample else 1
    uniform = uniforms(asked.seed, len(run.texts), steps, draws)  # [B, N, M]
    texts = [[Group(run, g * size, size) for g in range(count)] for _ in run.texts]
    result = Searched([], [], [])
    for step in range(steps):
        taken: list[list[int]] = [[] for _ in texts]
        found = []
        for number in range(count):
            groups = [text[number] for text in texts]
            found.append(_step(run, groups, taken, uniform[:, step], step))
        for name, one in zip((result.scores, result.logits), zip(*found, strict=True), strict=True):
            # [B, G, K / G, V] in the order of the beams of each text.
            name.append(np.stack(one, axis=1).reshape(len(texts) * asked.num_beams, -1))
        groups = [group for text in texts for group in text]
        if all(group.is_done for group in groups):
            break
        for group in groups:
            # Some text is not done: the others may still find better ones while they wait.
            group.is_done &= not asked.waits_for_batch or group.is_empty
    for row, text in enumerate(texts):
        best = sorted((one for group in text for one in group.pool), key=lambda one: -one.score)
        if not best:
            raise arguments.no_token_left(len(run.texts[row]))
        result.found.append(best[: asked.num_return_sequences])
        if count > 1:
            result.found[-1] = [_shown(run, one) for one in result.found[-1]]
    return result


def _shown(run: Run, one: Hypothesis) -> Hypothesis:
    """With groups, the first stop token stands for whichever ended a text, as in transformers."""
    stops = run.asked.stops
    is_stopped = one.tokens[-1] in stops
    return one._replace(tokens=[*one.tokens[:-1], stops[0]]) if is_stopped else one


def _step(
    run: Run, groups: list[Group], taken: list[list[int]], uniform: Floats, step: int
) -> tuple[Floats, Floats]:
    """One step of the group that stands at the same place in every text.

    Gives scores and logits [B, K / G, V], and adds to each text's `taken`.
    """
    size, M = groups[0].size, run.asked.candidates
    lines = [
        Line(row, beam.tokens, beam.score > -np.inf and not group.is_done, taken[row])
        for row, group in enumerate(groups)
        for beam in group.beams
    ]
    scored = score(run, lines, as_logs=True)
    scores = scored.scores.reshape(len(groups), size, -1)  # [B, K / G, V]
    candidates = []
    for row, group in enumerate(groups):
        sums = scores[row] + np.array([[beam.score] for beam in group.beams])
        candidates.append(drawn(sums, uniform[row]) if run.asked.do_sample else top(sums, M))
    ended = _ended(run, groups, candidates, scored.scores, M)
    is_last = step == run.planned.max_new_tokens - 1
    for row, group in enumerate(groups):
        if not group.is_done:
            pairs = list(zip(candidates[row], ended[row], strict=False))
            # Also in the last step, which ends all, groups are to differ from each other.
            taken[row] += [one.token for one, ends in pairs if not ends][:size]
            group.advance([(one, is_last or ends) for one, ends in pairs])
    return scores, scored.logits.reshape(scores.shape)


def _ended(
    run: Run, groups: list[Group], candidates: list[list[Candidate]], scores: Floats, M: int
) -> list[list[bool]]:
    """Which candidates end their text.

    Criteria see M for each text, each with the scores [V] of the beam that it follows.
    """
    nothing = Candidate(-np.inf, 0, run.asked.fill)
    filled = [found + [nothing] * (M - len(found)) for found in candidates]
    lines = [
        Line(row, [*group.beams[one.beam].tokens, one.token])
        for row, group in enumerate(groups)
        for one in filled[row]
    ]
    size = groups[0].size
    behind = [row * size + one.beam for row, found in enumerate(filled) for one in found]
    halts = halted(run, lines, scores[behind])
    ends = [
        bool(halt) or run.is_ended(line.row, line.new)
        for line, halt in zip(lines, halts, strict=True)
    ]
    return [ends[row * M : (row + 1) * M] for row in range(len(groups))]


def top(sums: Floats, count: int) -> list[Candidate]:
    """The best pairs of beam and token, best first: [K, V]."""
    flat = sums.ravel()
    return _candidates(sums, [int(place) for place in ranking(flat)[:count]])


def drawn(sums: Floats, uniform: Floats) -> list[Candidate]:
    """Pairs of beam and token, drawn one after the other without putting back: [K, V], [M].

    Draw m is the first pair, in the order of beam * V + token, at which the cumulative sum of the
    weights that are left exceeds `uniform[m]` times their total. Best first.
    """
    flat = sums.ravel()
    weights = np.exp(flat - flat.max()) if np.isfinite(flat).any() else np.zeros_like(flat)
    places = []
    for one in uniform:
        cumulative = weights.cumsum()
        if cumulative[-1] == 0:
            break
        places.append(int((cumulative > one * cumulative[-1]).argmax()))
        weights[places[-1]] = 0
    return _candidates(sums, sorted(places, key=lambda place: (-flat[place], place)))


def _candidates(sums: Floats, places: list[int]) -> list[Candidate]:
    pairs = [divmod(place, sums.shape[1]) for place in places]
    found = [Candidate(float(sums[beam, token]), beam, token) for beam, token in pairs]
    return [candidate for candidate in found if candidate.score > -np.inf]
