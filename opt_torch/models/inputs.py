"""What a call was given, checked and resolved once: mask, positions, cache and head factors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    if (input_ids is None) == (inputs_embeds is None):
        found = "neither" if input_ids is None else "both"
        raise ValueError(f"give either input_ids or inputs_embeds; found {found}")
    if inputs_embeds is not None:
        E = config.word_embed_proj_dim
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != E:
            raise ValueError(
                f"inputs_embeds are {tuple(inputs_embeds.shape)}, expected (batch, tokens, {E}): "
                "the width of embed_tokens"
            )
        tokens = inputs_embeds
    else:
        assert input_ids is not None
        if input_ids.dim() != 2 or input_ids.dtype.is_floating_point:
            raise ValueError(
                f"input_ids are {input_ids.dtype} {tuple(input_ids.shape)}, expected whole numbers "
                "(batch, tokens)"
            )
        tokens = input_ids
    if 0 in tokens.shape[:2]:
        raise ValueError(f"the input is empty: {tuple(tokens.shape)}; give at least one token")
    if input_ids is not None:
        check_ids(input_ids, config.vocab_size)
    return tokens


def _shown(mask: Tensor | None, B: int, held: int, T: int) -> Tensor | None:
    """Bool `[B, past + T]`, or None if nothing is padded."""
    if mask is None:
        return None
    if mask.shape != (B, held + T):
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}, expected {(B, held + T)}: {held} tokens in "
            f"the cache and {T} new ones"
        )
    shown = mask != 0
    if torch.compiler.is_compiling():
        return shown
    if bool(shown.all()) and bool((mask == 1).all()):
        return None
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            "attention_mask holds values other than 0 and 1; give 1 for what may be attended to "
            "and 0 for padding (not a mask to add to scores)"
        )
    return shown


def _positions(
    config: OPTConfig,
    given: Tensor | None,
    shown: Tensor | None,
    B: int,
    held: int,
    T: int,
    device: torch.device,
) -> Tensor:
    most = config.max_position_embeddings
    if given is not None:
        if given.shape not in ((B, T), (1, T)):
            raise ValueError(f"position_ids are {tuple(given.shape)}, expected {(B, T)}")
        if not torch.compiler.is_compiling():
            _check_reach(int(given.max()), most, least=int(given.min()))
        return given.to(device)
    if shown is None:
        _check_reach(held + T - 1, most)
        return torch.arange(held, held + T, device=device)[None]
    positions = positions_of(shown.to(device), T)
    if held + T > most and not torch.compiler.is_compiling():
        _check_reach(int(positions.max()), most)
    return positions


def _check_reach(last: int, most: int, least: int = 0) -> None:
    if last >= most or least < -1:
        wrong = last if last >= most else least
        raise ValueError(
            f"the input asks for position {wrong}, but positions go from 0 to {most - 1} "
            f"(max_position_embeddings is {most}); shorten the input"
        )


def _head_factors(config: OPTConfig, head_mask: Any) -> list[Tensor | None]:
    L, H = config.num_hidden_layers, config.num_attention_heads
    if head_mask is None:
        return [None] * L
    if head_mask.shape not in ((H,), (L, H)):
        raise ValueError(
            f"head_mask is {tuple(head_mask.shape)}, expected {(L, H)} (layers, heads) or {(H,)}"
        )
    rows = head_mask.expand(L, H)
    kept = [
        [head for head in range(H) if head not in config.pruned_heads.get(layer, ())]
        for layer in range(L)
    ]
    return [
        row if len(keep) == H else row[torch.tensor(keep, device=row.device)]
        for row, keep in zip(rows, kept, strict=True)
    ]
