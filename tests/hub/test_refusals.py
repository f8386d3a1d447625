"""What the hub refuses, and what is refused of the hub."""

import json

import pytest

from opt_core import hub
from tests.hub.conftest import ONE_OF, OPT, SHARDED, index_of
from tests.hub_server import Fault, Server


def test_an_unknown_repository_is_named(server: Server) -> None:
    with pytest.raises(
        hub.RepositoryMissing, match=r"has no repository 'facebook/opt-2'.*spelling"
    ):
        hub.resolve("facebook/opt-2", files=["config.json"])


def test_an_unknown_revision_is_named_with_its_repository(server: Server) -> None:
    with pytest.raises(hub.RepositoryMissing, match=f"'{OPT}' on .* has no revision 'v9': give a"):
        hub.resolve(OPT, files=["config.json"], revision="v9")


def test_a_private_repository_opens_to_its_token_only(server: Server) -> None:
    server[OPT].private = "mine"
    with pytest.raises(hub.RepositoryMissing, match="for a private repository log in with"):
        hub.resolve(OPT, files=["config.json"])
    assert hub.resolve(OPT, files=["config.json"], token="mine").is_dir()


@pytest.mark.parametrize("token", ["other", False])
def test_a_gated_repository_says_how_to_get_in(server: Server, token: str | bool) -> None:
    server[OPT].gated = "mine"
    with pytest.raises(hub.RepositoryGated, match=f"accept its terms at .*/{OPT}; log in with `hf"):
        hub.resolve(OPT, files=["config.json"], token=token)
    assert hub.resolve(OPT, files=["config.json"], token="mine").is_dir()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_without_a_reason_is_one_of_access(server: Server, status: int) -> None:
    server.faults.append(Fault("/revision/main", status=status))
    with pytest.raises(hub.RepositoryGated, match=rf"refuses access to .* \(HTTP {status}\)"):
        hub.resolve(OPT, files=["config.json"])


def test_a_disabled_repository_is_called_so(server: Server) -> None:
    server[OPT].disabled = True
    with pytest.raises(hub.RepositoryMissing, match=f"has disabled the repository '{OPT}'"):
        hub.resolve(OPT, files=["config.json"])


def test_a_missing_file_is_named_with_the_weights_there_are(server: Server) -> None:
    expected = (
        rf"'{OPT}' \(revision 'main'\) lacks tf.h5, vocab.json. Weights files there:"
        " flax_model.msgpack, model.safetensors, pytorch_model.bin. Check the repo id"
    )
    with pytest.raises(hub.FileMissing, match=expected):
        hub.resolve(OPT, files=["tf.h5", "config.json", "vocab.json"])
    assert server.fetched() == []


def test_a_repository_without_the_wanted_weights_says_which_were_looked_for(server: Server) -> None:
    server[OPT].commit({f"{i:02}.gguf": b"" for i in range(12)})
    with pytest.raises(hub.FileMissing, match="lacks every one of mod") as caught:
        hub.resolve(OPT, one_of=ONE_OF)
    assert "every one of model.safetensors, model.safetensors.index.json, py" in str(caught.value)
    assert "08.gguf, 09.gguf and 2 more" in str(caught.value)


def test_optional_files_alone_must_not_all_be_absent(server: Server) -> None:
    with pytest.raises(hub.FileMissing, match=r"lacks generation_config\.json"):
        hub.resolve(OPT, optional=["generation_config.json"])


def test_a_file_that_goes_while_it_is_asked_for_is_an_error(server: Server) -> None:
    stale = {"id": OPT, "sha": server[OPT].branches["main"], "siblings": [{"rfilename": "x.json"}]}
    server.faults.append(Fault("/revision/main", body=json.dumps(stale).encode()))
    with pytest.raises(hub.FileMissing, match=r"a file has gone from .*; try again"):
        hub.resolve(OPT, files=["x.json"])


@pytest.mark.parametrize(
    "shard",
    [
        "../../../../outside.safetensors",
        "sub/part.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a\\b.safetensors",
        "C:part.safetensors",
        "part\n.safetensors",
        "part\0",
        7,
        None,
        ["part-1.safetensors"],
    ],
)
def test_an_index_that_leads_out_of_its_folder_fetches_no_shard(
    server: Server, shard: object
) -> None:
    server[OPT].commit(
        {**SHARDED, "model.safetensors.index.json": index_of("part-1.safetensors", shard)}
    )
    with pytest.raises(
        hub.IndexUnsafe, match=r"says that 'layer.1' lies in .*No shard was fetched"
    ):
        hub.resolve(OPT, one_of=ONE_OF)
    assert server.fetched() == ["model.safetensors.index.json"]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"[]", b"{}", b'{"weight_map": 3}', b"[" * 100_000]
)
def test_a_damaged_index_is_an_error(server: Server, content: bytes) -> None:
    server[OPT].commit({"model.safetensors.index.json": content})
    with pytest.raises(
        hub.IndexDamaged, match="should be JSON with a weight_map from tensor names"
    ):
        hub.resolve(OPT, one_of=ONE_OF)


def test_an_index_without_shards_is_an_error(server: Server) -> None:
    server[OPT].commit({"model.safetensors.index.json": b'{"weight_map": {}}'})
    with pytest.raises(hub.IndexDamaged, match="has an empty weight_map: there are no weights"):
        hub.resolve(OPT, one_of=ONE_OF)


def test_a_shard_that_the_repository_lacks_is_named_before_any_is_fetched(server: Server) -> None:
    files = {name: data for name, data in SHARDED.items() if name != "part-2.safetensors"}
    server[OPT].commit(files)
    with pytest.raises(hub.FileMissing, match=r"lacks part-2\.safetensors\. Weights files"):
        hub.resolve(OPT, one_of=ONE_OF)
    assert server.fetched() == ["model.safetensors.index.json"]
