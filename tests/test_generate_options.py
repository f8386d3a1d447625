"""What may be asked of generation besides its tokens: records, streams, guards, refusals."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core import TextIteratorStreamer, TextStreamer
from opt_core.generation import OPTIONS, GenerationConfig
from opt_core.weights import Head
from tests.cases import padded, random_weights, tiny, words
from tests.subject import STD, Subject
from tests.tiny_tokenizer import VOCABULARY
from tests.tiny_tokenizer import tiny as tiny_tokenizer
from tests.wings import Wing

TEXTS = [words(1, count, seed=count)[0] for count in (7, 1, 4)]


@pytest.fixture(scope="module")
def subject(wing: Wing) -> Subject:
    return Subject(wing, lightly=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_a_cache_the_tokens_are_the_same(subject: Subject, side: str) -> None:
    batch = padded(TEXTS, side)
    found = subject.generate(batch.ids, batch.mask, max_new_tokens=8, use_cache=False)
    right = subject.generate(batch.ids, batch.mask, max_new_tokens=8)
    np.testing.assert_array_equal(found, right)


def test_a_record_comes_when_asked_for_and_its_cache_goes_on(subject: Subject) -> None:
    ids = words(2, 4)
    options: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": None}
    record = subject.generate(ids, return_dict_in_generate=True, **options)
    np.testing.assert_array_equal(record.sequences, subject.right(ids, **options))
    call = subject.wing.call
    past = record.past_key_values
    held = subject.wing.pairs(past)[0][0].shape[2]
    assert held == 8
    found = call(subject.model, input_ids=record.sequences[:, held:], past_key_values=past)
    whole = call(subject.model, input_ids=record.sequences)
    np.testing.assert_allclose(found.logits[:, -1], whole.logits[:, -1], rtol=0, atol=1e-4)


def test_options_come_from_the_call_then_the_given_then_the_models_configuration(
    subject: Subject,
) -> None:
    ids = words(1, 4)
    given_options = GenerationConfig(max_new_tokens=3)
    assert subject.generate(ids, generation_config=given_options).shape == (1, 7)
    longer = subject.generate(ids, generation_config=given_options, max_new_tokens=5)
    assert longer.shape == (1, 9)
    other = Subject(subject.wing)
    other.model.generation_config = GenerationConfig(max_new_tokens=2)
    assert other.generate(ids).shape == (1, 6)
    assert given_options.max_new_tokens == 3


def test_ids_that_the_tokenizer_does_not_know_are_never_chosen(wing: Wing) -> None:
    subject = Subject(wing, vocab_size=60)
    ids = words(3, 4, vocab_size=25)
    for options in ({}, {"do_sample": True, "seed": 1, "temperature": 3.0}):
        asked = {"max_new_tokens": 15, "eos_token_id": None, **options}
        free = subject.generate(ids, **asked)
        guarded = subject.generate(ids, tokenizer=range(25), **asked)
        assert free.max() >= 25
        assert guarded.max() < 25


def test_without_a_prompt_a_text_starts_with_the_bos_token(subject: Subject) -> None:
    found = subject.generate(None, max_new_tokens=4)
    np.testing.assert_array_equal(found, subject.generate(np.array([[2]]), max_new_tokens=4))
    with pytest.raises(ValueError, match="give input_ids, or a bos_token_id to start every text"):
        subject.generate(None, bos_token_id=None)


# Streams


def test_a_callback_gets_the_tokens_of_every_step(subject: Subject) -> None:
    ids, steps = words(2, 4), []
    found = subject.generate(
        ids, max_new_tokens=6, streamer=lambda tokens: steps.append(np.asarray(tokens))
    )
    np.testing.assert_array_equal(np.stack(steps, axis=1), found[:, 4:])


def test_a_streamer_gets_the_prompt_the_tokens_and_the_end(subject: Subject) -> None:
    heard: list[Any] = []

    class Listener:
        def put(self, value: Any) -> None:
            heard.append(np.asarray(value))

        def end(self) -> None:
            heard.append("end")

    ids = words(1, 4)
    found = subject.generate(ids, max_new_tokens=6, streamer=Listener())
    assert heard.pop() == "end"
    np.testing.assert_array_equal(heard.pop(0), ids)
    np.testing.assert_array_equal(np.stack(heard, axis=1), found[:, 4:])


STREAMED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": 3},
    "contrastive": {"penalty_alpha": 0.4, "top_k": 4},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("strategy", STREAMED)
def test_a_stream_yields_the_tokens_of_every_step(subject: Subject, strategy: str) -> None:
    """Drafts can be streamed for one row: rows run one after the other."""
    ids, options = words(1 if strategy == "lookup" else 2, 4), STREAMED[strategy]
    steps = list(subject.wing.stream(subject.model, ids, max_new_tokens=6, **options))
    found = subject.generate(ids, max_new_tokens=6, **options)
    np.testing.assert_array_equal(np.stack(steps, axis=1), found[:, 4:])


def test_a_stream_may_take_several_tokens_from_each_program(subject: Subject) -> None:
    if not subject.wing.traces:
        pytest.skip("PyTorch chooses one token at a time")
    steps = subject.wing.stream(subject.model, words(2, 4), max_new_tokens=7, chunk=3)
    found = subject.generate(words(2, 4), max_new_tokens=7)
    np.testing.assert_array_equal(np.stack(list(steps), axis=1), found[:, 4:])


def test_what_settles_late_cannot_be_streamed(subject: Subject) -> None:
    def heard(tokens: Any) -> None:
        raise AssertionError("nothing is settled yet")

    with pytest.raises(ValueError, match="beams settle at the end, so there is nothing to stream"):
        next(subject.wing.stream(subject.model, words(1, 4), num_beams=2))
    with pytest.raises(ValueError, match="beams settle at the end, so there is nothing to stream"):
        subject.generate(words(1, 4), num_beams=2, streamer=heard)
    with pytest.raises(ValueError, match="runs its 2 rows one after the other"):
        next(subject.wing.stream(subject.model, words(2, 4), prompt_lookup_num_tokens=2))


def test_text_is_streamed_by_every_framework(wing: Wing) -> None:
    subject = Subject(wing, lightly=True, vocab_size=len(VOCABULARY))
    tokenizer, ids = tiny_tokenizer(), words(1, 4)
    pieces: list[str] = []
    streamer = TextStreamer(tokenizer, skip_special_tokens=False, on_text=pieces.append)
    asked: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None}
    found = subject.generate(ids, streamer=streamer, **asked)
    right = tokenizer.decode(found[0], clean_up_tokenization_spaces=False)
    assert "".join(pieces) == right
    later = TextIteratorStreamer(tokenizer, skip_special_tokens=False, timeout=60)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(subject.generate, ids, streamer=later, **asked)
        assert "".join(later) == right
    with pytest.raises(ValueError, match="shows one text, and this prompt has 2 rows"):
        subject.generate(words(2, 4), streamer=streamer)


def test_a_stream_may_be_left_before_its_end(subject: Subject) -> None:
    stream = subject.wing.stream(subject.model, words(1, 4), max_new_tokens=6)
    assert next(stream).shape == (1,)
    found = subject.wing.call(subject.model, input_ids=words(1, 4))
    assert found.logits.shape == (1, 4, 40)


# Refusals


BAD_PROMPTS: dict[str, tuple[Any, Any, str]] = {
    "one axis": (
        words(1, 4)[0],
        None,
        r"input_ids are .*int(32|64) \(4,\), expected whole numbers",
    ),
    "real numbers": (
        words(1, 4) * 1.0,
        None,
        r"input_ids are .*float(32|64) \(1, 4\), expected whole",
    ),
    "an id outside the vocabulary": (
        np.array([[3, 40]]),
        None,
        "input_ids hold 40 in row 0 at place 1; the vocabulary goes from 0 to 39",
    ),
    "no token": (words(1, 4)[:, :0], None, r"\(1, 0\), expected .* with at least one token"),
    "a mask of another shape": (
        words(1, 4),
        np.ones((1, 5), np.int64),
        r"attention_mask is \(1, 5\), expected \(1, 4\) as input_ids",
    ),
    "a row of padding": (
        words(2, 3),
        np.array([[1, 1, 1], [0, 0, 0]]),
        "row 1 of the prompt has no token to continue",
    ),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_a_bad_prompt_is_refused(subject: Subject, case: str) -> None:
    ids, mask, message = BAD_PROMPTS[case]
    with pytest.raises(ValueError, match=message):
        subject.generate(ids, mask, max_new_tokens=2)


def test_scores_that_are_not_numbers_are_an_error(wing: Wing) -> None:
    config = tiny()
    weights = random_weights(config, Head.CAUSAL_LM, std=STD)
    weights["model.decoder.layers.1.fc2.bias"][3] = np.nan
    model = wing.build(Head.CAUSAL_LM, config, weights)
    for options in ({}, {"do_sample": True, "seed": 0}):
        with pytest.raises(ValueError, match="scores are NaN after 4 tokens; do the weights hold"):
            wing.generate(model, words(1, 4), max_new_tokens=3, **options)


def test_every_option_stands_on_the_page_about_decoding() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs/decoding.md").read_text(encoding="utf-8")
    assert [name for name in OPTIONS if f"`{name}`" not in page and f"{name}=" not in page] == []


def test_sampling_options_without_sampling_are_named_in_a_warning(subject: Subject) -> None:
    with pytest.warns(UserWarning, match="top_p changes nothing without do_sample=True"):
        subject.generate(words(1, 4), max_new_tokens=1, top_p=0.5)


# What is given wrongly


@pytest.mark.parametrize("wrong", [2, -1, -1e9])
def test_a_mask_of_other_values_is_refused(subject: Subject, wrong: float) -> None:
    mask = np.array([[1, 1, 1, wrong]])
    with pytest.raises(ValueError, match="attention_mask holds values other than 0 and 1"):
        subject.generate(words(1, 4), mask, max_new_tokens=1)
    with pytest.raises(ValueError, match="attention_mask holds values other than 0 and 1"):
        subject.generate(
            words(1, 4),
            guidance_scale=2.0,
            negative_prompt_ids=words(1, 4),
            negative_prompt_attention_mask=mask,
            max_new_tokens=1,
        )


BAD_NEGATIVES: dict[str, tuple[dict[str, Any], str]] = {
    "a mask alone": (
        {"guidance_scale": 2.0, "negative_prompt_attention_mask": np.ones((1, 4), np.int64)},
        "a negative prompt guides nothing without guidance_scale, and its mask nothing without",
    ),
    "a mask alone, nothing guided": (
        {"negative_prompt_attention_mask": np.ones((1, 4), np.int64)},
        "a negative prompt guides nothing without guidance_scale, and its mask nothing without",
    ),
    "ids, nothing guided": (
        {"negative_prompt_ids": words(1, 4)},
        "a negative prompt guides nothing without guidance_scale, and its mask nothing without",
    ),
    "an unknown id": (
        {"guidance_scale": 2.0, "negative_prompt_ids": np.array([[3, 40]])},
        "hold 40 in row 0 at place 1; the vocabulary goes from 0 to 39",
    ),
    "an id below 0": (
        {"guidance_scale": 2.0, "negative_prompt_ids": np.array([[3, -1]])},
        "hold -1 in row 0 at place 1; the vocabulary goes from 0 to 39",
    ),
    "real numbers": (
        {"guidance_scale": 2.0, "negative_prompt_ids": words(1, 2) * 1.0},
        r"float(32|64) \(1, 2\), expected whole numbers",
    ),
}


@pytest.mark.parametrize("case", BAD_NEGATIVES)
def test_a_bad_negative_prompt_is_refused(subject: Subject, case: str) -> None:
    options, message = BAD_NEGATIVES[case]
    with pytest.raises(ValueError, match=message):
        subject.generate(words(1, 4), max_new_tokens=1, **options)


def test_options_of_another_class_are_refused(subject: Subject) -> None:
    given: Any = {"max_new_tokens": 3}
    message = "generation_config is a .*dict; give a GenerationConfig of opt_core.generation"
    with pytest.raises(ValueError, match=message):
        subject.generate(words(1, 4), generation_config=given)
    with pytest.raises(ValueError, match=message):
        next(subject.wing.stream(subject.model, words(1, 4), generation_config=given))


def test_a_streamer_gets_the_prompt_of_every_row_that_is_generated(subject: Subject) -> None:
    heard: list[Any] = []

    class Listener:
        def put(self, value: Any) -> None:
            heard.append(np.asarray(value))

        def end(self) -> None:
            heard.append("end")

    ids = words(2, 4)
    asked: dict[str, Any] = {"max_new_tokens": 3, "streamer": Listener()}
    found = subject.generate(ids, do_sample=True, seed=1, num_return_sequences=2, **asked)
    np.testing.assert_array_equal(heard[0], found[:, :4])
    np.testing.assert_array_equal(np.stack(heard[1:-1], axis=1), found[:, 4:])
    heard.clear()
    found = subject.generate(None, **asked)
    np.testing.assert_array_equal(heard[0], [[2]])
    np.testing.assert_array_equal(np.stack(heard[1:-1], axis=1), found[:, 1:])


def test_a_penalty_that_outgrows_all_numbers_ends_a_text(subject: Subject) -> None:
    ids = words(2, 4)
    asked: dict[str, Any] = {"eos_token_id": 3, "min_new_tokens": 4}
    penalty = {"exponential_decay_length_penalty": (0, 1e200)}
    found = subject.generate(ids, max_new_tokens=8, **asked, **penalty)
    right = subject.generate(ids, max_new_tokens=4, **asked)
    np.testing.assert_array_equal(found[:, :8], right)
    np.testing.assert_array_equal(found[:, 8:], [[3], [3]])
    with pytest.raises(ValueError, match=r"a score is \+inf after 8 tokens, beside"):
        subject.generate(ids, max_new_tokens=8, do_sample=True, seed=1, **asked, **penalty)


@pytest.mark.parametrize("strategy", [{"do_sample": True, "seed": 1}, {"num_beams": 2}])
def test_a_model_that_overflows_is_named_or_repaired(wing: Wing, strategy: dict[str, Any]) -> None:
    config = tiny()
    weights = random_weights(config, Head.CAUSAL_LM, std=STD)
    weights["model.decoder.final_layer_norm.bias"][:] = 50
    weights["model.decoder.embed_tokens.weight"][39] = 3e38
    model, ids = wing.build(Head.CAUSAL_LM, config, weights), words(1, 4, vocab_size=39)
    asked: dict[str, Any] = {"max_new_tokens": 1, **strategy}
    assert wing.generate_lightly(model, ids, max_new_tokens=1)[0, 4] == 39
    with pytest.raises(ValueError, match=r"a score is \+inf after 4 tokens, beside"):
        wing.generate_lightly(model, ids, **asked)
    found = wing.generate_lightly(model, ids, remove_invalid_values=True, **asked)
    assert found[0, 4] == 39


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("prefix_allowed_tokens_fn", 5, "prefix_allowed_tokens_fn is int; give a function of a"),
        ("assistant_model", "small", "assistant_model is str; give a model of this framework"),
        ("streamer", 5, "streamer is int; give a TextStreamer"),
        ("inputs", 5, "no generation option 'inputs'; did you mean 'input_ids'"),
    ],
)
def test_an_argument_of_another_kind_is_named(
    subject: Subject, argument: str, value: Any, error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        subject.generate(words(1, 4), max_new_tokens=2, **{argument: value})
