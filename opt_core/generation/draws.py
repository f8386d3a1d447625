"""The uniform numbers that sampling draws by: the same in every framework, at any batch size."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def fresh_seed() -> int:
    """A seed from the system's entropy; no generator of anybody else is touched."""
    return secrets.randbits(64)


def uniforms(
    seed: int | Sequence[int] | None, rows: int, steps: int, draws: int = 1
) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) for every draw of a generation -> float64 [rows, steps, draws].

    The number at (row, step, draw) depends on these three and the seed alone, so a longer plan,
    more rows or more draws a step change none of the others. A list holds one seed for each row:
    its row is then the one that the seed alone gives as row 0, whatever its place in the batch.
    None takes fresh entropy.

    The numbers are those of Philox 4x64-10 (Salmon et al., SC 2011) as NumPy guarantees its
    stream: key (seed, row), counter started at draw * 2**64, the upper 53 bits of each word.

    Raises:
        ValueError: a list with another number of seeds than rows, or a seed outside 64 bits.
    """
    if seed is None:
        seed = fresh_seed()
    if isinstance(seed, (int, np.integer)):
        keys = [(int(seed), row) for row in range(rows)]
    else:
        keys = [(int(one), 0) for one in seed]
    if len(keys) != rows:
        raise ValueError(
            f"seed lists {len(keys)} seeds for {rows} rows; give one for each row, or one number"
        )
    for one, _ in keys:
        if not 0 <= one < 2**64:
            raise ValueError(f"seed is {one}; it must be a whole number from 0 to 2**64 - 1")
    result = np.empty((rows, steps, draws))
    for row, key in enumerate(keys):
        for draw in range(draws):
            generator = np.random.Philox(
                key=np.array(key, np.uint64), counter=np.array([0, draw, 0, 0], np.uint64)
            )
            result[row, :, draw] = (generator.random_raw(steps) >> np.uint64(11)) * 2.0**-53
    return result
