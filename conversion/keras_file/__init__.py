"""Keras's HDF5 files: transformers' `tf_model.h5`, and `.weights.h5` and `.keras` of our models."""

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
