"""From a local folder to a commit on the hub."""

import os

from opt_core.hub.download import repo_id_fault
from opt_core.hub.errors import SourceMissing, translated
from opt_core.hub.places import Asked
from opt_core.version import __version__


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    create_pr: bool = False,
) -> str:
    """Uploads the files of a folder and returns the commit's URL; repository and branch are made.

    Raises:
        HubError: its kind says what is wrong.
        ValueError: `repo_id` cannot be one, or `create_pr` comes with a branch.
    """
    if not os.path.isdir(folder):
        raise SourceMissing(f"there is no folder '{os.path.abspath(folder)}' to upload")
    fault = repo_id_fault(repo_id)
    if fault is not None:
        raise ValueError(f"{repo_id!r} cannot be a repo id: give 'name' or 'owner/name'") from fault
    asked = Asked(repo_id, "main" if revision is None else revision, token=token)
    if create_pr and asked.revision != "main":
        raise ValueError(
            "create_pr=True opens a pull request against 'main':"
            f" leave out revision={revision!r}, or create_pr"
        )
    with translated(asked):
        return _committed(folder, asked, private, commit_message, create_pr)


def _committed(
    folder: str | os.PathLike[str],
    asked: Asked,
    private: bool | None,
    commit_message: str,
    create_pr: bool,
) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=asked.token, library_name="optlm", library_version=__version__)
    repo_id = api.create_repo(asked.repo, private=private, exist_ok=True).repo_id
    if asked.revision != "main" and not asked.revision.startswith("refs/"):
        api.create_branch(repo_id, branch=asked.revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=os.fspath(folder),
        commit_message=commit_message,
        revision=asked.revision,
        create_pr=create_pr,
    )
    return commit.commit_url
