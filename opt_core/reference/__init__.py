"""The model, its losses and its decoding in float64 NumPy: what every wing is held to."""

from opt_core.reference.decoding import Generated, generate, generate_with_margins, stream
from opt_core.reference.heads import (
    CausalLM,
    QuestionAnswering,
    SequenceClassification,
    causal_lm,
    question_answering,
    sequence_classification,
)
from opt_core.reference.model import Forward, forward

__all__ = [
    "CausalLM",
    "Forward",
    "Generated",
    "QuestionAnswering",
    "SequenceClassification",
    "causal_lm",
    "forward",
    "generate",
    "generate_with_margins",
    "question_answering",
    "sequence_classification",
    "stream",
]
