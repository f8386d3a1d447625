"""Beams that have to hold words: how far a text has come, which beams go on, what is kept."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from opt_core.config import OPTConfig
from opt_core.generation import Candidate, ForcedWords, GenerationConfig, Hypothesis, plan
from opt_core.generation.constraints import Progress

VOCABULARY, STOP = 9, 0
CONFIG = OPTConfig(vocab_size=VOCABULARY, max_position_embeddings=64)

# Progress


@pytest.mark.parametrize(
    ("text", "bank", "wanted"),
    [
        ([], 0, [1, 4]),
        ([7, 7], 0, [1, 4]),
        ([1], 1, [2]),
        ([1, 2], 2, [3]),
        ([1, 2, 3], 3, [4]),
        ([1, 7], 0, [4, 1]),
        # What breaks a phrase begins none.
        ([1, 1], 0, [4, 1]),
        ([4], 2, [5]),
        ([4, 1, 2], 0, [1, 4]),
        ([4, 5, 1, 2], 5, [3]),
        ([4, 5, 7, 1, 2, 3, 1], 6, []),
    ],
)
def test_phrases_are_met_one_after_the_other(text: list[int], bank: int, wanted: list[int]) -> None:
    progress = Progress.of([[[1, 2, 3]], [[4, 5]]], text)
    assert (progress.bank, progress.wanted(), progress.is_complete) == (bank, wanted, not wanted)


@pytest.mark.parametrize(
    ("text", "bank", "wanted"),
    [([], 0, [1, 6]), ([1], 1, [2, 3]), ([1, 3], 2, [4]), ([1, 2], 3, []), ([6], 3, [])],
)
def test_one_of_several_phrases_is_enough(text: list[int], bank: int, wanted: list[int]) -> None:
    progress = Progress.of([[[1, 2], [1, 3, 4], [6]]], text)
    assert (progress.bank, progress.wanted(), progress.is_complete) == (bank, wanted, not wanted)


def test_the_same_word_twice_is_met_by_two() -> None:
    assert not Progress.of([[[1]], [[1]]], [1]).is_complete
    assert Progress.of([[[1]], [[1]]], [1, 7, 1]).is_complete


# Search


def search(scores: Any, words: list[Any], stops: Sequence[int] = (), **options: Any) -> ForcedWords:
    """Search texts whose every step has its own log-probabilities [N, V], whatever came before."""
    asked = GenerationConfig(
        **{
            "num_beams": 3,
            "force_words_ids": words,
            "max_new_tokens": len(scores),
            "eos_token_id": list(stops) or None,
            **options,
        }
    )
    planned = plan(asked, CONFIG, prompt_length=1, row_lengths=[1])
    text, K = ForcedWords(asked, planned), asked.num_beams
    beams = [0.0] + [-np.inf] * (K - 1)
    for step in scores:
        sums = np.array(beams)[:, None] + step  # [K, V]
        order = np.argsort(-sums, axis=None, kind="stable")[: max(2, 1 + len(stops)) * K]
        best = [Candidate(float(sums.flat[i]), *divmod(int(i), VOCABULARY)) for i in order]
        running = text.step(best, _reader(sums), lambda _, token: token in stops)
        assert len(running) == K
        beams = [candidate.score for candidate in running]
        if text.is_done:
            break
    return text


def _reader(sums: Any) -> Callable[[int, int], float]:
    return lambda beam, token: float(sums[beam, token])


def log_probabilities(seed: int, steps: int) -> Any:
    noise = np.random.default_rng(seed).normal(0, 2, (steps, VOCABULARY))
    return noise - np.log(np.exp(noise).sum(axis=1, keepdims=True))


def holds(words: list[list[int]], text: Hypothesis) -> bool:
    """Whether every phrase stands somewhere in a text."""
    tokens = text.tokens
    return all(word in [tokens[i : i + len(word)] for i in range(len(tokens))] for word in words)


@given(
    seed=st.integers(0, 2**16),
    words=st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=3), min_size=1, max_size=2),
    stops=st.sampled_from([(), (STOP,), (STOP, 8)]),
    stopping=st.sampled_from([True, False, "never"]),
    penalty=st.sampled_from([0.0, 1.0, 2.0]),
)
def test_what_is_returned_says_whether_it_holds_the_words_and_scores_what_it_should(
    seed: int, words: list[list[int]], stops: tuple[int, ...], stopping: Any, penalty: float
) -> None:
    assume(not {*stops} & {token for word in words for token in word})
    scores = log_probabilities(seed, 8)
    options = {"early_stopping": stopping, "length_penalty": penalty}
    found = search(scores, words, stops, **options).results(3)
    assert len(found) == 3
    assert len({tuple(text.tokens) for text in found}) == 3 or len(stops) > 1
    met = [text for text in found if text.is_met]
    assert found[: len(met)] == met == sorted(met, key=lambda text: -text.score)
    for text in found:
        assert len(text.path) == len(text.tokens) <= 8
        assert not text.is_met or holds(words, text)
        if text.tokens[-1] not in stops or len(stops) == 1:
            total = sum(scores[step, token] for step, token in enumerate(text.tokens))
            np.testing.assert_allclose(text.score, total / len(text.tokens) ** penalty)


def test_the_path_leads_back_to_the_tokens() -> None:
    scores = log_probabilities(4, 7)
    steps: list[list[Candidate]] = []

    class Noted(ForcedWords):
        def step(self, *given: Any) -> list[Candidate]:
            steps.append(super().step(*given))
            return steps[-1]

    asked = GenerationConfig(num_beams=3, force_words_ids=[[5, 6]], max_new_tokens=7)
    text = Noted(asked, plan(asked, CONFIG, prompt_length=1, row_lengths=[1]))
    beams = [0.0, -np.inf, -np.inf]
    for step in scores:
        sums = np.array(beams)[:, None] + step
        order = np.argsort(-sums, axis=None, kind="stable")[:6]
        best = [Candidate(float(sums.flat[i]), *divmod(int(i), VOCABULARY)) for i in order]
        running = text.step(best, _reader(sums), lambda *_: False)
        beams = [candidate.score for candidate in running]
    for found in text.results(3):
        assert found.path[0] == 0
        for step, place in enumerate(found.path[1:]):
            # Where the path goes on from is where the token before was put.
            assert steps[step][place].token == found.tokens[step]


@pytest.mark.parametrize("words", [[[3]], [[4, 5, 6]], [[3, 4], [5, 6, 7]], [[[3, 4], [5]], [8]]])
def test_words_are_found_in_texts_that_may_end(words: list[Any]) -> None:
    for seed in range(20):
        best = search(log_probabilities(seed, 9), words, [STOP], num_beams=6).results(1)[0]
        assert best.is_met
        assert isinstance(words[0][0], list) or holds(words, best)


#: The stop token is by far the likeliest, then 1, then 2, and so on.
LIKELY_STOP = np.tile(np.log([0.6, 0.2, 0.1, 0.05, 0.02, 0.01, 0.01, 0.005, 0.005]), (5, 1))


def test_a_text_that_ends_without_its_words_is_not_kept() -> None:
    found = search(LIKELY_STOP, [[1]], [STOP], length_penalty=0.0).results(3)
    assert found[0].tokens == [1, STOP]
    assert all(text.is_met for text in found)


def test_words_that_do_not_fit_into_the_new_tokens_are_refused() -> None:
    too_long = [7] * (len(LIKELY_STOP) + 1)
    with pytest.raises(ValueError, match="force_words_ids need at least"):
        search(LIKELY_STOP, [too_long], [STOP])
    search(LIKELY_STOP, [[too_long, [8]]], [STOP])


def test_where_nothing_else_is_left_texts_that_ended_early_are_returned() -> None:
    scores = np.where(np.arange(VOCABULARY) == STOP, 0.0, -np.inf)[None]
    found = search(scores, [[7]], [STOP]).results(3)
    assert [(text.tokens, text.is_met) for text in found] == [([STOP], False)]


def test_a_word_that_may_not_be_chosen_is_not_forced() -> None:
    scores = LIKELY_STOP.copy()
    scores[:, 7] = -np.inf
    found = search(scores, [[7]]).results(3)
    assert all(7 not in text.tokens for text in found)
    assert all(np.isfinite(text.score) for text in found)


def test_each_way_to_go_on_with_a_word_is_tried() -> None:
    # transformers forgets all but the first where several phrases begin alike.
    scores = np.tile(np.log([0.9, 0.02, 0.01, 0.001, 0.03, 0.01, 0.01, 0.01, 0.009]), (2, 1))
    found = search(scores, [[[2, 3], [2, 4]]]).results(3)
    assert found[0].tokens == [2, 4]


def test_the_first_stop_token_stands_for_all() -> None:
    found = search(LIKELY_STOP, [[1]], [8, STOP], length_penalty=0.0).results(1)
    assert found[0].tokens == [1, 8]
    np.testing.assert_allclose(found[0].score, LIKELY_STOP[0, 1] + LIKELY_STOP[0, STOP])


def test_a_search_that_may_stop_early_stops_when_its_pool_is_full() -> None:
    assert search(LIKELY_STOP, [[1]], [STOP], early_stopping=True, num_beams=2).is_done
    assert not search(LIKELY_STOP, [[7, 7, 7, 7]], [STOP], early_stopping=True).is_done
