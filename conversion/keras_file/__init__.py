"""Keras's HDF5 files: transformers' `tf_model.h5`, and `.weights.h5` and `.keras` of our models.

A file is read by a reader of our own, which knows as much of HDF5 as checkpoints use: groups and
plain, contiguous datasets. HDF5's library is not made for files from strangers. Of 12,573 mutated
files (those of `tests/fuzz/h5.py`) it read six without an end, and it follows links to other files;
to open each file in a process of its own would cost 200 ms. Ours takes milliseconds, holds each
number against the file's size, and gives tensors as places in the file, which are read or mapped
like those of safetensors. What it does not know it refuses by name.

A file is written by h5py, but for the bytes of the tensors: see `writing.py`.
"""

from conversion.keras_file.keras3 import KERAS, is_keras, keras_pieces, read_keras
from conversion.keras_file.structure import HDF5_START
from conversion.keras_file.tf import TF, name_in_shard, read_tf, tf_pieces

__all__ = [
    "HDF5_START",
    "KERAS",
    "TF",
    "is_keras",
    "keras_pieces",
    "name_in_shard",
    "read_keras",
    "read_tf",
    "tf_pieces",
]
