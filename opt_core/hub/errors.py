"""The errors of the hub, and what each error of `huggingface_hub` means in their terms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opt_core.hub.places import Asked

_LOG_IN = "log in with `hf auth login` or pass token="


class HubError(OSError):
    """A repository could not be read or written."""


class SourceMissing(HubError, FileNotFoundError):
    """The source is no file, no folder, and cannot be a repo id."""


class RepositoryMissing(HubError, FileNotFoundError):
    """The hub has no such repository, or the repository no such revision."""


class RepositoryGated(HubError, PermissionError):
    """The hub refuses the token, or asks for one."""


class FileMissing(HubError, FileNotFoundError):
    """The repository has no file of that name."""


class HubOffline(HubError, ConnectionError):
    """The hub does not answer, or may not be asked, and the cache does not hold the files."""


class IndexDamaged(HubError, ValueError):
    """The index of a sharded checkpoint cannot be read."""


class IndexUnsafe(HubError, ValueError):
    """The index of a sharded checkpoint names a file outside its own folder."""


@contextmanager
def translated(asked: Asked) -> Iterator[None]:
    """Turns what `huggingface_hub` raises or lets through into a `HubError`."""
    try:
        yield
    # httpx, hf_xet and the file system raise types of their own through huggingface_hub.
    except Exception as error:
        raise _explained(error, asked) from error


def _explained(error: Exception, asked: Asked) -> HubError:
    from huggingface_hub import HfApi

    endpoint = HfApi().endpoint
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:  # huggingface_hub keeps reasons there
        causes.append(causes[-1].__cause__)
    for cause in causes:
        known = _refused(cause, asked, endpoint) or _unanswered(cause, endpoint)
        if known is not None:
            return known
    reasons = ", because of ".join(f"{type(cause).__name__}: {cause}" for cause in causes)
    return HubError(f"{asked} on {endpoint}: the transfer failed. {reasons}")


def _refused(error: BaseException, asked: Asked, endpoint: str) -> HubError | None:
    """What the hub's answer means, where it answered with a no."""
    from huggingface_hub import errors

    status = _status(error)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return RepositoryGated(f"{asked}: token=True, but nobody is logged in here: {_LOG_IN}")
    if isinstance(error, errors.DisabledRepoError):
        return RepositoryMissing(f"{endpoint} has disabled the repository {asked}")
    if isinstance(error, errors.RevisionNotFoundError):
        return RepositoryMissing(
            f"the repository '{asked.repo}' on {endpoint} has no revision '{asked.revision}':"
            " give a branch, a tag or a commit that it has"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return FileMissing(f"a file has gone from {asked} on {endpoint}; try again. {error}")
    gated = isinstance(error, errors.GatedRepoError)  # a kind of RepositoryNotFoundError
    if not gated and (isinstance(error, errors.RepositoryNotFoundError) or status == 404):
        return RepositoryMissing(
            f"{endpoint} has no repository {asked}, or hides it: check the spelling, and for a"
            f" private repository {_LOG_IN}"
        )
    if gated or status in (401, 403):
        return RepositoryGated(
            f"{endpoint} refuses access to {asked} (HTTP {status}): if it is gated, accept its"
            f" terms at {endpoint}/{asked.repo}; {_LOG_IN} with the right to it"
        )
    return None


def _unanswered(error: BaseException, endpoint: str) -> HubOffline | None:
    """What is in the way, where the hub was not reached or could not answer."""
    # huggingface_hub 1 uses httpx and 2 uses httpx2: this name is the right type in both.
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return HubOffline("HF_HUB_OFFLINE forbids asking the hub")
    if isinstance(error, HTTPError) and (status in (0, 408, 429) or status >= 500):
        what = f"HTTP {status}" if status else f"{type(error).__name__}: {error}"
        return HubOffline(f"the hub at {endpoint} does not answer ({what})")
    return None


def _status(error: BaseException) -> int:
    """The HTTP status that an error carries, or 0."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))
