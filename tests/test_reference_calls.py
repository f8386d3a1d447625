"""What the NumPy reference may be given to generate by besides options: functions, texts."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from opt_core import reference
from opt_core.config import OPTConfig
from opt_core.generation import GenerationConfig
from opt_core.reference import Call
from opt_core.reference.cuts import log_softmax
from opt_core.reference.inputs import Floats
from opt_core.weights import Head
from tests.cases import random_weights
from tests.tiny_tokenizer import VOCABULARY, ids, tiny

TOKENIZER = tiny()
CONFIG = OPTConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=16,
    num_hidden_layers=2,
    ffn_dim=24,
    num_attention_heads=4,
    max_position_embeddings=40,
)
WEIGHTS: dict[str, Floats] = random_weights(CONFIG, Head.CAUSAL_LM, 5, std=0.3)
V = CONFIG.vocab_size
BATCH = np.array([[4, 7, 9, 12], [1, 1, 5, 8]])
BEAMS: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}


def record(call: Call | None = None, prompt: Any = BATCH, **options: Any) -> reference.Record:
    asked = GenerationConfig(pad_token_id=1, max_new_tokens=6).merged(**options)
    return reference.record(CONFIG, WEIGHTS, prompt, None, asked, call=call)


def last_logits(texts: Any) -> Floats:
    """What the model gives after the last token of every text [B, T]."""
    mask = np.asarray(texts) != 1
    return reference.causal_lm(CONFIG, WEIGHTS, input_ids=texts, attention_mask=mask).logits[:, -1]


# Functions


@pytest.mark.parametrize("options", [{}, BEAMS])
def test_a_processor_sees_ids_and_scores_of_all_rows(options: dict[str, Any]) -> None:
    seen = []

    def note(given: Any, scores: Any) -> Any:
        seen.append((given, scores))
        return scores

    found = record(Call(logits_processor=[note]), **options)
    plain = record(**options)
    np.testing.assert_array_equal(found.sequences, plain.sequences)
    rows = 2 * options.get("num_beams", 1)
    assert [given.shape for given, _ in seen] == [(rows, 4 + step) for step in range(6)]
    np.testing.assert_array_equal(seen[0][0], BATCH.repeat(rows // 2, axis=0))
    for (_, scores), expected in zip(seen, plain.scores, strict=True):
        np.testing.assert_array_equal(scores, expected)


@pytest.mark.parametrize("options", [{}, BEAMS, {"penalty_alpha": 0.5, "top_k": 4}])
def test_processors_change_scores_one_after_the_other(options: dict[str, Any]) -> None:
    def only_even(_: Any, scores: Any) -> Any:
        return np.where(np.arange(V) % 2 == 0, scores, -np.inf)

    def not_small(_: Any, scores: Any) -> Any:
        return np.where(np.arange(V) >= 10, scores, -np.inf)

    found = record(Call(logits_processor=[only_even, not_small]), **options)
    tokens = found.sequences[:, 4:]
    assert (tokens % 2 == 0).all()
    assert (tokens >= 10).all()


def test_a_finished_row_is_shown_with_what_fills_it() -> None:
    free = record().sequences
    stop = int(free[0, 4])
    assert stop not in free[1, 4:]
    seen = []

    def note(given: Any, scores: Any) -> Any:
        seen.append(given[0].tolist())
        return scores

    record(Call(logits_processor=[note]), eos_token_id=stop)
    assert seen[3] == [*BATCH[0], stop, 1, 1]


@pytest.mark.parametrize("as_array", [False, True])
def test_a_criterion_ends_texts_one_by_one_or_all_at_once(as_array: bool) -> None:
    free = record().sequences

    def ends(given: Any, scores: Any) -> Any:
        assert scores.shape == (2, V)
        rows = np.array([given.shape[1] >= 6, given.shape[1] >= 8])
        return rows if as_array else bool(rows[0])

    found = record(Call(stopping_criteria=[ends])).sequences
    if as_array:
        np.testing.assert_array_equal(found[0], [*free[0, :6], 1, 1])
        np.testing.assert_array_equal(found[1], free[1, :8])
    else:
        np.testing.assert_array_equal(found, free[:, :6])


@pytest.mark.parametrize("words", [{}, {"force_words_ids": [[21]]}])
def test_a_criterion_ends_beams(words: dict[str, Any]) -> None:
    call = Call(stopping_criteria=[lambda given, _: given[:, -1] % 5 == 0])
    found = record(call, **BEAMS, **words)
    stops = list(range(0, V, 5))
    expected = record(**BEAMS, **words, eos_token_id=stops)
    assert found.sequences.shape[0] == 4
    for row in found.sequences[:, 4:].tolist():
        tokens = [token for token in row if token != 1]
        assert all(token % 5 for token in tokens[:-1])
    # The first step's candidates are the same; later ones depend on how many are kept.
    np.testing.assert_allclose(found.scores[0], expected.scores[0])


def test_allowed_tokens_depend_on_the_text_and_what_it_holds() -> None:
    def allow(text: int, given: Any) -> list[int]:
        return [6 + text, int(given[-1]) + 1]

    found = record(Call(prefix_allowed_tokens_fn=allow), num_beams=2, num_return_sequences=2)
    for row, sequence in enumerate(found.sequences.tolist()):
        for before, token in pairwise(sequence[3:]):
            assert token in (6 + row // 2, before + 1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (Call(logits_processor=[lambda _, scores: scores[:1]]), r"processor <lambda> .*\(1, 60\)"),
        (Call(stopping_criteria=[lambda given, _: given]), r"criterion <lambda> .*\(2, 5\)"),
    ],
)
def test_a_function_that_gives_another_shape_is_named(call: Call, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("60", str(V))):
        record(call)


# What cannot be chosen from


def test_nothing_left_to_choose_is_an_error() -> None:
    call = Call(prefix_allowed_tokens_fn=lambda text, _: [] if text else [4])
    for options in ({}, BEAMS, {"penalty_alpha": 0.5, "top_k": 4}):
        with pytest.raises(ValueError, match="no token may be chosen after 2 tokens"):
            record(call, **options)


def test_scores_that_are_no_numbers_are_refused_or_replaced() -> None:
    call = Call(logits_processor=[lambda _, scores: np.where(scores > 1, np.nan, scores)])
    with pytest.raises(ValueError, match="the scores are NaN after 4 tokens"):
        record(call)
    name = "model.decoder.final_layer_norm.bias"
    broken = {**WEIGHTS, name: np.full_like(WEIGHTS[name], np.nan)}
    for options in ({}, BEAMS):
        asked = GenerationConfig(max_new_tokens=2, remove_invalid_values=True, **options)
        found = reference.generate(CONFIG, broken, [[4]], None, asked)
        assert found[0].tolist() == [4, 0, 0]


def test_ids_that_a_tokenizer_lacks_are_never_chosen() -> None:
    free = record().sequences[:, 4:]
    known = int(free.max())
    for options in ({}, BEAMS, {"do_sample": True, "temperature": 50.0, "top_k": 0, "seed": 1}):
        asked = GenerationConfig(pad_token_id=1, max_new_tokens=6).merged(**options)
        found = reference.generate(CONFIG, WEIGHTS, BATCH, None, asked, known=known)
        assert found[:, 4:].max() < known


# Stop strings

#: All but tokens of ASCII, so that every text can be read.
_UNREADABLE = [i for token, i in VOCABULARY.items() if not token.strip("Ġ").isascii() or i < 4]
READABLE: dict[str, Any] = {"suppress_tokens": _UNREADABLE}


def text_of(tokens: Any) -> str:
    text: str = TOKENIZER.decode(tokens, clean_up_tokenization_spaces=False)
    return text


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3}])
def test_a_text_ends_with_the_token_that_completes_a_string(options: dict[str, Any]) -> None:
    options = {**options, **READABLE, "max_new_tokens": 12}
    free = record(**options).sequences[0, 4:].tolist()
    strings = [text_of(free[3:6])[-2:], "no such text"]
    call = Call(tokenizer=TOKENIZER)
    found = record(call, **options, stop_strings=strings).sequences[0, 4:].tolist()
    count = next(n for n in range(1, 13) if strings[0] in text_of(free[:n]))
    assert found[:count] == free[:count]
    assert set(found[count:]) <= {1}


def test_a_string_may_begin_in_the_prompt_and_one_that_ends_there_ends_nothing() -> None:
    prompt = [ids("hello")]
    token = int(record(prompt=prompt).sequences[0, 1])
    last = text_of(prompt[0])[-1]
    begun = last + text_of([token])[:1]
    for strings, count in (([begun], 1), ([text_of(prompt[0])], 6)):
        found = record(Call(tokenizer=TOKENIZER), prompt, stop_strings=strings)
        assert found.sequences.shape[1] == 1 + count


def test_stop_strings_end_beams() -> None:
    free = record(**BEAMS, **READABLE).sequences
    letter = text_of(free[0, 4:6])[-1]
    found = record(Call(tokenizer=TOKENIZER), **BEAMS, **READABLE, stop_strings=letter).sequences
    assert not np.array_equal(found[:, 4:], free[:, 4 : found.shape[1]])
    for row in found[:, 4:]:
        tokens = [token for token in row.tolist() if token != 1]
        assert letter not in text_of(tokens[:-1])


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="give the tokenizer"):
        record(stop_strings="a")


# Guidance


def test_guidance_leads_away_from_what_is_likely_without_the_prompt() -> None:
    found = record(guidance_scale=1.8, max_new_tokens=3)
    tokens = found.sequences[:, 4:]
    for step in range(3):
        whole = last_logits(np.concatenate([BATCH, tokens[:, :step]], axis=1))
        without = last_logits(np.concatenate([BATCH[:, -1:], tokens[:, :step]], axis=1))
        a, b = (np.stack([log_softmax(row) for row in rows]) for rows in (whole, without))
        np.testing.assert_allclose(found.scores[step], 1.8 * (a - b) + b, atol=1e-9)
        np.testing.assert_allclose(found.logits[step], whole, atol=1e-9)


def test_a_negative_prompt_takes_the_place_of_the_last_token() -> None:
    negative = np.array([[1, 20, 21], [9, 22, 23]])
    call = Call(negative_prompt_ids=negative, negative_prompt_attention_mask=negative != 1)
    found = record(call, guidance_scale=0.0, max_new_tokens=5).sequences
    # With a scale of 0 nothing but the negative prompt is followed.
    expected = record(prompt=negative, max_new_tokens=5).sequences
    np.testing.assert_array_equal(found[:, :4], BATCH)
    np.testing.assert_array_equal(found[:, 4:], expected[:, 3:])


def test_guided_beams_add_up_what_guidance_gives() -> None:
    found = record(guidance_scale=1.5, max_new_tokens=1, **BEAMS)
    assert found.sequences_scores is not None
    single = record(guidance_scale=1.5, max_new_tokens=1)
    np.testing.assert_allclose(found.scores[0].reshape(2, 3, V)[:, 0], single.scores[0])
    best = np.sort(single.scores[0], axis=1)[:, :-3:-1]
    np.testing.assert_allclose(found.sequences_scores, best.ravel())


# What functions must give


DRAWN: dict[str, Any] = {"do_sample": True, "seed": 1}


@pytest.mark.parametrize(
    "options",
    [
        DRAWN,
        {**DRAWN, "num_beams": 2},
        {**DRAWN, "top_p": 0.5},
        {**DRAWN, "typical_p": 0.5},
        {"num_beams": 2},
        {"num_beams": 2, "force_words_ids": [[7]]},
        {"penalty_alpha": 0.6, "top_k": 4},
    ],
)
def test_nothing_is_drawn_or_weighed_beside_a_score_of_inf(options: dict[str, Any]) -> None:
    certain = Call(logits_processor=[lambda _, scores: np.where(np.arange(V) == 7, np.inf, scores)])
    with pytest.raises(ValueError, match=r"a score is \+inf after 4 tokens, beside which"):
        record(certain, **options)
    found = record(certain, renormalize_logits=True).sequences
    assert (found[:, 4:] == 7).all()


def test_a_penalty_that_outgrows_all_numbers_ends_a_text() -> None:
    options: dict[str, Any] = {"eos_token_id": 3, "min_new_tokens": 3}
    penalty: dict[str, Any] = {"exponential_decay_length_penalty": (0, 1e200)}
    found = record(**options, **penalty).sequences
    assert found.shape == (2, 8)
    assert (found[:, 7] == 3).all()
    with pytest.raises(ValueError, match=r"a score is \+inf after 7 tokens"):
        record(**options, **penalty, **DRAWN)


@pytest.mark.parametrize("answer", [None, "text", {}, np.ones(3)])
def test_a_function_that_gives_something_else_is_named(answer: Any) -> None:
    def forgetful(given: Any, scores: Any) -> Any:
        return answer

    with pytest.raises(ValueError, match="the logits processor forgetful returned"):
        record(Call(logits_processor=[forgetful]))
    with pytest.raises(ValueError, match="the stopping criterion forgetful returned"):
        record(Call(stopping_criteria=[forgetful]))
    wrong: Any = forgetful
    with pytest.raises(ValueError, match="logits_processor is function; give a list of functions"):
        record(Call(logits_processor=wrong))


EVEN = np.arange(V) % 2 == 0


@pytest.mark.parametrize("answer", [range(0, V, 2), np.arange(0, V, 2), EVEN, set(range(0, V, 2))])
def test_allowed_tokens_are_ids_or_bools(answer: Any) -> None:
    found = record(Call(prefix_allowed_tokens_fn=lambda *_: answer)).sequences
    right = record(suppress_tokens=list(range(1, V, 2))).sequences
    np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("answer", [[V], [-1], [1.5], None, 3, "text", [[3]], EVEN[:-1]])
def test_what_cannot_be_allowed_tokens_is_refused(answer: Any) -> None:
    with pytest.raises(ValueError, match="returned for text 0 what is not a list of ids from 0"):
        record(Call(prefix_allowed_tokens_fn=lambda *_: answer))


def test_a_negative_prompt_that_nobody_asks_for_is_refused() -> None:
    mask = np.ones_like(BATCH)
    for call, options in (
        (Call(negative_prompt_ids=BATCH), {}),
        (Call(negative_prompt_attention_mask=mask), {"guidance_scale": 2.0}),
    ):
        with pytest.raises(ValueError, match="a negative prompt guides nothing without"):
            record(call, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1e-9},
        {"num_beams": 3, "force_words_ids": [[20]]},
    ],
    ids=["beams", "groups", "forced words"],
)
def test_a_criterion_sees_the_scores_behind_each_candidate(options: dict[str, Any]) -> None:
    seen = []

    def criterion(given: Any, scores: Any) -> Any:
        seen.append((given.copy(), scores.copy()))
        given[:], scores[:] = 1, -np.inf
        return False

    prompt = BATCH[:1]
    found = record(Call(stopping_criteria=[criterion]), prompt, max_new_tokens=3, **options)
    plain = record(None, prompt, max_new_tokens=3, **options)
    np.testing.assert_array_equal(found.sequences, plain.sequences)
    np.testing.assert_array_equal(found.scores, plain.scores)
    assert seen
    for given, scores in seen:
        expected = [log_softmax(row) for row in last_logits(given[:, :-1])]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
