"""OPT for Keras users, on TensorFlow."""

try:
    import keras as _keras
    import tensorflow as _tensorflow  # noqa: F401
except ImportError as fault:
    raise ImportError(
        "opt_tf needs TensorFlow, which is not installed: pip install 'optlm[tensorflow]'"
    ) from fault

if _keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"opt_tf computes with TensorFlow, but Keras runs on {_keras.backend.backend()}: set "
        "KERAS_BACKEND=tensorflow before keras is imported"
    )

from opt_core import __version__
from opt_core.config import OPTConfig
from opt_core.generation import GenerationConfig, TextIteratorStreamer, TextStreamer
from opt_tf.decoder import Cache
from opt_tf.models import (
    TFOPTForCausalLM,
    TFOPTForQuestionAnswering,
    TFOPTForSequenceClassification,
    TFOPTModel,
    TFOPTPreTrainedModel,
)

__all__ = [
    "Cache",
    "GenerationConfig",
    "OPTConfig",
    "TFOPTForCausalLM",
    "TFOPTForQuestionAnswering",
    "TFOPTForSequenceClassification",
    "TFOPTModel",
    "TFOPTPreTrainedModel",
    "TextIteratorStreamer",
    "TextStreamer",
    "__version__",
]
