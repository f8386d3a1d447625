"""Token ids back to text, all at once or as they come."""

import codecs
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import index
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from opt_core.tokenizer.settings import ID_LIMIT

# Byte-level BPE writes every byte as one visible character: the visible ones of Latin-1 as
# themselves, the other 68 as the characters from U+0100 on.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = sorted(set(range(0x100)).difference(_VISIBLE))
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {
    chr(0x100 + place): byte for place, byte in enumerate(_HIDDEN)
}

# English detokenisation as transformers does it, in this order.
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class TokenBytes(dict[int, bytes]):
    """The bytes that each token id stands for, looked up once; none for an unknown id."""

    def __init__(self, backend: Tokenizer) -> None:
        super().__init__()
        self._added = backend.get_added_tokens_decoder()
        self._backend = backend

    def __missing__(self, token_id: int) -> bytes:
        if token_id in self._added:
            self[token_id] = self._added[token_id].content.encode()
            return self[token_id]
        token = self._backend.id_to_token(token_id) if token_id < ID_LIMIT else None
        if token is None:
            return b""
        self[token_id] = bytes_of(token)
        return self[token_id]


def bytes_of(token: str) -> bytes:
    """The bytes that a token of the vocabulary writes visibly, else the token's own UTF-8."""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()


def clean_up(text: str) -> str:
    """Takes out the spaces before English punctuation and contractions."""
    for spaced, closed in _CLEAN_UP:
        text = text.replace(spaced, closed)
    return text


def as_ids(token_ids: Any) -> list[int]:
    """Any framework's vector of ids, or a single id, as a list.

    Raises:
        ValueError: there is more than one axis, a value is no whole number, or one is negative.
    """
    plain = as_lists(token_ids)
    try:
        ids = [index(i) for i in (plain if isinstance(plain, list) else [plain])]
    except TypeError:
        raise ValueError(
            f"token ids should be one sequence of whole numbers, not {token_ids!r:.80}; for"
            " several sequences there is batch_decode"
        ) from None
    lowest = min(ids, default=0)
    if lowest < 0:
        raise ValueError(
            f"token id {lowest} at place {ids.index(lowest)} is negative; if these are labels,"
            " where -100 marks what is left out, replace those first"
        )
    return ids


def as_lists(values: Any) -> Any:
    """Nested lists of Python numbers from nested sequences and any framework's arrays."""
    if hasattr(values, "tolist"):
        return values.tolist()
    if hasattr(values, "__array__"):  # TensorFlow
        return np.asarray(values).tolist()
    if isinstance(values, Sequence) and not isinstance(values, str):
        is_flat = all(type(value) is int for value in values)
        return list(values) if is_flat else [as_lists(value) for value in values]
    return values


def decode(
    ids: Iterable[int], table: TokenBytes, *, apart: frozenset[int], separator: str, errors: str
) -> str:
    """The text of `ids`, with `separator` around the tokens whose ids are in `apart`."""
    texts: list[str] = []
    for is_apart, run in groupby(ids, key=apart.__contains__):
        parts = [table[i] for i in run]
        texts += (
            [p.decode() for p in parts] if is_apart else [b"".join(parts).decode("utf-8", errors)]
        )
    return separator.join(texts)


class DecodeStream:
    """Text as the ids come: the pieces, joined, are what `decode` gives for all ids at once.

    A character may be spread over several tokens: its bytes wait until it is complete.
    """

    def __init__(
        self,
        table: TokenBytes,
        *,
        skip: frozenset[int],
        apart: frozenset[int],
        separator: str,
        errors: str,
    ) -> None:
        self._table, self._skip, self._apart = table, skip, apart
        self._separator = separator
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._before: bool | None = None  # whether the last token stood apart; None at the start

    def step(self, token_id: int) -> str:
        """The text that `token_id` completes: '' while a character is incomplete.

        Raises:
            ValueError: the id is negative or no whole number.
        """
        (known,) = as_ids(token_id)
        written = self._table[known]
        if not written or known in self._skip:
            return ""
        apart = known in self._apart
        opening = ""
        if self._before is not None and (apart or self._before):
            opening = self.finish() + self._separator
        self._before = apart
        return opening + self._decoder.decode(written)

    def finish(self) -> str:
        """What is left of an incomplete character at the end, as the `errors` setting shows it."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
