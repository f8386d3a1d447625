"""A local folder becomes a commit."""

from pathlib import Path

import pytest

from opt_core import hub
from tests.hub.conftest import FILES, OPT, names, unplug
from tests.hub_server import Fault, Server

# huggingface_hub hands files to httpx in a way that httpx deprecates; not ours to change.
uploads = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "fp16").mkdir(parents=True)
    for name in ("config.json", "README.md", "model.safetensors", "fp16/model.safetensors"):
        (folder / name).write_bytes(name.encode() * 10)
    return folder


@uploads
def test_a_pushed_folder_comes_back_whole(server: Server, model: Path) -> None:
    url = hub.push(model, "me/opt", token="may-write", commit_message="First weights")
    commit = server["me/opt"].branches["main"]
    assert url == f"{server.url}/me/opt/commit/{commit}"
    assert server["me/opt"].messages[commit] == "First weights"
    back = hub.resolve("me/opt", files=names(model))
    assert names(back) == names(model)
    assert all((back / n).read_bytes() == (model / n).read_bytes() for n in names(model))


@uploads
def test_a_pushed_repository_belongs_to_the_user_and_may_be_private(
    server: Server, model: Path
) -> None:
    hub.push(str(model), "new-opt", token="may-write", private=True)
    assert server["me/new-opt"].private == "may-write"
    with pytest.raises(hub.RepositoryMissing):
        hub.resolve("me/new-opt", files=["config.json"])


@uploads
def test_a_push_keeps_the_other_files_of_the_repository(server: Server, model: Path) -> None:
    hub.push(model, OPT, token="may-write")
    assert set(server[OPT].files()) == set(FILES) | set(names(model))


@uploads
def test_a_push_to_a_revision_makes_the_branch_once(server: Server, model: Path) -> None:
    for text in ("1", "2"):
        (model / "config.json").write_text(text)
        hub.push(model, OPT, token="may-write", revision="v2")
    assert server[OPT].files("v2")["config.json"] == b"2"
    assert server[OPT].files() == FILES


@uploads
def test_a_push_may_open_a_pull_request(server: Server, model: Path) -> None:
    url = hub.push(model, OPT, token="may-write", create_pr=True)
    assert server[OPT].files() == FILES
    assert url.endswith(server[OPT].branches["refs/pr/1"])
    (model / "config.json").write_text("later")
    hub.push(model, OPT, token="may-write", revision="refs/pr/1")
    assert server[OPT].files("refs/pr/1")["config.json"] == b"later"


@pytest.mark.parametrize("token", ["may-read", False])
def test_a_push_without_the_right_to_write_says_so(
    server: Server, model: Path, token: str | bool
) -> None:
    with pytest.raises(
        hub.RepositoryGated, match=r"refuses access to 'me/opt' .* with the right to"
    ):
        hub.push(model, "me/opt", token=token)


def test_a_push_of_a_missing_folder_is_an_error(server: Server, tmp_path: Path) -> None:
    with pytest.raises(hub.SourceMissing, match=r"there is no folder '.*nothing' to upload"):
        hub.push(tmp_path / "nothing", "me/opt")
    assert server.requests == []


def test_a_push_to_an_impossible_repo_id_is_an_error(server: Server, model: Path) -> None:
    with pytest.raises(
        ValueError, match="'a/b/c' cannot be a repo id: give 'name' or 'owner/name'"
    ):
        hub.push(model, "a/b/c")
    assert server.requests == []


def test_a_pull_request_against_a_branch_is_refused(server: Server, model: Path) -> None:
    with pytest.raises(ValueError, match="create_pr=True opens a pull request against 'main'"):
        hub.push(model, OPT, revision="v2", create_pr=True)
    assert server.requests == []


def test_a_push_to_an_unreachable_hub_is_an_error(
    server: Server, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unplug(server, monkeypatch)
    with pytest.raises(hub.HubOffline, match=r"does not answer \(ConnectError"):
        hub.push(model, OPT, token="may-write")


@uploads
@pytest.mark.usefixtures("impatient")
def test_a_push_that_the_storage_refuses_is_an_error(server: Server, model: Path) -> None:
    server.faults.append(Fault("/[0-9a-f]{64}", method="PUT", status=500))
    with pytest.raises(hub.HubOffline, match=r"does not answer \(HTTP 500\)"):
        hub.push(model, OPT, token="may-write")
    assert server[OPT].files() == FILES
