"""Every strategy in PyTorch: compiled, by the modules and packed; what it moves; transformers'."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opt_core.weights import Head
from opt_torch import packed
from opt_torch.decoder import Cache
from tests.cases import SWITCHES, Batch, padded, words
from tests.subject import Subject
from tests.wings import Wing

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": 5, "top_k": 9},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True, "seed": 5},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "forced words": {"num_beams": 3, "force_words_ids": [[7, 8]]},
    "contrastive": {"penalty_alpha": 0.5, "top_k": 4},
    "guided beams": {"num_beams": 2, "guidance_scale": 1.5},
}
BATCH = padded([words(1, count, seed=count)[0] for count in (5, 3)], "left")
ASKED: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": [5, 9]}


@pytest.fixture(scope="module")
def subject(wing: Wing) -> Subject:
    return Subject(wing)


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "WORTH_PACKING", 10**9)


@pytest.fixture
def always_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "WORTH_PACKING", 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mask", [None, BATCH.mask], ids=["no padding", "padding"])
def test_compiled_steps_give_the_tokens_of_plain_ones(
    subject: Subject, strategy: str, mask: Any
) -> None:
    asked = {**ASKED, **STRATEGIES[strategy]}
    right = subject.generate(BATCH.ids, mask, **asked)
    found = subject.generate(BATCH.ids, mask, compiled="eager", **asked)
    np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("strategy", ["beams", "contrastive"])
def test_one_program_serves_all_texts_of_a_plan(subject: Subject, strategy: str) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    asked = {**ASKED, **STRATEGIES[strategy], "compiled": backend}
    for ids in (words(1, 4), words(1, 6, seed=1)):
        subject.generate(ids, np.ones_like(ids), **asked)
    assert len(graphs) == 1


def test_more_programs_than_pytorch_allows_by_itself(wing: Wing) -> None:
    torch._dynamo.reset()
    subject = Subject(wing)
    for rows in range(1, torch._dynamo.config.recompile_limit + 2):
        found = subject.generate(words(rows, 3), max_new_tokens=2, compiled="eager")
        assert found.shape == (rows, 5)


def test_compiled_drafts_are_refused(subject: Subject) -> None:
    with pytest.raises(ValueError, match="compiled steps are of one size, drafts are not"):
        subject.generate(words(1, 4), prompt_lookup_num_tokens=2, compiled="eager")


@pytest.mark.usefixtures("always_packed")
@pytest.mark.parametrize("switch", ["pre_norm", "post_norm_projected", "no_bias"])
@pytest.mark.parametrize(
    "strategy", ["beams", "contrastive", "guided beams", "forced words", "lookup"]
)
def test_packed_weights_serve_every_strategy(
    wing: Wing, switch: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(wing, 1, **SWITCHES[switch])
    calls = []
    call = packed.PackedDecoder.__call__

    def counted(*inputs: Any) -> Tensor:
        calls.append(inputs)
        return call(*inputs)

    monkeypatch.setattr(packed.PackedDecoder, "__call__", counted)
    asked = {**ASKED, **(STRATEGIES | {"lookup": {"prompt_lookup_num_tokens": 2}})[strategy]}
    ids = words(1, 6, seed=2)
    found = subject.generate(ids, **asked)
    assert calls
    monkeypatch.setattr(packed, "WORTH_PACKING", 10**9)
    np.testing.assert_array_equal(found, subject.generate(ids, **asked))


@pytest.mark.parametrize("strategy", ["beams", "groups", "beam sampling", "forced words"])
def test_beams_move_no_keys_and_values(
    subject: Subject, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[Cache] = []
    extended = Cache.extended

    def noted(cache: Cache, *inputs: Any) -> Cache:
        caches.append(extended(cache, *inputs))
        return caches[-1]

    monkeypatch.setattr(Cache, "extended", noted)
    subject.generate(words(2, 4), **{**ASKED, **STRATEGIES[strategy], "eos_token_id": None})
    K = STRATEGIES[strategy]["num_beams"]
    # One row a text, and the same memory from the first pass to the last.
    assert [cache.get_seq_length() for cache in caches] == [4 + K * step for step in range(6)]
    for cache in caches:
        for first, now in zip(
            (*caches[0].keys, *caches[0].values), (*cache.keys, *cache.values), strict=True
        ):
            assert isinstance(first, Tensor)
            assert isinstance(now, Tensor)
            assert now.data_ptr() == first.data_ptr()
            assert len(now) == 2


def test_what_beams_have_written_stays_as_it_is(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[tuple[int, Tensor]] = []
    add = Cache.add

    def checked(cache: Cache, layer: int, k: Tensor, v: Tensor) -> Any:
        found = add(cache, layer, k, v)
        if layer == 0:
            key = cache.keys[0]
            assert key is not None
            for held, copy in before:
                assert torch.equal(key[:, :, :held], copy)
            before.append((cache.get_seq_length(), key[:, :, : cache.get_seq_length()].clone()))
        return found

    monkeypatch.setattr(Cache, "add", checked)
    subject.generate(words(2, 4), num_beams=3, max_new_tokens=5, eos_token_id=None)
    assert len(before) == 5


def test_drafts_of_an_equal_model_are_all_taken(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    from opt_torch.generation import assisted

    verify = assisted._verify

    def noted(run: Any, state: Any, drafts: list[int]) -> Any:
        lengths.append(len(drafts))
        return verify(run, state, drafts)

    monkeypatch.setattr(assisted, "_verify", noted)
    for sampled in ({}, {"do_sample": True, "seed": 4}):
        lengths.clear()
        asked: dict[str, Any] = {"max_new_tokens": 13, "eos_token_id": None, **sampled}
        found = subject.generate(words(1, 4), assistant_model=subject.model, **asked)
        np.testing.assert_array_equal(found, subject.generate(words(1, 4), **asked))
        # One token by the prompt, then rounds of five drafts and the token behind them.
        assert lengths == [5, 5]


def test_an_assistant_with_fewer_positions_drafts_as_long_as_it_can(
    wing: Wing, subject: Subject
) -> None:
    small = Subject(wing, 3, max_position_embeddings=9)
    asked: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None}
    found = subject.generate(words(1, 4), assistant_model=small.model, **asked)
    np.testing.assert_array_equal(found, subject.generate(words(1, 4), **asked))


@pytest.mark.parametrize("strategy", ["greedy", "beams", "contrastive"])
def test_threads_may_share_a_model_in_every_strategy(subject: Subject, strategy: str) -> None:
    asked = {**ASKED, **STRATEGIES[strategy], "eos_token_id": None}
    prompts = [words(2, 3 + seed, seed) for seed in range(4)]
    right = [subject.generate(ids, **asked) for ids in prompts]
    with ThreadPoolExecutor(4) as threads:
        for tokens, expected in zip(
            threads.map(lambda ids: subject.generate(ids, **asked), prompts), right, strict=True
        ):
            np.testing.assert_array_equal(tokens, expected)


def test_warming_up_packs_and_compiles_beforehand(wing: Wing) -> None:
    subject = Subject(wing)
    model, compiled = subject.model, []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    asked: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": None}
    assert model.warmup(2, 6, num_beams=2, compiled=backend, **asked) is None
    assert len(compiled) == 1
    subject.generate(words(2, 5), np.ones((2, 5)), num_beams=2, compiled=backend, **asked)
    assert len(compiled) == 1


def test_flash_attention_refuses_what_it_cannot_order(wing: Wing) -> None:
    subject = Subject(wing)
    subject.model.set_attn_implementation("flash_attention_2")
    from opt_torch.attention import Visible, choose

    sees = torch.ones(1, 2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="so beams and contrastive search cannot run on it"):
        choose(
            "flash_attention_2",
            Visible(2, 2, 4, None, sees),
            dropout=0.0,
            weights=False,
            dtype=torch.float16,
            device=torch.device("cuda"),
        )


@pytest.mark.parametrize("strategy", ["beams", "contrastive"])
def test_attention_that_holds_every_score_gives_the_same(wing: Wing, strategy: str) -> None:
    subject = Subject(wing)
    asked = {**ASKED, **STRATEGIES[strategy]}
    right = subject.generate(BATCH.ids, BATCH.mask, **asked)
    subject.model.set_attn_implementation("eager")
    np.testing.assert_array_equal(subject.generate(BATCH.ids, BATCH.mask, **asked), right)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("strategy", [*STRATEGIES])
def test_half_precision_runs_every_strategy(wing: Wing, kind: str, strategy: str) -> None:
    subject = Subject(wing)
    model = wing.build(Head.CAUSAL_LM, subject.config, subject.weights, kind)
    found = wing.generate(model, words(2, 4), **{**ASKED, **STRATEGIES[strategy]})
    assert ((found >= 0) & (found < 40)).all()


@pytest.mark.parametrize(
    "cut",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.5},
        {"typical_p": 0.5},
        {"epsilon_cutoff": 0.1},
        {"eta_cutoff": 0.1},
        {"renormalize_logits": True},
    ],
    ids="".join,
)
@pytest.mark.parametrize("beams", [1, 2])
def test_no_cut_hides_a_score_of_inf(subject: Subject, cut: dict[str, Any], beams: int) -> None:
    def certain(_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 7] = torch.inf
        return scores

    with pytest.raises(ValueError, match=r"a score is \+inf after 4 tokens, beside which"):
        subject.generate(
            words(2, 4),
            do_sample=True,
            seed=1,
            num_beams=beams,
            logits_processor=[certain],
            **cut,
        )


# Other libraries


@pytest.mark.parametrize("strategy", ["greedy", "sampling", "beams", "contrastive"])
def test_the_processors_of_transformers_work(subject: Subject, strategy: str) -> None:
    transformers: Any = pytest.importorskip("transformers")
    kinds = transformers.generation
    processors = transformers.LogitsProcessorList(
        [kinds.RepetitionPenaltyLogitsProcessor(1.3), kinds.NoRepeatNGramLogitsProcessor(2)]
    )
    asked, ids = {**ASKED, **STRATEGIES[strategy]}, words(2, 4)
    right = subject.generate(ids, repetition_penalty=1.3, no_repeat_ngram_size=2, **asked)
    found = subject.generate(ids, logits_processor=processors, **asked)
    np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("strategy", ["greedy", "sampling", "contrastive"])
def test_the_criteria_of_transformers_work(subject: Subject, strategy: str) -> None:
    transformers: Any = pytest.importorskip("transformers")
    kinds = transformers.generation
    criteria = transformers.StoppingCriteriaList(
        [kinds.EosTokenCriteria([5, 9]), kinds.MaxLengthCriteria(max_length=10)]
    )
    asked, ids = STRATEGIES[strategy], words(2, 4)
    right = subject.generate(ids, max_new_tokens=6, eos_token_id=[5, 9], **asked)
    found = subject.generate(
        ids, max_new_tokens=12, eos_token_id=None, stopping_criteria=criteria, **asked
    )
    np.testing.assert_array_equal(found, right)


def test_a_streamer_of_transformers_prints_the_text(
    wing: Wing, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers: Any = pytest.importorskip("transformers")

    class Words:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"{int(i)} " for i in ids)

    subject = Subject(wing)
    ids = words(1, 4)
    for asked in ({}, STRATEGIES["contrastive"], {"prompt_lookup_num_tokens": 2}):
        streamer = transformers.TextStreamer(Words(), skip_prompt=True)
        found = subject.generate(ids, max_new_tokens=5, streamer=streamer, **asked)
        assert capsys.readouterr().out.split() == [str(i) for i in found[0, 4:]]


@pytest.mark.parametrize("strategy", ["greedy", "sampling", "beams", "contrastive"])
def test_an_adapter_generates_by_every_strategy(wing: Wing, strategy: str) -> None:
    peft: Any = pytest.importorskip("peft")
    subject = Subject(wing)
    torch.manual_seed(0)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    model = peft.get_peft_model(subject.model, settings).eval()
    ids = torch.from_numpy(words(2, 4))
    asked = {**ASKED, **STRATEGIES[strategy]}
    tuned = model.generate(input_ids=ids, **asked)
    merged = model.merge_and_unload()
    assert torch.equal(tuned, merged.generate(ids, **asked))


@pytest.mark.parametrize("way", ["PromptTuningConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("padded_on_the_left", [False, True])
def test_virtual_tokens_stand_before_every_text(
    wing: Wing, way: str, padded_on_the_left: bool
) -> None:
    peft: Any = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = getattr(peft, way)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(Subject(wing).model, settings).eval()
    for weight in model.prompt_encoder.parameters():
        torch.nn.init.normal_(weight)
    ids = torch.from_numpy(BATCH.ids if padded_on_the_left else words(2, 4))
    mask = torch.from_numpy(BATCH.mask) if padded_on_the_left else torch.ones_like(ids)
    right, longer = ids, mask
    with torch.no_grad():
        for _ in range(5):
            scores = model(input_ids=right, attention_mask=longer).logits[:, -1]
            right = torch.cat((right, scores.argmax(1, keepdim=True)), 1)
            longer = torch.cat((longer, torch.ones_like(longer[:, :1])), 1)
    asked: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": None}
    for more in ({}, {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 1e-9}):
        found = model.generate(input_ids=ids, attention_mask=mask, **asked, **more)
        assert torch.equal(found, right)
    one = model.generate(input_ids=ids[:1], attention_mask=mask[:1], **asked)
    drafted = model.generate(
        input_ids=ids[:1], attention_mask=mask[:1], prompt_lookup_num_tokens=2, **asked
    )
    assert torch.equal(drafted, one)
    with pytest.raises(ValueError, match="an adapter of virtual tokens does not go with guidance"):
        model.generate(input_ids=ids, guidance_scale=2.0, **asked)


def test_a_mask_of_every_kind_gives_what_rows_alone_give(subject: Subject) -> None:
    holes = Batch(words(1, 6), np.array([[0, 1, 0, 1, 1, 0]]))
    for strategy in ("beams", "contrastive", "groups"):
        asked = {**ASKED, **STRATEGIES[strategy]}
        found = subject.generate(holes.ids, holes.mask, **asked)
        alone = subject.generate(holes.ids[holes.shown][None], **asked)
        np.testing.assert_array_equal(found[:, 6:], alone[:, 3:])
