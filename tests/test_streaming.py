"""Text streamers: whole characters as soon as they are complete, and all of the text."""

import io
import sys
from queue import Empty
from threading import Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_core import TextIteratorStreamer, TextStreamer
from tests.tiny_tokenizer import VOCABULARY, ids, tiny

#: Hiragana and a face of four bytes, each spread over several tokens of the small vocabulary.
WIDE = "aあ\N{GRINNING FACE}!"


class Foreign:
    """A tokenizer that only decodes whole lists, as those of transformers."""

    def __init__(self) -> None:
        self.own = tiny()
        self.lengths: list[int] = []

    def decode(
        self, token_ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        self.lengths.append(len(token_ids))
        return self.own.decode(
            token_ids,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
        )


def streamed(tokenizer: Any, prompt: list[int], tokens: list[int], **options: Any) -> list[str]:
    pieces: list[str] = []
    streamer = TextStreamer(tokenizer, on_text=pieces.append, **options)
    streamer.put(np.array([prompt]))
    for token in tokens:
        streamer.put(np.array([token]))
    streamer.end()
    return pieces


@pytest.mark.parametrize("kind", [tiny, Foreign])
def test_a_character_comes_once_its_last_token_is_there(kind: Any) -> None:
    tokens = tiny()(WIDE, add_special_tokens=False)["input_ids"]
    assert len(tokens) > len(WIDE)
    assert streamed(kind(), ids("</s>"), tokens) == list(WIDE)


@pytest.mark.parametrize("kind", [tiny, Foreign])
@given(
    tokens=st.lists(st.sampled_from(sorted(VOCABULARY.values())), max_size=12),
    skip=st.booleans(),
)
def test_the_pieces_are_the_decoded_text(kind: Any, tokens: list[int], skip: bool) -> None:
    prompt = ids("</s>", "hello")
    pieces = streamed(kind(), prompt, tokens, skip_special_tokens=skip)
    whole = tiny().decode(
        prompt + tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )
    assert "".join(pieces) == whole
    assert "" not in pieces


def test_only_the_newest_tokens_are_decoded_again() -> None:
    tokenizer = Foreign()
    streamed(tokenizer, ids("</s>"), ids("hello") * 50)
    assert max(tokenizer.lengths) <= 3


@pytest.mark.parametrize("kind", [tiny, Foreign])
def test_a_prompt_that_is_left_out_may_end_within_a_character(kind: Any) -> None:
    tokens = tiny()("aあb", add_special_tokens=False)["input_ids"]
    assert streamed(kind(), tokens[:2], tokens[2:], skip_prompt=True) == ["あ", "b"]


def test_what_an_incomplete_character_leaves_is_shown_at_the_end() -> None:
    first = tiny()("あ", add_special_tokens=False)["input_ids"][0]
    assert streamed(tiny(), ids("hello"), [first]) == ["hello", "\ufffd"]


def test_without_a_function_text_goes_to_standard_output_as_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), write_through=False)
    monkeypatch.setattr(sys, "stdout", shown)
    streamer = TextStreamer(tiny())
    for _ in range(2):
        streamer.put(np.array([ids("</s>", "hello")]))
        streamer.put(np.array(ids("Ġworld")))
        assert shown.buffer.getvalue().endswith(b"hello world")
        streamer.end()
    assert shown.buffer.getvalue() == b"hello world\n" * 2


def test_a_prompt_begins_anew_what_a_failed_call_left_behind() -> None:
    pieces: list[str] = []
    streamer = TextStreamer(tiny(), skip_prompt=True, on_text=pieces.append)
    for _ in range(2):  # the first call ends without `end`
        streamer.put(np.array([ids("a")]))
        streamer.put(np.array(ids("!")))
    assert pieces == ["!", "!"]


def test_several_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="shows one text, and this prompt has 2 rows"):
        TextStreamer(tiny()).put(np.array([ids("hello"), ids("hello")]))


def test_an_iterator_gives_the_pieces_to_another_thread() -> None:
    streamer = TextIteratorStreamer(tiny(), skip_prompt=True, timeout=60)

    def generate() -> None:
        streamer.put(np.array([ids("hello")]))
        streamer.put(np.array(ids("Ġworld")))
        streamer.put(np.array(ids("Ġa")))
        streamer.end()

    for _ in range(2):
        worker = Thread(target=generate)
        worker.start()
        assert list(streamer) == [" world", " a"]
        worker.join()


def test_an_iterator_waits_no_longer_than_it_was_told() -> None:
    with pytest.raises(Empty):
        next(TextIteratorStreamer(tiny(), timeout=0.01))
