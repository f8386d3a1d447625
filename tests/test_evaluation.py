"""The figures of a text: every token counts once, in float64, whoever computes the scores."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from opt_core.evaluation import Window, evaluate, windows

V = 7


def scores(ids: NDArray[np.int64]) -> NDArray[Any]:
    """Scores that depend on the token and on its place in the window."""
    places = np.arange(ids.shape[1])[None, :, None]
    return np.asarray(np.sin(ids[..., None] * 1.3 + places * 0.7 + np.arange(V) * 2.1))


def log_probability(ids: list[int], place: int, start: int) -> float:
    """Of the token at `place`, in a window from `start` on."""
    row = scores(np.array([ids[start:]]))[0, place - start - 1]
    return float(row[ids[place]] - np.log(np.exp(row).sum()))


@given(st.integers(1, 60), st.integers(2, 12), st.data())
def test_every_token_but_the_first_counts_once(length: int, window: int, data: Any) -> None:
    stride = data.draw(st.integers(1, window - 1))
    cuts = list(windows(length, window=window, stride=stride))
    counted = [place for _, end, scored in cuts for place in range(end - scored, end)]
    assert counted == list(range(1, length))
    for start, end, scored in cuts:
        assert end - start <= window
        assert end - scored > start


def test_a_token_counts_in_the_first_window_that_holds_it() -> None:
    assert list(windows(10, window=6, stride=2)) == [
        Window(0, 6, 5),
        Window(2, 8, 2),
        Window(4, 10, 2),
    ]
    assert list(windows(3, window=6, stride=2)) == [Window(0, 3, 2)]


@pytest.mark.parametrize(("window", "stride"), [(4, 4), (4, 5), (4, 0), (4, -1), (1, 1)])
def test_a_stride_that_leaves_tokens_out_is_refused(window: int, stride: int) -> None:
    said = f"stride is {stride} and window {window}; the stride must be at least 1 and below"
    with pytest.raises(ValueError, match=said):
        list(windows(9, window=window, stride=stride))


def test_the_figures_are_those_of_the_definition() -> None:
    ids, text = [2, 5, 1, 6, 0, 3, 4, 2], "größer"
    cuts = list(windows(len(ids), window=4, stride=2))
    result = evaluate(text, ids, scores, cuts)
    starts = {1: 0, 2: 0, 3: 0, 4: 2, 5: 2, 6: 4, 7: 4}
    total = sum(log_probability(ids, place, start) for place, start in starts.items())
    assert result.log_likelihood == pytest.approx(total, rel=1e-14)
    assert (result.tokens, result.characters, result.size_bytes, result.windows) == (7, 6, 8, 3)
    assert result.nats_per_token == pytest.approx(-total / 7, rel=1e-14)
    assert result.perplexity == pytest.approx(np.exp(-total / 7), rel=1e-14)
    assert result.bits_per_character == pytest.approx(-total / np.log(2) / 6, rel=1e-14)
    assert result.bits_per_byte == pytest.approx(-total / np.log(2) / 8, rel=1e-14)


def test_equal_scores_give_the_size_of_the_vocabulary() -> None:
    cuts = windows(600, window=500, stride=400)
    result = evaluate("x", [3] * 600, lambda ids: np.zeros((*ids.shape, V), np.float16), cuts)
    assert result.tokens == 599
    assert result.perplexity == pytest.approx(V, rel=1e-12)


def test_the_sum_is_taken_in_float64_whatever_the_scores_are_in() -> None:
    ids = list(np.random.default_rng(0).integers(0, V, 3000))
    cuts = list(windows(len(ids), window=1000, stride=500))
    exact = evaluate("x", ids, lambda ids: scores(ids) + 500, cuts)
    single = evaluate("x", ids, lambda ids: (scores(ids) + 500).astype(np.float32), cuts)
    assert single.log_likelihood == pytest.approx(exact.log_likelihood, rel=2e-5)
    assert exact.log_likelihood == pytest.approx(
        evaluate("x", ids, scores, cuts).log_likelihood, rel=1e-12
    )


def test_impossible_tokens_make_the_perplexity_infinite_and_nan_is_refused() -> None:
    def impossible(ids: NDArray[np.int64]) -> NDArray[Any]:
        return np.where(np.arange(V) == 3, -np.inf, scores(ids))

    cuts = list(windows(3, window=3, stride=1))
    assert evaluate("x", [2, 3, 4], impossible, cuts).perplexity == np.inf
    hopeless = evaluate("x", [2, 3, 4], lambda ids: scores(ids) * 1e5, cuts)
    assert np.isfinite(hopeless.nats_per_token)
    assert hopeless.perplexity == np.inf
    with pytest.raises(ValueError, match="the scores are NaN; do the weights hold NaN or inf"):
        evaluate("x", [2, 3, 4], lambda ids: scores(ids) * np.nan, cuts)


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="the text holds no token to score; give one that is not"):
        evaluate("", [2], scores, windows(1, window=3, stride=1))
