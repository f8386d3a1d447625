"""What a call of the reference is given: checked, and brought to one form."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from opt_core.config import OPTConfig

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def token_ids(values: Any, config: OPTConfig) -> Ints:
    """Ids of a batch, checked -> int64 [B, T].

    Raises:
        ValueError: no whole numbers, not two axes, or an id outside the vocabulary (naming id, row
            and place).
    """
    ids = whole_numbers("input_ids", values)
    if ids.ndim != 2:
        raise ValueError(f"input_ids has shape {ids.shape}; it must be (rows, tokens)")
    outside = np.argwhere((ids < 0) | (ids >= config.vocab_size))
    if outside.size:
        row, place = outside[0]
        raise ValueError(
            f"input_ids holds {ids[row, place]} in row {row} at place {place}, outside the "
            f"vocabulary of {config.vocab_size}; is this the tokenizer of another model?"
        )
    return ids


def whole_numbers(name: str, values: Any) -> Ints:
    """An array of whole numbers -> int64.

    Raises:
        ValueError: the array holds something else.
    """
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} holds {array.dtype}; it must hold whole numbers")
    return array.astype(np.int64)


def visible(attention_mask: Any, batch: int, length: int) -> Mask:
    """Where a mask of 0 and 1 (or False and True) shows a token -> bool [B, T]; None shows all.

    Raises:
        ValueError: another shape than the tokens, or another value than 0 and 1.
    """
    if attention_mask is None:
        return np.ones((batch, length), np.bool_)
    mask = np.asarray(attention_mask)
    if mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask has shape {mask.shape}, but there are {batch} rows of {length} "
            f"tokens; it must be ({batch}, {length})"
        )
    other = mask[(mask != 0) & (mask != 1)]
    if other.size:
        raise ValueError(f"attention_mask holds {other[0]}; it must hold 1 to show, 0 to hide")
    return mask.astype(np.bool_)


def positions(position_ids: Any, mask: Mask, config: OPTConfig) -> Ints:
    """The position of every token, before the table's offset -> int64 [B, T].

    Given ones win; otherwise they count what the mask shows: 0, 1, 2, … there, -1 elsewhere.

    Raises:
        ValueError: a shape that is neither (B, T) nor (1, T), or a position without a row in the
            table (naming the position and `max_position_embeddings`).
    """
    if position_ids is None:
        counts = mask.astype(np.int64)
        places: Ints = counts.cumsum(axis=1) * counts - 1
    else:
        places = whole_numbers("position_ids", position_ids)
        if places.shape not in (mask.shape, (1, mask.shape[1])):
            raise ValueError(
                f"position_ids has shape {places.shape}, but the tokens have {mask.shape}; "
                "they must be the same"
            )
        places = np.broadcast_to(places, mask.shape)
    last = config.max_position_embeddings - 1
    outside = np.argwhere((places < -config.position_offset) | (places > last))
    if outside.size:
        row, place = outside[0]
        raise ValueError(
            f"position {places[row, place]} (row {row}, place {place}) has no embedding: "
            f"max_position_embeddings is {config.max_position_embeddings}, so positions end at "
            f"{last}; shorten the input"
        )
    return places


def head_weights(head_mask: Any, config: OPTConfig) -> list[Floats | None]:
    """A factor for every attention head that is left, layer by layer -> L times float64 [H].

    The mask is (L, H) or, for all layers alike, (H,), and counts heads as before pruning.

    Raises:
        ValueError: another shape.
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    if head_mask is None:
        return [None] * layers
    mask = np.asarray(head_mask, np.float64)
    if mask.shape not in ((layers, heads), (heads,)):
        raise ValueError(
            f"head_mask has shape {mask.shape}; it must be ({layers}, {heads}) or ({heads},)"
        )
    mask = np.broadcast_to(mask, (layers, heads))
    return [np.delete(mask[i], config.pruned_heads.get(i, [])) for i in range(layers)]
