"""Every deliberate difference to transformers that docs/coming-from-transformers.md lists."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opt_core.checkpoint import CheckpointUnsafe
from opt_core.weights import CheckpointMismatch, CheckpointWarning
from opt_torch import (
    OPTConfig,
    OPTForCausalLM,
    OPTForQuestionAnswering,
    OPTForSequenceClassification,
    OPTModel,
)
from tests.tiny_tokenizer import VOCABULARY, tiny

LM_HEAD, EMBEDDING = "lm_head.weight", "model.decoder.embed_tokens.weight"
IDS = torch.tensor([[2, 9, 5, 30, 11, 7], [2, 8, 8, 21, 4, 6]])


def config(**changes: Any) -> OPTConfig:
    fields: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "ffn_dim": 24,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "init_std": 0.3,
    }
    return OPTConfig(**{**fields, **changes})


@pytest.fixture
def model() -> OPTForCausalLM:
    torch.manual_seed(0)
    return OPTForCausalLM(config()).eval()


@pytest.fixture
def folder(model: OPTForCausalLM, tmp_path: Path) -> Path:
    model.half().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a saved checkpoint in place."""
    path = folder / "model.safetensors"
    found = load_file(path)
    change(found)
    save_file(found, path, metadata={"format": "pt"})


# --- loading and saving ------------------------------------------------------------------------


def test_loading_computes_in_float32_unless_told_otherwise(folder: Path) -> None:
    assert OPTForCausalLM.from_pretrained(folder).dtype == torch.float32
    assert OPTForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.float16
    assert OPTForCausalLM.from_pretrained(folder, torch_dtype="auto").dtype == torch.float16
    assert OPTForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_attention_is_sdpa_unless_told_otherwise(folder: Path) -> None:
    loaded = OPTForCausalLM.from_pretrained(folder)
    assert loaded.attn_implementation == "sdpa"
    eager = OPTForCausalLM.from_pretrained(folder, attn_implementation="eager")
    out = loaded(IDS, output_attentions=True)
    assert len(out.attentions) == 2
    torch.testing.assert_close(out.attentions, eager(IDS, output_attentions=True).attentions)
    torch.testing.assert_close(out.logits, loaded(IDS).logits)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(folder: Path) -> None:
    def change(found: dict[str, Tensor]) -> None:
        del found["model.decoder.layers.0.fc1.bias"]
        found["model.decoder.extra"] = torch.zeros(2)

    rewrite(folder, change)
    with pytest.raises(
        CheckpointMismatch, match=r"missing +model\.decoder\.layers\.0\.fc1\.bias"
    ) as one:
        OPTForCausalLM.from_pretrained(folder)
    assert "unexpected  model.decoder.extra" in str(one.value)


def test_a_new_head_is_named_in_a_warning(folder: Path) -> None:
    with pytest.warns(CheckpointWarning, match=r"holds no score\.weight: the new head starts"):
        OPTForSequenceClassification.from_pretrained(folder)
    with pytest.warns(CheckpointWarning, match=r"holds no qa_outputs\.weight, qa_outputs\.bias"):
        OPTForQuestionAnswering.from_pretrained(folder)


def test_odd_weights_are_warned_of(folder: Path) -> None:
    rewrite(folder, lambda found: found.update({LM_HEAD: found[EMBEDDING] + 1}))
    with pytest.warns(CheckpointWarning, match="lm_head.weight differs from"):
        loaded = OPTForCausalLM.from_pretrained(folder, dtype="auto")
    assert torch.equal(loaded.lm_head.weight, load_file(folder / "model.safetensors")[EMBEDDING])
    rewrite(folder, lambda found: (found.pop(LM_HEAD), found[EMBEDDING][3].fill_(torch.nan)))
    with pytest.warns(CheckpointWarning, match=f"there are NaN values in {EMBEDDING}"):
        OPTForCausalLM.from_pretrained(folder)
    OPTForCausalLM.from_pretrained(folder, check=False)


def test_a_file_may_hold_the_tied_weight_under_either_name(folder: Path) -> None:
    expected = OPTForCausalLM.from_pretrained(folder)(IDS).logits
    rewrite(folder, lambda found: found.update({LM_HEAD: found.pop(EMBEDDING)}))
    assert torch.equal(OPTForCausalLM.from_pretrained(folder)(IDS).logits, expected)

    def as_early(found: dict[str, Tensor]) -> None:
        for name in list(found):
            early = name.removeprefix("model.").replace(
                "decoder.final_layer_norm", "decoder.layer_norm"
            )
            found[early] = found.pop(name)

    rewrite(folder, as_early)
    assert torch.equal(OPTForCausalLM.from_pretrained(folder)(IDS).logits, expected)


class Runs:
    def __reduce__(self) -> Any:
        return print, ("this must not be printed",)


def test_a_pickle_that_would_run_code_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Runs()}, folder / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(CheckpointUnsafe, match="print"):
        OPTForCausalLM.from_pretrained(folder)
    assert capsys.readouterr().out == ""


def test_an_unknown_option_of_loading_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="no field 'drop_out'; did you mean 'dropout'"):
        OPTForCausalLM.from_pretrained(folder, drop_out=0.0)
    assert OPTForCausalLM.from_pretrained(folder, dropout=0.0).config.dropout == 0.0


def test_saving_writes_safetensors_that_transformers_opens(
    model: OPTForCausalLM, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path)
    files = {"model.safetensors", "config.json", "generation_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert LM_HEAD not in load_file(tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.OPTForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits)
    assert not list(tmp_path.glob(".*"))


def test_the_state_dict_names_a_tied_tensor_once(model: OPTForCausalLM) -> None:
    state = model.state_dict()
    assert LM_HEAD not in state
    for given in (state, {**state, LM_HEAD: state[EMBEDDING]}):
        other = OPTForCausalLM(config()).eval()
        other.load_state_dict(given)
        assert other.lm_head.weight is other.get_input_embeddings().weight
        assert torch.equal(other(IDS).logits, model(IDS).logits)
    assert LM_HEAD in OPTForCausalLM(config(tie_word_embeddings=False)).state_dict()


# --- configuration -----------------------------------------------------------------------------


def test_a_configuration_refuses_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="dropout is 7; it must be a number from 0 to 1"):
        OPTConfig(dropout=7)
    with pytest.raises(ValueError, match="no argument 'hiden_size'; did you mean 'hidden_size'"):
        OPTConfig(hiden_size=3)
    with pytest.raises(ValueError, match="vocab_size is -1"):
        OPTConfig().vocab_size = -1


def test_a_model_keeps_a_configuration_of_its_own() -> None:
    given = config()
    own = OPTForCausalLM(given).config
    assert own is not given
    own.use_cache = False
    own.pad_token_id = 3
    assert (given.use_cache, given.pad_token_id) == (True, 1)
    with pytest.raises(ValueError, match="vocab_size cannot change from 40 to 50"):
        own.vocab_size = 50


def test_contradicting_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="num_labels is 3, but 2 labels are named"):
        OPTConfig(num_labels=3, id2label={0: "no", 1: "yes"})


# --- calling -----------------------------------------------------------------------------------


def test_a_head_mask_has_an_effect(model: OPTForCausalLM) -> None:
    one, none = torch.ones(2, 4), torch.zeros(2, 4)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert torch.equal(model(IDS, head_mask=one).logits, model(IDS).logits)
        assert (model(IDS, head_mask=none).logits - model(IDS).logits).abs().max() > 0.01


def test_a_passed_cache_stays_as_it_was(model: OPTForCausalLM) -> None:
    with torch.no_grad():
        first = model(IDS[:, :4], use_cache=True).past_key_values
        before = [(k.clone(), v.clone()) for k, v in first]
        one = model(IDS[:, 4:], past_key_values=first)
        two = model(IDS[:, 4:].flip(1), past_key_values=first)
        again = model(IDS[:, 4:], past_key_values=first)
    assert first[0][0].shape == (2, 4, 4, 4)
    assert one.past_key_values[0][0].shape == (2, 4, 6, 4)
    assert all(
        torch.equal(a, b)
        for x, y in zip(first, before, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    torch.testing.assert_close(one.logits, model(IDS).logits[:, 4:])
    assert torch.equal(one.logits, again.logits)
    assert not torch.equal(one.logits, two.logits)


def test_pairs_and_foreign_caches_are_accepted(model: OPTForCausalLM) -> None:
    cache_utils = pytest.importorskip("transformers.cache_utils")
    first = model(IDS[:, :4], use_cache=True).past_key_values
    expected = model(IDS).logits[:, 4:]
    foreign = cache_utils.DynamicCache(config=None)
    for layer, (k, v) in enumerate(first):
        foreign.update(k, v, layer)
    for past in (tuple(first), [list(pair) for pair in first], foreign):
        torch.testing.assert_close(model(IDS[:, 4:], past_key_values=past).logits, expected)
    assert foreign.get_seq_length() == 4


def test_position_ids_start_at_zero_and_win_over_the_mask(model: OPTForCausalLM) -> None:
    counted = torch.arange(6)[None]
    torch.testing.assert_close(model(IDS, position_ids=counted).logits, model(IDS).logits)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]]).expand(2, 6)
    moved = model(IDS, attention_mask=mask, position_ids=counted).logits
    assert (moved - model(IDS, attention_mask=mask).logits)[:, 2:].abs().max() > 0.01
    with pytest.raises(ValueError, match="position 32, but positions go from 0 to 31"):
        model(IDS, position_ids=counted + 27)


def test_a_mask_of_the_wrong_length_is_refused_by_its_lengths(model: OPTForCausalLM) -> None:
    with pytest.raises(
        ValueError, match=r"attention_mask is \(2, 5\), expected \(2, 6\): 0 tokens"
    ):
        model(IDS, attention_mask=torch.ones(2, 5))
    past = model(IDS, use_cache=True).past_key_values
    with pytest.raises(
        ValueError, match=r"\(2, 1\), expected \(2, 7\): 6 tokens in the cache and 1"
    ):
        model(IDS[:, :1], attention_mask=torch.ones(2, 1), past_key_values=past)


def test_a_mask_of_other_values_is_refused(model: OPTForCausalLM) -> None:
    with pytest.raises(ValueError, match="attention_mask holds values other than 0 and 1"):
        model(IDS, attention_mask=torch.full((2, 6), 2))
    whole = model(IDS).logits
    for kind in (torch.bool, torch.float32, torch.int32):
        given = torch.ones(2, 6, dtype=kind)
        torch.testing.assert_close(model(IDS, attention_mask=given).logits, whole)


def test_inputs_outside_the_tables_are_refused_by_name(model: OPTForCausalLM) -> None:
    with pytest.raises(
        ValueError, match="input_ids hold 50 in row 0 at place 1; the vocabulary goes"
    ):
        model(torch.tensor([[2, 50]]))
    with pytest.raises(ValueError, match="position 32, but positions go from 0 to 31"):
        model(torch.full((1, 33), 5))


def test_labels_out_of_range_are_refused_by_name(model: OPTForCausalLM) -> None:
    with pytest.raises(
        ValueError, match="labels hold 99, outside 0 to 39; -100 marks what does not"
    ):
        model(IDS, labels=torch.full_like(IDS, 99))
    classifier = OPTForSequenceClassification(config())
    with pytest.raises(ValueError, match="labels hold 2, outside 0 to 1"):
        classifier(IDS, attention_mask=torch.ones_like(IDS), labels=torch.tensor([0, 2]))


def test_classification_pools_where_the_mask_ends() -> None:
    torch.manual_seed(0)
    classifier = OPTForSequenceClassification(config()).eval()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]])
    expected = classifier(IDS, attention_mask=mask).logits
    other = torch.where(mask == 1, IDS, 33)
    torch.testing.assert_close(classifier(other, attention_mask=mask).logits, expected)
    embedded = classifier.get_input_embeddings()(IDS)
    by_embeds = classifier(inputs_embeds=embedded, attention_mask=mask).logits
    torch.testing.assert_close(by_embeds, expected)
    padded = torch.where(mask == 1, IDS, 1)
    alone = classifier(padded[:1]).logits
    torch.testing.assert_close(alone, classifier(padded[:1, :3]).logits)


def test_flash_attention_says_what_it_cannot_do(model: OPTForCausalLM) -> None:
    model.set_attn_implementation("flash_attention_2")
    with pytest.raises(ValueError, match="needs float16 or bfloat16 on a CUDA device, found"):
        model(IDS)
    with pytest.raises(ValueError, match="never holds the attention weights"):
        model(IDS, output_attentions=True)


def test_an_unknown_keyword_of_a_call_is_refused(model: OPTForCausalLM) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'attention_masks'"):
        model(IDS, attention_masks=torch.ones(2, 6))


# --- training ----------------------------------------------------------------------------------


def test_checkpointing_turns_the_cache_off(model: OPTForCausalLM) -> None:
    model.train()
    model.gradient_checkpointing_enable()
    assert model(IDS).past_key_values is None
    with pytest.warns(
        UserWarning, match="use_cache is off while training with gradient checkpoint"
    ):
        assert model(IDS, use_cache=True).past_key_values is None
    assert model.eval()(IDS).past_key_values is not None


def test_options_of_checkpointing_that_are_not_honoured_raise(model: OPTForCausalLM) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="gradient checkpointing has no option preserve_rng_state"):
        model.gradient_checkpointing_enable({"preserve_rng_state": False})
    with pytest.raises(ValueError, match="gradient checkpointing has no option offload"):
        model.activation_checkpointing_enable(offload=True)


def test_resizing_warns_when_it_shrinks() -> None:
    given = config()
    model = OPTForCausalLM(given)
    model.resize_token_embeddings(600)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight[40:].std().item() == pytest.approx(0.3, rel=0.1)
    with pytest.warns(UserWarning, match="the vocabulary shrinks from 600 to 30 tokens"):
        model.resize_token_embeddings(30)
    assert (given.vocab_size, model.config.vocab_size) == (40, 30)


def test_heads_can_be_pruned(model: OPTForCausalLM, tmp_path: Path) -> None:
    mask = torch.ones(2, 4)
    mask[0, 1] = 0
    expected = model(IDS, head_mask=mask).logits
    model.prune_heads({0: [1]})
    torch.testing.assert_close(model(IDS).logits, expected)
    with pytest.warns(UserWarning, match="pruned heads: only optlm loads the saved files"):
        model.save_pretrained(tmp_path)
    torch.testing.assert_close(OPTForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)


# --- generation --------------------------------------------------------------------------------


def new(model: OPTForCausalLM, ids: Tensor, **options: Any) -> list[list[int]]:
    """The tokens after the prompt."""
    tokens = model.generate(ids, **{"max_new_tokens": 5, "eos_token_id": None, **options})
    assert isinstance(tokens, Tensor)
    rows: list[list[int]] = tokens[:, ids.shape[1] :].tolist()
    return rows


def test_a_seed_repeats_the_tokens_and_touches_no_generator(model: OPTForCausalLM) -> None:
    before = torch.get_rng_state()
    both = new(model, IDS, do_sample=True, seed=[3, 4])
    assert both == new(model, IDS, do_sample=True, seed=[3, 4])
    assert new(model, IDS.flip(0), do_sample=True, seed=[4, 3]) == both[::-1]
    assert new(model, IDS[1:], do_sample=True, seed=4) == both[1:]
    assert torch.equal(torch.get_rng_state(), before)


def test_right_padded_prompts_continue_as_without_padding(model: OPTForCausalLM) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    expected = [*new(model, IDS[:1, :3]), *new(model, IDS[1:])]
    assert new(model, torch.where(mask == 1, IDS, 1), attention_mask=mask) == expected


def test_an_explicit_none_is_not_the_same_as_absent(model: OPTForCausalLM) -> None:
    first = new(model, IDS[:1])[0][0]
    model.generation_config.eos_token_id = first
    stopped = model.generate(IDS[:1], max_new_tokens=5)
    assert isinstance(stopped, Tensor)
    assert stopped.shape == (1, 7)
    assert len(new(model, IDS[:1], eos_token_id=None)[0]) == 5


def test_lengths_are_checked_before_anything_is_computed(
    model: OPTForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [model.generate(ids, eos_token_id=None) for ids in (IDS, IDS.repeat(1, 4))]
    assert [tuple(tokens.shape) for tokens in sizes if isinstance(tokens, Tensor)] == [
        (2, 26),
        (2, 32),
    ]
    monkeypatch.setattr(model.model.decoder, "forward", None)
    with pytest.raises(
        ValueError, match="together 46, but max_position_embeddings is 32; ask for at"
    ):
        model.generate(IDS, max_new_tokens=40)


@pytest.mark.parametrize(
    "option", [{"max_time": 1.0}, {"dola_layers": "high"}, {"cache_implementation": "static"}]
)
def test_options_of_generation_that_are_not_honoured_raise(
    model: OPTForCausalLM, option: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="is not honoured; leave it out or give"):
        model.generate(IDS, **option)
    with pytest.raises(ValueError, match="no generation option 'temprature'; did you mean 'temp"):
        model.generate(IDS, temprature=0.5)
    assert new(model, IDS, max_time=None, token_healing=False) == new(model, IDS)


def test_options_that_contradict_each_other_raise(model: OPTForCausalLM) -> None:
    with pytest.raises(ValueError, match="num_beams is above 1 and penalty_alpha asks for"):
        model.generate(IDS, num_beams=2, penalty_alpha=0.6, top_k=4)


def test_rules_that_look_back_see_no_padding(model: OPTForCausalLM) -> None:
    rules = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1}
    padded = torch.cat([torch.ones_like(IDS), IDS], dim=1)
    assert new(model, padded, attention_mask=(padded != 1).long(), **rules) == new(
        model, IDS, **rules
    )


def test_a_bias_holds_where_it_needs_the_whole_text(model: OPTForCausalLM) -> None:
    bias = [[[5, 9], 100.0]]
    assert new(model, torch.tensor([[5]]), sequence_bias=bias)[0][0] == 9


def test_words_of_the_prompt_are_forced_all_the_same(model: OPTForCausalLM) -> None:
    word = IDS[0, 1:3].tolist()
    rows = new(model, IDS[:1], num_beams=3, force_words_ids=[word])
    assert word in [rows[0][place : place + 2] for place in range(4)]


def test_a_text_of_a_batch_is_searched_as_it_is_alone(model: OPTForCausalLM) -> None:
    options = {"num_beams": 3, "eos_token_id": list(range(5, 15)), "max_new_tokens": 8}
    both = new(model, IDS, **options)
    for row in range(2):
        alone = new(model, IDS[row : row + 1], **options)[0]
        assert both[row] == alone + [1] * (len(both[row]) - len(alone))


def test_drafts_change_no_token(model: OPTForCausalLM) -> None:
    for sampling in ({}, {"do_sample": True, "seed": 3}):
        plain = new(model, IDS, **sampling)
        assert new(model, IDS, assistant_model=model, **sampling) == plain
        assert new(model, IDS, prompt_lookup_num_tokens=3, **sampling) == plain


def test_attentions_of_beams_belong_to_the_returned_sequences(model: OPTForCausalLM) -> None:
    out = model.generate(
        IDS,
        num_beams=3,
        max_new_tokens=4,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_attentions=True,
    )
    assert not isinstance(out, Tensor)
    whole = model(out.sequences, output_attentions=True)
    torch.testing.assert_close(
        out.attentions[3][0][:, :, 0], whole.attentions[0][:, :, -2, :-1], atol=1e-5, rtol=1e-5
    )


def test_idle_sampling_options_warn(model: OPTForCausalLM) -> None:
    with pytest.warns(UserWarning, match="temperature changes nothing without do_sample=True"):
        new(model, IDS, temperature=0.5)


def test_ids_beyond_the_tokenizer_are_never_chosen(model: OPTForCausalLM) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[20:] *= 50
    assert max(map(max, new(model, IDS))) >= 20
    for sampling in ({}, {"do_sample": True, "seed": 0}):
        assert max(map(max, new(model, IDS, tokenizer=range(20), **sampling))) < 20


def test_tokens_can_be_had_one_by_one(model: OPTForCausalLM) -> None:
    expected = new(model, IDS)
    steps = model.stream(IDS, max_new_tokens=5, eos_token_id=None)
    assert torch.stack(list(steps), 1).tolist() == expected
    seen: list[Tensor] = []
    new(model, IDS, streamer=seen.append)
    assert torch.stack(seen, 1).tolist() == expected


def test_scores_that_are_nan_raise(model: OPTForCausalLM) -> None:
    with torch.no_grad():
        model.model.decoder.embed_positions.weight.fill_(torch.nan)
    with pytest.raises(
        ValueError, match="the scores are NaN after 6 tokens; do the weights hold NaN"
    ):
        model.generate(IDS)


def test_the_record_of_a_generation_holds_two_fields(model: OPTForCausalLM) -> None:
    out = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True)
    assert not isinstance(out, Tensor)
    assert list(out) == ["sequences", "past_key_values"]


# --- tokenizer ---------------------------------------------------------------------------------


def test_pairs_have_a_separator_before_both() -> None:
    hello, world = VOCABULARY["hello"], VOCABULARY["Ġworld"]
    assert tiny()("hello", " world")["input_ids"] == [2, hello, 2, world]


def test_the_leading_token_can_be_switched() -> None:
    tokenizer = tiny()
    assert tokenizer("hello")["input_ids"][0] == 2
    tokenizer.add_bos_token = False
    assert tokenizer("hello")["input_ids"] == [VOCABULARY["hello"]]


def test_truncation_that_cannot_succeed_raises() -> None:
    with pytest.raises(ValueError, match="cannot shorten a row to max_length=3"):
        tiny()("hello world hello world", "a", truncation="only_second", max_length=3)


def test_unknown_ids_decode_to_nothing() -> None:
    assert tiny().decode([VOCABULARY["hello"], 50265]) == "hello"
    with pytest.raises(ValueError, match="token id -100 at place 0 is negative"):
        tiny().decode([-100])


# --- the same on purpose -----------------------------------------------------------------------


def test_modes_and_dropout_are_those_of_transformers(folder: Path) -> None:
    assert OPTForCausalLM(config()).training
    loaded = OPTForCausalLM.from_pretrained(folder, layerdrop=1.0, dropout=1.0)
    assert not loaded.training
    loaded.train()
    states = loaded(IDS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(
        states[0], loaded.eval()(IDS, output_hidden_states=True).hidden_states[0]
    )


def test_the_row_of_the_padding_id_is_treated_as_in_transformers(tmp_path: Path) -> None:
    model = OPTModel(config())
    row = model.get_input_embeddings().weight
    assert not row[1].any()
    model(torch.tensor([[2, 1, 5]])).last_hidden_state.sum().backward()
    assert row.grad is not None
    assert not row.grad[1].any()
    assert row.grad[5].any()
    with torch.no_grad():
        row[1] = 0.5
    model.save_pretrained(tmp_path)
    assert (OPTModel.from_pretrained(tmp_path).get_input_embeddings().weight[1] == 0.5).all()


def test_labels_that_do_not_count_are_those_of_transformers(model: OPTForCausalLM) -> None:
    labels = IDS.clone()
    labels[:, 3:] = -100
    torch.testing.assert_close(
        model(IDS, labels=labels).loss, model(IDS[:, :3], labels=labels[:, :3]).loss
    )
    assert model(IDS, labels=torch.full_like(IDS, -100)).loss.isnan()
