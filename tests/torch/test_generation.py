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


DROPPING: dict[str, Any] = {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}
TRAINED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": 3},
    "beams": {"num_beams": 2},
    "forced words": {"num_beams": 2, "force_words_ids": [[7]]},
    "contrastive": {"penalty_alpha": 0.5, "top_k": 3},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "guidance": {"guidance_scale": 2.0},
    "compiled": {"compiled": "eager"},
}


@pytest.mark.parametrize("strategy", TRAINED)
def test_a_model_in_training_generates_as_in_evaluation(wing: Wing, strategy: str) -> None:
    subject = Subject(wing, **DROPPING)
    asked: dict[str, Any] = {
        "max_new_tokens": 6,
        "return_dict_in_generate": True,
        "output_hidden_states": True,
        **TRAINED[strategy],
    }
    right = subject.generate(IDS, **asked)
    subject.model.train()
    subject.model.model.decoder.layers[1].eval()
    modes = [module.training for module in subject.model.modules()]
    before = torch.get_rng_state()
    found = subject.generate(IDS, **asked)
    np.testing.assert_array_equal(found.sequences, right.sequences)
    np.testing.assert_array_equal(found.hidden_states[0][-1], right.hidden_states[0][-1])
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in subject.model.modules()] == modes


def test_a_part_that_trains_alone_drops_nothing(wing: Wing) -> None:
    subject = Subject(wing, **DROPPING)
    right = subject.generate(IDS, max_new_tokens=6)
    subject.model.model.decoder.layers[0].train()
    np.testing.assert_array_equal(subject.generate(IDS, max_new_tokens=6), right)


def test_an_assistant_in_training_drafts_as_in_evaluation(wing: Wing) -> None:
    subject, seen = Subject(wing, **DROPPING), []
    other = Subject(wing, **DROPPING).model.train()
    other.lm_head.register_forward_hook(lambda _module, _inputs, scores: seen.append(scores))
    before = torch.get_rng_state()
    for _ in range(2):
        subject.generate(IDS[:1], max_new_tokens=6, assistant_model=other)
    assert torch.equal(torch.get_rng_state(), before)
    half = len(seen) // 2
    assert half
    for one, again in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(one, again)
    assert other.training


def test_the_mode_stays_while_tokens_come(wing: Wing) -> None:
    """Other threads may train meanwhile."""
    model = Subject(wing, **DROPPING).model.train()
    for _ in model.stream(torch.from_numpy(IDS), max_new_tokens=3):
        assert all(module.training for module in model.modules())
    seen: list[bool] = []
    model.generate(
        torch.from_numpy(IDS),
        max_new_tokens=3,
        streamer=lambda tokens: seen.append(all(m.training for m in model.modules())),
    )
    assert seen == [True] * 3


def test_what_is_trained_further_is_what_generates(wing: Wing) -> None:
    subject = Subject(wing, **DROPPING)
    model = subject.model.train()
    subject.generate(IDS, max_new_tokens=3)
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight.mul_(-1)
        model.lm_head.weight.data = model.lm_head.weight.data.flip(0)
    found = subject.generate(IDS, max_new_tokens=6)
    model.eval()
    np.testing.assert_array_equal(found, subject.generate(IDS, max_new_tokens=6))


@pytest.mark.parametrize("width", [1, 3, 7])
@pytest.mark.parametrize(
    "strategy",
    [{}, {"do_sample": True, "seed": 2}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["greedy", "sampling", "beams"],
)
def test_the_cache_of_a_guided_call_holds_what_is_returned(
    subject: Subject, strategy: dict[str, Any], width: int
) -> None:
    model, ids = subject.model, torch.from_numpy(IDS)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    record = model.generate(
        ids,
        attention_mask=mask,
        guidance_scale=2.0,
        negative_prompt_ids=torch.from_numpy(words(2, width, seed=9)),
        negative_prompt_attention_mask=torch.ones(2, width),
        return_dict_in_generate=True,
        max_new_tokens=3,
        eos_token_id=None,
        **strategy,
    )
    sequences, past = record.sequences, record.past_key_values
    copies = len(sequences) // 2
    mask = torch.nn.functional.pad(mask.repeat_interleave(copies, 0), (0, 3), value=1)
    assert past.get_seq_length() == 6
    with torch.no_grad():
        whole = model(sequences[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
    for found, right in zip(past, whole.past_key_values, strict=True):
        for mine, other in zip(found, right, strict=True):
            real = mask[:, None, :-1, None].bool()
            torch.testing.assert_close(mine * real, other * real, rtol=0, atol=1e-5)
    asked: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None}
    fresh = model.generate(sequences, attention_mask=mask, **asked)
    further = model.generate(sequences, attention_mask=mask, past_key_values=past, **asked)
    assert torch.equal(further, fresh)


@pytest.mark.parametrize("strategy", ["greedy", "sampling", "contrastive", "lookup"])
def test_what_is_written_into_streamed_tokens_changes_nothing(
    subject: Subject, strategy: str
) -> None:
    class Writer:
        def put(self, value: torch.Tensor) -> None:
            value.fill_(1)

        def end(self) -> None:
            pass

    model, ids = subject.model, torch.from_numpy(IDS[:1].copy())
    asked: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, **TRAINED[strategy]}
    right = model.generate(ids, **asked)
    steps = []
    for tokens in model.stream(ids, **asked):
        steps.append(tokens.clone())
        tokens.fill_(1)
    assert torch.equal(torch.stack(steps, 1), right[:, 4:])
    for streamer in (Writer(), lambda tokens: tokens.fill_(1)):
        assert torch.equal(model.generate(ids, streamer=streamer, **asked), right)
    np.testing.assert_array_equal(ids, IDS[:1])


@pytest.mark.parametrize("strategy", ["greedy", "sampling", "beams", "forced words", "contrastive"])
def test_what_functions_write_into_their_tokens_changes_nothing(
    subject: Subject, strategy: str
) -> None:
    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids.clone())
        ids.fill_(1)
        return scores

    def criterion(ids: torch.Tensor, scores: torch.Tensor) -> bool:
        seen.append(ids.clone())
        ids.fill_(1)
        scores.fill_(-torch.inf)
        return False

    def prefix(_row: int, ids: torch.Tensor) -> range:
        ids.fill_(1)
        return range(40)

    seen: list[torch.Tensor] = []
    asked: dict[str, Any] = {
        "max_new_tokens": 4,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_scores": True,
        **TRAINED[strategy],
    }
    right = subject.generate(IDS, **asked)
    for functions in (
        {"logits_processor": [processor, processor], "prefix_allowed_tokens_fn": prefix},
        {"stopping_criteria": [criterion, criterion]},
    ):
        seen.clear()
        found = subject.generate(IDS, **asked, **functions)
        np.testing.assert_array_equal(found.sequences, right.sequences)
        for mine, other in zip(found.scores, right.scores, strict=True):
            np.testing.assert_allclose(mine, other, rtol=0, atol=1e-6)
        if strategy != "forced words":
            for first, second in zip(seen[::2], seen[1::2], strict=True):
                assert torch.equal(first, second)


def test_a_prompt_and_its_mask_may_be_lists(subject: Subject) -> None:
    ids, mask = [[1, 7, 12], [4, 9, 3]], [[0, 1, 1], [1, 1, 1]]
    found = subject.model.generate(ids, attention_mask=mask, max_new_tokens=4)
    right = subject.model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=4
    )
    assert torch.equal(found, right)
