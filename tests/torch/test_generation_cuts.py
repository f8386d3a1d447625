"""Cuts and draws in PyTorch over vocabularies that are not tiny, against the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opt_core.reference import beams as reference_beams
from opt_core.reference import cuts as reference_cuts
from opt_torch.generation import cuts
from opt_torch.generation.rules import Prompt, Seen

V = 3000
NOTHING = torch.zeros(2, 1, dtype=torch.long)
SEEN = Seen(NOTHING, Prompt(NOTHING, NOTHING, NOTHING, None))


def scores(spread: float, seed: int = 0, rows: int = 2) -> torch.Tensor:
    values = np.random.default_rng(seed).normal(0, spread, (rows, V))
    return torch.from_numpy(values)


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0], ids=["flat", "mixed", "peaked"])
@pytest.mark.parametrize("mass", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kept", [1, 3])
def test_top_p_keeps_the_tokens_of_the_reference(spread: float, mass: float, kept: int) -> None:
    given_scores = scores(spread)
    found = cuts.top_p(given_scores, SEEN, mass, kept)
    right = [reference_cuts.top_p(row, mass, kept) for row in given_scores.numpy()]
    np.testing.assert_array_equal(found.numpy(), right)


@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 2.0, -torch.inf]), min_size=2, max_size=30),
    count=st.integers(1, 32),
)
def test_of_equals_the_lowest_place_is_best(values: list[float], count: int) -> None:
    row = torch.tensor([values])
    found, places = cuts.best(row, count)
    order = sorted(range(len(values)), key=lambda place: (-values[place], place))[:count]
    assert found[0].tolist() == [values[place] for place in order]
    real = [place for place in order if values[place] > -torch.inf]
    assert places[0].tolist()[: len(real)] == real


@pytest.mark.parametrize("width", [V, V + 31, 63])
@pytest.mark.parametrize("digits", [0, 8], ids=["many equals", "few equals"])
def test_the_best_of_long_rows_are_found(width: int, digits: int) -> None:
    rows = torch.from_numpy(np.random.default_rng(2).normal(0, 2, (3, width)).round(digits))
    rows[1, ::2] = -torch.inf
    for count in (2, 9):
        found, places = cuts.best(rows, count)
        right = rows.sort(dim=1, descending=True, stable=True)
        torch.testing.assert_close(found, right.values[:, :count], rtol=0, atol=0)
        torch.testing.assert_close(places, right.indices[:, :count], rtol=0, atol=0)


@pytest.mark.parametrize("left", [V, 6, 2])
def test_draws_without_replacement_are_those_of_the_reference(left: int) -> None:
    sums = scores(1.0, seed=3)
    sums[:, left:] = -torch.inf
    uniforms = torch.from_numpy(np.random.default_rng(1).random((2, 5)))
    places, are_real = cuts.draw_several(sums, uniforms)
    for row in range(2):
        right = reference_beams.drawn(sums[row : row + 1].numpy(), uniforms[row].numpy())
        found = [place for place, real in zip(places[row], are_real[row], strict=True) if real]
        assert sorted(int(place) for place in found) == sorted(one.token for one in right)
        assert len(found) == min(left, 5)


def test_nothing_is_drawn_where_nothing_is_left() -> None:
    nothing = torch.full((1, V), -torch.inf, dtype=torch.float64)
    _, are_real = cuts.draw_several(nothing, torch.full((1, 3), 0.5, dtype=torch.float64))
    assert not are_real.any()
