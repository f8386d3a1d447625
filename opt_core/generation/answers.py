"""What functions of the caller answer, brought to one form."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from opt_core import arguments


def allowed_tokens(
    function: object, row: int, answer: Any, vocab_size: int
) -> npt.NDArray[np.bool_]:
    """Which tokens `prefix_allowed_tokens_fn` allows behind a row -> bool [V].

    It may answer with ids, in whatever can be gone through, or with bool [V].

    Raises:
        ValueError: it is something else; names the function and the row.
    """
    try:
        values = np.asarray(answer if hasattr(answer, "__array__") else list(answer))
    except (TypeError, ValueError) as fault:
        raise arguments.unknown_allowed(function, row, vocab_size) from fault
    if values.dtype == np.bool_ and values.shape == (vocab_size,):
        return values
    are_ids = values.ndim == 1 and (np.issubdtype(values.dtype, np.integer) or not values.size)
    if not are_ids or ((values < 0) | (values >= vocab_size)).any():
        raise arguments.unknown_allowed(function, row, vocab_size)
    result = np.zeros(vocab_size, np.bool_)
    result[values.astype(np.int64)] = True
    return result
