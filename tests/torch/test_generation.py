"""Generation in PyTorch: its fast paths on any prompt, generators, modes, loops of one's own."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opt_core.weights import Head
from opt_torch import packed
from tests.cases import SWITCHES, Batch, batches, tiny, words
from tests.subject import MARGIN, Subject
from tests.wings import Wing

IDS = words(2, 4)


@pytest.fixture(scope="module")
def subject(wing: Wing) -> Subject:
    return Subject(wing)


@pytest.mark.parametrize("path", ["modules", "packed"])
@given(
    batch=batches(),
    switch=st.sampled_from(sorted(SWITCHES)),
    seed=st.integers(0, 2**16),
    sampled=st.booleans(),
)
def test_every_path_gives_the_tokens_of_the_reference(
    wing: Wing, path: str, batch: Batch, switch: str, seed: int, sampled: bool
) -> None:
    subject = Subject(wing, seed, **SWITCHES[switch])
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": [5, 9]}
    options |= {"do_sample": True, "seed": seed} if sampled else {}
    right = subject.reference(batch.ids, batch.mask, **options)
    assume(right.margins.min() >= MARGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "WORTH_PACKING", 1 if path == "packed" else 10**9)
        found = subject.generate(batch.ids, batch.mask, **options)
    np.testing.assert_array_equal(found, right.sequences)


@pytest.mark.parametrize("switch", ["pre_norm", "post_norm_projected"])
@settings(max_examples=4)
@given(batch=batches(), sampled=st.booleans())
def test_compiled_steps_give_the_tokens_of_the_reference(
    wing: Wing, switch: str, batch: Batch, sampled: bool
) -> None:
    subject = Subject(wing, 3, **SWITCHES[switch])
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": [5, 9]}
    options |= {"do_sample": True, "seed": 1} if sampled else {}
    right = subject.reference(batch.ids, batch.mask, **options)
    assume(right.margins.min() >= MARGIN)
    found = subject.generate(batch.ids, batch.mask, compiled="eager", **options)
    np.testing.assert_array_equal(found, right.sequences)


def test_nothing_is_computed_where_there_is_no_room(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the prompt was fed")

    # Every path begins with looking up the embeddings of the prompt.
    monkeypatch.setattr("torch.nn.functional.embedding", refuse)
    with pytest.raises(AssertionError, match="the prompt was fed"):
        subject.generate(words(1, 30), max_new_tokens=2)
    with pytest.raises(
        ValueError, match="the longest prompt has 30 tokens and max_new_tokens is 3"
    ):
        subject.generate(words(1, 30), max_new_tokens=3)
    with pytest.raises(ValueError, match="max_length is 3, but the prompt is 4 tokens wide"):
        subject.generate(IDS, max_length=3)


def test_generation_touches_no_global_generator(subject: Subject) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    numbers: Any = np.random.get_state()
    subject.generate(IDS, max_new_tokens=4, do_sample=True)
    subject.generate(IDS, max_new_tokens=4, do_sample=True, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    after: Any = np.random.get_state()
    np.testing.assert_array_equal(after[1], numbers[1])


def test_generation_keeps_no_graph_and_leaves_the_mode_alone(subject: Subject) -> None:
    for training in (True, False):
        subject.model.train(training)
        found = subject.model.generate(torch.from_numpy(IDS), max_new_tokens=3)
        assert not found.requires_grad
        assert subject.model.training is training
        record = subject.model.generate(
            torch.from_numpy(IDS), max_new_tokens=3, return_dict_in_generate=True
        )
        assert not record.past_key_values[0][0].requires_grad


def test_a_stream_computes_without_gradients_and_leaves_them_on(subject: Subject) -> None:
    for tokens in subject.model.stream(torch.from_numpy(IDS), max_new_tokens=3):
        assert torch.is_grad_enabled()
        assert not tokens.requires_grad


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_tokens_keep_the_type_of_the_prompt(subject: Subject, kind: torch.dtype) -> None:
    found = subject.model.generate(torch.from_numpy(IDS).to(kind), max_new_tokens=3)
    assert found.dtype is kind


def test_the_prompt_is_not_written_into(subject: Subject) -> None:
    ids = torch.from_numpy(IDS.copy())
    mask = torch.ones_like(ids)
    subject.model.generate(ids, attention_mask=mask, max_new_tokens=3)
    np.testing.assert_array_equal(ids.numpy(), IDS)
    assert bool(mask.all())


def test_a_loop_of_ones_own_gives_the_same_tokens(subject: Subject) -> None:
    model, ids = subject.model, torch.from_numpy(IDS)
    past = None
    with torch.no_grad():
        for _ in range(5):
            inputs = model.prepare_inputs_for_generation(ids, past_key_values=past, use_cache=True)
            assert inputs["input_ids"].shape[1] == (ids.shape[1] if past is None else 1)
            out = model(**inputs)
            past = out.past_key_values
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
    found = subject.generate(IDS, max_new_tokens=5, eos_token_id=None)
    np.testing.assert_array_equal(found, ids.numpy())


def test_generation_leaves_the_options_it_was_given_alone(subject: Subject) -> None:
    before = subject.model.generation_config.to_dict()
    subject.generate(IDS, max_new_tokens=2, do_sample=True, seed=1, top_p=0.5)
    assert subject.model.generation_config.to_dict() == before


def test_only_a_language_model_generates(wing: Wing) -> None:
    for head in (Head.NONE, Head.SEQUENCE_CLASSIFICATION, Head.QUESTION_ANSWERING):
        assert not hasattr(wing.fresh(head, tiny()), "generate")
