"""The rows by which metaseq fills a vocabulary up, cut where a configuration has fewer words."""

from __future__ import annotations

import warnings
from dataclasses import replace

from conversion.metaseq.names import rows
from opt_core.checkpoint import Checkpoint
from opt_core.config import OPTConfig
from opt_core.weights import EMBEDDING_NAME, LM_HEAD_NAME, CheckpointWarning

# Metaseq fills a dictionary up to a multiple of 8 or 64, Megatron's to one of 128 times the parts.
# More rows than this are no padding: the configuration is that of another model.
_MOST_PADDING = 1024


def without_padding(checkpoint: Checkpoint, config: OPTConfig) -> Checkpoint:
    """A checkpoint of metaseq's with the vocabulary of the configuration; any other as it is.

    Words that fill the vocabulary up come last, also in model-parallel parts, which are slices of
    one padded vocabulary. They are left out with a `CheckpointWarning`.
    """
    if checkpoint.format != "metaseq":
        return checkpoint
    size, cut = config.vocab_size, {}
    for name in (EMBEDDING_NAME, LM_HEAD_NAME):
        tensor = checkpoint.tensors.get(name)
        if tensor is not None and tensor.shape and 0 < tensor.shape[0] - size < _MOST_PADDING:
            cut[name] = rows(tensor, 0, size)
    if not cut:
        return checkpoint
    found = checkpoint.tensors[next(iter(cut))].shape[0]
    warnings.warn(
        f"{checkpoint.path}: the rows from {size} to {found - 1} of {' and '.join(cut)} are left "
        f"out, as the vocabulary has {size} words; a larger vocab_size keeps them",
        CheckpointWarning,
        stacklevel=3,
    )
    return replace(checkpoint, tensors={**checkpoint.tensors, **cut})
