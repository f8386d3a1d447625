"""What every backend makes of the options of a continuation, and of what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
#: Token lists, and what each was ranked by; None where nothing was ranked.
Sequences = tuple[list[list[int]], list[float | None]]


def native_options(
    options: Mapping[str, Any], prompt: Any, array: Callable[[Ints], Any]
) -> dict[str, Any]:
    """The arguments of a model's own `generate`: its arrays and models, and nothing padded."""
    native = {**options, "attention_mask": array(np.ones(prompt.shape, np.int64))}
    if "assistant_model" in options:
        native["assistant_model"] = options["assistant_model"].model
    if "negative_prompt_ids" in options:
        given = options["negative_prompt_ids"]
        native["negative_prompt_ids"] = array(given)
        native["negative_prompt_attention_mask"] = array(np.ones_like(given))
    return native


def listed(sequences: Any, scores: Any, prompt: Ints) -> Sequences:
    """The new tokens of every sequence, and its score if beams were ranked."""
    rows: list[list[int]] = np.asarray(sequences)[:, prompt.shape[1] :].tolist()
    return rows, [None] * len(rows) if scores is None else np.asarray(scores).tolist()
