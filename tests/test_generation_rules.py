"""Uniforms, the rules that change scores, and the draws, without any framework."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_core.config import OPTConfig
from opt_core.generation import ORDER, GenerationConfig, fresh_seed, uniforms
from opt_core.reference import Call, cuts, rules
from opt_core.reference.chain import Line, process
from opt_core.reference.inputs import Floats
from opt_core.reference.setup import settle

#: float32 arithmetic on scores of size 10.
PROCESSOR_TOLERANCE = 5e-6

#: Rules that the reference data have no row of their own for.
NOT_IN_THE_DATA = (
    "vocabulary",
    "diversity_penalty",
    "prefix_allowed_tokens_fn",
    "logits_processor",
)


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


#: How each row of the reference data calls the function of its name. The text is the row's.
CALLS: dict[str, Callable[[Floats, list[int], dict[str, Any]], Floats]] = {
    "temperature": lambda s, _, o: cuts.temperature(s, o["temperature"]),
    "top_k": lambda s, _, o: cuts.top_k(s, o["top_k"], kept(o)),
    "top_p": lambda s, _, o: cuts.top_p(s, o["top_p"], kept(o)),
    "min_p": lambda s, _, o: cuts.min_p(s, o["min_p"], kept(o)),
    "typical_p": lambda s, _, o: cuts.typical_p(s, o["mass"], kept(o)),
    "epsilon_cutoff": lambda s, _, o: cuts.epsilon_cutoff(s, o["epsilon"], kept(o)),
    "eta_cutoff": lambda s, _, o: cuts.eta_cutoff(s, o["epsilon"], kept(o)),
    "renormalize_logits": lambda s, *_: cuts.log_softmax(s),
    "repetition_penalty": lambda s, t, o: rules.repetition_penalty(s, t, o["penalty"]),
    "no_repeat_ngram_size": lambda s, t, o: rules.no_repeat_ngram_size(s, t, o["ngram_size"]),
    "sequence_bias": lambda s, t, o: rules.sequence_bias(s, t, o["sequence_bias"]),
    "remove_invalid_values": lambda s, *_: rules.remove_invalid_values(s),
    "suppress_tokens": lambda s, _, o: rules.suppress_tokens(s, o["suppress_tokens"]),
    "bad_words_ids": lambda s, t, o: ruled(
        s, t, 4, bad_words_ids=o["bad_words_ids"], eos_token_id=o["eos_token_id"]
    ),
    "min_length": lambda s, t, o: ruled(s, t, 4, max_new_tokens=30, **o),
    "min_new_tokens": lambda s, t, o: ruled(
        s, t, o["prompt_length_to_skip"], **without(o, "prompt_length_to_skip")
    ),
    "begin_suppress_tokens": lambda s, t, o: ruled(
        s, t, o["begin_index"], **without(o, "begin_index")
    ),
    "forced_bos_token_id": lambda s, t, o: ruled(
        s, t[:1], 1, forced_bos_token_id=o["bos_token_id"]
    ),
    "forced_eos_token_id": lambda s, t, o: ruled(
        s, t, 4, forced_eos_token_id=o["eos_token_id"], max_length=o["max_length"]
    ),
    "exponential_decay_length_penalty": lambda s, t, o: ruled(
        s, t, o["input_ids_seq_length"], **without(o, "input_ids_seq_length")
    ),
}


def kept(options: dict[str, Any]) -> int:
    return int(options.get("min_tokens_to_keep", 1))


def without(options: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}


def ruled(scores: Floats, text: list[int], prompt: int, **options: Any) -> Floats:
    """Through the only rule that the options ask for, after a prompt of so many tokens."""
    result: Floats = chained(scores[None], [text], prompt, **options)[0][0]
    return result


def chained(
    scores: Floats, texts: list[list[int]], prompt: int, **options: Any
) -> tuple[Floats, Floats]:
    """Scores [R, V] through the whole chain, and how close its cuts were."""
    config = OPTConfig(vocab_size=scores.shape[1], max_position_embeddings=64)
    asked = GenerationConfig(**{"max_new_tokens": 30, **options})
    if asked.max_length:
        asked.max_new_tokens = None
    run = settle(config, {}, [text[:prompt] for text in texts], None, asked, None, Call())
    lines = [Line(row, text[prompt:]) for row, text in enumerate(texts)]
    return process(run, scores, lines)


def test_every_rule_agrees_with_the_reference_data(shared: Path) -> None:
    folder = shared / "reference" / "generation"
    rows = json.loads((folder / "processors.json").read_text())
    single = [row for row in rows if row["name"] != "combined"]
    assert {row["name"] for row in single} == set(CALLS)
    assert {*CALLS, *NOT_IN_THE_DATA} == {*ORDER, "min_length"}
    with np.load(folder / "processors.npz") as arrays:
        texts = arrays["input_ids"].tolist()
        for row in single:
            given = arrays[row["input"]].astype(np.float64)
            call = CALLS[row["name"]]
            result = np.stack(
                [call(s, t, row["kwargs"]) for s, t in zip(given, texts, strict=True)]
            )
            expected = arrays[row["key"]]
            if row["key"] == "p032":
                # Which of equal tokens stays was the sort's whim there; here it is the first.
                result, expected = np.sort(result), np.sort(expected)
            # Where transformers raises a stop token that may not be chosen, it gives NaN.
            expected = np.where(np.isnan(expected), -np.inf, expected)
            np.testing.assert_allclose(
                result, expected, rtol=1e-6, atol=PROCESSOR_TOLERANCE, err_msg=row["key"]
            )


def test_groups_of_beams_agree_with_the_reference_data(shared: Path) -> None:
    with np.load(shared / "reference" / "generation" / "processors.npz") as arrays:
        scores, expected = arrays["hamming_scores"], arrays["hamming_output"]
        # Two texts of four beams in two groups: what the first groups took, and the second's rows.
        taken = arrays["hamming_current_tokens"].reshape(2, 4)[:, :2].repeat(2, axis=0)
    result = [
        rules.diversity_penalty(row, some.tolist(), 0.6)
        for row, some in zip(scores, taken, strict=True)
    ]
    np.testing.assert_allclose(result, expected, atol=PROCESSOR_TOLERANCE)
    assert not np.array_equal(scores, expected)


def test_every_chain_agrees_with_the_reference_data(shared: Path) -> None:
    folder = shared / "reference" / "generation"
    rows = json.loads((folder / "processors.json").read_text())
    combined = [row for row in rows if row["name"] == "combined"]
    assert len(combined) == 8
    with np.load(folder / "processors.npz") as arrays:
        for row in combined:
            scores, texts = arrays[row["input"]].astype(np.float64), arrays["input_ids"].tolist()
            ids = {"eos_token_id": 2, "pad_token_id": None}
            result, _ = chained(scores, texts, row["prompt_length"], **ids, **row["kwargs"])
            np.testing.assert_allclose(
                result, arrays[row["key"]], rtol=0, atol=PROCESSOR_TOLERANCE, err_msg=row["key"]
            )


def process_row(scores: list[float], **options: Any) -> tuple[list[float], float]:
    """One row through a chain with draws, as the second token after the prompt [1, 2]."""
    asked = {"do_sample": True, "top_k": 0, **options}
    found, margins = chained(np.array([scores]), [[1, 2, 0]], 2, **asked)
    return found[0].tolist(), float(margins[0])


def test_stop_tokens_are_suppressed_before_the_best_tokens_are_sought() -> None:
    result, _ = process_row([3.0, 2.0, 1.0], eos_token_id=0, min_new_tokens=2, top_k=1)
    assert result == [-np.inf, 2.0, -np.inf]


def test_a_word_of_the_whole_text_and_one_more_is_biased() -> None:
    text, scores = [1, 2, 0], np.zeros(4)
    whole: list[rules.Bias] = [([1, 2, 0, 3], 2.0), ([3, 1, 2, 0, 3], 9.0), ([2, 3], 9.0)]
    assert rules.sequence_bias(scores, text, whole).tolist() == [0, 0, 0, 2.0]
    assert rules.bad_words_ids(scores, text, [[0, 1]]).tolist() == [0, -np.inf, 0, 0]


def test_a_stop_token_that_may_not_be_chosen_is_not_raised() -> None:
    options: dict[str, Any] = {
        "eos_token_id": [0, 1],
        "suppress_tokens": [0],
        "bad_words_ids": [[0, 1]],
        "exponential_decay_length_penalty": [0, 2.0],
    }
    assert process_row([3.0, 2.0, 1.0], **options)[0] == [-np.inf, -np.inf, 1.0]


def test_the_first_token_is_forced_after_one_real_token_and_the_next_one_suppressed() -> None:
    options: dict[str, Any] = {"forced_bos_token_id": 1, "begin_suppress_tokens": [2]}
    scores = np.array([[1.0, 2.0, 3.0]])
    nowhere = -np.inf
    assert chained(scores, [[0]], 1, **options)[0].tolist() == [[nowhere, 0.0, nowhere]]
    assert chained(scores, [[0, 1]], 1, **options)[0].tolist() == [[1.0, 2.0, nowhere]]
    assert chained(scores, [[0, 1, 1]], 1, **options)[0].tolist() == [[1.0, 2.0, 3.0]]
    assert chained(scores, [[0, 1]], 2, **options)[0].tolist() == [[1.0, 2.0, nowhere]]


def test_an_ngram_of_one_bans_every_token_of_the_text() -> None:
    scores = np.zeros(4)
    assert rules.no_repeat_ngram_size(scores, [1, 3], 1).tolist() == [0, -np.inf, 0, -np.inf]
    assert rules.no_repeat_ngram_size(scores, [1, 1], 2).tolist() == [0, -np.inf, 0, 0]
    assert rules.no_repeat_ngram_size(scores, [1, 3], 4).tolist() == [0, 0, 0, 0]


SCORES = [2.0, 1.0, 0.5, -3.0]
SHARES = np.exp(SCORES) / np.exp(SCORES).sum()
ENTROPY = float(-(SHARES * np.log(SHARES)).sum())


@pytest.mark.parametrize(
    ("options", "stay", "margin"),
    [
        ({"top_k": 2}, 2, 0.5),
        ({"top_k": 4}, 4, np.inf),
        ({"top_p": 0.5}, 1, SHARES[0] - 0.5),
        ({"min_p": 0.3}, 2, SHARES[1] - 0.3 * SHARES[0]),
        ({"temperature": 0.5, "top_k": 2}, 2, 1.0),
        ({"epsilon_cutoff": 0.2}, 2, SHARES[1] - 0.2),
        ({"eta_cutoff": 0.16}, 2, 0.4 * np.exp(-ENTROPY) - SHARES[2]),
        ({"typical_p": 0.15}, 1, -np.log(SHARES[0] * SHARES[1]) - 2 * ENTROPY),
        ({"typical_p": 0.6}, 1, SHARES[0] - 0.6),
        ({"renormalize_logits": True}, 4, np.inf),
        ({}, 4, np.inf),
    ],
)
def test_a_cut_tells_how_close_it_was(options: dict[str, Any], stay: int, margin: float) -> None:
    result, found = process_row(SCORES, **options)
    assert np.isfinite(result).sum() == stay
    assert found > 0
    np.testing.assert_allclose(found, margin, rtol=1e-12)


@given(
    scores=st.lists(st.floats(-6, 6), min_size=3, max_size=8, unique=True),
    options=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0.3, 3),
            "top_k": st.integers(1, 6),
            "top_p": st.floats(0, 0.99),
            "min_p": st.floats(0, 1),
            "typical_p": st.floats(0.01, 0.99),
            "epsilon_cutoff": st.floats(0.01, 0.5),
            "eta_cutoff": st.floats(0.01, 0.5),
        },
    ),
    seed=st.integers(0, 99),
)
def test_a_change_far_below_the_margin_keeps_the_same_tokens(
    scores: list[float], options: dict[str, Any], seed: int
) -> None:
    result, margin = process_row(scores, **options)
    # Ten, because a cut after a temperature below 1 sees larger differences.
    size = min(margin, 1e-3) / 10
    noise = np.random.default_rng(seed).uniform(-size, size, len(scores))
    changed, _ = process_row((np.array(scores) + noise).tolist(), **options)
    np.testing.assert_array_equal(np.isfinite(changed), np.isfinite(result))
    assert np.isfinite(result).any()


# Functions


def test_functions_stand_where_the_order_says() -> None:
    seen = []

    def double(ids: Any, scores: Any) -> Any:
        seen.append((ids.tolist(), scores.tolist()))
        return scores * 2

    def allow(text: int, ids: Any) -> list[int]:
        seen.append((text, ids.tolist()))
        return [0, 2]

    config = OPTConfig(vocab_size=3, max_position_embeddings=64)
    asked = GenerationConfig(do_sample=True, top_k=1, suppress_tokens=[0], forced_eos_token_id=1)
    call = Call(logits_processor=[double], prefix_allowed_tokens_fn=allow)
    run = settle(config, {}, [[1, 2]], [[0, 1]], asked, None, call)
    result, _ = process(run, np.array([[3.0, 2.0, 1.0]]), [Line(0, [2])])
    assert seen == [(0, [1, 2, 2]), ([[1, 2, 2]], [[-np.inf, -np.inf, 1.0]])]
    assert result.tolist() == [[-np.inf, -np.inf, 2.0]]


# Choices


def test_the_best_of_equal_tokens_is_the_first() -> None:
    assert cuts.best(np.array([0.0, 2.0, 2.0])) == (1, 0.0)
    assert cuts.best(np.array([1.0, 0.0, 0.75])) == (0, 0.25)


def test_the_only_token_of_a_vocabulary_has_no_rival() -> None:
    assert cuts.best(np.array([3.0])) == (0, np.inf)


def test_draws_follow_the_distribution_in_token_order() -> None:
    scores = np.log([0.1, 0.0 + 1e-300, 0.4, 0.5])
    tokens = [cuts.draw(scores, uniform)[0] for uniform in (np.arange(1000) + 0.5) / 1000]
    np.testing.assert_array_equal(np.bincount(tokens), [100, 0, 400, 500])
    assert tokens == sorted(tokens)


def test_a_draw_at_either_end_finds_a_possible_token() -> None:
    scores = np.array([-np.inf, 1.0, 2.0, -np.inf])
    found = [cuts.draw(scores, uniform) for uniform in (0.0, 1 - 2.0**-53)]
    assert [token for token, _ in found] == [1, 2]
    edge = 1 / (1 + np.e)
    np.testing.assert_allclose([margin for _, margin in found], [edge, 1 - edge], rtol=1e-12)


def test_a_draw_with_one_possible_token_is_sure() -> None:
    assert cuts.draw(np.array([-np.inf, 1.0]), 0.5) == (1, np.inf)
