"""OPT for PyTorch users."""

try:
    import torch as _torch  # noqa: F401
except ImportError as fault:
    raise ImportError(
        "opt_torch needs PyTorch, which is not installed: pip install 'optlm[torch]'"
    ) from fault

from opt_core import __version__
from opt_core.config import OPTConfig
from opt_core.generation import GenerationConfig, TextIteratorStreamer, TextStreamer
from opt_torch.decoder import Cache
from opt_torch.models import (
    OPTForCausalLM,
    OPTForQuestionAnswering,
    OPTForSequenceClassification,
    OPTModel,
    OPTPreTrainedModel,
)
from opt_torch.weights import shard

__all__ = [
    "Cache",
    "GenerationConfig",
    "OPTConfig",
    "OPTForCausalLM",
    "OPTForQuestionAnswering",
    "OPTForSequenceClassification",
    "OPTModel",
    "OPTPreTrainedModel",
    "TextIteratorStreamer",
    "TextStreamer",
    "__version__",
    "shard",
]
