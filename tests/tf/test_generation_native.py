"""Generation in TensorFlow: programs that are reused, fresh, freed, and the same without XLA."""

import gc
import re
import weakref
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opt_core.generation import Call
from opt_core.weights import Head
from opt_tf.generation import beams, contrastive, decoding, mixin
from opt_tf.generation.setup import settle
from tests.cases import PAD, Batch, batches, padded, random_weights, tiny, words
from tests.subject import MARGIN, STD, Subject
from tests.wings import Wing

IDS = words(2, 4)


@pytest.fixture(scope="module")
def subject(wing: Wing) -> Subject:
    return Subject(wing)


def traces(model: Any) -> int:
    """How often programs of a model were made."""
    return decoding.Programs.of(model).traces


# Programs are reused

DRAWN: dict[str, Any] = {"do_sample": True, "seed": 1, "temperature": 2.0, "top_p": 0.9}
#: Strategies, and the same with other values of what does not change a program.
VALUES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, {"eos_token_id": [5, 6, 7], "tokenizer": range(25)}),
    "sampling": (DRAWN, {**DRAWN, "seed": [3, 4], "top_k": 0, "min_p": 0.1, "temperature": 0.5}),
    "rules": (
        {"repetition_penalty": 1.2, "min_new_tokens": 1, "bad_words_ids": [[7]]},
        {"repetition_penalty": 0.8, "min_new_tokens": 3, "bad_words_ids": [[8, 9], [7]]},
    ),
    "beams": (
        {"num_beams": 3, "early_stopping": True},
        {"num_beams": 3, "length_penalty": 0.3, "early_stopping": "never", "eos_token_id": 5},
    ),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, {"penalty_alpha": 0.2, "top_k": 4}),
    "lookup": ({"prompt_lookup_num_tokens": 3}, {"prompt_lookup_num_tokens": 3, "eos_token_id": 5}),
}


@pytest.mark.parametrize("name", VALUES)
def test_calls_of_one_plan_share_their_programs(wing: Wing, name: str) -> None:
    subject = Subject(wing)
    first, others = VALUES[name]
    batch = padded([words(1, 8)[0], words(1, 5)[0]], "right")
    subject.generate(batch.ids, batch.mask, max_new_tokens=3, **first)
    made = traces(subject.model)
    for length, kind, options in ((7, np.int64, first), (4, np.int32, others), (5, int, others)):
        subject.generate(words(2, length).astype(kind), max_new_tokens=9, **options)
    assert traces(subject.model) == made


def test_rules_that_are_not_asked_for_are_not_in_the_program(wing: Wing) -> None:
    """Every program is made for the rules that are active, whatever was asked for before."""
    subject = Subject(wing)
    sizes = []
    for options in ({}, {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3}, {}):
        subject.generate(IDS, max_new_tokens=3, **options)
        sizes.append(traces(subject.model))
    # The prompt, its scores and a loop; another loop; nothing.
    assert sizes == [3, 4, 4]


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_stream_runs_the_programs_of_the_whole(wing: Wing, chunk: int) -> None:
    subject = Subject(wing)
    found = subject.generate(IDS, max_new_tokens=4, eos_token_id=None)
    made = traces(subject.model)
    asked: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None, "chunk": chunk}
    steps = list(wing.stream(subject.model, IDS, **asked))
    np.testing.assert_array_equal(np.stack(steps, axis=1), found[:, 4:])
    assert traces(subject.model) == made


def test_one_token_needs_no_loop(wing: Wing) -> None:
    subject = Subject(wing)
    subject.generate(IDS, max_new_tokens=1)
    assert traces(subject.model) == 2


def favours(input_ids: Any, scores: Any, cur_len: Any) -> Any:
    return scores + 5 * tf.one_hot(7, scores.shape[1])


#: What a call may be warmed for besides the values above.
WARMED: dict[str, dict[str, Any]] = {
    **{name: VALUES[name][0] for name in ("sampling", "beams", "contrastive", "lookup")},
    "forced words": {"num_beams": 3, "force_words_ids": [[7]]},
    "a traced function": {"logits_processor": [favours]},
    "functions on the host": {
        "logits_processor": [lambda ids, scores: scores],
        "stopping_criteria": [lambda ids, scores: False],
        "prefix_allowed_tokens_fn": lambda text, ids: list(range(40)),
        "compiled": False,
    },
    "a negative prompt": {"guidance_scale": 2.0, "negative_prompt_ids": words(2, 9)},
}


@pytest.mark.parametrize("name", WARMED)
def test_after_warming_a_call_makes_no_program(wing: Wing, name: str) -> None:
    subject = Subject(wing)
    options = {"max_new_tokens": 9, **WARMED[name]}
    subject.model.warmup(batch_size=2, prompt_length=4, **options)
    made = traces(subject.model)
    subject.generate(IDS, **options)
    assert traces(subject.model) == made > 0


@pytest.mark.parametrize("chunk", [0, -1, 1.5, None, "2"])
def test_a_chunk_of_no_tokens_is_refused(subject: Subject, chunk: Any) -> None:
    with pytest.raises(ValueError, match=r"chunk is .*; give a whole number of tokens, at least 1"):
        subject.model.stream(IDS, chunk=chunk)


def test_a_traced_function_sees_all_rows_also_where_drafts_are_asked_for(subject: Subject) -> None:
    def allowed(batch_id: Any, input_ids: Any, cur_len: Any) -> Any:
        return tf.range(40) % 2 == batch_id

    asked: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "compiled": False}
    found = subject.generate(
        IDS, prompt_lookup_num_tokens=3, prefix_allowed_tokens_fn=allowed, **asked
    )
    np.testing.assert_array_equal(found[:, 4:] % 2, [[0] * 6, [1] * 6])


@pytest.mark.parametrize("kind", ["processor", "criterion", "prefix"])
def test_an_answer_that_no_program_can_hold_is_named(subject: Subject, kind: str) -> None:
    """What is traced is looked at as what runs in Python is."""

    def forgetful(input_ids: Any, scores: Any, cur_len: Any) -> Any:
        return tf.constant("text") if kind == "processor" else None

    name = {
        "processor": "logits_processor",
        "criterion": "stopping_criteria",
        "prefix": "prefix_allowed_tokens_fn",
    }[kind]
    function: Any = forgetful if kind == "prefix" else [forgetful]
    with pytest.raises(ValueError, match="forgetful returned"):
        subject.generate(IDS, max_new_tokens=1, **{name: function})


@pytest.mark.parametrize("name", ["contrastive", "guidance"])
def test_infinite_scores_of_what_weighs_probabilities_are_named(wing: Wing, name: str) -> None:
    options = {
        "contrastive": {"penalty_alpha": 0.4, "top_k": 3},
        "guidance": {"guidance_scale": 2.0, "do_sample": True, "seed": 1},
    }[name]
    config = tiny()
    weights = random_weights(config, Head.CAUSAL_LM, std=STD)
    weights["model.decoder.final_layer_norm.bias"][:] = 50
    weights["model.decoder.embed_tokens.weight"][39] = 3e38
    model = wing.build(Head.CAUSAL_LM, config, weights)
    with pytest.raises(ValueError, match=r"a score is \+inf after 4 tokens, beside which"):
        wing.generate_lightly(model, words(2, 4, vocab_size=39), max_new_tokens=2, **options)


def test_an_assistant_drafts_inside_the_program(wing: Wing) -> None:
    subject, other = Subject(wing), Subject(wing, seed=5, num_hidden_layers=1)
    asked: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None}
    right = subject.generate(IDS, **asked)
    before = traces(subject.model)
    found = subject.generate(IDS, assistant_model=other.model, **asked)
    np.testing.assert_array_equal(found, right)
    # Rows run alone: the prompt, its scores and the loop; of the assistant the prompt alone.
    assert traces(subject.model) - before == 3
    assert traces(other.model) == 1


def test_a_function_that_can_be_traced_is_a_part_of_the_program(wing: Wing) -> None:
    subject = Subject(wing)
    calls = []

    def favours(input_ids: Any, scores: Any, cur_len: Any) -> Any:
        calls.append(tf.executing_eagerly())
        return scores + 5 * tf.one_hot(7, scores.shape[1])

    asked: dict[str, Any] = {"max_new_tokens": 9, "logits_processor": [favours]}
    found = subject.generate(IDS, **asked)
    assert (found[:, 4:] == 7).any()
    made = traces(subject.model), len(calls)
    np.testing.assert_array_equal(subject.generate(IDS, **asked), found)
    assert (traces(subject.model), len(calls)) == made
    assert not any(calls)


@pytest.mark.parametrize("name", ["greedy", "beams", "contrastive"])
def test_the_loop_copies_no_cache(wing: Wing, name: str) -> None:
    """The keys and values that come in are copied once; after that they are written in place."""
    model = Subject(wing).model
    setup = settle(model, Call(IDS), {"max_new_tokens": 9, **VALUES[name][0]}, compiled=True)
    run = mixin._RUNS[setup.strategy](setup)
    carried = run.until(run.begun(), 9)
    loop = {"greedy": decoding, "beams": beams, "contrastive": contrastive}[name].loop
    made: dict[Any, Any] = run.programs._made
    (program,) = (program for key, program in made.items() if key[0] is loop)
    show = program.experimental_get_compiler_ir(carried, setup.told, tf.constant(9))
    room = re.escape(f"f32[8,{setup.plan.capacity},4]")
    moves = re.findall(
        rf"= {room}\S* (?:copy|gather|transpose|select)\((\S+)\)", show("optimized_hlo")
    )
    assert len(moves) == 2 * model.config.num_hidden_layers
    assert all(moved.startswith("%arg") for moved in moves)


# Programs are fresh


@pytest.fixture(scope="module")
def changing(wing: Wing) -> Subject:
    return Subject(wing)


def changed(model: Any, change: str) -> None:
    random = np.random.default_rng(9)
    if change == "assign":
        bias = model.model.decoder.layers[1].fc2.bias
        bias.assign(random.normal(0, 3, bias.shape))
    elif change == "set_weights":
        model.set_weights([random.normal(0, STD, w.shape) for w in model.get_weights()])
    elif change == "fit":
        model.compile(optimizer=keras.optimizers.SGD(3.0))
        model.fit({"input_ids": IDS, "labels": IDS}, epochs=3, verbose=0)
    elif change == "resize":
        model.resize_token_embeddings(20)
    elif change == "prune":
        model.prune_heads({0: [1], 1: [0, 3]})
    else:
        embedding = keras.layers.Embedding(40, 16)
        embedding.build()
        embedding.set_weights([random.normal(0, STD, (40, 16))])
        model.set_input_embeddings(embedding)


@pytest.mark.parametrize("change", ["assign", "set_weights", "fit", "resize", "prune", "exchange"])
@pytest.mark.filterwarnings("ignore:the vocabulary shrinks:UserWarning")
def test_a_changed_model_generates_with_what_it_holds_now(
    wing: Wing, changing: Subject, change: str
) -> None:
    keeps_its_variables = change in ("assign", "set_weights", "fit")
    subject = changing if keeps_its_variables else Subject(wing)
    ids = words(1, 4, vocab_size=20)
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None}
    before = subject.generate(ids, **options)
    changed(subject.model, change)
    after = subject.generate(ids, **options)
    assert (after != before).any()
    text = ids
    for _ in range(8):
        logits = wing.call(subject.model, input_ids=text).logits
        text = np.concatenate([text, logits[:, -1].argmax(1)[:, None]], axis=1)
    np.testing.assert_array_equal(after, text)


def test_programs_go_with_their_model(wing: Wing) -> None:
    subject = Subject(wing)
    subject.generate(IDS, max_new_tokens=3)
    held = decoding.Programs.of(subject.model)
    gone: list[Any] = [weakref.ref(x) for x in (subject.model, held, *held._made.values())]
    gone += [weakref.ref(weight.value) for weight in subject.model.weights]
    del subject, held
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:keras")
def test_programs_are_not_saved_with_their_model(wing: Wing, tmp_path: Path) -> None:
    model = wing.fresh(Head.CAUSAL_LM, tiny())
    model.save(tmp_path / "before.keras")
    found = wing.generate(model, IDS, max_new_tokens=3)
    model.save(tmp_path / "after.keras")
    sizes = [(tmp_path / f"{when}.keras").stat().st_size for when in ("before", "after")]
    assert sizes[0] == sizes[1]
    again = keras.saving.load_model(tmp_path / "after.keras")
    np.testing.assert_array_equal(wing.generate(again, IDS, max_new_tokens=3), found)


# With and without XLA


@settings(max_examples=5)
@given(batch=batches(), sampled=st.booleans(), cached=st.booleans())
def test_without_xla_the_tokens_are_those_of_the_reference(
    subject: Subject, batch: Batch, sampled: bool, cached: bool
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": [5, 9], "use_cache": cached}
    options |= {"repetition_penalty": 1.2}
    options |= {"do_sample": True, "seed": 1, "top_p": 0.9} if sampled else {}
    right = subject.reference(batch.ids, batch.mask, **options)
    assume(right.margins.min() >= MARGIN)
    found = subject.generate(batch.ids, batch.mask, compiled=False, **options)
    np.testing.assert_array_equal(found, right.sequences)


def test_scores_that_turn_bad_on_the_way_are_named_with_the_length(wing: Wing) -> None:
    weights = random_weights(tiny(), Head.CAUSAL_LM, std=STD)
    weights["model.decoder.embed_positions.weight"][2 + 6] = np.nan
    model = wing.build(Head.CAUSAL_LM, tiny(), weights)
    assert wing.generate(model, IDS, max_new_tokens=3, eos_token_id=None).shape == (2, 7)
    for options in ({}, {"do_sample": True, "seed": 1}, {"compiled": False}):
        with pytest.raises(ValueError, match="the scores are NaN after 7 tokens"):
            wing.generate(model, IDS, max_new_tokens=9, eos_token_id=None, **options)


def test_the_record_of_a_half_precision_model_goes_on_from_its_cache(wing: Wing) -> None:
    weights = random_weights(tiny(), Head.CAUSAL_LM, std=STD)
    model = wing.build(Head.CAUSAL_LM, tiny(), weights, "mixed_bfloat16")
    record = model.generate(IDS, max_new_tokens=5, eos_token_id=None, return_dict_in_generate=True)
    past = record.past_key_values
    assert past[0][0].dtype == tf.bfloat16
    assert past.get_seq_length() == 8
    out = model(record.sequences[:, 8:], past_key_values=past)
    assert np.isfinite(wing.numpy(out.logits)).all()


# What a caller holds


@pytest.mark.parametrize("kind", [tf.int32, tf.int64])
def test_tokens_keep_the_type_of_the_prompt(subject: Subject, kind: Any) -> None:
    ids = tf.constant(IDS, kind)
    assert subject.model.generate(ids, max_new_tokens=3).dtype == kind
    assert next(subject.model.stream(ids, max_new_tokens=3)).dtype == kind


def test_prompts_may_be_lists_arrays_or_tensors(subject: Subject) -> None:
    found = [
        subject.model.generate(ids, attention_mask=mask, max_new_tokens=3).numpy()
        for ids, mask in (
            (IDS, np.ones_like(IDS)),
            (IDS.tolist(), np.ones_like(IDS).tolist()),
            (tf.constant(IDS), tf.ones_like(IDS, tf.bool)),
        )
    ]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_generation_touches_no_global_generator(subject: Subject) -> None:
    def drawn() -> Any:
        tf.random.set_seed(5)
        return tf.random.uniform((3,)).numpy()

    before, numbers = drawn(), np.random.get_state()
    tf.random.set_seed(5)
    subject.generate(IDS, max_new_tokens=4, do_sample=True)
    subject.generate(IDS, max_new_tokens=4, do_sample=True, seed=3)
    np.testing.assert_array_equal(tf.random.uniform((3,)).numpy(), before)
    after: Any = np.random.get_state()
    np.testing.assert_array_equal(after[1], dict(enumerate(numbers))[1])


def test_a_loop_of_ones_own_gives_the_same_tokens(subject: Subject) -> None:
    model, ids, past = subject.model, tf.constant(IDS), None
    for _ in range(5):
        inputs = model.prepare_inputs_for_generation(ids, past_key_values=past, use_cache=True)
        assert inputs["input_ids"].shape[1] == (ids.shape[1] if past is None else 1)
        out = model(**inputs)
        past = out.past_key_values
        ids = tf.concat([ids, tf.argmax(out.logits[:, -1:], -1)], axis=1)
    found = subject.generate(IDS, max_new_tokens=5, eos_token_id=None)
    np.testing.assert_array_equal(found, ids.numpy())


def test_nothing_is_computed_where_there_is_no_room(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("the prompt was fed")

    monkeypatch.setattr(decoding.Run, "fed", refuse)
    with pytest.raises(AssertionError, match="the prompt was fed"):
        subject.generate(words(1, 30), max_new_tokens=2)
    with pytest.raises(ValueError, match="longest prompt has 30 tokens and max_new_tokens is 3"):
        subject.generate(words(1, 30), max_new_tokens=3)


def test_generate_is_not_called_inside_another_program(subject: Subject) -> None:
    for name in ("generate", "stream"):
        with pytest.raises(ValueError, match=r"call it outside tf\.function"):
            tf.function(getattr(subject.model, name), autograph=False)(tf.constant(IDS))


def test_what_hides_behind_padding_does_not_reach_the_cache(subject: Subject) -> None:
    ids = np.array([[2, 7, PAD], [2, 8, 9]])
    mask = (ids != PAD).astype(np.int64)
    record = subject.generate(
        ids, mask, max_new_tokens=2, eos_token_id=None, return_dict_in_generate=True
    )
    key = subject.wing.pairs(record.past_key_values)[0][0]
    assert key.shape[2] == 4
    assert (key[1] != 0).all()


def test_only_a_language_model_generates(wing: Wing) -> None:
    for head in (Head.NONE, Head.SEQUENCE_CLASSIFICATION, Head.QUESTION_ANSWERING):
        assert not hasattr(wing.fresh(head, tiny()), "generate")
