"""Without a connection the cache is used, and a broken one leaves nothing half done."""

import socket
from pathlib import Path

import pytest

from opt_core import hub
from tests.hub.conftest import ONE_OF, OPT, WEIGHTS, unplug
from tests.hub_server import Fault, Server


def test_local_files_only_takes_the_cache_and_asks_nobody(server: Server) -> None:
    online = hub.resolve("facebook/opt-1.3b", files=["config.json"], one_of=ONE_OF)
    server.requests.clear()
    offline = hub.resolve(
        "facebook/opt-1.3b", files=["config.json"], one_of=ONE_OF, local_files_only=True
    )
    assert offline == online
    assert server.requests == []


def test_local_files_only_without_the_files_says_what_the_cache_lacks(server: Server) -> None:
    hub.resolve(OPT, files=["config.json"])
    server.requests.clear()
    with pytest.raises(
        hub.HubOffline, match=r"forbids asking the hub, and the cache .*home/hub' lacks"
    ):
        hub.resolve(OPT, files=["config.json"], one_of=ONE_OF, local_files_only=True)
    assert server.requests == []


def test_a_cache_that_lacks_a_shard_is_not_enough(server: Server) -> None:
    folder = hub.resolve("facebook/opt-1.3b", one_of=ONE_OF)
    (folder / "part-2.safetensors").unlink()
    with pytest.raises(hub.HubOffline, match=r"lacks part-2.safetensors of 'facebook/opt-1.3b'"):
        hub.resolve("facebook/opt-1.3b", one_of=ONE_OF, local_files_only=True)


def test_a_revision_that_was_never_fetched_is_not_in_the_cache(server: Server) -> None:
    hub.resolve(OPT, files=["config.json"])
    with pytest.raises(hub.HubOffline, match=r"lacks config.json of .*\(revision 'v2'\)"):
        hub.resolve(OPT, files=["config.json"], revision="v2", local_files_only=True)


def test_offline_mode_takes_the_cache_without_a_warning(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.resolve(OPT, files=["config.json"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    server.requests.clear()
    assert hub.resolve(OPT, files=["config.json"]) == folder
    with pytest.raises(
        hub.HubOffline, match="HF_HUB_OFFLINE forbids asking the hub, and the cache"
    ):
        hub.resolve(OPT, files=["merges.txt"])
    with pytest.raises(hub.HubOffline, match="HF_HUB_OFFLINE forbids asking the hub"):
        hub.resolve(OPT, files=["config.json"], force_download=True)
    assert server.requests == []


def test_an_unreachable_hub_is_replaced_by_the_cache_with_a_warning(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.resolve(OPT, files=["config.json"], one_of=ONE_OF)
    unplug(server, monkeypatch)
    with pytest.warns(UserWarning, match=r"does not answer \(ConnectError.*come from the cache"):
        assert hub.resolve(OPT, files=["config.json"], one_of=ONE_OF) == folder


def test_an_unreachable_hub_without_a_cache_is_an_error(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    unplug(server, monkeypatch)
    with pytest.raises(
        hub.HubOffline, match=r"does not answer .* and the cache .* lacks config\.json"
    ):
        hub.resolve(OPT, files=["config.json"])


def test_a_hub_that_never_answers_is_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.resolve(OPT, files=["config.json"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        with pytest.warns(UserWarning, match=r"does not answer \(ReadTimeout"):
            assert hub.resolve(OPT, files=["config.json"]) == folder


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_failing_hub_is_replaced_by_the_cache_with_a_warning(server: Server, status: int) -> None:
    folder = hub.resolve(OPT, files=["config.json"])
    server.faults.append(Fault("/revision/main", status=status))
    with pytest.warns(UserWarning, match=rf"does not answer \(HTTP {status}\)"):
        assert hub.resolve(OPT, files=["config.json"]) == folder


@pytest.mark.parametrize(
    "body",
    [
        b"<html>log in to the network</html>",
        b"\xff\xfe",
        b"{}",
        b"[]",
        b'{"id": 1, "siblings": [3]}',
    ],
)
def test_a_page_in_place_of_the_hub_is_recognised(server: Server, body: bytes) -> None:
    server.faults.append(Fault("/revision/main", body=body))
    with pytest.raises(hub.HubOffline, match=r"what answers at http://127.0.0.1:\d+ is not a hub"):
        hub.resolve(OPT, files=["config.json"])


def test_a_forced_download_does_not_fall_back_to_the_cache(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.resolve(OPT, files=["config.json"])
    unplug(server, monkeypatch)
    with pytest.raises(hub.HubOffline, match="does not answer"):
        hub.resolve(OPT, files=["config.json"], force_download=True)


def test_a_forced_download_from_the_cache_is_a_contradiction() -> None:
    with pytest.raises(ValueError, match="needs the hub: leave out local_files_only=True"):
        hub.resolve(OPT, files=["config.json"], force_download=True, local_files_only=True)


@pytest.mark.usefixtures("impatient")
def test_an_interrupted_download_is_resumed_where_it_broke_off(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)
    server.faults.append(Fault("model.safetensors", times=2, cut=1000))
    folder = hub.resolve(OPT, one_of=ONE_OF)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [request.headers.get("range") for request in server.requests if request.storage]
    assert ranges == [None, "bytes=1000-", "bytes=2000-"]


@pytest.mark.usefixtures("impatient")
def test_a_download_that_breaks_off_leaves_nothing_that_is_taken_for_whole(
    server: Server, tmp_path: Path
) -> None:
    server.faults.append(Fault("model.safetensors", cut=0))
    with pytest.raises(hub.HubOffline, match=r"does not answer \(RemoteProtocolError"):
        hub.resolve(OPT, files=["config.json"], one_of=ONE_OF)
    assert not list(tmp_path.rglob("model.safetensors"))
    with pytest.raises(hub.HubOffline, match="lacks every one of model"):
        hub.resolve(OPT, files=["config.json"], one_of=ONE_OF, local_files_only=True)
    server.faults.clear()
    folder = hub.resolve(OPT, files=["config.json"], one_of=ONE_OF)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_an_interrupt_from_the_keyboard_passes_and_leaves_no_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.file_download.http_get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hub.resolve(OPT, files=["config.json"])
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.usefixtures("impatient")
def test_a_hub_that_fails_between_two_answers_is_an_error_of_ours(server: Server) -> None:
    server.faults.append(Fault("/resolve/", method="HEAD", status=503))
    with pytest.raises(hub.HubOffline, match=r"does not answer \(HTTP 503\)"):
        hub.resolve(OPT, files=["config.json"])


def test_a_cache_that_cannot_be_written_is_an_error_of_ours(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(hub.HubError, match=rf"'{OPT}' .*: the transfer failed. \w+Error: .*file"):
        hub.resolve(OPT, files=["config.json"], cache_dir=tmp_path / "file")
