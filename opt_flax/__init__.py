"""OPT for JAX users, in Flax Linen."""

try:
    import flax as _flax  # noqa: F401
    import jax as _jax  # noqa: F401
except ImportError as fault:
    raise ImportError(
        "opt_flax needs Flax, which is not installed: pip install 'optlm[flax]'"
    ) from fault

from opt_core import __version__
from opt_core.config import OPTConfig
from opt_core.generation import GenerationConfig, TextIteratorStreamer, TextStreamer
from opt_flax.decoder import Cache
from opt_flax.models import (
    FlaxOPTForCausalLM,
    FlaxOPTForCausalLMModule,
    FlaxOPTForQuestionAnswering,
    FlaxOPTForQuestionAnsweringModule,
    FlaxOPTForSequenceClassification,
    FlaxOPTForSequenceClassificationModule,
    FlaxOPTModel,
    FlaxOPTModule,
    FlaxOPTPreTrainedModel,
)
from opt_flax.weights import shard, shardings

__all__ = [
    "Cache",
    "FlaxOPTForCausalLM",
    "FlaxOPTForCausalLMModule",
    "FlaxOPTForQuestionAnswering",
    "FlaxOPTForQuestionAnsweringModule",
    "FlaxOPTForSequenceClassification",
    "FlaxOPTForSequenceClassificationModule",
    "FlaxOPTModel",
    "FlaxOPTModule",
    "FlaxOPTPreTrainedModel",
    "GenerationConfig",
    "OPTConfig",
    "TextIteratorStreamer",
    "TextStreamer",
    "__version__",
    "shard",
    "shardings",
]
