"""Beam search of one text that has to hold given words: which beams go on, what is kept.

The meaning of `force_words_ids`, after transformers' constrained beam search (Post and Vilar,
1804.06609), in plain Python: a wing computes scores, and asks here once a step and text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from opt_core.generation.configuration import GenerationConfig
from opt_core.generation.planning import Plan

#: The ways in which one demand can be met: each is the ids of a phrase.
Demand = list[list[int]]

_NOWHERE = float("-inf")


class Candidate(NamedTuple):
    """A token that could follow a running beam."""

    #: The beam's sum of log-probabilities, the token's included; -inf: does not exist.
    score: float
    #: Its place among the K running beams.
    beam: int
    token: int


class Hypothesis(NamedTuple):
    """A text that may be returned."""

    #: sum / (number of new tokens ** length_penalty).
    score: float
    #: The new tokens, the stop token included.
    tokens: list[int]
    #: Where each of them came from: the place of its beam among those that ran before it. Token i
    #: itself was fed as beam `path[i + 1]` of step i, the last one not at all.
    path: list[int]
    #: Whether the words are in it.
    is_met: bool


class ForcedWords:
    """The beams of one text, from the first step to what is returned.

    For each text of a batch a wing makes one of these, and after each pass, until `is_done` or the
    last step, it calls `step` with

    - the best M = max(2, 1 + number of stop tokens) * K pairs of beam and token, best first, ties
      to the lowest beam * V + token, with the running sum in their scores. Before the first step
      only beam 0 exists: the scores of the others are -inf;
    - `total(beam, token)`, the same score for any pair, such as `sums[beam, token].item()` of
      float [K, V];
    - `ends(beam, token)`, whether this beam would end with this token: by a stop token, a stop
      string or a criterion.

    `step` gives the K beams that run next as candidates, in their order: feed `token` after the
    text of `beam`. One with a score of -inf does not exist: feed anything, and give -inf for all
    that would follow it. Texts that are done are fed anything, too. After the last step,
    `results(count)` gives what is returned, best first.

    Words are sought, not guaranteed: beams at every stage of progress run side by side, but one
    that holds its words goes on only by its score, and without stop tokens it can be lost.
    """

    def __init__(self, asked: GenerationConfig, planned: Plan) -> None:
        self._demands = [_demand(words) for words in asked.force_words_ids or ()]
        self._stops = asked.stops
        self._beams, self._most = asked.num_beams, planned.max_new_tokens
        self._penalty, self._stopping = asked.length_penalty, asked.early_stopping
        #: The running beams: what was chosen, and the path of each.
        self.texts: list[list[int]] = [[] for _ in range(self._beams)]
        self._paths: list[list[int]] = [[] for _ in range(self._beams)]
        self._scores = [0.0] + [_NOWHERE] * (self._beams - 1)
        self._pool: list[Hypothesis] = []
        self._unmet: list[Hypothesis] = []
        #: Nothing that goes on can enter what is returned.
        self.is_done = False

    def step(
        self,
        candidates: Sequence[Candidate],
        total: Callable[[int, int], float],
        ends: Callable[[int, int], bool],
    ) -> list[Candidate]:
        """Choose the K beams that run next, and keep those that ended; see the class."""
        running: list[Candidate] = []
        for rank, candidate in enumerate(candidates):
            if candidate.score == _NOWHERE or len(running) == self._beams:
                break
            if not ends(candidate.beam, candidate.token):
                running.append(candidate)
            elif rank < self._beams:
                self._keep(candidate)
        running = self._spread(running, self._forced(running, total, ends))
        self._scores = [c.score for c in running] + [_NOWHERE] * (self._beams - len(running))
        running += [Candidate(_NOWHERE, 0, 0)] * (self._beams - len(running))
        self.texts, self._paths = (
            [self.texts[c.beam] + [c.token] for c in running],
            [self._paths[c.beam] + [c.beam] for c in running],
        )
        best = max((c.score for c in candidates), default=_NOWHERE)
        self.is_done = best == _NOWHERE or self._is_settled(best)
        return running

    def results(self, count: int) -> list[Hypothesis]:
        """The best `count` hypotheses, after the last step.

        Where too few hold the words, others follow: those that still ran, then those that ended.
        Fewer than `count` are found only where nothing else could be chosen. Of several stop tokens
        the first stands for whichever was chosen, as in transformers (with groups of beams, too).
        """
        running = [
            self._hypothesis(score, text, path)
            for score, text, path in zip(self._scores, self.texts, self._paths, strict=True)
            if score != _NOWHERE and not self.is_done
        ]
        met = [*self._pool, *(h for h in running if h.is_met)]
        others = (met, [h for h in running if not h.is_met], self._unmet)
        # A stable sort: of equals the older one is first.
        best = [h for one in others for h in sorted(one, key=lambda h: -h.score)][:count]
        return [h._replace(tokens=self._shown(h.tokens)) for h in best]

    def _shown(self, text: list[int]) -> list[int]:
        return [*text[:-1], self._stops[0]] if text[-1] in self._stops else text

    def _keep(self, candidate: Candidate) -> None:
        found = self._hypothesis(
            candidate.score,
            self.texts[candidate.beam] + [candidate.token],
            self._paths[candidate.beam] + [candidate.beam],
        )
        if found.is_met:
            self._pool = sorted([*self._pool, found], key=lambda h: -h.score)[: self._beams]
        else:
            self._unmet.append(found)

    def _hypothesis(self, score: float, text: list[int], path: list[int]) -> Hypothesis:
        is_met = Progress.of(self._demands, text).is_complete
        return Hypothesis(score / len(text) ** self._penalty, text, path, is_met)

    def _is_settled(self, best: float) -> bool:
        """Whether the pool is full, and the step's best candidate could not enter it."""
        if len(self._pool) < self._beams:
            return False
        if self._stopping is True:
            return True
        longest = self._stopping == "never" and self._penalty > 0
        length = self._most if longest else len(self.texts[0])
        return self._pool[-1].score >= best / float(length**self._penalty)

    def _forced(
        self,
        running: list[Candidate],
        total: Callable[[int, int], float],
        ends: Callable[[int, int], bool],
    ) -> list[Candidate]:
        """The tokens that would bring each beam nearer to its words, where nobody chose them."""
        known = {(candidate.beam, candidate.token) for candidate in running}
        wanted = (
            Candidate(total(beam, token), beam, token)
            for beam, text in enumerate(self.texts)
            for token in Progress.of(self._demands, text).wanted()
            if (beam, token) not in known and not ends(beam, token)
        )
        return [candidate for candidate in wanted if candidate.score != _NOWHERE]

    def _spread(self, running: list[Candidate], forced: list[Candidate]) -> list[Candidate]:
        """K of all: the best of each bank, furthest first, then the second best of each."""
        if not forced:
            return running
        banks: dict[int, list[Candidate]] = {}
        for candidate in sorted((*running, *forced), key=lambda c: -c.score):
            text = self.texts[candidate.beam] + [candidate.token]
            banks.setdefault(Progress.of(self._demands, text).bank, []).append(candidate)
        turns = [
            (turn, -bank, candidate)
            for bank, members in banks.items()
            for turn, candidate in enumerate(members)
        ]
        return [candidate for _, _, candidate in sorted(turns, key=lambda t: t[:2])][: self._beams]


class Progress:
    """How far a text has met its demands: one after the other, each from its first token on.

    A token that does not go on with the phrase that is begun breaks it, and begins none itself;
    the demand then waits behind the others. So does transformers.
    """

    def __init__(self, demands: Sequence[Demand]) -> None:
        self._waiting = list(demands)
        self._open: Demand | None = None
        self._begun: list[int] = []
        self._met = 0
        # The longest phrase of all: a demand that is met counts this much.
        self._worth = max((len(phrase) for demand in demands for phrase in demand), default=1)

    @classmethod
    def of(cls, demands: Sequence[Demand], text: Sequence[int]) -> Progress:
        """After a whole text of new tokens."""
        result = cls(demands)
        for token in text:
            result.add(token)
        return result

    @property
    def is_complete(self) -> bool:
        """Whether all demands are met."""
        return self._open is None and not self._waiting

    @property
    def bank(self) -> int:
        """The progress as one number; beams with the same number compete with each other."""
        if self._open is None:
            return self._met * self._worth
        missing = max(map(len, self._open)) - len(self._begun)
        return self._met * self._worth + self._worth - missing

    def wanted(self) -> list[int]:
        """The tokens that go on with the phrase that is begun, or else begin one."""
        demands = self._waiting if self._open is None else [self._open]
        return list(dict.fromkeys(t for demand in demands for t in _next(demand, self._begun)))

    def add(self, token: int) -> None:
        """One more token of the text."""
        if self._open is None:
            starts = (d for d in self._waiting if token in _next(d, []))
            self._open = next(starts, None)
            if self._open is None:
                return
            self._waiting.remove(self._open)
        elif token not in _next(self._open, self._begun):
            self._waiting.append(self._open)
            self._open, self._begun = None, []
            return
        self._begun = [*self._begun, token]
        if self._begun in self._open:
            self._open, self._begun = None, []
            self._met += 1


def _demand(words: list[int] | list[list[int]]) -> Demand:
    """A phrase is a demand with one way to meet it."""
    return [words] if isinstance(words[0], int) else words


def _next(demand: Demand, begun: list[int]) -> list[int]:
    """The tokens that follow what is begun of a demand."""
    count = len(begun)
    return [phrase[count] for phrase in demand if phrase[:count] == begun and len(phrase) > count]
