"""The public OPT classes."""

from opt_tf.models.base import TFOPTPreTrainedModel
from opt_tf.models.opt import (
    TFOPTForCausalLM,
    TFOPTForQuestionAnswering,
    TFOPTForSequenceClassification,
    TFOPTModel,
)

__all__ = [
    "TFOPTForCausalLM",
    "TFOPTForQuestionAnswering",
    "TFOPTForSequenceClassification",
    "TFOPTModel",
    "TFOPTPreTrainedModel",
]
