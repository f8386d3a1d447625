"""A tiny model of a wing beside the reference with the same weights, both to generate with."""

from __future__ import annotations

from typing import Any

from opt_core import reference
from opt_core.generation import GenerationConfig
from opt_core.weights import Head
from tests.cases import Arrays, random_weights, tiny
from tests.wings import Wing

#: Choices closer than this to another one may fall differently in another order of summation.
MARGIN = 1e-4
#: Matrices of this deviation give scores that differ clearly.
STD = 0.3


class Subject:
    """A tiny model of a wing, and the weights that the reference computes with."""

    def __init__(self, wing: Wing, seed: int = 0, **changes: Any) -> None:
        self.wing, self.config = wing, tiny(**changes)
        self.weights: Arrays = random_weights(self.config, Head.CAUSAL_LM, seed, std=STD)
        self.model = wing.build(Head.CAUSAL_LM, self.config, self.weights)

    def generate(self, ids: Any, mask: Any = None, **options: Any) -> Any:
        return self.wing.generate(self.model, ids, attention_mask=mask, **options)

    def reference(self, ids: Any, mask: Any = None, **options: Any) -> reference.Generated:
        asked = GenerationConfig.from_model_config(self.config).merged(**options)
        return reference.generate_with_margins(self.config, self.weights, ids, mask, asked)

    def right(self, ids: Any, mask: Any = None, **options: Any) -> Any:
        """The reference's tokens, none of them a close choice."""
        generated = self.reference(ids, mask, **options)
        assert generated.margins.min() >= MARGIN
        return generated.sequences
