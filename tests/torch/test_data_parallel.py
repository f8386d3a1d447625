"""DistributedDataParallel and FSDP2 wrap opt_torch models, here in a group of one process."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from opt_core.weights import Head
from tests.cases import HEADS, Batch, labels, random_weights, tiny, words
from tests.wings import Wing

IDS = torch.from_numpy(words(3, 6))
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed, gloo"
)


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group(
        "gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def build(wing: Wing, head: Head, **changes: Any) -> Any:
    config = tiny(dropout=0.0, **changes)
    return wing.build(head, config, random_weights(config, head)).train()


def inputs(wing: Wing, head: Head, model: Any) -> dict[str, Any]:
    targets = labels(head, model.config, Batch(IDS.numpy(), None))
    return {"input_ids": IDS, **{name: wing.array(values) for name, values in targets.items()}}


def sharded(model: Any) -> Any:
    """FSDP2 as documented: a group for every layer, the root holds both ends of the tie."""
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.base_model.decoder.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("head", HEADS[1:])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ddp_computes_the_gradients_of_the_bare_model(
    wing: Wing, head: Head, checkpointing: bool
) -> None:
    bare, inner = build(wing, head), build(wing, head)
    given_inputs = inputs(wing, head, bare)
    bare(**given_inputs).loss.backward()
    if checkpointing:
        inner.gradient_checkpointing_enable()
    wrapped = DistributedDataParallel(inner)
    wrapped(**given_inputs).loss.backward()
    for (name, one), other in zip(bare.named_parameters(), inner.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_the_state_of_ddp_is_that_of_the_model_under_a_prefix(wing: Wing) -> None:
    bare = build(wing, Head.CAUSAL_LM)
    wrapped = DistributedDataParallel(build(wing, Head.CAUSAL_LM))
    assert list(wrapped.state_dict()) == [f"module.{name}" for name in bare.state_dict()]
    wrapped.load_state_dict(wrapped.state_dict())
    assert torch.equal(wrapped(IDS).logits, bare(IDS).logits)


@pytest.mark.parametrize("head", HEADS[1:])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fsdp_trains_as_the_bare_model(wing: Wing, head: Head, checkpointing: bool) -> None:
    bare, model = build(wing, head), build(wing, head)
    given_inputs = inputs(wing, head, bare)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model = sharded(model)
    losses = []
    for one in (bare, model):
        optimiser = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(2):
            loss = one(**given_inputs).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses[2:]), torch.stack(losses[:2]))


def test_the_whole_state_comes_back_from_fsdp_under_the_names_of_the_model(wing: Wing) -> None:
    bare, model = build(wing, Head.CAUSAL_LM), sharded(build(wing, Head.CAUSAL_LM))
    state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert state.keys() == bare.state_dict().keys()
    for name, values in bare.state_dict().items():
        assert torch.equal(state[name], values), name


def test_a_tie_holds_under_fsdp(wing: Wing) -> None:
    model = sharded(build(wing, Head.CAUSAL_LM))
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
