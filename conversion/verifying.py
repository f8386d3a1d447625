"""Whether two checkpoints, in whatever formats, are one model: tensors, configuration, files."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from conversion.comparing import Comparison, Result, checksum, compare, holds_only
from conversion.formats import open_checkpoint
from conversion.pieces import Count
from conversion.pretrained import COMPANIONS, located
from opt_core.checkpoint import Checkpoint, CheckpointNotFound, TensorSource, size_of
from opt_core.config import OPTConfig
from opt_core.config.files import config_path, read_json
from opt_core.weights import EMBEDDING_NAME, LM_HEAD_NAME, head_in, switched_off

#: Fields of a configuration that say where it comes from, not what the model is.
INFORMATIONAL = frozenset(
    {
        "architectures",
        "transformers_version",
        *("dtype", "torch_dtype"),
        *("name_or_path", "_name_or_path"),
    }
)
_READ_WHOLE = 64 * 1024 * 1024


class Verdict(Enum):
    """What two checkpoints are to each other."""

    IDENTICAL = "identical"
    EQUAL = "equal in value"
    ROUNDED = "equal after rounding"
    DIFFERENT = "different"


@dataclass(frozen=True)
class Stored:
    """How one checkpoint keeps a tensor: under its name, in the canonical layout."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class TensorResult:
    """One canonical tensor in both checkpoints; None where one lacks it."""

    name: str
    a: Stored | None
    b: Stored | None
    comparison: Comparison

    @property
    def result(self) -> Result:
        """What became of it."""
        return self.comparison.result

    @property
    def said(self) -> str:
        """The result in words."""
        to = self.comparison.rounded_to
        return self.result.value if to is None else f"{self.result.value} to {to}"


@dataclass(frozen=True)
class FieldResult:
    """A field of the configurations that differs, as JSON; None where a file lacks it."""

    name: str
    a: str | None
    b: str | None

    @property
    def is_difference(self) -> bool:
        """Whether it may change the model."""
        return self.name not in INFORMATIONAL


@dataclass(frozen=True)
class FileResult:
    """A file beside the weights: "identical", "same content", "different", "only in A" or B."""

    name: str
    said: str
    sha256: tuple[str | None, str | None]


@dataclass(frozen=True)
class Verification:
    """Two checkpoints compared."""

    a: Checkpoint
    b: Checkpoint
    tensors: tuple[TensorResult, ...]
    #: Which tensors were asked for, as a pattern.
    pattern: str
    #: The fields that differ; None where one has no configuration.
    fields: tuple[FieldResult, ...] | None
    files: tuple[FileResult, ...]

    @property
    def verdict(self) -> Verdict:
        """What tensors and configurations say; the other files are not weighed."""
        if self.differing or any(entry.is_difference for entry in self.fields or ()):
            return Verdict.DIFFERENT
        results = {entry.result for entry in self.tensors}
        if Result.ROUNDED in results:
            return Verdict.ROUNDED
        return Verdict.EQUAL if Result.EQUAL in results else Verdict.IDENTICAL

    @property
    def differing(self) -> tuple[TensorResult, ...]:
        """The tensors that are not the same, the worst first."""
        found = [entry for entry in self.tensors if entry.result.is_difference]
        return tuple(sorted(found, key=_rank))

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        chosen = "" if self.pattern == "*" else f" that {self.pattern!r} names"
        total = f"{_counted(len(self.tensors), 'tensor')}{chosen}"
        if self.verdict is Verdict.DIFFERENT:
            faults = []
            if self.differing:
                faults.append(f"{len(self.differing)} of {total} differ")
            if changed := [entry.name for entry in self.fields or () if entry.is_difference]:
                faults.append(f"the configurations differ in {', '.join(changed)}")
            return f"different: {'; '.join(faults)}"
        types = Counter(entry.comparison.rounded_to for entry in self.tensors)
        if self.verdict is Verdict.ROUNDED:
            kinds = " and ".join(sorted(kind for kind in types if kind))
            return f"equal after rounding to {kinds}: {total}"
        if self.verdict is Verdict.EQUAL:
            return f"equal in value, stored in different types: {total}"
        return f"identical: {total}, bit for bit"


def verify(
    a: Checkpoint | str | os.PathLike[str],
    b: Checkpoint | str | os.PathLike[str],
    *,
    tensors: str = "*",
    count: Count = lambda size: None,
) -> Verification:
    """Compare every tensor of two checkpoints, their configurations and the files beside them.

    Memory does not grow with the tensors. `tensors` is a shell pattern for canonical names;
    `count` is told the bytes read. An `lm_head` that only one of them stores, as a copy of the
    embedding it is tied to, is no difference, nor are biases of 0 and norms of 1 that the
    configuration switches off.

    Raises:
        CheckpointError: a file is damaged or unsafe, or changes while it is read.
        CheckpointNotFound: there are no weights.
        HubError: there is no such path, or the repository cannot be read.
        ValueError: no tensor has such a name, or a configuration is no JSON.
    """
    run = _Run(_opened(a), _opened(b), count)
    names = [name for name in run.names() if fnmatchcase(name, tensors)]
    if not names:
        raise ValueError(f"neither {run.a.path} nor {run.b.path} has a tensor named {tensors!r}")
    fields = _fields(*(_config_values(side.path) for side in (run.a, run.b)))
    files = tuple(_files(*(_beside(side.path) for side in (run.a, run.b))))
    results = tuple(run.result(name) for name in names)
    return Verification(run.a, run.b, results, tensors, fields, files)


def size_to_verify(a: Checkpoint, b: Checkpoint, tensors: str = "*") -> int:
    """About how many bytes `verify` will read."""
    return sum(
        size_of(source)
        for side in (a, b)
        for name, source in side.tensors.items()
        if fnmatchcase(name, tensors)
    )


def file_checksum(path: Path, count: Count = lambda size: None) -> str:
    """The sha256 of a file, as `sha256sum` shows it."""
    total = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            total.update(block)
            count(len(block))
    return total.hexdigest()


def _opened(side: Checkpoint | str | os.PathLike[str]) -> Checkpoint:
    return side if isinstance(side, Checkpoint) else open_checkpoint(located(side))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _rank(entry: TensorResult) -> tuple[bool, float]:
    """Missing and misshapen tensors first, then by the size of the difference."""
    return entry.result is Result.DIFFERENT, -entry.comparison.relative


class _Run:
    """One comparison: the two checkpoints, as far as possible with their configurations."""

    def __init__(self, a: Checkpoint, b: Checkpoint, count: Count) -> None:
        self.a, self.b, self.count = a, b, count
        self._configs = _config(a.path), _config(b.path)
        self._sources = _with_embedding(a, b), _with_embedding(b, a)

    def names(self) -> Iterable[str]:
        """All canonical names, in the order of A."""
        return dict.fromkeys(name for side in self._sources for name in side)

    def result(self, name: str) -> TensorResult:
        """One tensor in both."""
        a, b = (side.get(name) for side in self._sources)
        stored = [
            None if source is None else _stored(checkpoint, name, source)
            for checkpoint, source in ((self.a, a), (self.b, b))
        ]
        return TensorResult(name, stored[0], stored[1], self._compared(name, a, b))

    def _compared(self, name: str, a: TensorSource | None, b: TensorSource | None) -> Comparison:
        if a is None or b is None:
            return self._alone(name, a, b)
        if a.shape != b.shape:
            sums = checksum(a, self.count), checksum(b, self.count)
            return Comparison(Result.SHAPES, sums)
        return compare(a, b, self.count)

    def _alone(self, name: str, a: TensorSource | None, b: TensorSource | None) -> Comparison:
        """A tensor of one side: a difference, unless a model of the other is the same without."""
        place = 0 if b is None else 1
        source = a if a is not None else b
        assert source is not None
        result = (Result.ONLY_A, Result.ONLY_B)[place]
        if self._is_tied(name, source, place):
            result = Result.TIED
        elif self._is_neutral(name, source, place):
            result = Result.NEUTRAL
        total = checksum(source, self.count)
        return Comparison(result, (total, None) if b is None else (None, total))

    def _is_tied(self, name: str, source: TensorSource, place: int) -> bool:
        embedding = self._sources[place].get(EMBEDDING_NAME)
        if name != LM_HEAD_NAME or embedding is None or embedding.shape != source.shape:
            return False
        if not all(config is None or config.tie_word_embeddings for config in self._configs):
            return False
        return compare(source, embedding).result is Result.IDENTICAL

    def _is_neutral(self, name: str, source: TensorSource, place: int) -> bool:
        """Whether the configuration of the side that lacks it does without, and it does nothing."""
        config = self._configs[1 - place] or self._configs[place]
        if config is None:
            return False
        row = switched_off(config, head_in(config, self._sources[1 - place])).get(name)
        return row is not None and row.shape == source.shape and holds_only(source, row.mean)


def _stored(checkpoint: Checkpoint, name: str, source: TensorSource) -> Stored:
    names = checkpoint.original_names
    # The embedding may lie in the file as the head alone.
    spelled = names.get(name) or (names.get(LM_HEAD_NAME) if name == EMBEDDING_NAME else None)
    return Stored(spelled or name, tuple(source.shape), str(source.dtype))


def _with_embedding(side: Checkpoint, other: Checkpoint) -> Mapping[str, TensorSource]:
    """The tensors; where a tied pair is stored as the head alone, that is the embedding too."""
    found = dict(side.tensors)
    if LM_HEAD_NAME in found and EMBEDDING_NAME not in found and EMBEDDING_NAME in other.tensors:
        config = _config(side.path)
        if config is None or config.tie_word_embeddings:
            found[EMBEDDING_NAME] = found[LM_HEAD_NAME]
    return found


def _config(path: Path) -> OPTConfig | None:
    """The configuration beside the weights, if it is there and in order."""
    try:
        return OPTConfig.from_pretrained(path)
    except (ValueError, CheckpointNotFound):
        return None


def _config_values(path: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What a config.json says, and with defaults for what it does not; None without a file."""
    try:
        written = read_json(config_path(path))
    except CheckpointNotFound:
        return None
    config = _config(path)
    return written, written if config is None else config.to_dict()


def _fields(
    a: tuple[dict[str, Any], dict[str, Any]] | None,
    b: tuple[dict[str, Any], dict[str, Any]] | None,
) -> tuple[FieldResult, ...] | None:
    if a is None or b is None:
        return None
    ours = all(written is not whole for written, whole in (a, b))
    left, right = (whole if ours else written for written, whole in (a, b))
    shown = (
        FieldResult(name, *(_as_json(side, name) for side in (left, right)))
        for name in dict.fromkeys([*left, *right])
    )
    return tuple(entry for entry in shown if entry.a != entry.b)


def _as_json(values: Mapping[str, Any], name: str) -> str | None:
    return json.dumps(values[name], sort_keys=True) if name in values else None


def _beside(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _files(a: Path, b: Path) -> Iterable[FileResult]:
    for name in COMPANIONS:
        places = a / name, b / name
        sums = tuple(file_checksum(path) if path.is_file() else None for path in places)
        if sums[0] is None and sums[1] is None:
            continue
        if sums[0] is None or sums[1] is None:
            said = "only in A" if sums[1] is None else "only in B"
        elif sums[0] == sums[1]:
            said = "identical"
        else:
            said = "same content" if _same_json(*places) else "different"
        yield FileResult(name, said, (sums[0], sums[1]))


def _same_json(a: Path, b: Path) -> bool:
    if a.suffix != ".json" or max(path.stat().st_size for path in (a, b)) > _READ_WHOLE:
        return False
    try:
        return read_json(a) == read_json(b)
    except ValueError:
        return False
