"""The published sizes, one line each."""

from collections.abc import Mapping
from typing import Any


def _size(layers: int, width: int, heads: int, **other: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "ffn_dim": 4 * width,
        **other,
    }


_GALACTICA: dict[str, Any] = {
    "vocab_size": 50000,
    "activation_function": "gelu",
    "enable_bias": False,
    "layer_norm_elementwise_affine": False,
    "attention_dropout": 0.1,
    "bos_token_id": 0,
}

#: The sizes of table 1 of the OPT paper (arXiv 2205.01068) and of Galactica (arXiv 2211.09085).
PRESETS: Mapping[str, dict[str, Any]] = {
    "125m": _size(12, 768, 12),
    "350m": _size(24, 1024, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "1.3b": _size(24, 2048, 32),
    "2.7b": _size(32, 2560, 32),
    "6.7b": _size(32, 4096, 32),
    "13b": _size(40, 5120, 40),
    "30b": _size(48, 7168, 56),
    "66b": _size(64, 9216, 72),
    "175b": _size(96, 12288, 96),
    "galactica-125m": _size(12, 768, 12, **_GALACTICA),
    "galactica-1.3b": _size(24, 2048, 32, **_GALACTICA),
    "galactica-6.7b": _size(32, 4096, 32, **_GALACTICA),
    "galactica-30b": _size(48, 7168, 56, **_GALACTICA),
    "galactica-120b": _size(96, 10240, 80, **_GALACTICA),
}
