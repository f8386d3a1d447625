"""Checkpoint files: tensors read lazily, by slice and by shard; saved whole or not at all."""

from opt_core.checkpoint.reading import (
    read_index,
    read_index_metadata,
    read_safetensors,
    read_safetensors_metadata,
    read_weight_map,
)
from opt_core.checkpoint.saving import save, size_in_bytes, write_file
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
    "read_index",
    "read_index_metadata",
    "read_safetensors",
    "read_safetensors_metadata",
    "read_weight_map",
    "save",
    "size_in_bytes",
    "write_file",
]
