"""torch.compile: forward passes and decode steps as one graph, made once for each shape."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from opt_core.weights import Head
from tests.cases import HEADS, SWITCHES, Batch, labels, random_weights, tiny, words
from tests.wings import Wing

MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
IDS = torch.from_numpy(words(2, 6))


class Counted:
    """A backend that runs graphs as they are and counts how many it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(wing: Wing, head: Head, **changes: Any) -> Any:
    config = tiny(dropout=0.0, num_labels=3, **changes)
    return wing.build(head, config, random_weights(config, head))


def whole(model: Any, backend: Any = "aot_eager") -> Any:
    """The model compiled as a single graph."""
    return torch.compile(model, backend=backend, fullgraph=True)


def loss_inputs(wing: Wing, head: Head, model: Any) -> dict[str, Tensor]:
    arrays = labels(head, model.config, Batch(IDS.numpy(), None))
    return {name: wing.array(values) for name, values in arrays.items()}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("training", "mask"), [(False, None), (True, MASK)])
def test_a_forward_pass_is_one_graph_that_serves_every_batch_of_its_shape(
    wing: Wing, head: Head, training: bool, mask: Tensor | None
) -> None:
    model = build(wing, head).train(training)
    inputs = {"use_cache": False, **loss_inputs(wing, head, model)}
    backend = Counted()
    compiled = whole(model, backend)
    for ids in (IDS, IDS.flip(0), (IDS + 1).clamp(max=39)):
        found = compiled(ids, attention_mask=mask, **inputs)
        right = model(ids, attention_mask=mask, **inputs)
        for name in right:
            torch.testing.assert_close(found[name], right[name], atol=1e-5, rtol=1e-5)
    assert backend.graphs == 1


@pytest.mark.parametrize("switch", [*SWITCHES])
def test_every_architecture_compiles_with_its_backward_pass(wing: Wing, switch: str) -> None:
    model = build(wing, Head.CAUSAL_LM, **SWITCHES[switch]).train()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    right = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    compiled = whole(model)
    compiled(IDS, labels=IDS, use_cache=False).loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, right[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"output_attentions": True}, {"output_hidden_states": True}])
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_outputs_that_are_asked_for_compile_too(
    wing: Wing, changes: dict[str, bool], name: str
) -> None:
    model = build(wing, Head.NONE)
    model.set_attn_implementation(name)
    compiled = whole(model)
    with torch.no_grad():
        found = compiled(IDS, head_mask=torch.ones(2, 4), use_cache=False, **changes)
        right = model(IDS, head_mask=torch.ones(2, 4), use_cache=False, **changes)
    for one, other in zip(found.to_tuple(), right.to_tuple(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_pass_that_fills_a_cache_compiles(wing: Wing) -> None:
    model = build(wing, Head.CAUSAL_LM)
    compiled = whole(model)
    with torch.no_grad():
        found, right = compiled(IDS), model(IDS)
        more = compiled(IDS[:, :1], past_key_values=found.past_key_values).logits
        torch.testing.assert_close(
            more, model(IDS[:, :1], past_key_values=right.past_key_values).logits
        )
    for one, other in zip(found.past_key_values, right.past_key_values, strict=True):
        torch.testing.assert_close(one, other)


def test_without_padding_a_compiled_pass_keeps_the_causal_kernel(wing: Wing) -> None:
    model = build(wing, Head.NONE)
    seen: list[tuple[Any, ...]] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        for node in graph.graph.nodes:
            if "scaled_dot_product_attention" in str(node.target):
                seen.append((node.kwargs["attn_mask"], node.kwargs["is_causal"]))
        return graph

    with torch.no_grad():
        whole(model, look)(IDS)
    assert seen == [(None, True)] * 2


def test_a_pass_with_dropout_is_one_graph(wing: Wing) -> None:
    model = build(wing, Head.CAUSAL_LM).train()
    model.config.dropout = model.config.attention_dropout = 0.5
    backend = Counted()
    compiled = whole(model, backend)
    one, other = (compiled(IDS, labels=IDS, use_cache=False).loss for _ in range(2))
    assert backend.graphs == 1
    assert one != other


def test_gradient_checkpointing_compiles(wing: Wing) -> None:
    model = build(wing, Head.CAUSAL_LM).train()
    model(IDS, labels=IDS).loss.backward()
    right = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    compiled = whole(model)
    compiled(IDS, labels=IDS, use_cache=False).loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, right[name], atol=1e-6, rtol=1e-4)


def test_a_pass_exports_for_any_batch_and_length(wing: Wing) -> None:
    model = build(wing, Head.CAUSAL_LM)
    dims = {"input_ids": (torch.export.Dim.AUTO, torch.export.Dim.AUTO)}
    with torch.no_grad():
        program = torch.export.export(
            model,
            (),
            {"input_ids": IDS, "use_cache": False},
            dynamic_shapes={**dims, "use_cache": None},
        )
        for shape in ((3, 9), (2, 4)):
            ids = torch.from_numpy(words(*shape))
            found = program.module()(input_ids=ids, use_cache=False)
            torch.testing.assert_close(found.logits, model(ids).logits)
