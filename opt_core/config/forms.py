"""The forms in which values of a configuration come, brought to the one that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opt_core.config.rules import is_int


def int_keys(values: Any) -> Any:
    """Whole-number keys that JSON has turned into text, turned back; the rest is left to rules."""
    try:
        return {int(k) if isinstance(k, str) else k: v for k, v in values.items()}
    except (TypeError, ValueError, AttributeError):
        return values


def heads(values: Any) -> Any:
    """Head numbers in order, each once, by layer."""
    layers = int_keys(values)
    if not isinstance(layers, dict):
        return layers
    try:
        return {layer: sorted(set(layers[layer])) for layer in sorted(layers)}
    except TypeError:
        return layers


def labels(
    count: int | None, names: Mapping[int, str] | None, numbers: Mapping[str, int] | None
) -> tuple[Any, Any]:
    """`id2label` and `label2id` from what is given of three ways to say it."""
    if names is None and isinstance(numbers, Mapping) and numbers:
        names = {number: name for name, number in numbers.items()}
    if names is not None:
        names = int_keys(names)
        if count is not None and count != len(names):
            raise ValueError(
                f"OPTConfig.num_labels is {count!r}, but {len(names)} labels are named; "
                "give one of the two, or make them agree"
            )
    else:
        count = 2 if count is None else count
        if not is_int(count) or not 1 <= count <= 2**24:
            raise ValueError(
                f"OPTConfig.num_labels is {count!r}; it must be a whole number from 1 to {2**24}"
            )
        names = {index: f"LABEL_{index}" for index in range(count)}
    if numbers is None and isinstance(names, Mapping):
        numbers = {name: number for number, name in names.items()}
    return names, dict(numbers) if isinstance(numbers, Mapping) else numbers


def dtype_name(value: Any) -> Any:
    """A framework's dtype object, a NumPy scalar type or a name -> the name."""
    if value is None or isinstance(value, str):
        return value if value is None else value.removeprefix("torch.")
    return getattr(value, "__name__", None) or str(value).removeprefix("torch.")
