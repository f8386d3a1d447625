"""The public OPT classes, and the Linen modules that they run."""

from opt_flax.models.base import FlaxOPTPreTrainedModel
from opt_flax.models.opt import (
    FlaxOPTForCausalLM,
    FlaxOPTForCausalLMModule,
    FlaxOPTForQuestionAnswering,
    FlaxOPTForQuestionAnsweringModule,
    FlaxOPTForSequenceClassification,
    FlaxOPTForSequenceClassificationModule,
    FlaxOPTModel,
    FlaxOPTModule,
)

__all__ = [
    "FlaxOPTForCausalLM",
    "FlaxOPTForCausalLMModule",
    "FlaxOPTForQuestionAnswering",
    "FlaxOPTForQuestionAnsweringModule",
    "FlaxOPTForSequenceClassification",
    "FlaxOPTForSequenceClassificationModule",
    "FlaxOPTModel",
    "FlaxOPTModule",
    "FlaxOPTPreTrainedModel",
]
