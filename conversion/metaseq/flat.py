"""Tensors out of flat shards, as fairscale's fully sharded data parallelism leaves them.

All parameters of a module lie one after another in one flat run, padded and cut into shards of
one length; the metadata of a shard name the parameters and tell its padding.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod
from typing import Any

from conversion.views import Joined
from opt_core.checkpoint import CheckpointDamaged, CheckpointNotFound, StoredTensor, TensorSource

_MOST_AXES = 64


@dataclass(frozen=True)
class Shard:
    """One file: what its state dict holds, and what it says about flat tensors."""

    place: str
    tensors: Mapping[str, StoredTensor]
    metadata: object


@dataclass(frozen=True)
class _Flat:
    """One flat tensor of a shard: its name, and the parameters that the whole run holds."""

    key: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    #: Values at the end of this shard that mean nothing.
    padding: int
    #: Every shard has parameters of its own (experts); the first shard's are taken.
    is_local: bool
    #: Parameters that are others by another name: those, and these.
    shared: tuple[tuple[str, str], ...]


def unflattened(shards: Sequence[Shard]) -> dict[str, TensorSource]:
    """The tensors that a part's shards hold, in order; none is read.

    Raises CheckpointDamaged when the metadata and the shards do not say the same,
    CheckpointNotFound when they tell of more shards.
    """
    flats = [_flats(shard) for shard in shards]
    first = shards[0]
    if not flats[0] and len(shards) > 1:
        raise CheckpointDamaged(
            f"{first.place} is one of {len(shards)} shards, but has no shard_metadata, which say "
            "what its flat tensors hold"
        )
    found: dict[str, TensorSource] = {
        name: tensor for name, tensor in first.tensors.items() if name not in flats[0]
    }
    for key, flat in flats[0].items():
        _check_alike(key, shards, flats)
        count = 1 if flat.is_local else len(shards)
        run = _Run(tuple(_used(shards[i], flats[i][key]) for i in range(count)))
        _check_size(first, flat, run)
        start = 0
        for name, shape in zip(flat.names, flat.shapes, strict=True):
            _enter(found, name, run.tensor(shape, start), first)
            start += prod(shape)
    for flat in flats[0].values():
        for name, other in flat.shared:
            if name not in found:
                raise CheckpointDamaged(
                    f"{first.place}: {other!r} is said to be {name!r}, which is not there"
                )
            found[other] = found[name]
    return found


@dataclass(frozen=True)
class _Run:
    """Flat tensors that follow one another."""

    pieces: tuple[StoredTensor, ...]

    @cached_property
    def ends(self) -> list[int]:
        """Where each piece ends, in elements of the run."""
        return list(accumulate(piece.shape[0] for piece in self.pieces))

    def tensor(self, shape: tuple[int, ...], start: int, axis: int = 0) -> TensorSource:
        """The tensor of this shape whose elements begin at `start`.

        Where the run is cut the tensor is, too: into rows, and the row that has the cut in it into
        columns. Axes before `axis` have the length 1.
        """
        ends, size = self.ends, prod(shape)
        number = min(bisect_right(ends, start), len(ends) - 1)
        begin = ends[number] - self.pieces[number].shape[0]
        if start + size <= ends[number]:
            piece = self.pieces[number]
            offset = piece.offset + (start - begin) * piece.dtype.itemsize
            return replace(piece, offset=offset, shape=shape)
        step = prod(shape[axis + 1 :])
        edges = {0, shape[axis]}
        for end in ends[number:]:
            if end >= start + size:
                break
            whole, rest = divmod(end - start, step)
            edges |= {whole, whole + 1} if rest else {whole}
        ordered = sorted(edges)
        found = []
        for first, last in pairwise(ordered):
            cut = (*shape[:axis], last - first, *shape[axis + 1 :])
            found.append(self.tensor(cut, start + first * step, axis + (last - first == 1)))
        return found[0] if len(found) == 1 else Joined(tuple(found), axis)


def _flats(shard: Shard) -> dict[str, _Flat]:
    """The flat tensors that a shard holds, as its metadata describe them."""
    if shard.metadata is None:
        return {}
    found = {}
    for module in _as(list, _as(dict, shard.metadata, shard).get("param_metadata"), shard):
        path = _as(str, _as(dict, module, shard).get("fsdp_path"), shard)
        pairs = _as(list, module.get("shared_param_info", []), shard)
        shared = tuple(_pair(pair, path, shard) for pair in pairs)
        for name, described in _as(dict, module.get("params"), shard).items():
            key = _under(path, _as(str, name, shard))
            if key in shard.tensors:
                is_local = bool(module.get("no_broadcast_optim_state"))
                found[key] = _flat(key, path, _as(dict, described, shard), is_local, shared, shard)
    return found


def _flat(
    key: str,
    path: str,
    described: Mapping[Any, Any],
    is_local: bool,
    shared: tuple[tuple[str, str], ...],
    shard: Shard,
) -> _Flat:
    names = _as(list, described.get("names"), shard)
    shapes = _as(list, described.get("shapes"), shard)
    padding = _as(int, described.get("padding"), shard)
    if len(names) != len(shapes) or padding < 0:
        raise _contradiction(shard, f"those of {key!r} do not fit each other")
    return _Flat(
        key,
        tuple(_under(path, _as(str, name, shard)) for name in names),
        tuple(_shape(shape, shard) for shape in shapes),
        padding,
        is_local,
        shared,
    )


def _shape(value: object, shard: Shard) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > _MOST_AXES:
        raise _contradiction(shard, "a shape is no list of numbers")
    if not all(type(length) is int and 0 <= length < 1 << 63 for length in value):
        raise _contradiction(shard, "a shape has a length that is no number")
    return tuple(value)


def _pair(value: object, path: str, shard: Shard) -> tuple[str, str]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise _contradiction(shard, "a shared parameter has no two names")
    source, other = value
    return _under(path, _as(str, source, shard)), _under(path, _as(str, other, shard))


def _under(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _as(kind: type, value: object, shard: Shard) -> Any:
    if not isinstance(value, kind):
        raise _contradiction(shard, f"found a {type(value).__name__}, expected a {kind.__name__}")
    return value


def _contradiction(shard: Shard, said: str) -> CheckpointDamaged:
    return CheckpointDamaged(
        f"{shard.place}: its shard_metadata are not those of fairscale's flat shards: {said}"
    )


def _check_alike(key: str, shards: Sequence[Shard], flats: Sequence[Mapping[str, _Flat]]) -> None:
    """Raises CheckpointDamaged unless all shards describe a flat tensor alike."""
    for shard, described in zip(shards, flats, strict=True):
        same = key in described and replace(described[key], padding=flats[0][key].padding)
        if same != flats[0][key] or shard.tensors[key].dtype != shards[0].tensors[key].dtype:
            raise CheckpointDamaged(
                f"{shard.place} and {shards[0].place} do not describe the same {key!r}: are both "
                "of one checkpoint?"
            )


def _used(shard: Shard, flat: _Flat) -> StoredTensor:
    """A shard's piece of a flat run, without its padding."""
    tensor = shard.tensors[flat.key]
    if len(tensor.shape) != 1 or tensor.strides is not None or flat.padding > tensor.shape[0]:
        raise CheckpointDamaged(
            f"{shard.place}: {flat.key!r} of shape {tensor.shape} should be one flat run with "
            f"{flat.padding} values of padding"
        )
    return replace(tensor, shape=(tensor.shape[0] - flat.padding,))


def _check_size(first: Shard, flat: _Flat, run: _Run) -> None:
    found, expected = run.ends[-1], sum(map(prod, flat.shapes))
    if found == expected:
        return
    length = first.tensors[flat.key].shape[0]
    if length and length * len(run.pieces) < expected and not flat.is_local:
        raise CheckpointNotFound(
            f"shard {len(run.pieces)} is missing beside {first.place}: {flat.key!r} has {expected} "
            f"values, of which {found} are there"
        )
    raise CheckpointDamaged(
        f"{first.place}: {flat.key!r} holds {found} values with those of its other shards; its "
        f"shard_metadata tell of {expected}"
    )


def _enter(found: dict[str, TensorSource], name: str, tensor: TensorSource, first: Shard) -> None:
    if name in found:
        raise CheckpointDamaged(f"{first.place}: its shard_metadata name {name!r} twice")
    found[name] = tensor
