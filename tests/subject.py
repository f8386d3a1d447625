"""A tiny model of a wing beside the reference with the same weights, both to generate with."""

from __future__ import annotations

from typing import Any

from opt_core import reference
from opt_core.generation import GenerationConfig, Strategy
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
        """The reference's tokens without beams, and how sure each is."""
        return reference.generate_with_margins(*self._asked(ids, mask, options))

    def record(
        self, ids: Any, mask: Any = None, tokenizer: Any = None, **options: Any
    ) -> reference.Record | None:
        """All that the reference says, for any strategy; None if a choice was close."""
        asked, call = self._asked(ids, mask, options), reference.Call(tokenizer=tokenizer)
        if asked[-1].strategy not in (Strategy.BEAMS, Strategy.CONSTRAINED):
            found = reference.generate_with_margins(*asked, call=call)
            is_sure = found.margins.min() >= MARGIN
        else:
            is_sure = reference.is_sure(*asked, call=call, disturbances=1)
        return reference.record(*asked, call=call) if is_sure else None

    def right(self, ids: Any, mask: Any = None, **options: Any) -> Any:
        """The reference's tokens, none of them a close choice."""
        found = self.record(ids, mask, **options)
        assert found is not None
        return found.sequences

    def _asked(self, ids: Any, mask: Any, options: dict[str, Any]) -> tuple[Any, ...]:
        asked = GenerationConfig.from_model_config(self.config).merged(**options)
        return self.config, self.weights, ids, mask, asked
