"""What is fetched of a repository, and how it is asked for."""

import io
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from opt_core import hub
from tests.hub.conftest import FILES, ONE_OF, OPT, SHARDED, WEIGHTS, names
from tests.hub_server import Server


@pytest.mark.parametrize("source", [OPT, "opt"])
def test_only_the_needed_files_are_fetched_and_safetensors_is_preferred(
    server: Server, source: str
) -> None:
    folder = hub.resolve(
        source, files=["config.json"], optional=["merges.txt", "vocab.json"], one_of=ONE_OF
    )
    assert names(folder) == ["config.json", "merges.txt", "model.safetensors"]
    assert server.fetched() == names(folder)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_the_next_alternative_is_taken_where_the_first_is_absent(server: Server) -> None:
    server[OPT].commit({"config.json": b"{}", "pytorch_model.bin": b"b", "a.bin": b"a"})
    assert names(hub.resolve(OPT, one_of=ONE_OF)) == ["pytorch_model.bin"]
    assert server.fetched() == ["pytorch_model.bin"]


def test_all_files_of_the_chosen_alternative_are_fetched(server: Server) -> None:
    alternatives = [["vocab.json", "merges.txt"], ["merges.txt", "README.md"]]
    assert names(hub.resolve(OPT, one_of=alternatives)) == ["README.md", "merges.txt"]


def test_an_index_brings_its_shards_and_no_others(server: Server) -> None:
    folder = hub.resolve("facebook/opt-1.3b", files=["config.json"], one_of=ONE_OF)
    shards = ["part-1.safetensors", "part-2.safetensors"]
    assert names(folder) == ["config.json", "model.safetensors.index.json", *shards]
    assert server.fetched() == names(folder)


def test_what_the_cache_holds_is_not_fetched_again(server: Server) -> None:
    first = hub.resolve(OPT, files=["config.json"], one_of=ONE_OF)
    server.requests.clear()
    assert hub.resolve(OPT, files=["config.json"], one_of=ONE_OF) == first
    assert server.fetched() == []
    assert len(server.requests) == 2  # what is the commit, and has the first file changed


def test_a_forced_download_fetches_again(server: Server) -> None:
    for _ in range(2):
        hub.resolve(OPT, files=["config.json"], one_of=ONE_OF, force_download=True)
    assert server.fetched() == ["config.json"] * 2 + ["model.safetensors"] * 2


def test_a_new_commit_is_noticed(server: Server) -> None:
    old = hub.resolve(OPT, files=["config.json"])
    server[OPT].commit({**FILES, "config.json": b'{"new": 1}'})
    new = hub.resolve(OPT, files=["config.json"])
    assert (new / "config.json").read_bytes() == b'{"new": 1}'
    assert (old / "config.json").read_bytes() == FILES["config.json"]


@pytest.mark.parametrize("kind", ["branch", "branch/with/slashes", "commit"])
def test_a_revision_is_fetched(server: Server, kind: str) -> None:
    commit = server[OPT].commit({"config.json": b"[1]"}, branch=kind)
    revision = commit if kind == "commit" else kind
    folder = hub.resolve(OPT, files=["config.json"], revision=revision)
    assert (folder / "config.json").read_bytes() == b"[1]"
    assert hub.resolve(OPT, files=["config.json"], revision=revision, local_files_only=True)


def test_all_files_come_from_one_commit(server: Server) -> None:
    folder = hub.resolve(OPT, files=["config.json", "merges.txt"], one_of=ONE_OF)
    asked = [request.path for request in server.requests if request.method == "HEAD"]
    commit = server[OPT].branches["main"]
    assert folder.name == commit
    assert asked[1:] == [
        f"/{OPT}/resolve/{commit}/{n}" for n in ("merges.txt", "model.safetensors")
    ]


def test_a_cache_folder_is_used(server: Server, tmp_path: Path) -> None:
    folder = hub.resolve(OPT, files=["config.json"], cache_dir=tmp_path / "mine")
    assert folder.is_relative_to(tmp_path / "mine")
    assert not (tmp_path / "home").exists()
    again = hub.resolve(
        OPT, files=["config.json"], cache_dir=str(tmp_path / "mine"), local_files_only=True
    )
    assert again == folder


def test_a_subfolder_of_a_repository_is_fetched_and_returned(server: Server) -> None:
    server[OPT].commit({**FILES, **{f"fp16/v1/{name}": data for name, data in SHARDED.items()}})
    folder = hub.resolve(OPT, files=["config.json"], one_of=ONE_OF, subfolder="fp16/v1/")
    assert folder.parts[-2:] == ("fp16", "v1")
    assert len(server.fetched()) == 4
    assert all(name.startswith("fp16/v1/") for name in server.fetched())
    offline = hub.resolve(OPT, one_of=ONE_OF, subfolder="fp16/v1", local_files_only=True)
    assert offline == folder


@pytest.mark.parametrize("value", ["../x", "a/../../x", "/etc", "a\\b"])
@pytest.mark.parametrize("argument", ["subfolder", "revision"])
def test_a_subfolder_or_revision_that_leads_out_is_refused(
    server: Server, argument: str, value: str
) -> None:
    with pytest.raises(ValueError, match=f"{argument}=.* leads out of the repository"):
        hub.resolve(OPT, files=["config.json"], **{argument: value})  # type: ignore[arg-type]
    assert server.requests == []


def test_an_empty_revision_is_refused() -> None:
    with pytest.raises(ValueError, match="revision='' names nothing: give a branch"):
        hub.resolve(OPT, files=["config.json"], revision="")


def test_asking_for_nothing_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"nothing is asked of .* name files=, optional= or one_of="
    ):
        hub.resolve(OPT)


def test_bars_show_each_file_and_one_line_over_all(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    hub.resolve("facebook/opt-1.3b", one_of=ONE_OF)
    shown = terminal.getvalue()
    assert "Fetching 2 files" in shown
    assert "part-1.safetensors: 100%" in shown


def test_a_token_goes_to_the_hub_and_not_to_its_storage(server: Server) -> None:
    hub.resolve(OPT, files=["config.json"], one_of=ONE_OF, token="secret")
    assert {request.token for request in server.requests if not request.storage} == {"secret"}
    assert {request.token for request in server.requests if request.storage} == {""}


def test_the_token_of_the_environment_is_sent_unless_it_is_switched_off(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "from-environment")
    hub.resolve(OPT, files=["config.json"])
    assert server.requests[0].token == "from-environment"
    hub.resolve(OPT, files=["merges.txt"], token=False)
    assert server.requests[-1].token == ""


def test_asking_for_the_stored_token_without_one_says_how_to_log_in(server: Server) -> None:
    with pytest.raises(hub.RepositoryGated, match="nobody is logged in here: log in with `hf auth"):
        hub.resolve(OPT, files=["config.json"], token=True)


@pytest.mark.parametrize("token", ["hf_secret\n", "hf secret", "hf_sécret", ""])
def test_a_damaged_token_is_refused_and_not_shown(server: Server, token: str) -> None:
    with pytest.raises(ValueError, match="token= is empty or holds foreign characters") as caught:
        hub.resolve(OPT, files=["config.json"], token=token)
    assert "cret" not in str(caught.value)
    assert server.requests == []


def test_importing_the_hub_and_opening_a_folder_leaves_the_client_alone(tmp_path: Path) -> None:
    code = (
        "import sys, opt_core.hub as hub; hub.resolve(sys.argv[1], files=['config.json'])\n"
        "assert 'huggingface_hub' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=True, timeout=60)


def test_the_environment_sets_the_endpoint_the_token_and_the_cache(
    server: Server, tmp_path: Path
) -> None:
    code = f"""
from opt_core import hub
print(hub.resolve("{OPT}", files=["config.json"], one_of={ONE_OF}))
"""
    done = server.run(tmp_path / "other", code, HF_TOKEN="from-environment")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "other" / "hub")
    assert server.fetched() == ["config.json", "model.safetensors"]
    assert server.requests[0].token == "from-environment"
    offline = server.run(tmp_path / "other", code, HF_HUB_OFFLINE="1")
    assert offline.stdout == done.stdout


def test_what_will_be_downloaded_is_told_before_it_is(server: Server) -> None:
    told: list[dict[str, int]] = []

    def before(sizes: Mapping[str, int]) -> None:
        assert server.fetched() == []
        told.append(dict(sizes))

    def resolve() -> None:
        hub.resolve(OPT, files=["config.json"], one_of=ONE_OF, before=before)

    resolve()
    assert told == [{name: len(FILES[name]) for name in ("config.json", "model.safetensors")}]
    server.requests.clear()
    resolve()
    assert told[1] == {}  # the cache has them all


def test_who_is_told_may_stop_the_download(server: Server) -> None:
    def before(sizes: Mapping[str, int]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.resolve("facebook/opt-1.3b", one_of=ONE_OF, before=before)
    assert server.fetched() == ["model.safetensors.index.json"]


def test_the_sizes_of_shards_are_told(server: Server) -> None:
    told: dict[str, int] = {}
    hub.resolve("facebook/opt-1.3b", files=["config.json"], one_of=ONE_OF, before=told.update)
    shards = ("part-1.safetensors", "part-2.safetensors")
    assert told == {name: len(SHARDED[name]) for name in ("config.json", *shards)}


def test_a_copy_in_the_cache_is_nothing_to_download(server: Server) -> None:
    hub.resolve(OPT, files=["config.json"])
    told = [{"never": 1}]
    hub.resolve(
        OPT, files=["config.json"], local_files_only=True, before=lambda s: told.append({**s})
    )
    assert told[1:] == [{}]
