"""Where the files of a repository come from: the hub, or what the cache holds of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

from opt_core.hub.errors import FileMissing, HubError, HubOffline, translated
from opt_core.version import __version__

# Importing the names of huggingface_hub takes 100 ms and more: it is done where the hub is met.

# What a name that ends so stands for is a file; other dots ('opt-1.3b') belong to repo ids.
WEIGHTS_SUFFIXES = tuple(
    f".{kind}"
    for kind in ("safetensors", "bin", "pt", "pth", "h5", "keras", "msgpack", "npz", "gguf", "ckpt")
)


@dataclass(frozen=True)
class Asked:
    """The repository that a call is about, and how to reach it."""

    repo: str
    revision: str = "main"
    subfolder: str = ""
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: Path | None = None
    force_download: bool = False

    def __post_init__(self) -> None:
        """Refuses what would lead out of the repository or the cache, and half-copied tokens."""
        if not self.revision:
            raise ValueError("revision='' names nothing: give a branch, a tag or a commit, or None")
        for argument in ("revision", "subfolder"):
            value = getattr(self, argument)
            if value.startswith("/") or "\\" in value or ".." in value.split("/"):
                raise ValueError(f"{argument}={value!r} leads out of the repository")
        token = self.token if isinstance(self.token, str) else "-"
        if not (token.isascii() and token.isprintable() and token.split() == [token]):
            # The text of the library's own error would show the token.
            raise ValueError(
                "token= is empty or holds foreign characters, such as a space: copy it"
            )

    def __str__(self) -> str:
        inside = f", folder '{self.subfolder}'" if self.subfolder else ""
        return f"'{self.repo}' (revision '{self.revision}'{inside})"

    def path(self, name: str) -> str:
        """The path in the repository of a file of the folder that is asked for."""
        return str(PurePosixPath(self.subfolder, name))


class Place(Protocol):
    """A source of files, by their paths in the repository."""

    def has(self, name: str) -> bool:
        """Whether the file is there."""

    def fetch(self, names: Sequence[str]) -> Path:
        """Makes files that are there local, and returns the folder of the snapshot."""

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of those files that `fetch` would download."""

    def missing(self, names: Sequence[str]) -> HubError:
        """The error to raise where files are not there."""


class Hub:
    """The files of one commit of a repository, fetched into the cache."""

    def __init__(self, asked: Asked, *, sizes: bool = False) -> None:
        """Asks for the commit and the names of its files: one request, one timeout, no retry.

        With `sizes`, asks for these as well.
        """
        from huggingface_hub import HfApi, constants

        self._asked = asked
        api = HfApi(token=asked.token, library_name="optlm", library_version=__version__)
        try:
            with translated(asked):
                told = api.model_info(
                    asked.repo,
                    revision=asked.revision,
                    timeout=constants.HF_HUB_ETAG_TIMEOUT,
                    files_metadata=sizes,
                )
                self._files = {str(s.rfilename): s.size or 0 for s in told.siblings or ()}
                self._commit = str(told.sha)
        except HubError as error:
            # A captive portal, or a wrong HF_ENDPOINT, answers every question with some page.
            if isinstance(
                error.__cause__, json.JSONDecodeError | UnicodeError | KeyError | TypeError
            ):
                raise HubOffline(f"what answers at {api.endpoint} is not a hub") from error
            raise
        # The first file is asked for by the revision's name: that makes huggingface_hub note the
        # commit in the cache, where an offline call finds it. The others come from that commit.
        self._revision = asked.revision

    def has(self, name: str) -> bool:
        """Whether the commit has the file."""
        return name in self._files

    def fetch(self, names: Sequence[str]) -> Path:
        """Downloads what the cache lacks, with one line above the lines of the single files."""
        from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

        asked = self._asked
        waiting = [n for n in names if asked.force_download or not cached(asked, n, self._commit)]
        hidden = True if len(waiting) < 2 else None  # None: shown on a terminal
        title = f"Fetching {len(waiting)} files"
        with tqdm(total=len(waiting), desc=title, disable=hidden) as bar:  # type: ignore[no-untyped-call]
            for name in names:
                snapshot = self._download(name)
                bar.update(name in waiting)
        return snapshot

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of those files that the cache lacks."""
        asked = self._asked
        return {
            name: self._files[name]
            for name in names
            if asked.force_download or not cached(asked, name, self._commit)
        }

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        asked = self._asked
        with translated(asked):
            path = hf_hub_download(
                asked.repo,
                name,
                revision=self._revision,
                token=asked.token,
                cache_dir=asked.cache_dir,
                force_download=asked.force_download,
                library_name="optlm",
                library_version=__version__,
            )
        snapshot = _snapshot(path, name)
        self._revision = snapshot.name
        return snapshot

    def missing(self, names: Sequence[str]) -> HubError:
        """Names the weights that the folder does have."""
        folder = PurePosixPath(self._asked.subfolder)
        weights = sorted(
            name
            for name in self._files
            if name.endswith((*WEIGHTS_SUFFIXES, ".index.json"))
            and PurePosixPath(name).parent == folder
        )
        more = f" and {len(weights) - 10} more" if len(weights) > 10 else ""
        return FileMissing(
            f"{self._asked} lacks {', '.join(names)}. Weights files there:"
            f" {', '.join(weights[:10]) or 'none'}{more}. Check the repo id, revision= and"
            " subfolder="
        )


class Cache:
    """The files of a repository that the cache holds already."""

    def __init__(self, asked: Asked, why: str, cause: HubOffline | None) -> None:
        """`why` the hub is not asked, and `cause`: what went wrong with it, if anything did."""
        self._asked, self._why, self._cause = asked, why, cause

    def has(self, name: str) -> bool:
        """Whether the file is whole in the cache, at the commit that the revision last was."""
        return cached(self._asked, name, self._asked.revision) is not None

    def fetch(self, names: Sequence[str]) -> Path:
        """Finds the snapshot of files that are there."""
        path = cached(self._asked, names[0], self._asked.revision)
        assert path is not None
        return _snapshot(path, names[0])

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Nothing is downloaded."""
        return {}

    def missing(self, names: Sequence[str]) -> HubError:
        """Says both what keeps us from the hub and what the cache lacks."""
        from huggingface_hub import constants

        error = HubOffline(
            f"{self._why}, and the cache '{self._asked.cache_dir or constants.HF_HUB_CACHE}' lacks"
            f" {', '.join(names)} of {self._asked}. Fetch it once with a connection, or give the"
            " path of a folder"
        )
        error.__cause__ = self._cause
        return error


def cached(asked: Asked, name: str, revision: str) -> str | None:
    """The path of a file in the cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(asked.repo, name, cache_dir=asked.cache_dir, revision=revision)
    return path if isinstance(path, str) else None


def _snapshot(path: str, name: str) -> Path:
    """The folder of the commit in the cache, from the path of one of its files."""
    return Path(path).parents[len(PurePosixPath(name).parts) - 1]
