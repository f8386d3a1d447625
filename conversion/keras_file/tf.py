"""`tf_model.h5`, as transformers 4 writes it for its TensorFlow classes: Keras 2's layout of HDF5.

One file holds a group a layer (`model`, and the head if it has weights), with the weights under
their full names and a list of these. Shards hold the weights alone, without the name of the class.

TensorFlow classes exist for language models with a tied head and for base models alone. Files of
other models are laid out as Keras 2 would, and are read by optlm only.
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

import numpy as np

from conversion.keras_file.structure import read_structure
from conversion.keras_file.writing import Layout, hdf5_file
from conversion.names import FrameworkRule
from conversion.pieces import Count, Piece, Tensors, sharded
from opt_core.checkpoint import (
    CheckpointDamaged,
    CheckpointNotFound,
    StoredFile,
    StoredTensor,
    shards_of,
)
from opt_core.weights import Head

_FILE = "tf_model.h5"
_CLASSES = {
    Head.NONE: "tfopt_model",
    Head.CAUSAL_LM: "tfopt_for_causal_lm",
    Head.SEQUENCE_CLASSIFICATION: "tfopt_for_sequence_classification",
    Head.QUESTION_ANSWERING: "tfopt_for_question_answering",
}
# The layers of a model, one of which every weight belongs to.
_LAYERS = ("model", "decoder", "lm_head", "score", "qa_outputs")
_LONGEST_LIST = 64512  # bytes of an attribute, beyond which Keras 2 cuts a list of names
_VERSION = "2.18.0"  # of the Keras whose layout this is


def read_tf(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, under the names that Keras gave the weights."""
    found = read_structure(stored_file(path)).datasets
    tensors: dict[str, StoredTensor] = {}
    for place, tensor in found.items():
        name = _weight_name(place)
        if name in tensors:
            raise CheckpointDamaged(f"{path} holds the weight {name!r} twice")
        tensors[name] = tensor
    return tensors


def stored_file(path: Path) -> StoredFile:
    """The file at `path`; CheckpointNotFound if there is none."""
    try:
        return StoredFile.of(path)
    except FileNotFoundError:
        raise CheckpointNotFound(f"there is no file {path}") from None


def name_in_shard(name: str) -> str:
    """What a shard calls the weight of an index: its name without that of the class."""
    return name.partition("/")[2] or name


def tf_pieces(tensors: Tensors, limit: int) -> list[Piece]:
    """One file, or shards and their index."""
    write = _write_file if len(shards_of(tensors, limit)) == 1 else _write_shard
    return sharded(_FILE, tensors, limit, write)


def _weight_name(path: str) -> str:
    """A dataset's path without the group of its layer, which the name says once more."""
    layer, _, name = path.partition("/")
    return name if layer in _LAYERS and f"/{layer}/" in name else path


def _path(name: str) -> str | None:
    """The dotted path of a parameter; that of an optimizer is no weight."""
    parts = name.removesuffix(":0").split("/")
    if "optimizer_weights" in parts:
        return None
    starts = [i for i, part in enumerate(parts) if part in _LAYERS]
    return ".".join(parts[starts[-1] :]) if starts else name


def _spelled(path: str, head: Head) -> str:
    name = re.sub(r"/layers/(\d+)/", r"/layers.\1/", path.replace(".", "/"))
    # The class makes the table of tokens by hand, and calls it otherwise than Keras's layer would.
    name = name.replace("embed_tokens/embeddings", "embed_tokens/weight")
    return f"{_CLASSES[head]}/{name}:0"


#: The names and the layout of `tf_model.h5`; the classes cannot do without biases and norms.
TF = FrameworkRule("keras", _spelled, _path, complete=True)


def _write_file(path: Path, tensors: Tensors, count: Count) -> None:
    layers = {
        layer: list(names) for layer, names in groupby(sorted(tensors, key=_layer), key=_layer)
    }
    attributes = {layer: _lists("weight_names", names) for layer, names in layers.items()}
    attributes[""] = {
        "backend": "tensorflow",
        "keras_version": _VERSION,
        **_lists("layer_names", list(layers)),
    }
    attributes["top_level_model_weights"] = _lists("weight_names", [])
    placed = {f"{_layer(name)}/{name}": tensor for name, tensor in tensors.items()}
    _write(path, Layout(placed, attributes), count)


def _write_shard(path: Path, tensors: Tensors, count: Count) -> None:
    named = {name_in_shard(name): tensor for name, tensor in tensors.items()}
    _write(path, Layout(named, {"": _lists("layer_names", list(named))}), count)


def _layer(name: str) -> str:
    return name.split("/")[1]


def _lists(name: str, values: list[str]) -> dict[str, str | list[str]]:
    """A list of names as Keras 2 keeps it: in numbered parts where it is too long for one."""
    whole = np.array([value.encode() for value in values], np.bytes_)
    if whole.nbytes <= _LONGEST_LIST:
        return {name: values}
    step = _LONGEST_LIST // whole.itemsize
    parts = [values[i : i + step] for i in range(0, len(values), step)]
    return {f"{name}{i}": part for i, part in enumerate(parts)}


def _write(path: Path, layout: Layout, count: Count) -> None:
    with path.open("xb") as handle:
        handle.writelines(hdf5_file(layout, count)[1])
