"""Uniforms, the rules that change scores, and the draws, without any framework."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core.generation import GenerationConfig, fresh_seed, uniforms
from opt_core.reference import rules
from opt_core.reference.decoding import seen_tokens
from opt_core.reference.inputs import Floats

#: float32 arithmetic on scores of size 10.
PROCESSOR_TOLERANCE = 5e-6


# Uniforms


def test_a_uniform_depends_on_seed_row_step_and_draw_alone() -> None:
    small, large = uniforms(5, 2, 3), uniforms(5, 4, 9, draws=3)
    np.testing.assert_array_equal(small, large[:2, :3, :1])
    assert len(np.unique(large)) == large.size


def test_uniforms_lie_in_the_unit_interval_and_fill_it() -> None:
    values = uniforms(0, 4, 2500, draws=2)
    assert values.dtype == np.float64
    assert values.min() >= 0
    assert values.max() < 1
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    assert abs(counts / values.size - 0.1).max() < 0.01


def test_a_list_of_seeds_gives_each_row_its_own_stream_at_any_place() -> None:
    both = uniforms([9, 4], 2, 6)
    np.testing.assert_array_equal(both[0], uniforms(9, 1, 6)[0])
    np.testing.assert_array_equal(both[1], uniforms([4, 9], 2, 6)[0])


def test_the_stream_of_a_seed_is_pinned() -> None:
    expected = [0.9342820204007575, 0.07916148013208679, 0.3828279896411555]
    np.testing.assert_array_equal(uniforms(3, 1, 3)[0, :, 0], expected)


def test_without_a_seed_draws_are_fresh_and_no_global_generator_is_touched() -> None:
    before = pickle.dumps(np.random.get_state())
    assert not np.array_equal(uniforms(None, 1, 4), uniforms(None, 1, 4))
    assert fresh_seed() != fresh_seed()
    assert pickle.dumps(np.random.get_state()) == before


def test_seeds_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="seed lists 2 seeds for 3 rows"):
        uniforms([1, 2], 3, 1)
    with pytest.raises(
        ValueError, match=r"seed is -1; it must be a whole number from 0 to 2\*\*64"
    ):
        uniforms(-1, 1, 1)
    assert uniforms(2**64 - 1, 1, 1).shape == (1, 1, 1)


# Rules


def test_the_active_rules_come_in_the_order_of_transformers() -> None:
    generation = GenerationConfig(
        do_sample=True,
        min_p=0.1,
        top_p=0.9,
        temperature=0.7,
        min_length=3,
        repetition_penalty=1.2,
        eos_token_id=2,
    )
    assert generation.rules == (
        "repetition_penalty",
        "min_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
    )


def test_without_sampling_and_stop_tokens_few_rules_are_active() -> None:
    generation = GenerationConfig(
        min_p=0.1, top_p=0.9, temperature=0.7, min_length=3, repetition_penalty=1.2
    )
    assert generation.rules == ("repetition_penalty",)


def processed(row: dict[str, Any], arrays: Any) -> Any:
    scores, options = arrays[row["input"]].astype(np.float64), row["kwargs"]
    keep = options.get("min_tokens_to_keep", 1)
    ids = arrays["input_ids"]
    match row["name"]:
        case "temperature":
            return rules.temperature(scores, options["temperature"])
        case "top_k":
            return rules.top_k(scores, options["top_k"], keep)
        case "top_p":
            return rules.top_p(scores, options["top_p"], keep)
        case "min_p":
            return rules.min_p(scores, options["min_p"], keep)
        case "repetition_penalty":
            seen = seen_tokens(ids, np.ones(ids.shape, np.bool_), scores.shape[1])
            return rules.repetition_penalty(scores, seen, options["penalty"])
        case "min_length" | "min_new_tokens":
            least = options.get("min_length", options.get("min_new_tokens"))
            length = ids.shape[1] - options.get("prompt_length_to_skip", 0)
            return rules.suppress(scores, options["eos_token_id"]) if length < least else scores
    return None


def test_every_rule_agrees_with_the_reference_data(shared: Path) -> None:
    folder = shared / "reference" / "generation"
    checked = set()
    with np.load(folder / "processors.npz") as arrays:
        for row in json.loads((folder / "processors.json").read_text()):
            result = processed(row, arrays)
            if result is None:
                continue
            checked.add(row["name"])
            expected = arrays[row["key"]]
            if row["key"] == "p032":
                # Which of equal tokens stays was the sort's whim there; here it is the first.
                result, expected = np.sort(result), np.sort(expected)
            np.testing.assert_allclose(
                result, expected, rtol=0, atol=PROCESSOR_TOLERANCE, err_msg=row["key"]
            )
    assert len(checked) == 7


@pytest.mark.parametrize("key", ["c00", "c01", "c07"])
def test_a_whole_chain_agrees_with_the_reference_data(shared: Path, key: str) -> None:
    folder = shared / "reference" / "generation"
    rows = json.loads((folder / "processors.json").read_text())
    options = next(row for row in rows if row["key"] == key)["kwargs"]
    with np.load(folder / "processors.npz") as arrays:
        scores, ids, expected = (arrays[n] for n in ("scores", "input_ids", key))
    seen = seen_tokens(ids, np.ones(ids.shape, np.bool_), scores.shape[1])
    result, _ = rules.process(
        GenerationConfig(**options),
        scores.astype(np.float64),
        seen=seen,
        suppresses_stops=False,
    )
    np.testing.assert_allclose(result, expected, rtol=0, atol=PROCESSOR_TOLERANCE)


def process(scores: list[list[float]], **options: Any) -> tuple[Floats, Floats]:
    array = np.array(scores)
    generation = GenerationConfig(do_sample=True, **{"top_k": 0, **options})
    return rules.process(
        generation, array, seen=np.zeros(array.shape, np.bool_), suppresses_stops=True
    )


def test_stop_tokens_are_suppressed_before_the_best_tokens_are_sought() -> None:
    result, _ = process([[3.0, 2.0, 1.0]], eos_token_id=0, min_new_tokens=1, top_k=1)
    np.testing.assert_array_equal(result, [[-np.inf, 2.0, -np.inf]])


@pytest.mark.parametrize(
    ("options", "margin"),
    [
        ({"top_k": 2}, 0.5),
        ({"top_k": 4}, np.inf),
        ({"top_p": 0.5}, np.exp(2.0) / np.exp([2.0, 1.0, 0.5, -3.0]).sum() - 0.5),
        ({"min_p": 0.3}, (np.exp(1.0) - 0.3 * np.exp(2.0)) / np.exp([2.0, 1.0, 0.5, -3.0]).sum()),
        ({"temperature": 0.5, "top_k": 2}, 1.0),
        ({}, np.inf),
    ],
)
def test_a_cut_tells_how_close_it_was(options: dict[str, Any], margin: float) -> None:
    _, margins = process([[2.0, 1.0, 0.5, -3.0]], **options)
    np.testing.assert_allclose(margins, [margin], rtol=1e-12)


# Choices


def test_the_best_of_equal_tokens_is_the_first() -> None:
    tokens, leads = rules.best(np.array([[0.0, 2.0, 2.0], [1.0, 0.0, 0.75]]))
    np.testing.assert_array_equal(tokens, [1, 0])
    np.testing.assert_array_equal(leads, [0.0, 0.25])


def test_the_only_token_of_a_vocabulary_has_no_rival() -> None:
    tokens, leads = rules.best(np.array([[3.0]]))
    assert (tokens[0], leads[0]) == (0, np.inf)


def test_draws_follow_the_distribution_in_token_order() -> None:
    scores = np.log([[0.1, 0.0 + 1e-300, 0.4, 0.5]])
    grid = (np.arange(1000) + 0.5) / 1000
    tokens, _ = rules.draw(np.repeat(scores, 1000, axis=0), grid)
    np.testing.assert_array_equal(np.bincount(tokens), [100, 0, 400, 500])
    assert (np.diff(tokens) >= 0).all()


def test_a_draw_at_either_end_finds_a_possible_token() -> None:
    scores = np.array([[-np.inf, 1.0, 2.0, -np.inf]] * 2)
    tokens, margins = rules.draw(scores, np.array([0.0, 1 - 2.0**-53]))
    np.testing.assert_array_equal(tokens, [1, 2])
    edge = 1 / (1 + np.e)
    np.testing.assert_allclose(margins, [edge, 1 - edge], rtol=1e-12)


def test_a_draw_with_one_possible_token_is_sure() -> None:
    tokens, margins = rules.draw(np.array([[-np.inf, 1.0]]), np.array([0.5]))
    assert (tokens[0], margins[0]) == (1, np.inf)
