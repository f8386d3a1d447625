"""Rows of different lengths brought to one length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opt_core.tokenizer.decoding import as_lists
from opt_core.tokenizer.rows import Row

# What stands where there is no token; the ids have the padding token's.
_FILLERS = {
    "attention_mask": 0,
    "token_type_ids": 0,
    "special_tokens_mask": 1,
    "offset_mapping": (0, 0),
}


@dataclass(frozen=True, slots=True)
class Padding:
    """To the longest row where `length` is None, else to `length`; a longer row stays as it is.

    Raises:
        ValueError: a field is not possible.
    """

    kind: bool | str
    length: int | None
    multiple: int | None
    side: str

    def __post_init__(self) -> None:
        if self.kind is not True and self.kind not in ("longest", "max_length"):
            raise ValueError(
                "padding should be True, False, 'longest', 'max_length' or 'do_not_pad', not"
                f" {self.kind!r}"
            )
        if self.side not in ("left", "right"):
            raise ValueError(f"padding_side should be 'left' or 'right', not {self.side!r}")
        if self.multiple is not None and self.multiple < 1:
            raise ValueError(f"pad_to_multiple_of should be at least 1, not {self.multiple}")

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with padding on one side."""
        target = self._target([len(row) for row in rows])
        padded = []
        for row in rows:
            more = max(target - len(row), 0)
            left, right = (more, 0) if self.side == "left" else (0, more)
            padded.append(replace(row, left=left, right=right))
        return padded

    def columns(self, values: Mapping[str, list[Any]], pad: int) -> dict[str, list[Any]]:
        """The columns of rows that are lists already, padded where they go with the ids."""
        target = self._target([len(ids) for ids in values["input_ids"]])
        fillers = {"input_ids": pad, **_FILLERS}
        return {
            name: [self._fill(row, fillers[name], target) for row in column]
            if name in fillers
            else column
            for name, column in values.items()
        }

    def _fill(self, row: Sequence[Any], filler: Any, target: int) -> list[Any]:
        more = [filler] * (target - len(row))
        return [*more, *row] if self.side == "left" else [*row, *more]

    def _target(self, lengths: Sequence[int]) -> int:
        target = max(lengths, default=0) if self.length is None else self.length
        return target if self.multiple is None else -(-target // self.multiple) * self.multiple


def read_columns(encoded: Any) -> tuple[dict[str, list[Any]], bool]:
    """One row, a batch, or a list of rows as columns of lists, and whether there were many.

    Raises:
        ValueError: there are no ids, or rows have different keys.
    """
    if isinstance(encoded, Mapping):
        values = {name: as_lists(value) for name, value in encoded.items()}
    elif isinstance(encoded, Sequence) and all(isinstance(row, Mapping) for row in encoded):
        names = list(dict.fromkeys(name for row in encoded for name in row))
        for name in names:
            if lacking := [place for place, row in enumerate(encoded) if name not in row]:
                raise ValueError(
                    f"row {lacking[0]} of {len(encoded)} lacks {name!r}, others have it"
                )
        values = {name: [as_lists(row[name]) for row in encoded] for name in names}
    else:
        raise ValueError(
            f"expected a dictionary or a list of dictionaries of token ids, not {encoded!r:.80}"
        )
    ids = values.get("input_ids")
    if not isinstance(ids, list):
        raise ValueError(f"there are no 'input_ids' to pad, only {', '.join(values) or 'nothing'}")
    if all(isinstance(row, list) for row in ids) and (ids or not isinstance(encoded, Mapping)):
        return values, True
    return {name: [value] for name, value in values.items()}, False
