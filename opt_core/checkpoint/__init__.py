"""Checkpoint files on disk: tensors read lazily, by slice and by shard; saved whole or not at all."""

from opt_core.checkpoint.tensors import (
    Checkpoint,
    CheckpointDamaged,
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnsafe,
    StoredFile,
    StoredTensor,
    TensorSource,
    has_nan,
)

__all__ = [
    "Checkpoint",
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointNotFound",
    "CheckpointUnsafe",
    "StoredFile",
    "StoredTensor",
    "TensorSource",
    "has_nan",
]
