"""What each field of a configuration may hold, and what a decoder reads of any configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

#: Names that users write, and the function each stands for. The tanh form of gelu has four names.
ACTIVATIONS: Mapping[str, str] = {
    "relu": "relu",
    "relu2": "relu2",
    "relu6": "relu6",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}
DTYPES = ("float32", "float16", "bfloat16", "float64")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


class DecoderConfig(Protocol):
    """What any decoder of this house reads of a configuration, whatever the family."""

    vocab_size: int
    hidden_size: int
    word_embed_proj_dim: int
    num_hidden_layers: int
    ffn_dim: int
    max_position_embeddings: int
    do_layer_norm_before: bool
    activation_function: str
    enable_bias: bool
    layer_norm_elementwise_affine: bool
    dropout: float
    attention_dropout: float
    layerdrop: float
    init_std: float
    pad_token_id: int | None

    @property
    def position_offset(self) -> int:
        """Rows of the position table that come before the row of position 0."""

    @property
    def layer_norm_eps(self) -> float:
        """What every layer norm adds to the variance."""

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether a norm follows the last layer."""

    @property
    def has_projections(self) -> bool:
        """Whether embeddings are narrower or wider than the layers."""

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""

    def heads(self, layer: int) -> int:
        """The number of attention heads that a layer has left."""


class Rule(NamedTuple):
    """What one field may hold, in words and as a test.

    `fixed` gives what about the value decides names or shapes of weights: that part cannot change
    once a model is built.
    """

    words: str
    holds: Callable[[Any], bool]
    fixed: Callable[[Any], Any] | None = None


def is_int(value: Any) -> bool:
    """Whether the value is a whole number; True and False are none here."""
    return isinstance(value, int) and not isinstance(value, bool)


def _itself(value: Any) -> Any:
    return value


def _whole(least: int, most: int, *, fixed: bool = False, optional: bool = False) -> Rule:
    words = f"a whole number from {least} to {most}" + (" or None" if optional else "")
    return Rule(
        words,
        lambda v: (optional and v is None) or (is_int(v) and least <= v <= most),
        _itself if fixed else None,
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_map(value: Any, key: Callable[[Any], bool], item: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(key(k) and item(v) for k, v in value.items())


def _is_real(value: Any) -> bool:
    return (is_int(value) or isinstance(value, float)) and math.isfinite(value)


_FLAG = Rule("True or False", lambda v: isinstance(v, bool))
_FIXED_FLAG = _FLAG._replace(fixed=_itself)
_RATE = Rule("a number from 0 to 1", lambda v: _is_real(v) and 0 <= v <= 1)
_TOKEN = _whole(0, 2**24, optional=True)
_STOPS = Rule(
    "a token id, a list of token ids or None",
    lambda v: (
        _TOKEN.holds(v)
        or (isinstance(v, list) and bool(v) and all(is_int(i) and i >= 0 for i in v))
    ),
)

# The upper ends lie far above every published model; they turn a damaged number into an error
# before memory is asked for.
RULES: Mapping[str, Rule] = {
    "vocab_size": _whole(1, 2**24, fixed=True),
    "hidden_size": _whole(1, 2**20, fixed=True),
    "num_hidden_layers": _whole(1, 2**14, fixed=True),
    "ffn_dim": _whole(1, 2**24, fixed=True),
    "max_position_embeddings": _whole(1, 2**24, fixed=True),
    "do_layer_norm_before": _FIXED_FLAG,
    "_remove_final_layer_norm": _FIXED_FLAG,
    "word_embed_proj_dim": _whole(1, 2**20, fixed=True),
    "dropout": _RATE,
    "attention_dropout": _RATE,
    "num_attention_heads": _whole(1, 2**16, fixed=True),
    "activation_function": Rule(
        f"one of {', '.join(ACTIVATIONS)}",
        lambda v: isinstance(v, str) and v in ACTIVATIONS,
        _itself,
    ),
    "layerdrop": _RATE,
    "init_std": Rule("a number of at least 0", lambda v: _is_real(v) and v >= 0),
    "use_cache": _FLAG,
    "pad_token_id": _TOKEN,
    "bos_token_id": _TOKEN,
    "eos_token_id": _STOPS,
    "enable_bias": _FIXED_FLAG,
    "layer_norm_elementwise_affine": _FIXED_FLAG,
    "tie_word_embeddings": _FIXED_FLAG,
    "id2label": Rule(
        "a mapping from 0, 1, 2, … to names",
        lambda v: _is_map(v, is_int, _is_text) and bool(v) and sorted(v) == list(range(len(v))),
        len,
    ),
    "label2id": Rule(
        "a mapping from names to whole numbers", lambda v: _is_map(v, _is_text, is_int)
    ),
    "problem_type": Rule(
        f"one of {', '.join(PROBLEM_TYPES)}, or None", lambda v: v is None or v in PROBLEM_TYPES
    ),
    "pruned_heads": Rule(
        "a mapping from layer numbers to lists of head numbers",
        lambda v: _is_map(
            v, is_int, lambda heads: isinstance(heads, list) and all(map(is_int, heads))
        ),
        _itself,
    ),
    "output_attentions": _FLAG,
    "output_hidden_states": _FLAG,
    "return_dict": _FLAG,
    "dtype": Rule(f"one of {', '.join(DTYPES)}, or None", lambda v: v is None or v in DTYPES),
}

#: What the hub and other libraries write onto a configuration. It says nothing about the model.
METADATA = (
    "name_or_path",
    "architectures",
    "transformers_version",
    "tokenizer_class",
    "finetuning_task",
    "task_specific_params",
)


def check_together(config: Any) -> None:
    """The rules between fields.

    Raises:
        ValueError: naming the fields, their values and the remedy.
    """
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"OPTConfig.hidden_size is {config.hidden_size}, which num_attention_heads "
            f"({config.num_attention_heads}) does not divide; choose a multiple of it"
        )
    tokens = {name: getattr(config, name) for name in ("pad_token_id", "bos_token_id")}
    stops = config.eos_token_id
    tokens |= {"eos_token_id": max(stops) if isinstance(stops, list) else stops}
    for name, token in tokens.items():
        if token is not None and token >= config.vocab_size:
            raise ValueError(
                f"OPTConfig.{name} is {token}, outside the vocabulary of {config.vocab_size}; "
                "give an id below vocab_size, or None"
            )
    for layer, heads in config.pruned_heads.items():
        known = range(config.num_attention_heads)
        if not 0 <= layer < config.num_hidden_layers or not set(heads) < set(known):
            raise ValueError(
                f"OPTConfig.pruned_heads has {{{layer}: {heads}}}; layers go from 0 to "
                f"{config.num_hidden_layers - 1}, heads from 0 to {known[-1]}, and one must stay"
            )
