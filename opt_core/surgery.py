"""Changes of a built model's shape, as its configuration sees them: vocabulary and heads."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from opt_core.config import OPTConfig


def vocabulary_size(
    config: OPTConfig, new_num_tokens: int | None, pad_to_multiple_of: int | None
) -> int:
    """The size that `resize_token_embeddings` is asked for; the present one if none is given."""
    size = new_num_tokens if new_num_tokens is not None else config.vocab_size
    if pad_to_multiple_of is not None:
        size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
    return size


def resized(config: OPTConfig, size: int, *, stacklevel: int) -> OPTConfig:
    """The configuration with another vocabulary; a smaller one is warned of.

    Raises:
        ValueError: a size below 1, or one that leaves a special token outside.
    """
    changed = config.replace(vocab_size=size)
    if size < config.vocab_size:
        warnings.warn(
            f"the vocabulary shrinks from {config.vocab_size} to {size} tokens: the rows of the "
            "others are gone (published OPT has more rows than its tokenizer has tokens)",
            stacklevel=stacklevel + 1,
        )
    return changed


class Pruned(NamedTuple):
    """A configuration without some heads, and what stays of those that a model has."""

    config: OPTConfig
    #: By layer, where any head has gone: the places of those that stay among the present ones.
    keep: Mapping[int, list[int]]


def pruned(config: OPTConfig, heads: Mapping[int, Iterable[int]]) -> Pruned:
    """Take heads away for good: `{layer: heads}`, numbered as in the whole model.

    Raises:
        ValueError: there is no such layer or head, or a layer would keep none.
    """
    before = {layer: set(gone) for layer, gone in config.pruned_heads.items()}
    after = {layer: set(gone) for layer, gone in before.items()}
    for layer, gone in heads.items():
        after[layer] = after.get(layer, set()) | set(gone)
    listed = {layer: sorted(gone) for layer, gone in after.items() if gone}
    changed = config.replace(pruned_heads=listed)
    keep = {}
    for layer, gone in listed.items():
        present = (h for h in range(config.num_attention_heads) if h not in before.get(layer, ()))
        keep[layer] = [place for place, head in enumerate(present) if head not in gone]
    return Pruned(changed, keep)
