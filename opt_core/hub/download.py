"""From a repo id or a path to local files."""

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from opt_core.hub.errors import HubOffline, IndexDamaged, IndexUnsafe, SourceMissing
from opt_core.hub.places import WEIGHTS_SUFFIXES, Asked, Cache, Hub, Place

_Before = Callable[[Mapping[str, int]], object]


@dataclass(frozen=True)
class _Wanted:
    """Paths in the repository: all of `files`, what exists of `optional`, one of `one_of`."""

    files: Sequence[str]
    optional: Sequence[str]
    one_of: Sequence[Sequence[str]]


def resolve(
    source: str | os.PathLike[str],
    *,
    files: Sequence[str] = (),
    optional: Sequence[str] = (),
    one_of: Sequence[Sequence[str]] = (),
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str = "",
    before: _Before | None = None,
) -> Path:
    """Returns the local file or folder that `source` stands for, fetching from the hub if need be.

    An existing path is returned as it is, joined with `subfolder`; a path object is never a repo
    id. Of a repository come all `files`, what exists of `optional`, and the first alternative of
    `one_of` whose first name exists, with its shards if that is an `.index.json`; nothing else.
    A hub that does not answer is replaced by the cache, with a warning.

    `before` is told what will be downloaded, bytes by file, and may raise to stop that. (An index
    is fetched first, since it says which shards there are.)

    Raises:
        HubError: its kind says what is wrong.
        ValueError: arguments contradict each other.
    """
    where = Path(cache_dir).expanduser() if cache_dir is not None else None
    branch = "main" if revision is None else revision
    asked = Asked(os.fspath(source), branch, subfolder.rstrip("/"), token, where, force_download)
    wanted = _Wanted(
        [asked.path(name) for name in files],
        [asked.path(name) for name in optional],
        [[asked.path(name) for name in alternative] for alternative in one_of],
    )
    local = _local(source, asked.subfolder)
    return local if local is not None else _fetched(asked, wanted, local_files_only, before)


def _local(source: str | os.PathLike[str], subfolder: str) -> Path | None:
    """The path that `source` names, or None where it can only be a repo id."""
    name = os.fspath(source)
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        if not (path / subfolder).is_dir():
            raise SourceMissing(f"the folder '{path}' holds no folder '{subfolder}' (subfolder=)")
        return path / subfolder
    if name and path.exists():
        if subfolder:
            raise ValueError(f"'{path}' is a file: subfolder={subfolder!r} goes with a folder only")
        return path
    what = f"{name!r}: there is no file or folder '{os.path.abspath(path)}'"
    remedy = "give an existing path, or a repo id such as 'facebook/opt-125m'"
    if isinstance(source, os.PathLike) or _looks_like_a_path(name):
        raise SourceMissing(f"{what}; {remedy}")
    fault = repo_id_fault(name)
    if fault is not None:
        raise SourceMissing(f"{what}, and this cannot be a repo id; {remedy}") from fault
    return None


def _looks_like_a_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or name.endswith(("/", *WEIGHTS_SUFFIXES, ".json", ".txt", ".model"))
        or name.count("/") > 1
        or "\\" in name
        or os.path.lexists(name)  # a link to nowhere
    )


def repo_id_fault(name: str) -> ValueError | None:
    """Why a name cannot be a repo id, or None."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except ValueError as error:
        return error
    return None


def _fetched(asked: Asked, wanted: _Wanted, local_files_only: bool, before: _Before | None) -> Path:
    if not (wanted.files or wanted.optional or wanted.one_of):
        raise ValueError(f"nothing is asked of {asked}: name files=, optional= or one_of=")
    if asked.force_download and local_files_only:
        raise ValueError("force_download=True needs the hub: leave out local_files_only=True")
    warning = None
    place: Place
    if local_files_only:
        place = Cache(asked, "local_files_only=True forbids asking the hub", None)
    else:
        try:
            place = Hub(asked, sizes=before is not None)
        except HubOffline as error:
            if asked.force_download:
                raise
            place, warning = Cache(asked, str(error), error), _warning(asked, error)
    snapshot = _taken(place, asked, wanted, before)
    if warning:
        warnings.warn(warning, stacklevel=3)
    return snapshot / asked.subfolder


def _warning(asked: Asked, error: HubOffline) -> str | None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:  # who chose to be offline need not be told
        return None
    return (
        f"{error}: the files of {asked} come from the cache, and may be older than the hub's."
        " HF_HUB_OFFLINE=1 or local_files_only=True asks for that"
    )


def _taken(place: Place, asked: Asked, wanted: _Wanted, before: _Before | None) -> Path:
    """The snapshot, with every wanted file in it."""
    chosen = next((list(names) for names in wanted.one_of if place.has(names[0])), [])
    names = [*wanted.files, *chosen, *filter(place.has, wanted.optional)]
    absent = [name for name in names if not place.has(name)]
    if wanted.one_of and not chosen:
        absent.append("every one of " + ", ".join(names[0] for names in wanted.one_of))
    if absent or not names:
        raise place.missing(absent or wanted.optional)
    if chosen and chosen[0].endswith(".index.json"):
        shards = _shards(place.fetch(chosen), chosen[0], asked)
        absent = [name for name in shards if not place.has(name)]
        if absent:
            raise place.missing(absent)
        names += shards
    if before is not None:
        before(place.sizes(names))
    return place.fetch(list(dict.fromkeys(names)))


def _shards(snapshot: Path, index: str, asked: Asked) -> list[str]:
    """The files that an index names, each in the index's own folder."""
    where = f"'{index}' of {asked}"
    try:
        entries = dict(json.loads((snapshot / index).read_bytes())["weight_map"].items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise IndexDamaged(
            f"{where} should be JSON with a weight_map from tensor names to file names, but"
            f" reading it gave {type(error).__name__}: {error}. Fetch it anew with"
            " force_download=True, or tell its author"
        ) from error
    if not entries:
        raise IndexDamaged(f"{where} has an empty weight_map: there are no weights to load")
    for tensor, shard in entries.items():
        plain = isinstance(shard, str) and shard.isprintable() and shard not in ("", ".", "..")
        if not plain or any(mark in shard for mark in "/\\:"):
            raise IndexUnsafe(
                f"{where} says that {tensor!r} lies in {shard!r}, but a shard is a plain file name"
                " beside the index. No shard was fetched; tell the repository's author"
            )
    return [str(PurePosixPath(index).parent / shard) for shard in dict.fromkeys(entries.values())]
