"""What a source stands for: a path, a repository, or nothing."""

from pathlib import Path

import pytest

from opt_core import hub
from tests.hub.conftest import OPT
from tests.hub_server import Server


def test_an_existing_folder_is_returned_as_it_is(server: Server, tmp_path: Path) -> None:
    assert hub.resolve(tmp_path, files=["config.json"], revision="x") == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert server.requests == []


def test_an_existing_file_is_returned_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "opt.safetensors"
    path.touch()
    assert hub.resolve(str(path)) == path


def test_a_folder_named_like_a_repository_wins_over_the_hub(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(OPT).mkdir(parents=True)
    assert hub.resolve(OPT, files=["config.json"]) == Path(OPT)
    assert server.requests == []


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "opt").mkdir()
    assert hub.resolve("~/opt") == tmp_path / "opt"


def test_a_subfolder_is_joined_to_a_local_folder(tmp_path: Path) -> None:
    (tmp_path / "fp16").mkdir()
    assert hub.resolve(tmp_path, subfolder="fp16/") == tmp_path / "fp16"


def test_a_subfolder_that_a_local_folder_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(hub.SourceMissing, match=r"holds no folder 'fp16' \(subfolder=\)"):
        hub.resolve(tmp_path, subfolder="fp16")


def test_a_subfolder_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "opt.bin"
    path.touch()
    with pytest.raises(ValueError, match="is a file: subfolder='fp16' goes with a folder only"):
        hub.resolve(path, subfolder="fp16")


@pytest.mark.parametrize(
    "source",
    [
        "./opt",
        "../opt",
        "/nowhere/opt",
        "~/nowhere",
        "owner/opt/",
        "a/b/c",
        "a\\b",
        "model.safetensors",
        "owner/pytorch_model.bin",
        "model.safetensors.index.json",
        "https://huggingface.co/facebook/opt-125m",
        Path(OPT),
    ],
)
def test_a_missing_path_never_becomes_a_request(server: Server, source: str | Path) -> None:
    with pytest.raises(hub.SourceMissing, match=r"there is no file or folder .* give an existing"):
        hub.resolve(source, files=["config.json"])
    assert server.requests == []


def test_a_link_to_nowhere_never_becomes_a_request(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("opt").symlink_to("gone")
    with pytest.raises(hub.SourceMissing, match="'opt': there is no file or folder"):
        hub.resolve("opt", files=["config.json"])
    assert server.requests == []


@pytest.mark.parametrize("source", ["", "two words", "x--y", "owner/-name", "name.git", "a\0b"])
def test_a_name_that_can_be_no_repo_id_never_becomes_a_request(server: Server, source: str) -> None:
    with pytest.raises(hub.SourceMissing, match="this cannot be a repo id; give an existing path"):
        hub.resolve(source, files=["config.json"])
    assert server.requests == []
