"""The OPT decoder in float64 NumPy, without a cache: one pass over all tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from opt_core.config import ACTIVATIONS, OPTConfig
from opt_core.reference.inputs import Floats, Mask, head_weights, positions, token_ids, visible

Weights = Mapping[str, Any]

# NumPy has no error function.
_erf: Any = np.frompyfunc(math.erf, 1, 1)


def _sigmoid(x: Floats) -> Floats:
    # By tanh, because exp overflows for large negative x.
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def _gelu(x: Floats) -> Floats:
    return np.asarray(0.5 * x * (1 + _erf(x / math.sqrt(2)).astype(np.float64)))


def _gelu_tanh(x: Floats) -> Floats:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


#: The functions that the values of `ACTIVATIONS` name.
FUNCTIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "relu6": lambda x: np.clip(x, 0, 6),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "silu": lambda x: x * _sigmoid(x),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
}


class Forward(NamedTuple):
    """What one pass computes; E is `word_embed_proj_dim`, C `hidden_size`."""

    #: float64 [B, T, E].
    last_hidden_state: Floats
    #: L + 1 times float64 [B, T, C]: the embeddings, then each layer's output; in place of the last
    #: layer's stands `last_hidden_state`.
    hidden_states: tuple[Floats, ...]
    #: L times float64 [B, H, T, T]: the weights by which values are summed, head mask included.
    attentions: tuple[Floats, ...]
    #: Every module's output by its path in the checkpoint, such as
    #: "model.decoder.layers.0.self_attn.q_proj".
    modules: dict[str, Floats]


def forward(
    config: OPTConfig,
    weights: Weights,
    *,
    input_ids: Any = None,
    inputs_embeds: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    head_mask: Any = None,
) -> Forward:
    """Run the decoder: `[B, T] int` or `[B, T, E]` -> hidden states `[B, T, E]` float64.

    `weights` maps canonical names ("model.decoder.…") to arrays of any float type. A query that may
    attend to no key gives the same weight, 1 / T, to each of all T keys, later ones included: so
    does PyTorch OPT, where every forbidden score is the same smallest number.

    Raises:
        ValueError: both or none of ids and embeddings, ids outside the vocabulary, positions
            beyond the table, or shapes that do not fit; names what was found and expected.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds, one of the two")
    run = _Run(config, weights)
    if input_ids is not None:
        ids = token_ids(input_ids, config)
        table = run.weight("model.decoder.embed_tokens")
        embedded = run.note("model.decoder.embed_tokens", table[ids])  # [B, T, E]
    else:
        embedded = np.asarray(inputs_embeds, np.float64)  # [B, T, E]
        if embedded.ndim != 3 or embedded.shape[2] != config.word_embed_proj_dim:
            raise ValueError(
                f"inputs_embeds has shape {embedded.shape}; it must be (rows, tokens, "
                f"{config.word_embed_proj_dim})"
            )
    mask = visible(attention_mask, embedded.shape[0], embedded.shape[1])
    places = positions(position_ids, mask, config) + config.position_offset
    position_table = run.weight("model.decoder.embed_positions")
    position = run.note("model.decoder.embed_positions", position_table[places])  # [B, T, C]
    if config.has_projections:
        embedded = run.linear("model.decoder.project_in", embedded)  # [B, T, C]
    return run.decoder(embedded + position, mask, head_weights(head_mask, config))


@dataclass
class _Run:
    """One pass: the weights it reads and the outputs it has noted."""

    config: OPTConfig
    weights: Weights
    modules: dict[str, Floats] = field(default_factory=dict)

    def weight(self, path: str, leaf: str = "weight") -> Floats:
        return np.asarray(self.weights[f"{path}.{leaf}"], np.float64)

    def note(self, path: str, output: Floats) -> Floats:
        self.modules[path] = output
        return output

    def linear(self, path: str, hidden: Floats, *, has_bias: bool = False) -> Floats:
        output = hidden @ self.weight(path).T
        return self.note(path, output + self.weight(path, "bias") if has_bias else output)

    def layer_norm(self, path: str, hidden: Floats) -> Floats:
        centred = hidden - hidden.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        output = centred / np.sqrt(variance + self.config.layer_norm_eps)
        if self.config.layer_norm_elementwise_affine:
            output = output * self.weight(path) + self.weight(path, "bias")
        return self.note(path, output)

    def decoder(self, hidden: Floats, mask: Mask, heads: list[Floats | None]) -> Forward:
        """Embeddings [B, T, C], bool [B, T] -> everything that the pass computes."""
        config = self.config
        states, attentions = [hidden], []
        allowed = np.tri(mask.shape[1], dtype=np.bool_) & mask[:, None, None, :]  # [B, 1, T, T]
        for index in range(config.num_hidden_layers):
            path = f"model.decoder.layers.{index}"
            hidden, attention = self.layer(path, hidden, allowed, heads[index])
            states.append(hidden)
            attentions.append(attention)
        if config.has_final_layer_norm:
            hidden = self.layer_norm("model.decoder.final_layer_norm", hidden)
        if config.has_projections:
            hidden = self.linear("model.decoder.project_out", hidden)  # [B, T, E]
        states[-1] = hidden
        for path in ("model.decoder", "model"):
            self.note(path, hidden)
        return Forward(hidden, tuple(states), tuple(attentions), self.modules)

    def layer(
        self, path: str, hidden: Floats, allowed: Mask, heads: Floats | None
    ) -> tuple[Floats, Floats]:
        """One decoder layer: [B, T, C], bool [B, 1, T, T] -> [B, T, C], [B, H, T, T]."""
        norm_first = self.config.do_layer_norm_before
        biased = self.config.enable_bias
        attention_norm, final_norm = f"{path}.self_attn_layer_norm", f"{path}.final_layer_norm"
        source = self.layer_norm(attention_norm, hidden) if norm_first else hidden
        attended, attention = self.self_attention(f"{path}.self_attn", source, allowed, heads)
        hidden = hidden + attended
        if not norm_first:
            hidden = self.layer_norm(attention_norm, hidden)
        source = self.layer_norm(final_norm, hidden) if norm_first else hidden
        activate = FUNCTIONS[ACTIVATIONS[self.config.activation_function]]
        inner = activate(self.linear(f"{path}.fc1", source, has_bias=biased))  # [B, T, F]
        hidden = hidden + self.linear(f"{path}.fc2", inner, has_bias=biased)  # [B, T, C]
        if not norm_first:
            hidden = self.layer_norm(final_norm, hidden)
        return self.note(path, hidden), attention

    def self_attention(
        self, path: str, hidden: Floats, allowed: Mask, heads: Floats | None
    ) -> tuple[Floats, Floats]:
        """Attention of one layer: [B, T, C], bool [B, 1, T, T] -> [B, T, C], [B, H, T, T]."""
        batch, length, _ = hidden.shape
        width, biased = self.config.head_dim, self.config.enable_bias

        def split(name: str) -> Floats:
            projected = self.linear(f"{path}.{name}", hidden, has_bias=biased)
            return projected.reshape(batch, length, -1, width).swapaxes(1, 2)  # [B, H, T, D]

        q, k, v = (split(name) for name in ("q_proj", "k_proj", "v_proj"))
        attention = attention_weights(q * width**-0.5 @ k.swapaxes(2, 3), allowed)  # [B, H, T, T]
        if heads is not None:
            attention = attention * heads[:, None, None]
        summed = (attention @ v).swapaxes(1, 2).reshape(batch, length, -1)  # [B, T, H * D]
        output = self.linear(f"{path}.out_proj", summed, has_bias=biased)  # [B, T, C]
        return self.note(path, output), attention


def attention_weights(scores: Floats, allowed: Mask) -> Floats:
    """Softmax over the allowed keys, 1 / T for every key where none is: [B, H, T, T] both ways."""
    blind = ~allowed.any(axis=-1, keepdims=True)
    kept = np.where(allowed, scores, -np.inf)
    kept = np.where(blind, 0.0, kept)
    powers = np.exp(kept - kept.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
