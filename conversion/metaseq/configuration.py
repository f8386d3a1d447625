"""The configuration of a metaseq checkpoint: its shapes, and the settings that are kept with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversion.torch_file import entries_of
from opt_core.config import OPTConfig
from opt_core.weights import LM_HEAD_NAME

# What metaseq calls the chances of dropping something out, and the field of the configuration.
_RATES = {
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "decoder_layerdrop": "layerdrop",
}
# Metaseq's names of activations that have another one today; the first is written.
_ACTIVATIONS = {"gelu_accurate": "gelu_new", "gelu_fast": "gelu_new"}
_DECODER = "model.decoder."


def fields_of(
    content: Mapping[Any, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any] | None:
    """Fields of `OPTConfig`, given what lies beside the tensors and their shapes.

    Sizes are those of the tensors, by canonical name. The number of heads is in no shape: it comes
    from the `cfg` or the `args` that metaseq keeps, and without it there is no configuration.
    """
    settings = _settings(content)
    shapes = {name.removeprefix(_DECODER): shape for name, shape in shapes.items()}
    heads, sizes = settings.get("decoder_attention_heads"), _sizes(shapes)
    if sizes is None or type(heads) is not int:
        return None
    fields = sizes | _switches(shapes, settings) | {"num_attention_heads": heads}
    fields |= {
        field: float(rate)
        for name, field in _RATES.items()
        if isinstance(rate := settings.get(name), int | float)
    }
    activation = settings.get("activation_fn")
    if isinstance(activation, str):
        fields["activation_function"] = _ACTIVATIONS.get(activation, activation)
    return fields


def _settings(content: Mapping[Any, Any]) -> dict[str, object]:
    """The settings of the model, wherever they are kept."""
    configuration = entries_of(content.get("cfg"))
    model = entries_of(configuration.get("model"))
    return entries_of(content.get("args")) | configuration | model


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    names = ("embed_tokens.weight", "embed_positions.weight", "layers.0.fc1.weight")
    matrices = [shapes[name] for name in names if len(shapes.get(name, ())) == 2]
    if len(matrices) != len(names):
        return None
    (vocabulary, width), (positions, hidden), (inner, _) = matrices
    return {
        "vocab_size": vocabulary,
        "word_embed_proj_dim": width,
        "hidden_size": hidden,
        "max_position_embeddings": positions - OPTConfig.position_offset,
        "ffn_dim": inner,
        "num_hidden_layers": len({n.split(".")[1] for n in shapes if n.startswith("layers.")}),
    }


def _switches(
    shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, object]
) -> dict[str, Any]:
    """What the model has and has not; where a tensor tells, it is believed before a setting."""
    has_last_norm = "final_layer_norm.weight" in shapes
    has_affine = "layers.0.self_attn_layer_norm.weight" in shapes
    # Models that normalise after each block have no last norm, and say so; later versions of
    # metaseq have no such models, and no such setting.
    is_before = has_last_norm or settings.get("decoder_normalize_before") is not False
    is_untied = settings.get("share_decoder_input_output_embed") is False
    return {
        "do_layer_norm_before": is_before,
        "_remove_final_layer_norm": is_before and has_affine and not has_last_norm,
        "enable_bias": "layers.0.fc1.bias" in shapes,
        "layer_norm_elementwise_affine": has_affine,
        "tie_word_embeddings": not (is_untied and LM_HEAD_NAME in shapes),
    }


def settings_of(config: OPTConfig) -> dict[str, object]:
    """A model's settings as metaseq calls them; `config_of` understands them."""
    names = {today: name for name, today in reversed(_ACTIVATIONS.items())}
    activation = config.activation_function
    return {
        "_name": "transformer_lm_gpt",
        "activation_fn": names.get(activation, activation),
        "decoder_layers": config.num_hidden_layers,
        "decoder_attention_heads": config.num_attention_heads,
        "decoder_embed_dim": config.hidden_size,
        "decoder_input_dim": config.word_embed_proj_dim,
        "decoder_output_dim": config.word_embed_proj_dim,
        "decoder_ffn_embed_dim": config.ffn_dim,
        "decoder_normalize_before": config.do_layer_norm_before,
        "decoder_learned_pos": True,
        "no_scale_embedding": True,
        "share_decoder_input_output_embed": config.tie_word_embeddings,
        "max_target_positions": config.max_position_embeddings,
        "tokens_per_sample": config.max_position_embeddings,
        "disable_bias": not config.enable_bias,
        "disable_affine_ln": not config.layer_norm_elementwise_affine,
        **{name: float(getattr(config, field)) for name, field in _RATES.items()},
    }
