"""The table by which stop strings are found, against a plain search in bytes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from opt_core.generation import StopTable

#: Tokens as a byte-level tokenizer spells them. The two bytes of "é" are two of them.
TOKENS = ["a", "b", "c", "ab", "ba", "abab", "cc", "bcab", "Ã", "©", "aÃ", "©b"]
BYTES = [token.encode("latin-1") for token in TOKENS]
STRINGS = ["a", "ab", "aba", "abab", "bca", "cab", "cccc", "é", "aéb", "bé", "babab"]


class Speller:
    """A tokenizer of these tokens."""

    def __len__(self) -> int:
        return len(TOKENS)

    def convert_ids_to_tokens(self, ids: Any) -> list[str]:
        return [TOKENS[i] for i in ids]


SPELLER = Speller()
TEXTS = st.lists(st.integers(0, len(TOKENS) - 1), max_size=8)


def place_by_search(prompt: list[int], new: list[int], strings: Sequence[str]) -> int | None:
    """How many new tokens there are when a string first ends within them; None if never."""
    begun = b"".join(BYTES[token] for token in prompt)
    whole = begun
    for count, token in enumerate(new, 1):
        whole += BYTES[token]
        longer = [whole[:end] for end in range(len(begun) + 1, len(whole) + 1)]
        if any(text.endswith(string.encode()) for text in longer for string in strings):
            return count
    return None


def place_by_table(table: StopTable, prompt: list[int], new: list[int]) -> int | None:
    state = table.start(prompt)
    for count, token in enumerate(new, 1):
        state = int(table.after[state, token])
        if state == len(table.after) - 1:
            return count
    return None


@given(
    strings=st.lists(st.sampled_from(STRINGS), min_size=1, max_size=4, unique=True),
    prompt=TEXTS,
    new=TEXTS,
)
def test_the_table_finds_what_a_search_finds(
    strings: list[str], prompt: list[int], new: list[int]
) -> None:
    table = StopTable.of(strings, SPELLER, len(TOKENS))
    assert place_by_table(table, prompt, new) == place_by_search(prompt, new, strings)


def test_a_string_may_begin_in_the_prompt_but_not_end_there() -> None:
    table = StopTable.of(["bca"], SPELLER, len(TOKENS))
    assert place_by_table(table, [1, 2], [0]) == 1
    assert place_by_table(table, [1, 2, 0], [1]) is None


def test_a_string_is_found_wherever_in_a_token_it_ends() -> None:
    table = StopTable.of(["bc"], SPELLER, len(TOKENS))
    assert place_by_table(table, [], [7]) == 1
    assert place_by_table(table, [], [3, 6]) == 2


def test_a_complete_string_stays_complete() -> None:
    table = StopTable.of(["ab"], SPELLER, len(TOKENS))
    assert (table.after[-1] == len(table.after) - 1).all()


def test_an_id_without_a_token_writes_nothing() -> None:
    table = StopTable.of(["ab"], SPELLER, len(TOKENS) + 3)
    begun = table.start([0])
    assert begun != table.start([])
    np.testing.assert_array_equal(table.after[begun, len(TOKENS) :], begun)


def test_tables_have_few_sizes_and_are_made_once() -> None:
    one = StopTable.of(["ab"], SPELLER, len(TOKENS))
    assert StopTable.of(["ab"], SPELLER, len(TOKENS)) is one
    other = StopTable.of(["ab", "cab", "babab"], SPELLER, len(TOKENS))
    assert other.after.shape == one.after.shape
    assert one.after.dtype == np.int32


def test_only_the_newest_tables_are_kept() -> None:
    speller, count = Speller(), len(TOKENS)
    first = StopTable.of(["a"], speller, count)
    assert StopTable.of(["a"], speller, count) is first
    for length in range(2, 10):
        StopTable.of(["a" * length], speller, count)
    assert StopTable.of(["a"], speller, count) is not first
