"""What a call was given, checked and resolved once: mask, positions, cache and head factors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from opt_core import arguments
from opt_core.config import OPTConfig
from opt_torch.attention import Visible
from opt_torch.decoder import Cache, check_ids, positions_of


class Inputs(NamedTuple):
    """A call's inputs as the decoder wants them."""

    positions: Tensor  # int [B or 1, T]
    visible: Visible
    cache: Cache | None
    head_mask: list[Tensor | None]


def resolve(
    config: OPTConfig,
    tokens: Tensor,
    *,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    head_mask: Tensor | None,
    past: Cache | None,
    caching: bool,
) -> Inputs:
    """`[B, T, ...]` ids or embeddings and the other arguments of a call -> `Inputs`.

    Raises:
        ValueError: a mask, positions or head factors of the wrong shape, or too long an input.
    """
    B, T = tokens.shape[:2]
    held = past.get_seq_length() if past is not None else 0
    shown = _shown(attention_mask, B, held, T)
    positions = _positions(config, position_ids, shown, B, held, T, tokens.device)
    visible = Visible(held, T, held + T, shown)
    cache = past if past is not None else Cache(config.num_hidden_layers) if caching else None
    return Inputs(
        positions,
        visible,
        cache.extended(T) if cache is not None else None,
        _head_factors(config, head_mask),
    )


def check_tokens(
    config: OPTConfig, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> Tensor:
    """The one of the two that was given.

    Raises:
        ValueError: both or none, another number of axes, no token, or an id outside the vocabulary.
    """
    arguments.check_tokens(config, given(input_ids), given(inputs_embeds))
    if input_ids is not None:
        check_ids(input_ids, config.vocab_size)
        return input_ids
    assert inputs_embeds is not None
    return inputs_embeds


def given(values: Tensor | None) -> arguments.Given | None:
    """A tensor as an error describes it."""
    if values is None:
        return None
    return arguments.Given(tuple(values.shape), str(values.dtype), values.is_floating_point())


def _shown(mask: Tensor | None, B: int, held: int, T: int) -> Tensor | None:
    """Bool `[B, past + T]`, or None if nothing is padded."""
    if mask is None:
        return None
    arguments.check_mask_shape(tuple(mask.shape), B, held, T)
    shown = mask != 0
    if torch.compiler.is_compiling():
        return shown
    if bool(shown.all()) and bool((mask == 1).all()):
        return None
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise arguments.unknown_mask_values()
    return shown


def _positions(
    config: OPTConfig,
    position_ids: Tensor | None,
    shown: Tensor | None,
    B: int,
    held: int,
    T: int,
    device: torch.device,
) -> Tensor:
    if position_ids is not None:
        arguments.check_position_shape(tuple(position_ids.shape), B, T)
        if not torch.compiler.is_compiling():
            arguments.check_reach(config, int(position_ids.max()), int(position_ids.min()))
        return position_ids.to(device)
    if shown is None:
        arguments.check_reach(config, held + T - 1)
        return torch.arange(held, held + T, device=device)[None]
    positions = positions_of(shown.to(device), T)
    if held + T > config.max_position_embeddings and not torch.compiler.is_compiling():
        arguments.check_reach(config, int(positions.max()))
    return positions


def _head_factors(config: OPTConfig, head_mask: Any) -> list[Tensor | None]:
    L, H = config.num_hidden_layers, config.num_attention_heads
    if head_mask is None:
        return [None] * L
    kept = arguments.kept_heads(config, tuple(head_mask.shape))
    return [
        row if len(keep) == H else row[torch.tensor(keep, device=row.device)]
        for row, keep in zip(head_mask.expand(L, H), kept, strict=True)
    ]
