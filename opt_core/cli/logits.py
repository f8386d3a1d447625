"""What every installed framework computes with two checkpoints, held to the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opt_core.checkpoint import Checkpoint
from opt_core.cli.backends import WINGS, Backend, NumpyReference, Scores, Wing, installed
from opt_core.cli.continuing import Ints
from opt_core.config import OPTConfig

if TYPE_CHECKING:
    from conversion.report import Logits
    from conversion.verifying import Verdict

#: The most by which float32 logits may differ from the reference's, as a share of the largest one.
FLOAT32_BOUND = 1e-5
#: The most by which those of weights rounded to a half type may differ from those of the others.
HALF_BOUND = 2e-2

#: Tokens of a row, and of which rows which are padding: none, some before, some behind.
_TOKENS = 8
_PADDING = (slice(0, 0), slice(0, 3), slice(6, 8))


@dataclass(frozen=True)
class Subject:
    """Two language models, and the tokens that both are given."""

    a: Path
    b: Path
    #: [3, T]: one row is padded before its tokens, one behind them.
    ids: Ints
    mask: Ints

    @classmethod
    def of(cls, a: Checkpoint, b: Checkpoint) -> Subject:
        """Two opened checkpoints.

        Raises:
            ValueError: a model has another head than that of a language model.
            CheckpointNotFound: there is no configuration.
        """
        from opt_core.weights import Head, head_in

        configs = [OPTConfig.from_pretrained(side.path) for side in (a, b)]
        for side, config in zip((a, b), configs, strict=True):
            head = head_in(config, side.tensors)
            if head not in (Head.NONE, Head.CAUSAL_LM):
                raise ValueError(
                    f"--run compares the logits of language models, and {side.path} is an "
                    f"OPT{head.value}; leave it out to compare the weights"
                )
        ids, mask = batch(
            vocabulary=min(config.vocab_size for config in configs),
            positions=min(config.max_position_embeddings for config in configs),
        )
        return cls(a.path, b.path, ids, mask)

    def compared(self, verdict: Verdict) -> Iterator[Logits]:
        """The reference on A and on B, then every installed wing on both.

        Weights that are equal give equal logits, so the bound from A to B is that of float32; that
        of rounded ones is wider, and different ones have none.
        """
        from conversion.report import Logits
        from conversion.verifying import Verdict

        bounds = {Verdict.ROUNDED: HALF_BOUND, Verdict.DIFFERENT: None}
        between = bounds.get(verdict, FLOAT32_BOUND)
        expected = self._both(NumpyReference)
        yield Logits.of("NumPy, float64", expected, expected, None, between)
        for name in installed():
            wing = WINGS[name]
            found = self._both(partial(_loaded, wing))
            title = f"{wing.title} {wing.version}, float32"
            yield Logits.of(title, found, expected, FLOAT32_BOUND, between)

    def _both(self, load: Callable[[Path], Backend]) -> tuple[Scores | str, Scores | str]:
        return self._scores(load, self.a), self._scores(load, self.b)

    def _scores(self, load: Callable[[Path], Backend], source: Path) -> Scores | str:
        """The logits of every token that is no padding: [N, V]; or why there are none."""
        try:
            found = load(source).logits(self.ids, self.mask)
        except (ValueError, OSError) as fault:
            return str(fault).partition("\n")[0]
        return found[self.mask.astype(np.bool_)]


def _loaded(wing: Wing, source: Path) -> Backend:
    return wing.load(source, None, None)


def batch(*, vocabulary: int, positions: int) -> tuple[Ints, Ints]:
    """Fixed tokens, spread over the vocabulary, and their mask -> int64 [3, T] twice."""
    length = min(_TOKENS, positions)
    spread = np.arange(1, 3 * length + 1, dtype=np.int64).reshape(3, length) * 7919
    ids = spread % vocabulary
    mask = np.ones_like(ids)
    for row, padding in enumerate(_PADDING):
        mask[row, padding] = 0
    # A row of padding alone would have no logits to compare.
    mask[:, -1] |= mask.sum(axis=1) == 0
    return ids, mask
