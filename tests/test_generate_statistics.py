"""What is drawn follows its distribution: chi-square tests of fixed seeds, and what they find.

A test fails with probability 1e-3 where all is right; since the seeds are fixed, it then always
does. Its power is stated as Cohen's w, the root of the sum of (q - p)^2 / p over the cells: a
distribution q that lies so far from the right one p would be found with probability 0.9. For
w = 0.1 that is a token of probability 0.25 that is drawn 4.3 points too often or too rarely.
"""

from collections import Counter
from collections.abc import Hashable, Mapping
from itertools import permutations
from math import prod, sqrt
from typing import Any

import numpy as np
import pytest

from opt_core import reference
from opt_core.generation import GenerationConfig
from tests.cases import words
from tests.subject import Subject
from tests.wings import Wing

#: By degrees of freedom: the value that chi-square exceeds with probability 1e-3, and the
#: noncentrality at which it does with probability 0.9.
CRITICAL = {2: (13.816, 23.817), 8: (26.124, 32.987)}

CUTS: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_k": 6, "top_p": 0.95}
PROMPT = words(1, 4)


@pytest.fixture(scope="module")
def subject(wing: Wing) -> Subject:
    return Subject(wing, lightly=True)


def probabilities(subject: Subject, texts: Any, **options: Any) -> Any:
    """The distribution from which the reference draws the next token of every text `[B, V]`."""
    asked = GenerationConfig.from_model_config(subject.config)
    asked = asked.merged(max_new_tokens=1, eos_token_id=None, seed=0, **options)
    scores = reference.record(subject.config, subject.weights, texts, None, asked).scores[0]
    return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)


def check(drawn: list[Hashable], expected: Mapping[Any, float], *, finds: float) -> None:
    """Hold draws to the probabilities of all that can be drawn, the rarest in one cell."""
    degrees = min(len(expected) - 1, max(CRITICAL))
    critical, noncentrality = CRITICAL[degrees]
    assert sqrt(noncentrality / len(drawn)) <= finds
    assert sum(expected.values()) == pytest.approx(1)
    counts = Counter(drawn)
    assert counts.keys() <= {outcome for outcome, p in expected.items() if p > 0}
    cells = sorted(expected, key=lambda outcome: -expected[outcome])[:degrees]
    right = np.array([expected[cell] for cell in cells])
    found = np.array([counts[cell] for cell in cells])
    right = np.append(right, 1 - right.sum()) * len(drawn)
    found = np.append(found, len(drawn) - found.sum())
    assert right.min() >= 5
    assert ((found - right) ** 2 / right).sum() <= critical


def pairs(subject: Subject, prompt: Any) -> dict[tuple[int, int], float]:
    """The probability of every pair of tokens that may follow."""
    first = probabilities(subject, prompt, **CUTS)[0]
    tokens = np.flatnonzero(first)
    longer = np.concatenate([prompt.repeat(len(tokens), axis=0), tokens[:, None]], axis=1)
    second = probabilities(subject, longer, **CUTS)
    return {
        (int(one), other): float(first[one] * row[other])
        for one, row in zip(tokens, second, strict=True)
        for other in range(len(row))
    }


def draw_pairs(subject: Subject, prompt: Any, count: int, **options: Any) -> list[Hashable]:
    found = subject.generate(
        prompt, seed=0, num_return_sequences=count, eos_token_id=None, **CUTS, **options
    )
    width = prompt.shape[1]
    return [(one, other) for one, other in found[:, width : width + 2].tolist()]


def test_samples_follow_the_distribution(subject: Subject) -> None:
    drawn = draw_pairs(subject, PROMPT, 4000, max_new_tokens=2)
    check(drawn, pairs(subject, PROMPT), finds=0.1)


def test_samples_with_an_assistant_follow_the_models_distribution(
    subject: Subject, wing: Wing
) -> None:
    other = Subject(wing, seed=1, num_hidden_layers=1)
    drafts = {"assistant_model": other.model, "num_assistant_tokens": 2}
    drawn = draw_pairs(subject, PROMPT, 300, max_new_tokens=3, **drafts)
    check(drawn, pairs(subject, PROMPT), finds=0.34)


def test_samples_with_lookup_follow_the_distribution(subject: Subject) -> None:
    prompt = np.concatenate([PROMPT, PROMPT], axis=1)
    drawn = draw_pairs(subject, prompt, 300, max_new_tokens=3, prompt_lookup_num_tokens=2)
    check(drawn, pairs(subject, prompt), finds=0.34)


def test_beams_are_drawn_without_replacement(subject: Subject) -> None:
    """Two beams draw four of five tokens, and the likeliest two of them are returned."""
    cuts = {**CUTS, "temperature": 3.0, "top_k": 5, "top_p": 1.0, "num_beams": 2}
    chances = probabilities(subject, PROMPT, **cuts)[0]
    ranked = [int(token) for token in np.argsort(-chances)[:5]]
    expected = dict.fromkeys([(0, 1), (0, 2), (1, 2)], 0.0)
    for order in permutations(range(5), 4):
        weights = [chances[ranked[place]] for place in order]
        left = [1 - sum(weights[:draw]) for draw in range(4)]
        best, second, *_ = sorted(order)
        expected[best, second] += prod(w / rest for w, rest in zip(weights, left, strict=True))
    found = subject.generate(
        PROMPT.repeat(2000, axis=0),
        seed=0,
        max_new_tokens=1,
        eos_token_id=None,
        num_return_sequences=2,
        **cuts,
    )
    places = [ranked.index(token) for token in found[:, -1].tolist()]
    check(list(zip(places[::2], places[1::2], strict=True)), expected, finds=0.11)
