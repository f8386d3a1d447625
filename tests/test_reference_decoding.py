"""Decoding by the NumPy reference: the data of transformers, and greedy choice and draws."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion import open_checkpoint
from opt_core import reference
from opt_core.config import OPTConfig
from opt_core.generation import GenerationConfig, uniforms
from opt_core.reference.cuts import softmax
from opt_core.reference.inputs import Floats
from opt_core.weights import Head, table
from tests.data import searches

#: Far above float64 rounding of scores of size 5; a draw this sure is the same in any batch.
SURE = 1e-9

CONFIG = OPTConfig(
    vocab_size=23,
    hidden_size=8,
    num_hidden_layers=2,
    ffn_dim=12,
    num_attention_heads=2,
    max_position_embeddings=20,
)
PROMPTS = [[2, 5, 6, 7, 8], [2, 9], [11]]
SAMPLING = GenerationConfig(
    do_sample=True, top_k=12, top_p=0.95, temperature=1.3, seed=[3, 4, 5], pad_token_id=1
)


def weights_of(config: OPTConfig = CONFIG) -> dict[str, Floats]:
    random = np.random.default_rng(7)
    rows = table(config, Head.CAUSAL_LM)
    return {name: random.normal(row.mean, 0.4, row.shape) for name, row in rows.items()}


WEIGHTS = weights_of()


def generate(prompts: Any, mask: Any = None, **options: Any) -> reference.Generated:
    generation = GenerationConfig(pad_token_id=1).merged(**options)
    return reference.generate_with_margins(CONFIG, WEIGHTS, prompts, mask, generation)


def padded(prompts: list[list[int]], width: int, left: bool) -> tuple[Any, Any]:
    ids, mask = np.ones((2, len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if left else slice(len(prompt))
        mask[row] = 0
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


# Data of transformers


@pytest.fixture(scope="module")
def data(shared: Path) -> Any:
    return json.loads((shared / "reference/generation/sequences.json").read_text())


@pytest.fixture(scope="module")
def models(shared: Path) -> dict[str, tuple[OPTConfig, Any]]:
    folders = {name: shared / "reference/generation" / name for name in ("model", "assistant")}
    return {
        name: (
            OPTConfig.from_json_file(folder / "config.json"),
            {k: t.read() for k, t in open_checkpoint(folder).tensors.items()},
        )
        for name, folder in folders.items()
    }


def filled(sequences: list[list[int]], width: int) -> list[list[int]]:
    return [row + [1] * (width - len(row)) for row in sequences]


@pytest.mark.filterwarnings("ignore:max_length changes nothing")
@pytest.mark.parametrize("place", range(72))
def test_the_reference_data_come_out_whole(
    shared: Path, data: Any, models: dict[str, tuple[OPTConfig, Any]], place: int
) -> None:
    assert len(data["entries"]) == 72
    entry = data["entries"][place]
    options = dict(entry["kwargs"])
    call = reference.Call(
        assistant=models["assistant"] if options.pop("assistant", False) else None
    )
    asked = GenerationConfig.from_pretrained(shared / "reference/generation/model")
    inputs = data["inputs"][entry["inputs"]]
    found = reference.record(
        *models["model"],
        inputs["input_ids"],
        inputs.get("attention_mask"),
        asked.merged(**options),
        call=call,
    )
    width = found.sequences.shape[1]
    assert found.sequences.tolist() == filled(entry["sequences"], width)
    if found.sequences_scores is not None:
        np.testing.assert_allclose(found.sequences_scores, entry["sequences_scores"], atol=5e-6)
    if entry["name"].startswith("beam"):
        assert found.beam_indices is not None
        assert found.beam_indices.tolist() == entry["beam_indices"]


@pytest.mark.parametrize("entry", json.loads(searches.FILE.read_text()), ids=lambda e: e["name"])
def test_transformers_finds_the_same_by_other_options(entry: dict[str, Any]) -> None:
    asked = GenerationConfig(bos_token_id=2, pad_token_id=1).merged(**entry["options"])
    prompt = searches.PROMPTS[entry["prompt"]]
    found = reference.record(searches.config(), searches.weights(), prompt, None, asked)
    assert found.sequences.tolist() == filled(entry["sequences"], found.sequences.shape[1])
    if "scores" in entry:
        assert found.sequences_scores is not None
        np.testing.assert_allclose(found.sequences_scores, entry["scores"], atol=2e-5)


@pytest.mark.filterwarnings("ignore:max_length changes nothing")
def test_margins_of_greedy_choice_are_those_of_the_reference_data(
    shared: Path, data: Any, models: dict[str, tuple[OPTConfig, Any]]
) -> None:
    checked = [e for e in data["entries"] if "smallest_gap_to_second" in e]
    assert len(checked) > 30
    for entry in checked:
        asked = GenerationConfig.from_pretrained(shared / "reference/generation/model")
        inputs = data["inputs"][entry["inputs"]]
        found = reference.generate_with_margins(
            *models["model"],
            inputs["input_ids"],
            inputs.get("attention_mask"),
            asked.merged(**entry["kwargs"]),
        )
        gap = entry["smallest_gap_to_second"]
        np.testing.assert_allclose(
            found.margins.min(), float(gap), atol=1e-5, err_msg=entry["name"]
        )


# Batches and draws


@given(left=st.booleans(), width=st.integers(5, 9), samples=st.booleans())
def test_padding_on_either_side_changes_no_rows_tokens(
    left: bool, width: int, samples: bool
) -> None:
    base = SAMPLING if samples else GenerationConfig(pad_token_id=1, repetition_penalty=1.3)
    ids, mask = padded(PROMPTS, width, left)
    together = reference.generate_with_margins(
        CONFIG, WEIGHTS, ids, mask, base.merged(max_new_tokens=9)
    )
    assert together.margins.min() > SURE
    for row, prompt in enumerate(PROMPTS):
        seed = [3 + row] if samples else None
        alone = reference.generate(
            CONFIG, WEIGHTS, [prompt], None, base.merged(max_new_tokens=9, seed=seed)
        )
        np.testing.assert_array_equal(together.sequences[row, width:], alone[0, len(prompt) :])


def test_new_tokens_follow_the_prompt_as_it_was_given() -> None:
    ids, mask = padded(PROMPTS, 6, left=False)
    found = generate(ids, mask, max_new_tokens=4)
    assert found.sequences.dtype == np.int64
    assert found.sequences.shape == (3, 10)
    np.testing.assert_array_equal(found.sequences[:, :6], ids)


def test_the_pad_id_marks_padding_when_there_is_no_mask() -> None:
    ids, mask = padded(PROMPTS, 6, left=True)
    np.testing.assert_array_equal(
        generate(ids, max_new_tokens=4).sequences, generate(ids, mask, max_new_tokens=4).sequences
    )


def test_the_pad_id_is_a_token_like_others_when_it_also_stops() -> None:
    ids = np.array([[2, 1, 5]])
    found = generate(ids, max_new_tokens=4, pad_token_id=1, eos_token_id=[1])
    expected = generate(ids, np.ones_like(ids), max_new_tokens=4, eos_token_id=[1])
    np.testing.assert_array_equal(found.sequences, expected.sequences)


def test_rows_that_stop_are_filled_and_the_last_to_stop_ends_the_text() -> None:
    ids, mask = padded(PROMPTS, 5, left=True)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "seed": 3}
    free = generate(ids, mask, **options).sequences[:, 5:]
    stops = free[np.arange(3), [1, 6, 3]].tolist()
    counts = [next(i for i, t in enumerate(row) if t in stops) + 1 for row in free.tolist()]
    assert len(set(counts)) > 1
    found = generate(ids, mask, eos_token_id=stops, **options)
    assert found.sequences.shape[1] == 5 + max(counts)
    for row, count in enumerate(counts):
        np.testing.assert_array_equal(found.sequences[row, 5 : 5 + count], free[row, :count])
        assert (found.sequences[row, 5 + count :] == 1).all()
        assert np.isfinite(found.margins[row, :count]).all()
        assert np.isinf(found.margins[row, count:]).all()


def test_a_minimum_keeps_stop_tokens_away_for_so_long() -> None:
    stop = int(generate(PROMPTS[:1], max_new_tokens=1).sequences[0, -1])
    found = generate(PROMPTS[:1], max_new_tokens=6, min_new_tokens=3, eos_token_id=stop)
    assert stop not in found.sequences[0, 5:8]


def test_each_draw_is_the_inverse_of_the_cumulative_distribution_at_its_uniform() -> None:
    found = generate(PROMPTS[:1], do_sample=True, top_k=0, seed=11, max_new_tokens=8)
    assert found.margins.min() > SURE
    logits = reference.causal_lm(CONFIG, WEIGHTS, input_ids=found.sequences).logits[0, 4:-1]
    cumulative = np.stack([softmax(row) for row in logits]).cumsum(axis=1)
    for step, uniform in enumerate(uniforms(11, 1, 8)[0, :, 0]):
        expected = np.searchsorted(cumulative[step], uniform, side="right")
        assert found.sequences[0, 5 + step] == expected


def test_a_longer_plan_begins_with_the_same_tokens() -> None:
    options = {"do_sample": True, "seed": 5}
    short = generate(PROMPTS[:1], max_new_tokens=4, **options).sequences
    long = generate(PROMPTS[:1], max_new_tokens=9, **options).sequences
    np.testing.assert_array_equal(long[:, : short.shape[1]], short)


def test_every_sequence_of_a_prompt_has_its_own_draws() -> None:
    found = generate(
        PROMPTS[:1] * 2, do_sample=True, seed=5, num_return_sequences=3, max_new_tokens=9
    )
    rows = {tuple(row) for row in found.sequences.tolist()}
    assert (found.sequences.shape, len(rows)) == ((6, 14), 6)
    first = generate(PROMPTS[:1], do_sample=True, seed=5, max_new_tokens=9)
    np.testing.assert_array_equal(found.sequences[0], first.sequences[0])


def test_without_a_seed_samples_differ() -> None:
    options = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 12}
    first, second = (generate(PROMPTS[:1], **options).sequences for _ in range(2))
    assert not np.array_equal(first, second)


def test_without_options_the_models_own_token_ids_count() -> None:
    found = reference.generate(CONFIG, WEIGHTS, PROMPTS[:1])
    expected = generate(PROMPTS[:1], eos_token_id=2)
    np.testing.assert_array_equal(found, expected.sequences)


def test_an_untied_head_is_used() -> None:
    config = CONFIG.replace(tie_word_embeddings=False)
    weights = weights_of(config)
    logits = reference.causal_lm(config, weights, input_ids=PROMPTS[:1]).logits
    found = reference.generate(
        config, weights, PROMPTS[:1], None, GenerationConfig(max_new_tokens=1)
    )
    assert found[0, -1] == logits[0, -1].argmax()


def test_scores_that_are_no_numbers_are_refused() -> None:
    name = "model.decoder.final_layer_norm.bias"
    broken = {**WEIGHTS, name: np.full_like(WEIGHTS[name], np.nan)}
    with pytest.raises(ValueError, match="the scores are NaN after 5 tokens"):
        reference.generate(CONFIG, broken, PROMPTS[:1])


def test_what_cannot_be_planned_is_refused_before_anything_is_computed() -> None:
    with pytest.raises(ValueError, match=r"max_new_tokens is 16: together 21, but .* is 20"):
        reference.generate(CONFIG, {}, PROMPTS[:1], None, GenerationConfig(max_new_tokens=16))
    with pytest.raises(ValueError, match="row 1 of the prompt has no token to continue"):
        reference.generate(CONFIG, {}, [[2, 5], [1, 1]], [[1, 1], [0, 0]])
    with pytest.raises(ValueError, match="seed lists 2 seeds for 1 rows"):
        reference.generate(CONFIG, WEIGHTS, PROMPTS[:1], None, GenerationConfig(seed=[1, 2]))
