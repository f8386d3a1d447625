"""Checkpoint files: tensors read lazily, by slice and by shard; saved whole or not at all."""

from opt_core.checkpoint.reading import (
    read_index,
    read_index_metadata,
    read_safetensors,
    read_safetensors_metadata,
    read_weight_map,
)
from opt_core.checkpoint.saving import (
    Source,
    blocks,
    index_of,
    safetensors_blocks,
    save,
    shards_of,
    size_in_bytes,
    size_of,
    write_file,
)
from opt_core.checkpoint.tensors import (
    Array,
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
    "Array",
    "Checkpoint",
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointNotFound",
    "CheckpointUnsafe",
    "Source",
    "StoredFile",
    "StoredTensor",
    "TensorSource",
    "blocks",
    "has_nan",
    "index_of",
    "read_index",
    "read_index_metadata",
    "read_safetensors",
    "read_safetensors_metadata",
    "read_weight_map",
    "safetensors_blocks",
    "save",
    "shards_of",
    "size_in_bytes",
    "size_of",
    "write_file",
]
