"""What a caller may hand over as text, brought into one form: a list of pairs."""

from collections.abc import Sequence
from typing import Any, TypeAlias

Text: TypeAlias = str | Sequence[str]
Pair: TypeAlias = tuple[Text, Text | None]

_EXPECTED = "a text is a str, a batch a list of str or of pairs of str"
_EXPECTED_WORDS = "with is_split_into_words a text is a list of str, a batch a list of those"


def read_texts(text: Any, text_pair: Any, split: bool) -> tuple[list[Pair], bool]:
    """The texts as pairs whose second member may be None, and whether they came as a batch.

    Raises:
        ValueError: the arguments are no text, pair, batch or batch of pairs.
    """
    if _is_text(text, split):
        if text_pair is not None and not _is_text(text_pair, split):
            raise ValueError(f"text is one text, so text_pair should be one, not {text_pair!r:.80}")
        return [(text, text_pair)], False
    if not isinstance(text, list | tuple):
        expected = _EXPECTED_WORDS if split else _EXPECTED
        raise ValueError(f"{expected}; found {type(text).__name__}: {text!r:.80}")
    if text_pair is None:
        return [_read_entry(entry, place, split) for place, entry in enumerate(text)], True
    if not isinstance(text_pair, list | tuple) or len(text_pair) != len(text):
        raise ValueError(
            f"text is a batch of {len(text)}, so text_pair should be a list as long, not"
            f" {text_pair!r:.80}"
        )
    pairs = list(zip(text, text_pair, strict=True))
    return [_read_pair(pair, place, split) for place, pair in enumerate(pairs)], True


def surrogate_error(texts: Sequence[Text]) -> ValueError:
    """Names the first character that no UTF-8 can hold; there must be one."""
    place, character = next(
        (place, character)
        for text in texts
        for part in ([text] if isinstance(text, str) else text)
        for place, character in enumerate(part)
        if "\ud800" <= character <= "\udfff"
    )
    return ValueError(
        f"a text has the lone surrogate U+{ord(character):04X} at character {place}, which is no"
        " Unicode text: decode it with errors='replace'"
    )


def _is_text(value: Any, split: bool) -> bool:
    if not split:
        return isinstance(value, str)
    return isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)


def _read_entry(entry: Any, place: int, split: bool) -> Pair:
    """A member of a batch: a text, or a pair in a tuple (unless split, in a list too)."""
    if _is_text(entry, split):
        return entry, None
    if isinstance(entry, tuple if split else list | tuple) and len(entry) == 2:
        return _read_pair((entry[0], entry[1]), place, split)
    expected = _EXPECTED_WORDS if split else _EXPECTED
    raise ValueError(f"{expected}; entry {place} is {entry!r:.80}")


def _read_pair(pair: Pair, place: int, split: bool) -> Pair:
    if all(_is_text(text, split) for text in pair):
        return pair
    expected = _EXPECTED_WORDS if split else _EXPECTED
    raise ValueError(f"{expected}; the pair {place} is {pair!r:.80}")
