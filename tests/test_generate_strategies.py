"""Every strategy gives the reference's tokens, under every group of rules and any padding."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from opt_core.weights import Head
from tests.cases import random_weights, tiny, words
from tests.strategies import COLUMNS, MORE_PAIRS, NEW, PAIRS, ROWS, RULES, STOPS, STRATEGIES, ragged
from tests.subject import STD, Subject
from tests.wings import Wing

#: The largest difference of a beam's score between float32 and the reference.
SCORE_ERROR = 1e-4


@pytest.fixture(scope="module")
def subject(wing: Wing) -> Subject:
    return Subject(wing)


@pytest.fixture(scope="module")
def light(wing: Wing) -> Subject:
    return Subject(wing, lightly=True)


@pytest.fixture(scope="module")
def assistant(wing: Wing) -> Subject:
    """A smaller model of the same vocabulary."""
    return Subject(wing, seed=1, num_hidden_layers=1)


@pytest.mark.parametrize(
    ("strategy", "rules"),
    [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.deep) for pair in MORE_PAIRS)],
)
@settings(max_examples=max(6, settings().max_examples // 2))
@given(data=st.data())
def test_tokens_are_those_of_the_reference(
    subject: Subject, assistant: Subject, strategy: str, rules: str, data: st.DataObject
) -> None:
    batch = data.draw(ragged())
    options = {
        "max_new_tokens": NEW,
        "eos_token_id": STOPS,
        **data.draw(STRATEGIES[strategy]),
        **data.draw(RULES[rules]),
    }
    models = {"assistant_model": assistant.model} if options.pop("assistant_model", None) else {}
    right = subject.record(batch.ids, batch.mask, **options)
    if right is None:
        reject()
    found = subject.generate(
        batch.ids, batch.mask, return_dict_in_generate=True, **options, **models
    )
    np.testing.assert_array_equal(found.sequences, right.sequences)
    if right.sequences_scores is not None:
        np.testing.assert_allclose(
            found.sequences_scores, right.sequences_scores, rtol=0, atol=SCORE_ERROR
        )
        np.testing.assert_array_equal(found.beam_indices, right.beam_indices)


# Drafts

IDS = words(ROWS, COLUMNS)


@pytest.mark.parametrize("sampled", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_drafts_of_any_assistant_change_no_token(
    light: Subject, assistant: Subject, sampled: bool
) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None}
    options |= {"do_sample": True, "seed": [4, 5, 6], "top_k": 10} if sampled else {}
    plain = light.right(IDS, **options)
    for drafting in (assistant.model, light.model):
        found = light.generate(IDS, assistant_model=drafting, num_assistant_tokens=3, **options)
        np.testing.assert_array_equal(found, plain)


def test_an_assistant_of_another_vocabulary_is_refused(light: Subject, wing: Wing) -> None:
    other = Subject(wing, vocab_size=41)
    with pytest.raises(ValueError, match="assistant_model has a vocabulary of 41, the model one"):
        light.generate(IDS, assistant_model=other.model)
    with pytest.raises(ValueError, match=r"drafts for greedy choice .* ask for beams"):
        light.generate(IDS, assistant_model=light.model, num_beams=2)


def test_an_assistant_is_left_as_it_was(light: Subject, assistant: Subject) -> None:
    before = assistant.model.generation_config.to_dict()
    light.generate(IDS[:1], assistant_model=assistant.model, max_new_tokens=NEW, eos_token_id=7)
    assert assistant.model.generation_config.to_dict() == before


# Seeds


@pytest.mark.parametrize(
    "strategy",
    [
        {"do_sample": True},
        {"do_sample": True, "num_beams": 3},
        {"do_sample": True, "prompt_lookup_num_tokens": 3},
    ],
    ids=["sampling", "beam sampling", "lookup"],
)
def test_each_text_has_its_own_seed_wherever_it_stands(
    light: Subject, strategy: dict[str, Any]
) -> None:
    """Beam sampling takes one for each text, not for each beam."""
    options = {"max_new_tokens": NEW, "eos_token_id": STOPS, "pad_token_id": 1, **strategy}
    one = light.generate(IDS, seed=[7, 8, 9], **options)
    np.testing.assert_array_equal(light.generate(IDS, seed=[7, 8, 9], **options), one)
    other = light.generate(IDS[::-1], seed=[9, 8, 7], **options)
    np.testing.assert_array_equal(other, one[::-1])
    same = light.generate(IDS[[0, 0, 0]], seed=[7, 7, 7], **options)
    np.testing.assert_array_equal(same, np.repeat(same[:1], 3, axis=0))
    np.testing.assert_array_equal(same[0, : one.shape[1]], one[0, : same.shape[1]])


# Faults


@pytest.mark.parametrize(
    "strategy",
    [
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True},
        {"num_beams": 3, "force_words_ids": [[7]]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prompt_lookup_num_tokens": 3},
        {"guidance_scale": 2.0},
        {"repetition_penalty": 1.5},
    ],
    ids=lambda options: " ".join(options),
)
def test_scores_that_are_not_numbers_are_an_error(broken: Subject, strategy: Any) -> None:
    with pytest.raises(ValueError, match=r"scores are NaN after \d+ tokens; do the weights hold"):
        broken.generate(IDS, max_new_tokens=NEW, **strategy)


def test_scores_that_are_not_numbers_may_be_taken_as_0(broken: Subject) -> None:
    found = broken.generate(IDS, max_new_tokens=2, remove_invalid_values=True, eos_token_id=None)
    np.testing.assert_array_equal(found[:, COLUMNS:], 0)


@pytest.fixture(scope="module")
def broken(wing: Wing) -> Subject:
    """A model that computes nothing but NaN."""
    subject = Subject(wing, lightly=True)
    weights = random_weights(tiny(), Head.CAUSAL_LM, std=STD)
    weights["model.decoder.layers.1.fc2.bias"][:] = np.nan
    subject.model = wing.build(Head.CAUSAL_LM, tiny(), weights)
    return subject


def test_a_text_for_which_every_token_is_forbidden_is_an_error(light: Subject) -> None:
    with pytest.raises(ValueError, match=r"no token may be chosen after \d+ tokens"):
        light.generate(IDS, max_new_tokens=2, suppress_tokens=list(range(40)))


def test_options_that_contradict_each_other_are_refused(light: Subject) -> None:
    with pytest.raises(ValueError, match="num_beams is 3, which 2 groups"):
        light.generate(IDS, num_beams=3, num_beam_groups=2, diversity_penalty=1.0)
    with pytest.raises(ValueError, match="output_scores needs the record"):
        light.generate(IDS, output_scores=True)


def test_beams_find_a_text_no_less_likely_than_greedy_choice(light: Subject) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None}
    greedy = light.generate(IDS, **options)
    found = light.generate(IDS, num_beams=3, num_return_sequences=3, **options)

    def likelihood(tokens: Any) -> Any:
        logits = light.wing.call(light.model, input_ids=tokens).logits.astype(np.float64)
        sums = np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = np.take_along_axis(logits - sums, np.roll(tokens, -1, 1)[..., None], -1)
        return chosen[:, COLUMNS - 1 : -1, 0].sum(1)

    per_text = likelihood(found).reshape(ROWS, 3)
    assert (per_text[:, 0] >= likelihood(greedy) - 1e-4).all()
    assert (np.diff(per_text, axis=1) <= 1e-4).all()
    assert len({tuple(row) for row in found.tolist()}) == 3 * ROWS


def test_a_forced_word_comes_also_where_the_prompt_holds_it(light: Subject) -> None:
    word = [int(token) for token in IDS[0, 2:4]]
    found = light.generate(
        IDS[:1], num_beams=3, force_words_ids=[word], max_new_tokens=NEW, eos_token_id=None
    )
    tokens = found[0, COLUMNS:].tolist()
    assert word in [tokens[i : i + 2] for i in range(NEW)]
