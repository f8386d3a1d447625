"""A tiny model of a wing beside the reference with the same weights, both to generate with."""

from __future__ import annotations

from typing import Any

import numpy as np

from opt_core import reference
from opt_core.generation import GenerationConfig, Strategy
from opt_core.reference import Generated, Record
from opt_core.weights import Head
from tests.cases import Arrays, random_weights, tiny
from tests.wings import Wing

#: Choices closer than this to another one may fall differently in another order of summation.
MARGIN = 1e-4
#: Matrices of this deviation give scores that differ clearly.
STD = 0.3


class Subject:
    """A tiny model of a wing, and the weights that the reference computes with."""

    def __init__(self, wing: Wing, seed: int = 0, *, lightly: bool = False, **changes: Any) -> None:
        self.wing, self.config = wing, tiny(**changes)
        self._generate = wing.generate_lightly if lightly else wing.generate
        self.weights: Arrays = random_weights(self.config, Head.CAUSAL_LM, seed, std=STD)
        self.model = wing.build(Head.CAUSAL_LM, self.config, self.weights)

    def generate(self, ids: Any, mask: Any = None, **options: Any) -> Any:
        return self._generate(self.model, ids, attention_mask=mask, **options)

    def reference(self, ids: Any, mask: Any = None, **options: Any) -> Generated:
        """The reference's tokens without beams, and how sure each is."""
        return reference.generate_with_margins(*self._asked(ids, mask, options))

    def record(
        self, ids: Any, mask: Any = None, tokenizer: Any = None, **options: Any
    ) -> Record | None:
        """The reference's tokens and, of beams, their scores; None if a choice was close."""
        config, weights, *asked = self._asked(ids, mask, options)
        call = reference.Call(tokenizer=tokenizer)
        if asked[-1].strategy in (Strategy.BEAMS, Strategy.CONSTRAINED):
            other = reference.generate(config, reference.disturbed(weights, 0), *asked, call=call)
            found = reference.record(config, weights, *asked, call=call)
            return found if np.array_equal(found.sequences, other) else None
        sure = reference.generate_with_margins(config, weights, *asked, call=call)
        if sure.margins.min() < MARGIN:
            return None
        return Record(sure.sequences, (), ())

    def right(self, ids: Any, mask: Any = None, **options: Any) -> Any:
        """The reference's tokens, none of them a close choice."""
        found = self.record(ids, mask, **options)
        assert found is not None
        return found.sequences

    def _asked(self, ids: Any, mask: Any, options: dict[str, Any]) -> tuple[Any, ...]:
        asked = GenerationConfig.from_model_config(self.config).merged(**options)
        return self.config, self.weights, ids, mask, asked
