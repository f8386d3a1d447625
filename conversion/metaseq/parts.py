"""Model-parallel parts of a metaseq checkpoint, joined into the tensors of a single file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conversion.metaseq.names import blocks_of, check_fused, is_head, split_axis, thirds
from conversion.views import Joined
from opt_core.checkpoint import (
    Array,
    CheckpointDamaged,
    CheckpointNotFound,
    TensorSource,
    parts,
    read_part,
)

Tensors = Mapping[str, TensorSource]


@dataclass(frozen=True)
class Replicated:
    """A tensor that every part holds; each reading compares them, bit by bit."""

    name: str
    sources: tuple[TensorSource, ...]
    #: What each of the sources comes from.
    places: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of each."""
        return self.sources[0].shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of each."""
        return self.sources[0].dtype

    def read(self, part: slice | None = None, *, axis: int = 0) -> Array:
        """The values, or those of `part` of one axis.

        Raises CheckpointDamaged where two parts differ.
        """
        values = self.sources[0].read(part, axis=axis)
        for place, source in zip(self.places[1:], self.sources[1:], strict=True):
            self._compare(values, source.read(part, axis=axis), place)
        return values

    def map(self) -> Array:
        """The values as a view of the first source's; all of them are compared first."""
        for part in parts(self):
            read_part(self, part)
        return self.sources[0].map()

    def _compare(self, values: Array, other: Array, place: str) -> None:
        if not np.array_equal(values.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8)):
            raise CheckpointDamaged(
                f"{self.name!r} is not the same in {self.places[0]} and in {place}, though it is "
                "not split between the parts: are all of them of one checkpoint?"
            )


def merged(sources: Sequence[Tensors], places: Sequence[str]) -> dict[str, TensorSource]:
    """The tensors of a single file from those of its parts, in order; none is read.

    Raises CheckpointDamaged when the parts do not hold the same tensors, or shapes that do not fit.
    """
    if len(sources) == 1:
        return dict(sources[0])
    _check_names(sources, places)
    # Every part has its slice of the output projection, which is that of the embedding; metaseq's
    # own tools take it for replicated, so that after them it is a slice of something else.
    return {
        name: _joined(name, tuple(part[name] for part in sources), tuple(places))
        for name in sources[0]
        if not is_head(name)
    }


def check_count(sources: Sequence[Tensors], places: Sequence[str]) -> None:
    """Raises unless there are as many parts as the shapes tell.

    An output projection of attention has all of a model's rows, and one part's columns of as many.
    """
    for name, source in sources[0].items():
        if not name.endswith(".self_attn.out_proj.weight") or len(source.shape) != 2:
            continue
        height, width = source.shape
        expected = height // width if width and height % width == 0 else len(sources)
        if expected > len(sources):
            raise CheckpointNotFound(
                f"part {len(sources)} is missing beside {', '.join(places)}: {name!r} of shape "
                f"{source.shape} is one of {expected} parts"
            )
        if expected < len(sources):
            raise CheckpointDamaged(
                f"{', '.join(places)} are {len(sources)} parts, but {name!r} of shape "
                f"{source.shape} is one of {expected}: are all of them of one checkpoint?"
            )
        return


def _check_names(sources: Sequence[Tensors], places: Sequence[str]) -> None:
    for part, place in zip(sources, places, strict=True):
        for name in sorted(part.keys() ^ sources[0].keys()):
            holder, other = (place, places[0]) if name in part else (places[0], place)
            raise CheckpointDamaged(f"{holder} holds {name!r}, which {other} lacks")


def _joined(name: str, sources: tuple[TensorSource, ...], places: tuple[str, ...]) -> TensorSource:
    axis, first = split_axis(name), sources[0]
    for source, place in zip(sources, places, strict=True):
        if source.dtype != first.dtype or source.shape != first.shape:
            raise CheckpointDamaged(
                f"{name!r} is of shape {first.shape} and type {first.dtype} in {places[0]}, but of "
                f"shape {source.shape} and type {source.dtype} in {place}"
            )
    if axis is None:
        return Replicated(name, sources, places)
    if axis >= len(first.shape):
        raise CheckpointDamaged(
            f"{name!r} of shape {first.shape} in {places[0]} should be split on its axis {axis}"
        )
    if blocks_of(name) == 1:
        return Joined(sources, axis)
    # K, V and Q lie one under another in every part: all of K comes first when they are joined.
    for source, place in zip(sources, places, strict=True):
        check_fused(name, source, place)
    return Joined(
        tuple(part for block in zip(*map(thirds, sources), strict=True) for part in block), 0
    )
