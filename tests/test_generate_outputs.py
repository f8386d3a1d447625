"""What a record of generation holds: scores, logits, attentions, hidden states, beams, a cache."""

from typing import Any

import numpy as np
import pytest

from opt_core.generation import uniforms
from tests.cases import PAD, words
from tests.subject import Subject
from tests.tolerances import assert_near
from tests.wings import Wing

NEW, ROWS, P = 5, 2, 4
IDS = words(ROWS, P)
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": 3, "top_k": 7},
    "copies": {"do_sample": True, "seed": 3, "num_return_sequences": 2},
    "contrastive": {"penalty_alpha": 0.4, "top_k": 4},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "forced words": {"num_beams": 3, "force_words_ids": [[7]]},
}
WHOLE: dict[str, Any] = {
    "max_new_tokens": NEW,
    "eos_token_id": None,
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
}


@pytest.fixture(scope="module")
def subject(wing: Wing) -> Subject:
    return Subject(wing, lightly=True)


@pytest.fixture(scope="module", params=STRATEGIES)
def record(subject: Subject, request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, subject.generate(IDS, **WHOLE, **STRATEGIES[request.param])


def log_softmax(scores: Any) -> Any:
    scores = np.asarray(scores, np.float64)
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def test_what_is_not_asked_for_is_not_there(subject: Subject) -> None:
    found = subject.generate(IDS, max_new_tokens=NEW, return_dict_in_generate=True)
    assert set(found) == {"sequences", "past_key_values"}
    assert set(subject.generate(IDS, num_beams=3, return_dict_in_generate=True)) == {
        "sequences",
        "sequences_scores",
        "beam_indices",
        "past_key_values",
    }


def test_collecting_changes_no_token(subject: Subject, record: tuple[str, Any]) -> None:
    name, found = record
    plain = subject.generate(IDS, max_new_tokens=NEW, eos_token_id=None, **STRATEGIES[name])
    np.testing.assert_array_equal(found.sequences, plain)


def test_logits_are_those_of_a_plain_call(subject: Subject, record: tuple[str, Any]) -> None:
    name, found = record
    if "num_beams" in STRATEGIES[name]:
        pytest.skip("the logits of beams belong to the running beams")
    whole = subject.wing.call(subject.model, input_ids=found.sequences)
    assert len(found.logits) == NEW
    for step, logits in enumerate(found.logits):
        assert_near(logits, whole.logits[:, P - 1 + step], what=f"logits of step {step}")


def test_attentions_and_hidden_states_are_those_of_a_plain_call(
    subject: Subject, record: tuple[str, Any]
) -> None:
    """Cut as transformers cuts them: the prompt in the first step, then one token each."""
    _, found = record
    whole = subject.wing.call(
        subject.model,
        input_ids=found.sequences,
        output_attentions=True,
        output_hidden_states=True,
    )
    assert len(found.attentions) == len(found.hidden_states) == NEW
    for step in range(NEW):
        fed = slice(0, P) if step == 0 else slice(P + step - 1, P + step)
        held = slice(0, P + step)
        for right, layer in zip(whole.attentions, found.attentions[step], strict=True):
            assert_near(layer, right[:, :, fed, held], what=f"attentions of step {step}")
        for right, layer in zip(whole.hidden_states, found.hidden_states[step], strict=True):
            assert_near(layer, right[:, fed], what=f"hidden states of step {step}")


def test_the_cache_holds_the_returned_sequences(subject: Subject, record: tuple[str, Any]) -> None:
    _, found = record
    whole = subject.wing.call(subject.model, input_ids=found.sequences[:, :-1])
    right = subject.wing.pairs(whole.past_key_values)
    for layer, (key, value) in enumerate(subject.wing.pairs(found.past_key_values)):
        assert_near(key, right[layer][0], what=f"keys of layer {layer}")
        assert_near(value, right[layer][1], what=f"values of layer {layer}")


def test_greedy_choice_takes_the_best_score(subject: Subject) -> None:
    rules = {"repetition_penalty": 1.5, "suppress_tokens": [7]}
    found = subject.generate(IDS, **{**WHOLE, "output_attentions": False}, **rules)
    for step, scores in enumerate(found.scores):
        assert scores.shape == (ROWS, 40)
        np.testing.assert_array_equal(scores.argmax(1), found.sequences[:, P + step])
        assert np.isneginf(scores[:, 7]).all()
    assert any((a != b).any() for a, b in zip(found.scores, found.logits, strict=True))


def test_a_drawn_token_is_where_the_sum_of_the_scores_passes_its_number(subject: Subject) -> None:
    found = subject.generate(IDS, **WHOLE, **STRATEGIES["sampling"])
    numbers = uniforms(3, ROWS, NEW)[..., 0]
    for step, scores in enumerate(found.scores):
        assert (np.isfinite(scores).sum(1) == 7).all()
        sums = np.exp(log_softmax(scores)).cumsum(1)
        chosen = (sums > numbers[:, step, None]).argmax(1)
        np.testing.assert_array_equal(chosen, found.sequences[:, P + step])


@pytest.mark.parametrize("name", ["beams", "forced words"])
def test_the_scores_of_beams_add_up_along_their_path(subject: Subject, name: str) -> None:
    found = subject.generate(
        IDS, **{**WHOLE, "eos_token_id": [5, 9, 11, 20]}, **STRATEGIES[name], length_penalty=0.5
    )
    for row, places in enumerate(found.beam_indices):
        length = int((places >= 0).sum())
        chosen = found.sequences[row, P : P + length]
        assert (found.sequences[row, P + length :] == PAD).all()
        assert (places[length:] == -1).all()
        total = sum(
            float(found.scores[step][place, token])
            for step, (place, token) in enumerate(zip(places[:length], chosen, strict=True))
        )
        np.testing.assert_allclose(total / length**0.5, found.sequences_scores[row], atol=1e-4)
        text = row // (len(found.sequences) // ROWS)
        assert (places[:length] // 3 == text).all()
    for scores, logits in zip(found.scores, found.logits, strict=True):
        assert scores.shape == logits.shape == (ROWS * 3, 40)
        assert_near(scores, log_softmax(logits), what="log-probabilities")


def test_beams_come_best_first(subject: Subject) -> None:
    found = subject.generate(
        IDS, max_new_tokens=NEW, num_beams=3, num_return_sequences=3, return_dict_in_generate=True
    )
    assert (np.diff(found.sequences_scores.reshape(ROWS, 3), axis=1) <= 0).all()


def test_rows_that_are_guided_are_collected_once(subject: Subject) -> None:
    found = subject.generate(IDS, **WHOLE, guidance_scale=2.0)
    assert found.scores[0].shape == (ROWS, 40)
    assert found.attentions[0][0].shape == (ROWS, 4, P, P)
    for step, scores in enumerate(found.scores):
        np.testing.assert_array_equal(scores.argmax(1), found.sequences[:, P + step])
