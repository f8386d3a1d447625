"""The best of many and draws from many in TensorFlow: of equals the first, compiled or not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from opt_core.reference.beams import drawn, top
from opt_tf.generation.cuts import best, draw_several

#: Few rows, and many values of which many are equal.
ROWS, BEAMS, V = 2, 3, 500
COUNTS = (1, 6, 40)


def scores(seed: int) -> Any:
    random = np.random.default_rng(seed)
    values = random.integers(-40, 0, (ROWS, BEAMS, V)) / 8.0
    values[random.random(values.shape) < 0.3] = -np.inf
    return values


@pytest.fixture(params=[True, False], ids=["compiled", "plain"])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    def called(function: Callable[..., Any], *given: Any) -> Any:
        return tf.function(function, jit_compile=request.param, autograph=False)(*given)

    return called


@pytest.mark.parametrize("kind", [np.float64, np.float32])
@pytest.mark.parametrize("count", COUNTS)
def test_of_equals_the_first_is_the_better(run: Any, kind: Any, count: int) -> None:
    values = scores(0).astype(kind)
    flat = tf.constant(values.reshape(ROWS, -1))
    found, places = run(lambda x: best(x, count), flat)
    for row, sums in enumerate(values.astype(np.float64)):
        right = top(sums, count)
        np.testing.assert_array_equal(found[row], [one.score for one in right])
        np.testing.assert_array_equal(places[row], [one.beam * V + one.token for one in right])


def test_draws_take_nothing_twice(run: Any) -> None:
    sums, M = scores(1), 8
    uniforms = np.random.default_rng(2).random((ROWS, M))
    found, places = run(draw_several, tf.constant(sums.reshape(ROWS, -1)), tf.constant(uniforms))
    for row in range(ROWS):
        right = drawn(sums[row], uniforms[row])
        np.testing.assert_array_equal(found[row], [one.score for one in right])
        np.testing.assert_array_equal(places[row], [one.beam * V + one.token for one in right])
        assert len(set(places[row].numpy())) == M


def test_where_nothing_is_left_a_draw_is_none(run: Any) -> None:
    sums = np.full((1, 90), -np.inf)
    sums[0, [7, 40]] = -1.0, -2.0
    uniforms = tf.constant([[0.99, 0.0, 0.5]], tf.float64)
    found, places = run(draw_several, tf.constant(sums), uniforms)
    np.testing.assert_array_equal(found, [[-1.0, -2.0, -np.inf]])
    np.testing.assert_array_equal(places[:, :2], [[7, 40]])
    nothing, _ = run(draw_several, tf.constant(np.full((1, 90), -np.inf)), uniforms)
    assert np.isneginf(nothing).all()
