"""Files of the hub: a repo id or a path becomes local files, a folder becomes a commit."""

from opt_core.hub.download import resolve
from opt_core.hub.errors import (
    FileMissing,
    HubError,
    HubOffline,
    IndexDamaged,
    IndexUnsafe,
    RepositoryGated,
    RepositoryMissing,
    SourceMissing,
)
from opt_core.hub.upload import push

__all__ = [
    "FileMissing",
    "HubError",
    "HubOffline",
    "IndexDamaged",
    "IndexUnsafe",
    "RepositoryGated",
    "RepositoryMissing",
    "SourceMissing",
    "push",
    "resolve",
]
