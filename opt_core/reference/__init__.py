"""The model, its losses and its decoding in float64 NumPy: what every wing is held to."""

from opt_core.reference.decoding import (
    Generated,
    Record,
    disturbed,
    generate,
    generate_with_margins,
    is_sure,
    record,
    stream,
)
from opt_core.reference.heads import (
    CausalLM,
    QuestionAnswering,
    SequenceClassification,
    causal_lm,
    question_answering,
    sequence_classification,
)
from opt_core.reference.model import Forward, forward
from opt_core.reference.setup import Call

__all__ = [
    "Call",
    "CausalLM",
    "Forward",
    "Generated",
    "QuestionAnswering",
    "Record",
    "SequenceClassification",
    "causal_lm",
    "disturbed",
    "forward",
    "generate",
    "generate_with_margins",
    "is_sure",
    "question_answering",
    "record",
    "sequence_classification",
    "stream",
]
