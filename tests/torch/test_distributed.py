"""Models spread over two processes: tensor parallelism by `shard`, and PyTorch's FSDP2."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.utils._pytree import tree_leaves

import opt_torch
from opt_core.weights import Head, stored_name
from opt_torch.linear import suits
from opt_torch.packed import packed
from tests.cases import SWITCHES, labels, padded, random_weights, tiny, vanishing, words
from tests.tolerances import assert_gradients_near, assert_near

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed, gloo"
)

PROCESSES = 2
#: Every class and every switch; a vocabulary that no two processes share evenly; dropout.
CASES: dict[str, tuple[Head, dict[str, Any]]] = {
    "tied": (Head.CAUSAL_LM, {"dropout": 0.1}),
    "untied": (Head.CAUSAL_LM, {"tie_word_embeddings": False, "vocab_size": 41}),
    "post_norm_projected": (Head.CAUSAL_LM, dict(SWITCHES["post_norm_projected"])),
    "pruned": (Head.SEQUENCE_CLASSIFICATION, {"pruned_heads": {0: [1, 2]}}),
    "no_bias": (Head.QUESTION_ANSWERING, dict(SWITCHES["no_bias"])),
    "wide_embedding": (Head.NONE, dict(SWITCHES["wide_embedding"])),
}
GENERATING = [name for name, (head, _) in CASES.items() if head is Head.CAUSAL_LM]
BATCH = padded([words(1, length, seed=length)[0] for length in (7, 4, 6)], "left")
HEAD_MASK = [[1.0, 0.5, 0.0, 2.0], [0.3, 1.0, 1.0, 0.7]]
#: Long enough that a plain model would be packed for it.
LENGTHS: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": None}
FULL = StateDictOptions(full_state_dict=True)
Results = dict[str, Any]


def build(name: str = "tied", **changes: Any) -> Any:
    head, switches = CASES[name]
    config = tiny(**{"dropout": 0.0, "max_position_embeddings": 64, **switches, **changes})
    values = random_weights(config, head, std=0.2)
    model = getattr(opt_torch, f"OPT{head.value}")(config)
    model.load_state_dict({stored_name(n, head): torch.tensor(v) for n, v in values.items()})
    return model


def inputs(model: Any) -> dict[str, Tensor]:
    given = BATCH.inputs | labels(model.head, model.config, BATCH)
    return {name: torch.tensor(values) for name, values in given.items()}


def gathered(values: Tensor) -> Tensor:
    return (values.full_tensor() if isinstance(values, DTensor) else values).detach()


def held(values: Tensor) -> Tensor:
    assert isinstance(values, DTensor)
    return values.to_local()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    # Copies: what is gathered may be the gradient itself, and clipping writes into it.
    pairs = [(name, p.grad) for name, p in model.named_parameters()]
    return {name: gathered(grad).clone() for name, grad in pairs if grad is not None}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: gathered(p).clone() for name, p in model.named_parameters()}


def loss_of(out: Any) -> Any:
    return out.loss if "loss" in out else out.last_hidden_state.square().mean()


def generated(model: Any, **options: Any) -> Tensor:
    prompt = {name: torch.tensor(values) for name, values in BATCH.inputs.items()}
    tokens: Tensor = model.generate(**prompt, **LENGTHS, **options)
    return tokens


# What both processes run, and the tests run on a whole model


def observe(model: Any) -> Results:
    """A pass of training with dropout and head factors, a call, and one that goes on from it."""
    factors = torch.tensor(HEAD_MASK, requires_grad=True)
    torch.manual_seed(5)
    loss = loss_of(model.train()(**inputs(model), head_mask=factors))
    loss.backward()
    found: Results = {"gradients": gradients(model) | {"head_mask": factors.grad}}
    found["norm"] = gathered(nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True))
    with torch.no_grad():
        out = model.eval()(**inputs(model), output_attentions=True, output_hidden_states=True)
        more = model(torch.tensor([[5], [6], [7]]), past_key_values=out.past_key_values)
    caches = [out.pop("past_key_values"), more.pop("past_key_values")]
    found["caches"] = [torch.stack(pair) for cache in caches for pair in cache]
    found["outputs"] = [loss.detach(), *tree_leaves(tuple(out.values())), *more.values()]
    if model.head is Head.CAUSAL_LM:
        found["tokens"] = [generated(model), generated(model, do_sample=True, seed=3)]
    torch.optim.AdamW(model.parameters(), lr=0.1, eps=0.1).step()
    return found | {"weights": weights(model)}


def take_a_step(model: Any, rows: slice) -> Results:
    """One step of gradient descent on some rows of a batch without padding."""
    ids = torch.tensor(words(4, 6))[rows]
    model.train()(ids, labels=ids).loss.backward()
    found = {"gradients": gradients(model)}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return found | {"weights": weights(model), "state": get_model_state_dict(model, options=FULL)}


# What only the processes run


def in_each_process(rank: int, folder: str) -> None:
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ["GLOO_SOCKET_IFNAME"] = loopback
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (PROCESSES,))
    found: Results = {name: observe(opt_torch.shard(build(name), mesh)) for name in CASES}
    found |= {"sharded": look_at_sharded(mesh), "refused": refusals(mesh)}
    half = slice(rank * 2, rank * 2 + 2)
    found["fsdp"] = take_a_step(by_fsdp(build(dropout=0.0), mesh), half)
    checkpointed = build(dropout=0.0)
    checkpointed.gradient_checkpointing_enable()
    found["fsdp checkpointed"] = take_a_step(by_fsdp(checkpointed, mesh), half)
    found["fsdp generating"] = generate_by_fsdp(mesh)
    both = init_device_mesh("cpu", (1, PROCESSES), mesh_dim_names=("data", "tensor"))
    model = opt_torch.shard(build(dropout=0.0), both["tensor"])
    found["both"] = take_a_step(by_fsdp(model, both["data"]), slice(None))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def by_fsdp(model: Any, mesh: Any, **options: Any) -> Any:
    """A group for each layer; the root's holds the embedding and the head that is tied to it."""
    for layer in model.base_model.decoder.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def is_tied(model: Any) -> bool:
    return model.lm_head.weight is model.get_input_embeddings().weight


def has_fast_path(model: Any) -> bool:
    with torch.no_grad():
        return suits(model.model.decoder.layers[0].fc1) or packed(model, 40) is not None


def look_at_sharded(mesh: Any) -> Results:
    """The ties, the state and the unseeded tokens of sharded models."""
    torch.manual_seed(dist.get_rank())
    fresh = opt_torch.OPTForCausalLM(build().config)
    model = opt_torch.shard(fresh, mesh)
    found: Results = {
        "is the model": model is fresh,
        "first values": weights(model),
        "local sizes": {name: held(p).numel() for name, p in model.named_parameters()},
        "fast path": has_fast_path(model.eval()),
        "unseeded": generated(model, do_sample=True),
    }
    set_model_state_dict(model, build().state_dict(), options=FULL)
    return found | {"tied": is_tied(model), "state": get_model_state_dict(model, options=FULL)}


def generate_by_fsdp(mesh: Any) -> Results:
    model = by_fsdp(build().eval(), mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "generate")
    cut = has_fast_path(model)
    found: Results = {"tokens": [generated(model), generated(model)], "tied": is_tied(model)}
    # By now the weights are plain again, but only as long as PyTorch's hooks have it so.
    return found | {"fast path": cut or packed(model, 40) is not None}


def refusals(mesh: Any) -> dict[str, str]:
    """What is said to what cannot be done."""
    flat = init_device_mesh("cpu", (1, PROCESSES), mesh_dim_names=("data", "tensor"))
    adapted = build()
    adapted.model.decoder.layers[1].fc1 = nn.Sequential(adapted.model.decoder.layers[1].fc1)
    sharded = opt_torch.shard(build(), mesh)
    attempts: dict[str, Callable[[], Any]] = {
        "flat": lambda: opt_torch.shard(build(), flat),
        "uneven": lambda: opt_torch.shard(
            build(pruned_heads={0: [1], 1: [2, 3]}, ffn_dim=25), mesh
        ),
        "adapted": lambda: opt_torch.shard(adapted, mesh),
        "twice": lambda: opt_torch.shard(sharded, mesh),
        "after fsdp": lambda: opt_torch.shard(by_fsdp(build(), mesh), mesh),
        "saved": lambda: sharded.save_pretrained("nowhere"),
        "resized": lambda: sharded.resize_token_embeddings(50),
        "pruned": lambda: sharded.prune_heads({0: [1]}),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as fault:
            said[name] = str(fault)
    return said


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each process has found."""
    folder = tmp_path_factory.mktemp("processes")
    processes: Callable[..., Any] = spawn
    processes(in_each_process, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{n}.pt", weights_only=False) for n in range(PROCESSES)]


@pytest.fixture(scope="module")
def expected() -> Results:
    """What a whole model gives."""
    torch.set_num_threads(1)
    return {name: observe(build(name)) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_model_gives_what_the_whole_one_gives(
    found: list[Results], expected: Results, name: str
) -> None:
    for process in found:
        pairs = zip(process[name]["outputs"], expected[name]["outputs"], strict=True)
        for place, (one, other) in enumerate(pairs):
            assert_near(one, other, what=f"output {place}")


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_model_has_the_gradients_of_the_whole_one(
    found: list[Results], expected: Results, name: str
) -> None:
    head, switches = CASES[name]
    for process in found:
        one, whole = (
            {n: g.numpy() for n, g in r[name]["gradients"].items()} for r in (process, expected)
        )
        assert_gradients_near(one, whole, vanishing(head, tiny(**switches)))


@pytest.mark.parametrize("name", CASES)
def test_each_process_caches_its_own_heads(
    found: list[Results], expected: Results, name: str
) -> None:
    shares = zip(*(process[name]["caches"] for process in found), strict=True)
    for parts, cached in zip(shares, expected[name]["caches"], strict=True):
        assert parts[0].shape == parts[1].shape
        assert_near(torch.cat(parts, dim=2), cached)


@pytest.mark.parametrize("name", GENERATING)
def test_a_sharded_model_generates_the_tokens_of_the_whole_one(
    found: list[Results], expected: Results, name: str
) -> None:
    for process in found:
        pairs = zip(process[name]["tokens"], expected[name]["tokens"], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_a_sharded_model_are_clipped_and_stepped_along_as_those_of_the_whole_one(
    found: list[Results], expected: Results, name: str
) -> None:
    for process in found:
        assert_near(process[name]["norm"], expected[name]["norm"], "gradient")
        for parameter, values in expected[name]["weights"].items():
            assert_near(process[name]["weights"][parameter], values, "gradient", what=parameter)


def test_sampling_without_a_seed_gives_every_process_the_same_tokens(found: list[Results]) -> None:
    one, other = (process["sharded"]["unseeded"] for process in found)
    assert torch.equal(one, other)


def test_sharding_takes_the_values_of_the_first_process(found: list[Results]) -> None:
    torch.manual_seed(0)
    first = weights(opt_torch.OPTForCausalLM(build().config))
    for process in found:
        values = process["sharded"]["first values"]
        assert values.keys() == first.keys()
        assert all(torch.equal(values[name], first[name]) for name in first)


def test_a_model_is_sharded_in_place_and_its_large_weights_are_halved(found: list[Results]) -> None:
    for process in found:
        assert process["sharded"]["is the model"]
        for name, size in process["sharded"]["local sizes"].items():
            number = build().get_parameter(name).numel()
            cut = name.endswith("embed_tokens.weight") or "_proj.weight" in name or ".fc" in name
            halved = cut and not name.endswith("fc2.bias")
            halved |= name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))
            assert size == (number // 2 if halved else number), name


@pytest.mark.parametrize("how", ["sharded", "fsdp generating"])
def test_a_tied_head_stays_tied_when_spread(found: list[Results], how: str) -> None:
    assert all(process[how]["tied"] for process in found)


@pytest.mark.parametrize("how", ["sharded", "fsdp generating"])
def test_fast_paths_stand_back_for_spread_weights(found: list[Results], how: str) -> None:
    assert not any(process[how]["fast path"] for process in found)


def test_weights_of_a_whole_model_are_spread_and_gathered_unchanged(found: list[Results]) -> None:
    state = build().state_dict()
    for process in found:
        assert process["sharded"]["state"].keys() == state.keys()
        assert all(torch.equal(process["sharded"]["state"][name], state[name]) for name in state)


@pytest.mark.parametrize("how", ["fsdp", "fsdp checkpointed", "both"])
def test_a_step_of_fsdp_is_that_of_the_whole_model(found: list[Results], how: str) -> None:
    step = take_a_step(build(dropout=0.0), slice(None))
    for process in found:
        assert_gradients_near(
            *({n: g.numpy() for n, g in r["gradients"].items()} for r in (process[how], step))
        )
        for name, values in step["weights"].items():
            assert_near(process[how]["weights"][name], values, what=name)


@pytest.mark.parametrize("how", ["fsdp", "fsdp checkpointed", "both"])
def test_the_gathered_state_has_every_key_and_loads_into_a_whole_model(
    found: list[Results], how: str
) -> None:
    for process in found:
        model = build()
        model.load_state_dict(process[how]["state"])
        assert process[how]["state"].keys() == model.state_dict().keys()
        assert is_tied(model)
        after = process[how]["weights"]
        assert all(torch.equal(p, after[name]) for name, p in model.named_parameters())


def test_a_model_under_fsdp_generates_the_tokens_of_the_whole_one(found: list[Results]) -> None:
    tokens = generated(build().eval())
    for process in found:
        assert all(torch.equal(again, tokens) for again in process["fsdp generating"]["tokens"])


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        ("flat", r"the mesh has 2 dimensions, expected 1; .*mesh\['tp'\]"),
        ("uneven", "^2 processes cannot share the model evenly: 3 heads in layers 0; ffn_dim 25; "),
        ("adapted", r"no parameter model\.decoder\.layers\.1\.fc1\.weight.*before sharding it"),
        ("twice", "embed_tokens.weight is spread over processes, and sharding it wants whole"),
        ("after fsdp", "is spread over processes, and sharding it wants whole weights"),
        ("saved", "is spread over processes, and saving the whole model wants whole weights"),
        ("resized", "is spread over processes, and resizing the vocabulary wants whole weights"),
        ("pruned", "is spread over processes, and pruning heads wants whole weights"),
    ],
)
def test_what_cannot_be_spread_or_done_to_spread_weights_is_refused(
    found: list[Results], attempt: str, said: str
) -> None:
    for process in found:
        assert re.search(said, process["refused"][attempt])
