"""Stop strings: a text ends with the token that completes one, wherever it began."""

from typing import Any

import numpy as np
import pytest

from opt_core import OPTTokenizer
from tests.cases import PAD, padded
from tests.subject import Subject
from tests.tiny_tokenizer import VOCABULARY, ids, tiny
from tests.wings import Wing

NEW = 12
#: Only tokens of ASCII are chosen, so that every text can be read.
_UNREADABLE = [i for token, i in VOCABULARY.items() if not token.strip("Ġ").isascii()]
OPTIONS: dict[str, Any] = {
    "max_new_tokens": NEW,
    "eos_token_id": None,
    "suppress_tokens": [*_UNREADABLE, 0, 1, 2, 3],
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": [3, 4]},
    "contrastive": {"penalty_alpha": 0.4, "top_k": 4},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture(scope="module")
def subject(wing: Wing) -> Subject:
    return Subject(wing, lightly=True, vocab_size=len(VOCABULARY), max_position_embeddings=64)


@pytest.fixture(scope="module")
def tokenizer() -> OPTTokenizer:
    return tiny()


PROMPT = padded([np.array(ids("hello", "Ġworld")), np.array(ids("Ġhello"))], "left")


def _text(tokenizer: OPTTokenizer, tokens: Any) -> str:
    text: str = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    return text


def _spread(tokenizer: OPTTokenizer, tokens: Any) -> str:
    """A string that begins within one token and ends within another."""
    pieces = [_text(tokenizer, [token]) for token in tokens]
    place = next(i for i in range(3, NEW - 2) if len(pieces[i + 1]) > 0)
    return pieces[place][-1] + pieces[place + 1] + pieces[place + 2][:1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_text_ends_where_its_string_is_complete(
    subject: Subject, tokenizer: OPTTokenizer, strategy: str
) -> None:
    asked = {**OPTIONS, **STRATEGIES[strategy], "tokenizer": tokenizer}
    free = subject.generate(PROMPT.ids, PROMPT.mask, **asked)[:, 2:]
    strings = [_spread(tokenizer, free[0]), "never comes"]
    found = subject.generate(PROMPT.ids, PROMPT.mask, stop_strings=strings, **asked)[:, 2:]
    for row in range(2):
        ends = [i for i in range(1, NEW + 1) if strings[0] in _text(tokenizer, free[row, :i])]
        end = min(ends, default=NEW)
        np.testing.assert_array_equal(found[row, :end], free[row, :end])
        assert (found[row, end:] == PAD).all()
    assert strings[0] in _text(tokenizer, found[0])


def test_a_string_may_begin_in_the_prompt_but_not_end_there(
    subject: Subject, tokenizer: OPTTokenizer
) -> None:
    asked = {**OPTIONS, "tokenizer": tokenizer}
    prompt = np.array([ids("hello", "Ġworld")])
    free = subject.generate(prompt, **asked)[0, 2:]
    begun = "rld" + _text(tokenizer, free[:2])
    found = subject.generate(prompt, stop_strings=begun, **asked)
    np.testing.assert_array_equal(found[0, 2:], free[:2])
    whole = subject.generate(prompt, stop_strings=["hello w", "world"], **asked)
    np.testing.assert_array_equal(whole[0, 2:], free)


def test_a_string_ends_within_a_token(subject: Subject, tokenizer: OPTTokenizer) -> None:
    bias = [[ids("Ġworld"), 100.0]]
    found = subject.generate(
        np.array([ids("hello")]),
        stop_strings="o wo",
        sequence_bias=bias,
        tokenizer=tokenizer,
        max_new_tokens=NEW,
    )
    assert found.tolist() == [ids("hello", "Ġworld")]


def test_beams_end_by_strings_too(subject: Subject, tokenizer: OPTTokenizer) -> None:
    asked = {**OPTIONS, "tokenizer": tokenizer, "num_beams": 3, "num_return_sequences": 3}
    one = PROMPT.ids[:1]
    free = subject.generate(one, **asked)[:, 2:]
    string = _text(tokenizer, free[0])[4:6]
    found = subject.generate(one, stop_strings=string, length_penalty=0.0, **asked)[:, 2:]
    ended = 0
    for row in found.tolist():
        tokens = row[: row.index(PAD)] if PAD in row else row
        assert string not in _text(tokenizer, tokens[:-1])
        ended += string in _text(tokenizer, tokens)
    assert ended


def test_beams_with_strings_are_the_references(subject: Subject, tokenizer: OPTTokenizer) -> None:
    asked = {**OPTIONS, "max_new_tokens": 6, "num_beams": 3, "stop_strings": ["a", "o", "e"]}
    right = subject.right(PROMPT.ids, PROMPT.mask, tokenizer=tokenizer, **asked)
    found = subject.generate(PROMPT.ids, PROMPT.mask, tokenizer=tokenizer, **asked)
    np.testing.assert_array_equal(found, right)


def test_strings_need_a_tokenizer(subject: Subject) -> None:
    with pytest.raises(ValueError, match="stop_strings are looked for in text: give the tokenizer"):
        subject.generate(PROMPT.ids, stop_strings="end")
