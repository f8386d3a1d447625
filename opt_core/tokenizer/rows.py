"""One row of model input: its texts, how much of them is kept, and what is put around them."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tokenizers import Encoding

T = TypeVar("T")
STRATEGIES = ("longest_first", "only_first", "only_second")


@dataclass(frozen=True, slots=True)
class Span:
    """The kept part of one tokenized text.

    `shift` is the number of characters that were put before the text, or before each of its words.
    """

    encoding: Encoding
    start: int
    stop: int
    shift: int = 0

    def __len__(self) -> int:
        return self.stop - self.start

    def cut(self, place: range) -> "Span":
        """The part of this span at `place`, counted from its own start."""
        return Span(self.encoding, self.start + place.start, self.start + place.stop, self.shift)

    def ids(self) -> list[int]:
        """The tokens' ids."""
        return self.encoding.ids[self.start : self.stop]

    def word_ids(self) -> list[int | None]:
        """For each token the word that it comes from."""
        return self.encoding.word_ids[self.start : self.stop]

    def offsets(self) -> list[tuple[int, int]]:
        """Where each token lies in the caller's text: start and end in characters."""
        own = self.encoding.offsets[self.start : self.stop]
        if not self.shift:
            return own
        return [(max(a - self.shift, 0), max(b - self.shift, 0)) for a, b in own]


@dataclass(frozen=True, slots=True)
class Row:
    """One or two spans, `bos` before each of them if it is not None, and padding around all."""

    spans: tuple[Span, ...]
    bos: int | None
    left: int = 0
    right: int = 0

    def __len__(self) -> int:
        content = sum(len(span) for span in self.spans)
        return self.left + content + self.specials + self.right

    @property
    def specials(self) -> int:
        """How many special tokens the row has: one before each text, as in the slow tokenizer."""
        return 0 if self.bos is None else len(self.spans)

    def ids(self, pad: int) -> list[int]:
        """The ids, with `pad` where there is padding."""
        return self._column(lambda _, span: span.ids(), lambda _: self.bos or 0, pad)

    def attention_mask(self) -> list[int]:
        """1 for every token that is not padding."""
        return self._column(lambda _, span: [1] * len(span), lambda _: 1, 0)

    def token_type_ids(self) -> list[int]:
        """The number of the text that a token, or the special token before it, belongs to."""
        return self._column(lambda text, span: [text] * len(span), lambda text: text, 0)

    def special_tokens_mask(self) -> list[int]:
        """1 for what was put around the texts; a special token inside a text counts as text."""
        return self._column(lambda _, span: [0] * len(span), lambda _: 1, 1)

    def offsets(self) -> list[tuple[int, int]]:
        """Where each token lies in its text; (0, 0) for what was put around."""
        return self._column(lambda _, span: span.offsets(), lambda _: (0, 0), (0, 0))

    def sequence_ids(self) -> list[int | None]:
        """The number of the text that a token comes from, None for what was put around."""
        return self._column(lambda text, span: [text] * len(span), lambda _: None, None)

    def word_ids(self) -> list[int | None]:
        """The word that a token comes from, None for what was put around."""
        return self._column(lambda _, span: span.word_ids(), lambda _: None, None)

    def _column(
        self, own: Callable[[int, Span], Sequence[T]], special: Callable[[int], T], padding: T
    ) -> list[T]:
        column = [padding] * self.left
        for text, span in enumerate(self.spans):
            if self.bos is not None:
                column.append(special(text))
            column.extend(own(text, span))
        return column + [padding] * self.right


@dataclass(frozen=True, slots=True)
class Truncation:
    """How rows are shortened; windows over what is cut overlap by `stride` tokens."""

    strategy: str
    max_length: int
    stride: int
    side: str

    def rows(self, rows: Sequence[Row], *, windows: bool) -> tuple[list[Row], list[int]]:
        """The shortened rows, each followed by its windows if asked for, and whose they are.

        Raises:
            ValueError: the strategy cannot reach `max_length`, or the stride fills a row.
        """
        # The fast tokenizer counts one special token here, for pairs too.
        room = self.max_length - int(any(row.specials for row in rows))
        if self.stride < 0 or (self.stride and self.stride >= room):
            raise ValueError(
                f"stride should be from 0 to less than the {room} tokens of text in a row"
                f" (max_length {self.max_length}), not {self.stride}"
            )
        cut = [self._cut(row) for row in rows]
        kept = [(n, r) for n, parts in enumerate(cut) for r in (parts if windows else parts[:1])]
        return [row for _, row in kept], [number for number, _ in kept]

    def _cut(self, row: Row) -> list[Row]:
        """The shortened row, then the windows over what was cut from it."""
        excess = len(row) - self.max_length
        if excess <= 0:
            return [row]
        lengths = [len(span) for span in row.spans]
        kept = self._kept(lengths, excess, row.specials)
        windows = [
            [span.cut(place) for place in self._windows(length, size)]
            for span, length, size in zip(row.spans, lengths, kept, strict=True)
        ]
        first, *others = windows
        if not others:
            return [Row((span,), row.bos) for span in first]
        (second,) = others
        # The order of the fast tokenizer: the second text's own windows come last.
        pairs = [(a, b) for a in first[1:] for b in second]
        pairs = [(first[0], second[0]), *pairs, *((first[0], b) for b in second[1:])]
        return [Row(pair, row.bos) for pair in pairs]

    def _kept(self, lengths: Sequence[int], excess: int, specials: int) -> tuple[int, ...]:
        """How many tokens of each text stay."""
        length, *second = lengths
        if second:
            return self._kept_of_pair(length, second[0], excess, specials)
        if self.strategy == "only_second" and length > excess:
            raise self._unreachable("there is no second text")
        return (max(length - excess, 0),)

    def _kept_of_pair(self, first: int, second: int, excess: int, specials: int) -> tuple[int, int]:
        """As the slow tokenizer: the longer text goes first, then both in turn from the second."""
        if self.strategy == "longest_first":
            uneven = min(abs(first - second), excess)
            even = excess - uneven
            if first > second:
                first -= uneven
            else:
                second -= uneven
            return max(first - even // 2, 0), max(second - (even - even // 2), 0)
        at_first = self.strategy == "only_first"
        length = first if at_first else second
        if length > excess:
            return (first - excess, second) if at_first else (first, second - excess)
        # The fast tokenizer counts one special token for a pair, and where that leaves no text at
        # all it has nothing to refuse. Where it does not raise, the slow one's answer stands.
        extra = specials // 2
        if length <= excess - extra and self.max_length > extra:
            which = "first" if at_first else "second"
            raise self._unreachable(f"the {which} text has only {length}")
        warnings.warn(
            f"truncation={self.strategy!r} cannot take {excess} tokens from a text of {length}:"
            f" a row stays longer than max_length={self.max_length}",
            stacklevel=5,
        )
        return first, second

    def _unreachable(self, why: str) -> ValueError:
        return ValueError(
            f"truncation={self.strategy!r} cannot shorten a row to max_length={self.max_length}:"
            f" {why}. Use truncation='longest_first' or a larger max_length"
        )

    def _windows(self, length: int, size: int) -> list[range]:
        """What is kept of a text of `length` tokens, then windows of `size` over the rest."""
        if size >= length:
            return [range(length)]
        if size == 0:
            return [range(0), range(length)]
        if self.stride >= size:
            raise ValueError(
                f"stride should be less than the {size} tokens of a text that a row has room for"
                f" (max_length {self.max_length}), not {self.stride}"
            )
        starts = range(0, length - self.stride, size - self.stride)
        windows = [range(start, min(start + size, length)) for start in starts]
        if self.side == "right":
            return windows
        return [range(length - w.stop, length - w.start) for w in windows]


_COLUMNS: dict[str, Callable[[Row], list[Any]]] = {
    "token_type_ids": Row.token_type_ids,
    "attention_mask": Row.attention_mask,
    "special_tokens_mask": Row.special_tokens_mask,
    "offset_mapping": Row.offsets,
}


def columns(rows: Sequence[Row], asked: Mapping[str, bool], pad: int) -> dict[str, list[Any]]:
    """The ids of every row, and the columns that are asked for."""
    return {
        "input_ids": [row.ids(pad) for row in rows],
        **{n: [column(row) for row in rows] for n, column in _COLUMNS.items() if asked[n]},
    }
