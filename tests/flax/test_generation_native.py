"""Generation in JAX: its programs, what they cost, and how they live in the caller's programs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from opt_core.generation import Call, GenerationConfig, Plan
from opt_core.generation import given as all_given
from opt_core.reference import cuts as reference
from opt_core.weights import Head
from opt_flax import FlaxOPTForCausalLM, shard
from opt_flax.generation import cuts, mixin, rules, setup
from tests.cases import SWITCHES, Batch, batches, padded, random_weights, tiny, words
from tests.subject import MARGIN, STD, Subject
from tests.tiny_tokenizer import tiny as tiny_tokenizer
from tests.wings import Wing

IDS = words(2, 4)
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def subject(wing: Wing) -> Subject:
    return Subject(wing)


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """One entry for each program that XLA compiles."""
    found: list[str] = []

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)


# Programs


def test_programs_are_compiled_once_for_all_texts_and_options_of_a_plan(
    wing: Wing, compiled: list[str]
) -> None:
    model, other = (Subject(wing, seed, vocab_size=44).model for seed in (0, 5))
    options: dict[str, Any] = {"do_sample": True, "seed": 1, "eos_token_id": 2}
    model.generate(words(2, 4), max_new_tokens=9, **options)
    assert compiled
    compiled.clear()
    model.generate(words(2, 7), max_new_tokens=3, **{**options, "seed": 9})
    cuts = {"top_k": 5, "top_p": 0.5, "min_p": 0.1, "temperature": 2.0}
    rest = {"min_new_tokens": 0, "eos_token_id": [4, 5, 9]}
    model.generate(words(2, 5), max_new_tokens=20, **{**options, **cuts, **rest})
    model.generate(words(2, 1), max_new_tokens=1, **options)
    batch = padded([words(1, 3)[0], words(1, 6)[0]], "left")
    model.generate(batch.ids, attention_mask=batch.mask, max_new_tokens=5, **options)
    model.generate(words(1, 4), max_new_tokens=5, num_return_sequences=2, **options)
    other.generate(words(2, 4), max_new_tokens=9, tokenizer=range(30), **options)
    assert not compiled


def test_a_stream_compiles_one_step_for_all_its_tokens(wing: Wing, compiled: list[str]) -> None:
    subject = Subject(wing, vocab_size=45)
    for tokens in subject.model.stream(IDS, max_new_tokens=2, eos_token_id=None):
        assert tokens.shape == (2,)
    compiled.clear()
    steps = list(subject.model.stream(words(2, 6), max_new_tokens=20, eos_token_id=None))
    assert len(steps) == 20
    assert not compiled


def test_the_loop_is_one_program_whose_weights_are_arguments(subject: Subject) -> None:
    program, params, state, asked = started(subject, IDS)
    until = asked.end
    traced = jax.make_jaxpr(mixin._loop, static_argnums=0)(program, params, state, asked, until)
    (call,) = traced.eqns
    traced = call.params["jaxpr"]
    assert [equation.primitive.name for equation in traced.eqns].count("while") == 1
    assert all(np.size(constant) <= 1 for constant in traced.consts)


def test_the_state_is_given_to_the_loop_and_used_up(subject: Subject) -> None:
    program, params, state, asked = started(subject, IDS)
    places = {buffer.unsafe_buffer_pointer() for buffer in state.cache.keys}
    after = mixin._loop(program, params, state, asked, asked.end)
    assert state.cache.keys[0].is_deleted()
    assert {buffer.unsafe_buffer_pointer() for buffer in after.cache.keys} == places
    assert not jax.tree.leaves(params)[0].is_deleted()


def started(subject: Subject, ids: Any, **options: Any) -> tuple[Any, ...]:
    asked = {"max_new_tokens": 6, "eos_token_id": None, **options}
    run = setup.settled(subject.model, Call(ids), asked)
    state, _ = mixin._start(run.program, run.params, run.begun, run.asked)
    return run.program, run.params, state, run.asked


@pytest.mark.parametrize("switch", ["compiled", "trace"])
def test_without_programs_the_tokens_are_the_same(subject: Subject, switch: str) -> None:
    found = subject.generate(IDS, max_new_tokens=2, **{switch: False})
    np.testing.assert_array_equal(found, subject.generate(IDS, max_new_tokens=2))


def test_a_backend_is_not_to_be_chosen(subject: Subject) -> None:
    with pytest.raises(ValueError, match="compiled is 'inductor'; it must be True or False"):
        subject.generate(IDS, compiled="inductor")


@settings(max_examples=3)
@given(batch=batches(), switch=st.sampled_from(["pre_norm", "untied"]), sampled=st.booleans())
def test_a_stream_gives_the_tokens_of_the_reference(
    wing: Wing, batch: Batch, switch: str, sampled: bool
) -> None:
    subject = Subject(wing, 3, **SWITCHES[switch])
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": [5, 9]}
    options |= {"do_sample": True, "seed": 1} if sampled else {}
    right = subject.reference(batch.ids, batch.mask, **options)
    assume(right.margins.min() >= MARGIN)
    steps = list(wing.stream(subject.model, batch.ids, attention_mask=batch.mask, **options))
    np.testing.assert_array_equal(np.stack(steps, 1), right.sequences[:, batch.ids.shape[1] :])


def test_half_precision_keeps_its_cache_in_the_same_type(wing: Wing) -> None:
    weights = random_weights(tiny(), Head.CAUSAL_LM, std=STD)
    model = wing.build(Head.CAUSAL_LM, tiny(), weights, "bfloat16")
    record = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True)
    assert record.past_key_values[0][0].dtype == jnp.bfloat16
    assert record.sequences.dtype == jnp.int32


# Arguments of Flax's users


def test_params_of_the_call_stand_for_those_of_the_model(wing: Wing, subject: Subject) -> None:
    other = Subject(wing, seed=8)
    found = subject.generate(IDS, params=other.model.params, max_new_tokens=6)
    np.testing.assert_array_equal(found, other.generate(IDS, max_new_tokens=6))


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_a_key_stands_for_a_seed(subject: Subject, make: Any) -> None:
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 6, "temperature": 3.0}
    found = subject.generate(IDS, prng_key=make(5), **options)
    np.testing.assert_array_equal(found, subject.generate(IDS, seed=5, **options))
    one, other = (subject.generate(IDS, prng_key=k, **options) for k in jax.random.split(make(5)))
    assert one.shape != other.shape or (one != other).any()


def test_keys_that_cannot_be_honoured_are_refused(subject: Subject) -> None:
    with pytest.raises(ValueError, match="give either prng_key or seed; found both"):
        subject.generate(IDS, prng_key=jax.random.key(1), seed=2, do_sample=True)
    with pytest.raises(ValueError, match=r"prng_key is uint32 \(3, 2\); give one key"):
        subject.generate(IDS, prng_key=jax.random.split(jax.random.key(1), 3), do_sample=True)


# In programs of one's own


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "seed": 4},
        {"num_beams": 3, "num_beam_groups": 3, "diversity_penalty": 0.5},
        {"penalty_alpha": 0.6, "top_k": 3},
    ],
    ids=["greedy", "sampling", "groups", "contrastive"],
)
def test_generation_may_be_a_part_of_another_program(subject: Subject, options: Any) -> None:
    asked = {"max_new_tokens": 6, "eos_token_id": [5, 9], "pad_token_id": 1, **options}
    batch = padded([words(1, 7, seed=7)[0], words(1, 3, seed=3)[0]], "left")

    @jax.jit
    def run(params: Any, ids: Any, mask: Any) -> Any:
        return subject.model.generate(ids, attention_mask=mask, params=params, **asked)

    found = np.asarray(run(subject.model.params, batch.ids, batch.mask))
    right = subject.generate(batch.ids, batch.mask, **asked)
    assert found.shape == (2, 13)
    np.testing.assert_array_equal(found[:, : right.shape[1]], right)
    assert (found[:, right.shape[1] :] == 1).all()


def test_what_a_program_cannot_do_is_refused_in_it(subject: Subject) -> None:
    generate = subject.model.generate
    for options, why in (
        ({"do_sample": True}, "fresh entropy would be the same at every call"),
        ({"streamer": print}, "a stream needs values as they come"),
        ({"compiled": False}, "a run without programs needs values as they come"),
        ({"max_new_tokens": 40}, "the longest prompt has 4 tokens and max_new_tokens is 40"),
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding needs values as they come"),
        ({"num_beams": 2, "force_words_ids": [[4]]}, "a search for forced words needs values"),
        (
            {"output_scores": True, "return_dict_in_generate": True},
            "what is collected needs values as they come",
        ),
        (
            {"stop_strings": "a", "tokenizer": tiny_tokenizer()},
            "stop_strings need the prompt's values",
        ),
    ):
        with pytest.raises(ValueError, match=why):
            jax.jit(lambda ids, given=options: generate(ids, **given))(IDS)
    with pytest.raises(ValueError, match="prng_key is not known inside a compiled program"):
        jax.jit(lambda key: generate(IDS, prng_key=key, do_sample=True))(jax.random.key(0))


def test_a_program_may_be_given_a_negative_prompt_and_masks(subject: Subject) -> None:
    asked: dict[str, Any] = {"guidance_scale": 2.0, "max_new_tokens": 3}
    negative, mask = words(2, 6, seed=1), np.array([[0, 1, 1, 1, 1, 1], [1] * 6])

    @jax.jit
    def run(negative: Any, mask: Any) -> Any:
        return subject.model.generate(
            IDS, negative_prompt_ids=negative, negative_prompt_attention_mask=mask, **asked
        )

    asked |= {"eos_token_id": None}
    right = subject.generate(
        IDS, negative_prompt_ids=negative, negative_prompt_attention_mask=mask, **asked
    )
    np.testing.assert_array_equal(run(negative, mask), right)


def test_a_cache_of_a_program_has_no_known_length(subject: Subject) -> None:
    past = subject.model.generate(IDS, return_dict_in_generate=True).past_key_values
    ids = words(2, 30)
    with pytest.raises(ValueError, match="past_key_values of a program that is being compiled"):
        jax.jit(lambda past: subject.model.generate(ids, past_key_values=past))(past)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"penalty_alpha": 0.6, "top_k": 3}, {"prompt_lookup_num_tokens": 2}],
    ids=["beams", "contrastive", "lookup"],
)
def test_scores_that_are_not_numbers_end_every_search(wing: Wing, options: Any) -> None:
    weights = random_weights(tiny(), Head.CAUSAL_LM, std=STD)
    weights["model.decoder.layers.1.fc2.bias"][3] = np.nan
    model = wing.build(Head.CAUSAL_LM, tiny(), weights)
    with pytest.raises(ValueError, match="scores are NaN after 4 tokens"):
        model.generate(IDS, max_new_tokens=3, **options)


BAD_ROWS: dict[str, tuple[list[int], list[int]]] = {
    "an id outside the vocabulary": ([3, 40], [1, 1]),
    "a negative id": ([3, -1], [1, 1]),
    "a row of padding": ([3, 4], [0, 0]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_prompt_inside_a_program_gives_no_tokens(subject: Subject, case: str) -> None:
    wrong_ids, wrong_mask = BAD_ROWS[case]
    ids, mask = np.array([wrong_ids, [3, 4]]), np.array([wrong_mask, [1, 1]])
    run = jax.jit(lambda i, m: subject.model.generate(i, attention_mask=m, max_new_tokens=3))
    found = np.asarray(run(ids, mask))
    # The other row's first token was chosen at the same time.
    assert (found[0, 2:] < 0).all()
    assert (found[1, 3:] < 0).all()


# Over several devices


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 4, "top_p": 0.9}])
def test_a_model_that_is_spread_over_devices_gives_the_same_tokens(
    wing: Wing, options: Any
) -> None:
    subject = Subject(wing, num_attention_heads=4)
    asked = {"max_new_tokens": 6, "eos_token_id": None, **options}
    right = subject.right(IDS, **asked)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shard(subject.model, mesh)
    assert len(jax.tree.leaves(subject.model.params)[0].sharding.device_set) == 8
    np.testing.assert_array_equal(subject.generate(IDS, **asked), right)
    steps = list(wing.stream(subject.model, IDS, **asked))
    np.testing.assert_array_equal(np.stack(steps, 1), right[:, 4:])


# Beams, candidates and drafts


@pytest.mark.parametrize(
    "options", [{"num_beams": 4}, {"penalty_alpha": 0.6, "top_k": 4}], ids=["beams", "contrastive"]
)
def test_keys_and_values_stay_where_they_are(subject: Subject, options: Any) -> None:
    program, params, state, asked = started(subject, IDS, **options)
    cache = state.cache if hasattr(state, "cache") else state.decode.cache
    places = {buffer.unsafe_buffer_pointer() for buffer in (*cache.keys, *cache.values)}
    text = mixin._loop.lower(program, params, state, asked, asked.end).compile().as_text() or ""
    B, H, S, D = cache.keys[0].shape
    assert len(IDS) == B
    buffers = (f"f32[{B * H},{S},{D}]", f"f32[{B},{H},{S},{D}]")
    made = [line.split(" = ", 1)[1] for line in text.splitlines() if " = " in line]
    assert [line for line in made if line.startswith(buffers) and " gather(" in line] == []
    after = mixin._loop(program, params, state, asked, asked.end)
    kept = after.cache if hasattr(after, "cache") else after.decode.cache
    assert {b.unsafe_buffer_pointer() for b in (*kept.keys, *kept.values)} == places


STRATEGIES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 2},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 3},
    "lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_compiles_once_for_prompts_and_lengths_of_a_plan(
    wing: Wing, strategy: str, compiled: list[str]
) -> None:
    model, options = Subject(wing, vocab_size=46).model, STRATEGIES[strategy]
    model.generate(words(1, 4), max_new_tokens=9, **options)
    compiled.clear()
    more = {"length_penalty": 2.0, "early_stopping": True} if strategy == "beams" else {}
    model.generate(words(1, 7), max_new_tokens=5, **{**options, **more})
    assert not compiled


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_prompt_of_another_room_compiles_the_first_pass_alone(
    wing: Wing, strategy: str, compiled: list[str]
) -> None:
    model, options = Subject(wing, vocab_size=49).model, STRATEGIES[strategy]
    model.generate(words(1, 5), max_new_tokens=4, **options)
    compiled.clear()
    model.generate(words(1, 20), max_new_tokens=4, **options)
    assert len(compiled) == 1


def test_what_was_warmed_up_compiles_nothing_more(wing: Wing, compiled: list[str]) -> None:
    model = Subject(wing, vocab_size=47).model
    asked: dict[str, Any] = {"max_new_tokens": 9, "repetition_penalty": 1.2}
    assert model.warmup(batch_size=2, prompt_length=5, **asked) is None
    assert compiled
    compiled.clear()
    model.generate(words(2, 4), **{**asked, "repetition_penalty": 1.4})
    assert not compiled


def test_a_stream_that_was_warmed_up_compiles_nothing_more(wing: Wing, compiled: list[str]) -> None:
    model = Subject(wing, vocab_size=48).model
    heard: list[Any] = []
    model.warmup(prompt_length=5, max_new_tokens=9, streamer=heard.append, compiled=True)
    assert compiled
    compiled.clear()
    assert len(list(model.stream(words(1, 4), max_new_tokens=9, eos_token_id=None))) == 9
    assert not compiled
    assert heard == []
    with pytest.raises(ValueError, match="compiled is 'inductor'; it must be True or False"):
        model.warmup(compiled="inductor")


def test_a_rule_that_nobody_asked_for_is_no_part_of_the_program(subject: Subject) -> None:
    sizes = []
    for options in ({}, {"no_repeat_ngram_size": 2}):
        program, params, state, asked = started(subject, IDS, **options)
        until = asked.end
        traced = jax.make_jaxpr(mixin._loop, static_argnums=0)(program, params, state, asked, until)
        sizes.append(str(traced).count("while["))
    assert sizes == [1, 2]


def test_what_just_ended_counts_where_a_group_is_judged(shared: Path) -> None:
    """The tokens are those of transformers 4.53.3; the best beam that runs on gives others."""
    model = FlaxOPTForCausalLM.from_pretrained(shared / "reference" / "generation" / "model")
    stops = [2, 25, 171, 184, 156, 24, 297, 167, 212, 113, 102, 127, 91, 221, 292, 67, 222, 53, 260]
    found = model.generate(
        np.array([[171, 140, 109, 89, 233, 274, 242, 70]]),
        num_beams=6,
        num_beam_groups=2,
        diversity_penalty=0.3,
        max_new_tokens=16,
        eos_token_id=stops,
    )
    assert np.asarray(found)[0, 8:].tolist() == [85, 168, 77, 197, 142, 150, *[58] * 10]


# Functions of a caller


def test_a_function_that_can_be_traced_runs_in_the_program(subject: Subject) -> None:
    calls = []

    def processor(input_ids: Any, scores: Any, cur_len: Any) -> Any:
        calls.append(type(scores))
        return jnp.where((jnp.arange(40) % 2 == cur_len % 2)[None], scores, -jnp.inf)

    def on_host(input_ids: Any, scores: Any) -> Any:
        assert isinstance(np.asarray(scores), np.ndarray)
        odd = np.arange(40) % 2 == input_ids.shape[1] % 2
        return jnp.where(odd[None], scores, -jnp.inf)

    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None}
    found = subject.generate(IDS, logits_processor=[processor], **options)
    assert (found[:, 4:] % 2 == np.arange(8) % 2).all()
    traced = len(calls)
    again = subject.generate(words(2, 5), logits_processor=[processor], **options)
    assert again.shape == (2, 13)
    # The programs are there already.
    assert len(calls) == traced
    np.testing.assert_array_equal(
        subject.generate(IDS, logits_processor=[on_host], **options), found
    )


def test_what_cannot_be_traced_runs_on_the_host(subject: Subject) -> None:
    def processor(input_ids: Any, scores: Any, cur_len: Any) -> Any:
        changed = np.array(scores)
        changed[:, int(cur_len) % 40] = 100.0
        return changed

    found = subject.generate(IDS, logits_processor=[processor], max_new_tokens=3)
    np.testing.assert_array_equal(found[:, 4:], [[4, 5, 6]] * 2)
    with pytest.raises(ValueError, match="a function that cannot be traced needs values"):
        jax.jit(lambda ids: subject.model.generate(ids, logits_processor=[processor]))(IDS)


def test_traced_functions_see_all_rows_also_where_drafts_are_asked_for(subject: Subject) -> None:
    def processor(input_ids: Any, scores: Any, cur_len: Any) -> Any:
        return scores.at[jnp.arange(2), jnp.array([7, 9])].add(100.0)

    found = subject.generate(
        IDS, logits_processor=[processor], prompt_lookup_num_tokens=2, max_new_tokens=2
    )
    np.testing.assert_array_equal(found[:, 4:], [[7, 7], [9, 9]])


def test_a_traced_criterion_sees_candidates_and_the_scores_behind_them(subject: Subject) -> None:
    shapes = set()

    def criterion(input_ids: Any, scores: Any, cur_len: Any) -> Any:
        shapes.add((len(input_ids), *scores.shape))
        return (input_ids[:, 4] == 7) & (scores.max(1) <= 0)

    options: dict[str, Any] = {"num_beams": 2, "max_new_tokens": 2, "eos_token_id": None}
    subject.generate(IDS, stopping_criteria=[criterion], **options)
    assert shapes == {(8, 8, 40)}


@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_a_stream_by_chunks_yields_the_same_tokens(
    wing: Wing, subject: Subject, chunk: int
) -> None:
    steps = list(subject.model.stream(IDS, max_new_tokens=6, chunk=chunk))
    right = subject.generate(IDS, max_new_tokens=6)
    np.testing.assert_array_equal(np.stack([np.asarray(x) for x in steps], 1), right[:, 4:])


def test_a_chunk_has_at_least_one_token(subject: Subject) -> None:
    with pytest.raises(ValueError, match="chunk is 0; give a whole number of tokens, at least 1"):
        subject.model.stream(IDS, chunk=0)


# Draws


def drawn(scores: Any, numbers: Any) -> Any:
    return np.asarray(jax.jit(cuts.draw)(scores.astype(np.float32), cuts.parts(numbers)))


def right_draws(scores: Any, numbers: Any) -> tuple[Any, Any]:
    """The tokens and margins of float64."""
    rows = zip(scores.astype(np.float64), numbers, strict=True)
    tokens, margins = zip(*(reference.draw(row, float(one)) for row, one in rows), strict=True)
    return np.array(tokens), np.array(margins)


@pytest.mark.parametrize("size", [1, 40, 128, 129, 50272])
def test_draws_are_those_of_float64_but_at_an_edge(size: int) -> None:
    random = np.random.default_rng(size)
    for spread in (0.0, 0.1, 3.0, 30.0):
        scores = random.normal(0, spread, (6, size)).astype(np.float32)
        numbers = random.random(6)
        right, margins = right_draws(scores, numbers)
        sure = margins >= 1e-7
        np.testing.assert_array_equal(drawn(scores, numbers)[sure], right[sure])


def test_a_draw_keeps_more_bits_of_its_uniform_than_a_float32_has() -> None:
    scores = np.zeros((4, 40))
    numbers = np.array([0.5 - 2.0**-40, 0.5, 1 - 2.0**-53, 0.0])
    np.testing.assert_array_equal(drawn(scores, numbers), [19, 20, 39, 0])


def test_draws_without_putting_back_are_all_there_is() -> None:
    scores = np.array([[0.0, -np.inf, 1.0, 1.0], [2.0, 3.0, 1.0, 0.0]], np.float32)
    numbers = np.full((2, 4), 0.5)
    values, places = map(np.asarray, jax.jit(cuts.drawn)(scores, cuts.parts(numbers)))
    np.testing.assert_array_equal(places[:, :3], [[2, 3, 0], [1, 0, 2]])
    np.testing.assert_array_equal(values, [[1, 1, 0, -np.inf], [3, 2, 1, 0]])


@pytest.mark.parametrize("shape", [(2, 5), (3, 300), (2, 5000)])
def test_the_best_of_many_come_in_order_of_their_places_where_they_are_equal(
    shape: tuple[int, int],
) -> None:
    scores = np.random.default_rng(0).integers(0, 9, shape).astype(np.float32)
    values, places = map(np.asarray, cuts.best(jnp.asarray(scores), 4))
    right = np.argsort(-scores, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(places, right)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, right, axis=1))


@given(
    seed=st.integers(0, 2**16),
    size=st.sampled_from([7, 300]),
    ties=st.booleans(),
    temperature=st.sampled_from([0.5, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 50, 1000]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    typical_p=st.sampled_from([0.2, 0.9]),
    cutoff=st.sampled_from([0.001, 0.1]),
)
def test_cuts_leave_the_tokens_that_the_reference_leaves(
    seed: int, size: int, ties: bool, cutoff: float, **values: Any
) -> None:
    scores = np.random.default_rng(seed).normal(0, 3, (3, size)).astype(np.float32)
    scores = np.round(scores) if ties else scores
    values |= {"epsilon_cutoff": cutoff, "eta_cutoff": cutoff}
    asked = GenerationConfig(do_sample=True, seed=seed, **values)
    numbers = all_given(asked, Plan(1, 1, 0, 64, 64, 8), vocab_size=size, known=size)
    arrays = {name: tuple(map(narrow, found)) for name, found in numbers.items()}
    text = rules.Text(jnp.zeros((3, 64), jnp.int32), jnp.int32(1), jnp.arange(3), None)
    found = np.asarray(rules.ruled(tuple(arrays), scores, text, arrays))
    for row, kept in zip(scores.astype(np.float64), found, strict=True):
        closest = np.inf
        for name in asked.rules:
            before, row = row, reference.CUTS[name](row, asked)
            closest = min(closest, reference.margin(name, asked, before, row))
        if closest >= 1e-5:
            np.testing.assert_allclose(kept, row, rtol=1e-5, atol=1e-5)


LARGE = float(np.finfo(np.float32).max)


@pytest.mark.parametrize(
    ("options", "scores", "right"),
    [
        ({"temperature": 0.5, "do_sample": True}, [LARGE, -LARGE, 2, 0], [LARGE, -LARGE, 4, 0]),
        ({"top_p": 0.5, "eta_cutoff": 0.2, "do_sample": True}, [np.inf, 1, 2, 0], [np.inf] * 4),
        ({"typical_p": 0.5, "top_k": 2, "do_sample": True}, [np.inf, 1, 2, 0], [np.inf] * 4),
        ({"renormalize_logits": True}, [np.inf, 1, 2, 0], [np.inf, 1, 2, 0]),
        (
            {"exponential_decay_length_penalty": (0, 10.0), "eos_token_id": [0, 1]},
            [-2, 0, 1, 1],
            [LARGE, 0, 1, 1],
        ),
        (
            {"exponential_decay_length_penalty": (0, 1e38), "eos_token_id": [0, 1]},
            [-2, 0, 1, 1],
            [np.inf, 0, 1, 1],
        ),
        (
            {
                "exponential_decay_length_penalty": (0, 10.0),
                "eos_token_id": [0, 1],
                "remove_invalid_values": True,
            },
            [-np.inf, -2, 1, 1],
            [-LARGE, LARGE, 1, 1],
        ),
    ],
    ids=[
        "temperature",
        "inf",
        "inf and typical_p",
        "log of inf",
        "fits float64",
        "fits nothing",
        "forbidden by a number",
    ],
)
def test_no_rule_makes_inf_of_a_number_or_a_number_of_inf(
    options: Any, scores: Any, right: Any
) -> None:
    asked = GenerationConfig(seed=1 if "do_sample" in options else None, **options)
    numbers = all_given(asked, Plan(1, 60, 0, 64, 64, 8), vocab_size=4, known=4)
    arrays = {name: tuple(map(narrow, found)) for name, found in numbers.items()}
    text = rules.Text(jnp.zeros((1, 64), jnp.int32), jnp.int32(61), jnp.arange(1), None)
    found = rules.ruled(tuple(arrays), jnp.array([scores], jnp.float32), text, arrays)
    np.testing.assert_array_equal(found, np.array([right], np.float32))


def narrow(array: Any) -> Any:
    return array.astype(np.float32) if array.dtype == np.float64 else array
