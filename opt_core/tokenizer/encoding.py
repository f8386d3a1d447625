"""What a tokenizer returns: a dictionary of lists or of one framework's arrays."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from opt_core.tokenizer.rows import Row

# module, function that takes a NumPy array, integer type, extra of the distribution
_FRAMEWORKS: dict[str, tuple[str, str, type[np.signedinteger[Any]], str]] = {
    "np": ("numpy", "asarray", np.int64, ""),
    "pt": ("torch", "as_tensor", np.int64, "torch"),
    "tf": ("tensorflow", "convert_to_tensor", np.int32, "tensorflow"),
    "jax": ("jax.numpy", "asarray", np.int32, "flax"),
}


class BatchEncoding(dict[str, Any]):
    """The dictionary of model inputs, also read by attribute, with the rows' origins beside it.

    Built from a plain dictionary it has no rows, so only what the dictionary holds can be asked.
    """

    def __init__(self, data: Mapping[str, Any] | None = None, rows: Sequence[Row] = ()) -> None:
        super().__init__(data or {})
        self._rows = tuple(rows)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {', '.join(self)}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Rows keep the library's encodings, which another process has no use for.
        return type(self), (dict(self),)

    def to(self, device: Any, *, non_blocking: bool = False) -> "BatchEncoding":
        """The same with every torch tensor on `device`; other values stay as they are."""
        moved = {
            key: value.to(device, non_blocking=non_blocking) if hasattr(value, "to") else value
            for key, value in self.items()
        }
        return BatchEncoding(moved, self._rows)

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row: 0 in the first text, 1 in the second, None where in neither."""
        return self._row(batch_index).sequence_ids()

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row the word it comes from, None for a special or padding token."""
        return self._row(batch_index).word_ids()

    def _row(self, batch_index: int) -> Row:
        if not -len(self._rows) <= batch_index < len(self._rows):
            raise ValueError(
                f"there is no row {batch_index}: {len(self._rows)} are known. Ask the record that"
                " the tokenizer returned, not one made from it"
            )
        return self._rows[batch_index]


def to_arrays(columns: Mapping[str, Any], framework: str) -> dict[str, Any]:
    """Every column as an array: `[B, T]` for ids and masks, `[B, T, 2]` for offsets.

    Raises:
        ImportError: the framework is not installed.
        ValueError: there is no such framework, or rows have different lengths.
    """
    # transformers names them by an enumeration of strings.
    key = getattr(framework, "value", framework)
    if key not in _FRAMEWORKS:
        known = ", ".join(repr(name) for name in _FRAMEWORKS)
        raise ValueError(f"return_tensors should be one of {known}, not {framework!r}")
    module_name, function, integer, extra = _FRAMEWORKS[key]
    try:
        convert = getattr(import_module(module_name), function)
    except ImportError as error:
        raise ImportError(
            f"return_tensors={key!r} needs {module_name.partition('.')[0]}, which is not"
            f" installed: pip install 'optlm[{extra}]'"
        ) from error
    return {name: convert(_array(name, values, integer)) for name, values in columns.items()}


def _array(name: str, values: Any, integer: type[np.signedinteger[Any]]) -> np.ndarray[Any, Any]:
    try:
        array = np.asarray(values)
    except ValueError:
        lengths = [len(value) for value in values]
        raise ValueError(
            f"the rows of {name!r} have {min(lengths)} to {max(lengths)} entries and cannot be one"
            " array: pass padding=True, and truncation=True where texts are too long"
        ) from None
    if array.dtype.kind == "f" and array.size:
        return array.astype(np.float32)
    return array if array.dtype.kind == "b" else array.astype(integer)
