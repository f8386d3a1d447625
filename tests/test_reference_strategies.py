"""Beams, contrastive search, drafts, guidance and functions in the NumPy reference."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_core import reference
from opt_core.config import OPTConfig
from opt_core.generation import GenerationConfig, uniforms
from opt_core.reference import Call, beams
from opt_core.reference.assisted import looked_up, rounds
from opt_core.reference.cuts import log_softmax, softmax
from opt_core.reference.inputs import Floats
from opt_core.reference.setup import settle
from opt_core.weights import Head, table

V = 6
CONFIG = OPTConfig(
    vocab_size=V,
    hidden_size=8,
    num_hidden_layers=2,
    ffn_dim=12,
    num_attention_heads=2,
    max_position_embeddings=24,
)
PROMPT = [[3, 5, 4]]
#: Three texts in one batch, padded with 1.
BATCH = [[3, 5, 4], [1, 2, 4], [1, 1, 3]]
BEAMS: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 6, "num_return_sequences": 3}
WORDS: dict[str, Any] = {**BEAMS, "force_words_ids": [[5, 2]]}
GROUPS: dict[str, Any] = {**BEAMS, "num_beam_groups": 2, "diversity_penalty": 0.7}


def weights_of(seed: int) -> dict[str, Floats]:
    noise = np.random.default_rng(seed)
    rows = table(CONFIG, Head.CAUSAL_LM)
    return {name: noise.normal(row.mean, 0.4, row.shape) for name, row in rows.items()}


WEIGHTS = weights_of(3)


def asked(**options: Any) -> GenerationConfig:
    return GenerationConfig(pad_token_id=1).merged(**options)


def record(prompt: Any, call: Call | None = None, **options: Any) -> reference.Record:
    return reference.record(CONFIG, WEIGHTS, prompt, None, asked(**options), call=call)


def new(found: reference.Record, width: int = 3) -> list[list[int]]:
    """The new tokens, without what fills the rows."""
    rows = found.sequences[:, width:].tolist()
    return [[token for token in row if token != 1] for row in rows]


def log_probability(tokens: list[int]) -> float:
    """Of tokens after the prompt, by one pass over all of them."""
    logits = reference.causal_lm(CONFIG, WEIGHTS, input_ids=[PROMPT[0] + tokens]).logits[0]
    steps = zip(logits[2:-1], tokens, strict=True)
    return float(sum(log_softmax(row)[token] for row, token in steps))


# Beams


def test_beams_that_keep_every_text_find_the_likeliest() -> None:
    texts = [list(text) for text in itertools.product(range(V), repeat=3)]
    best = sorted(texts, key=lambda text: -log_probability(text))[:5]
    found = record(PROMPT, num_beams=V**2, num_return_sequences=5, max_new_tokens=3)
    assert found.sequences[:, 3:].tolist() == best
    assert found.sequences_scores is not None
    np.testing.assert_allclose(found.sequences_scores, [log_probability(t) / 3 for t in best])


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.5])
def test_beams_that_keep_every_text_find_the_best_that_ends(penalty: float) -> None:
    stop = 4
    texts = [list(t) for n in (1, 2, 3) for t in itertools.product(range(V), repeat=n)]
    ended = [t for t in texts if stop not in t[:-1] and (t[-1] == stop or len(t) == 3)]
    ended.sort(key=lambda text: -log_probability(text) / len(text) ** penalty)
    found = record(
        PROMPT,
        num_beams=V**3,
        num_return_sequences=6,
        max_new_tokens=3,
        eos_token_id=stop,
        length_penalty=penalty,
        early_stopping="never",
    )
    width = max(map(len, ended[:6]))
    filled = [text + [1] * (width - len(text)) for text in ended[:6]]
    assert found.sequences[:, 3:].tolist() == filled


@pytest.mark.parametrize("options", [BEAMS, WORDS, GROUPS, {**BEAMS, "do_sample": True}])
@pytest.mark.parametrize("stops", [None, [4, 3]])
def test_a_text_finds_the_same_alone_and_in_a_batch(options: dict[str, Any], stops: Any) -> None:
    options = {**options, "eos_token_id": stops, "repetition_penalty": 1.2}
    together = new(record(BATCH, **options, seed=[7, 8, 9]))
    for row, text in enumerate(BATCH):
        alone = new(record([[t for t in text if t != 1]], **options, seed=[7 + row]), 3 - row)
        assert together[3 * row : 3 * row + 3] == alone


@pytest.mark.parametrize("options", [BEAMS, GROUPS, WORDS])
@pytest.mark.parametrize("stop", [None, 4])
def test_scores_and_indices_of_beams_say_where_each_token_came_from(
    options: dict[str, Any], stop: int | None
) -> None:
    found = record(BATCH, **options, eos_token_id=stop)
    assert found.beam_indices is not None
    assert found.sequences_scores is not None
    K, tokens = options["num_beams"], found.sequences[:, 3:]
    assert all(scores.shape == (3 * K, V) for scores in (*found.scores, *found.logits))
    for row, (path, total) in enumerate(
        zip(found.beam_indices, found.sequences_scores, strict=True)
    ):
        count = int((path >= 0).sum())
        assert set(path[:count] // K) == {row // 3}
        assert (path[count:] == -1).all()
        parts = [found.scores[step][path[step], tokens[row, step]] for step in range(count)]
        np.testing.assert_allclose(total, sum(parts) / count)


def test_the_first_group_searches_as_if_it_were_alone_and_the_others_differ() -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beam_groups": 2, "diversity_penalty": 50.0}
    both = record(PROMPT, **options, num_beams=4, num_return_sequences=4)
    alone = record(PROMPT, num_beams=2, num_return_sequences=2, max_new_tokens=4)
    assert both.beam_indices is not None
    first = both.beam_indices[:, 0] < 2
    assert both.sequences[first].tolist() == alone.sequences.tolist()
    # At each step, the last one included, no token is taken by both groups.
    for step in range(3, 7):
        assert not set(both.sequences[first, step]) & set(both.sequences[~first, step])


def test_of_equal_candidates_the_first_beam_and_the_lowest_token_come_first() -> None:
    sums = np.array([[0.0, 2.0, 1.0], [2.0, 2.0, -np.inf]])
    found = beams.top(sums, 6)
    assert [(c.beam, c.token) for c in found] == [(0, 1), (1, 0), (1, 1), (0, 2), (0, 0)]


def test_candidates_are_drawn_one_after_the_other_without_putting_back() -> None:
    sums = np.log([[0.1, 0.4], [0.3, 0.2]])
    # 0.6 of 0.1 0.4 0.3 0.2 is the third; 0.6 of what is left, 0.1 0.4 0.2, the second.
    found = beams.drawn(sums, np.array([0.6, 0.6]))
    assert [(c.beam, c.token) for c in found] == [(0, 1), (1, 0)]
    assert [c.score for c in found] == [sums[0, 1], sums[1, 0]]


def test_no_more_candidates_are_drawn_than_there_are() -> None:
    sums = np.array([[-np.inf, 1.0], [0.0, -np.inf]])
    found = beams.drawn(sums, np.array([0.0, 0.0, 0.0, 0.0]))
    assert [(c.beam, c.token) for c in found] == [(0, 1), (1, 0)]


def test_beams_are_drawn_by_the_uniforms_of_their_text() -> None:
    options: dict[str, Any] = {"num_beams": 2, "do_sample": True, "top_k": 0}
    found = record(PROMPT, **options, max_new_tokens=1, num_return_sequences=2, seed=5)
    weights = softmax(reference.causal_lm(CONFIG, WEIGHTS, input_ids=PROMPT).logits[0, -1])
    drawn = []
    for uniform in uniforms(5, 1, 1, draws=4)[0, 0]:
        cumulative = weights.cumsum()
        drawn.append(int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")))
        weights[drawn[-1]] = 0
    # All of them end in the only step; the two best are what the pool keeps of the best two.
    likely = sorted(drawn, key=lambda token: -log_probability([token]))
    assert new(found) == [[token] for token in likely[:2]]


def test_fewer_sequences_than_asked_for_are_filled() -> None:
    call = Call(prefix_allowed_tokens_fn=lambda text, ids: [4])
    found = record(PROMPT, call, **BEAMS)
    assert found.sequences_scores is not None
    assert new(found) == [[4] * 6, [], []]
    assert np.isneginf(found.sequences_scores).tolist() == [False, True, True]


@pytest.mark.parametrize("word", [3, 5, 4])
def test_a_word_of_the_prompt_is_forced_all_the_same(word: int) -> None:
    options = {**WORDS, "num_return_sequences": 1, "force_words_ids": [[word]]}
    assert word in new(record(PROMPT, **options))[0]


# Contrastive search


def test_contrastive_search_weighs_probability_against_likeness() -> None:
    text = list(PROMPT[0])
    options: dict[str, Any] = {"penalty_alpha": 0.6, "top_k": 3, "max_new_tokens": 5}
    for token in new(record(PROMPT, **options))[0]:
        share = softmax(reference.causal_lm(CONFIG, WEIGHTS, input_ids=[text]).logits[0, -1])
        merits = {}
        for candidate in np.argsort(-share)[:3]:
            ids = [[*text, int(candidate)]]
            hidden = reference.forward(CONFIG, WEIGHTS, input_ids=ids).last_hidden_state[0]
            lengths = np.linalg.norm(hidden, axis=1)
            cosines = hidden[:-1] @ hidden[-1] / lengths[:-1] / lengths[-1]
            merits[int(candidate)] = 0.4 * share[candidate] - 0.6 * cosines.max()
        assert token == max(merits, key=lambda one: merits[one])
        text.append(token)


def test_contrastive_search_chooses_nothing_that_is_forbidden() -> None:
    found = record(
        PROMPT, penalty_alpha=1.0, top_k=4, max_new_tokens=8, suppress_tokens=[0, 2, 3, 5]
    )
    assert set(found.sequences[0, 3:]) <= {1, 4}


# Drafts


@pytest.mark.parametrize(
    ("text", "longest", "expected"),
    [
        ([1, 2, 3, 1, 2], 2, [3, 1]),
        # The longest ending wins, then the latest place.
        ([1, 2, 3, 9, 2, 4, 1, 2], 2, [3, 9]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 2, [4, 1]),
        ([1, 2, 3, 9, 2, 4, 1, 2], 1, [4, 1]),
        ([7, 7], 2, [7]),
        ([1, 2, 3], 2, []),
        ([1], 2, []),
    ],
)
def test_what_followed_the_latest_like_ending_is_drafted(
    text: list[int], longest: int, expected: list[int]
) -> None:
    assert looked_up(text, longest, 2) == expected


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "seed": 4, "temperature": 2.0}])
def test_an_equal_assistant_is_always_right(sampled: dict[str, Any]) -> None:
    generation = asked(max_new_tokens=11, num_assistant_tokens=3, **sampled)
    call = Call(assistant=(CONFIG, WEIGHTS))
    run = settle(CONFIG, WEIGHTS, PROMPT, None, generation, None, call)
    assert rounds(run) == [4, 4, 3]


@given(seed=st.integers(0, 99), draws=st.booleans())
def test_drafts_settle_every_token_and_change_none(seed: int, draws: bool) -> None:
    generation = asked(max_new_tokens=12, do_sample=draws, seed=seed)
    plain = reference.generate(CONFIG, WEIGHTS, PROMPT, None, generation)
    for options, assistant in (
        ({"num_assistant_tokens": 2}, (CONFIG, weights_of(seed))),
        ({"prompt_lookup_num_tokens": 4}, None),
    ):
        call, drafted = Call(assistant=assistant), generation.merged(**options)
        found = reference.generate(CONFIG, WEIGHTS, PROMPT, None, drafted, call=call)
        np.testing.assert_array_equal(found, plain)
        settled = rounds(settle(CONFIG, WEIGHTS, PROMPT, None, drafted, None, call))
        assert sum(settled) == 12
        assert all(1 <= count <= 5 for count in settled)


def test_an_assistant_that_does_not_fit_is_refused() -> None:
    other = CONFIG.replace(vocab_size=V + 1)
    with pytest.raises(ValueError, match=r"a vocabulary of 7, the model one of 6"):
        record(PROMPT, Call(assistant=(other, WEIGHTS)))
    with pytest.raises(ValueError, match="other options ask for beams"):
        record(PROMPT, Call(assistant=(CONFIG, WEIGHTS)), num_beams=2)
    with pytest.raises(ValueError, match=r"assistant_model needs guidance_scale=1\.0"):
        record(PROMPT, Call(assistant=(CONFIG, WEIGHTS)), guidance_scale=2.0)


# How sure


def test_streams_and_margins_are_not_for_beams() -> None:
    with pytest.raises(ValueError, match="beams settle at the end"):
        reference.stream(CONFIG, WEIGHTS, PROMPT, None, asked(num_beams=2))
    with pytest.raises(ValueError, match="beams settle at the end"):
        reference.generate_with_margins(CONFIG, WEIGHTS, PROMPT, None, asked(num_beams=2))


def test_a_close_call_of_beams_is_found() -> None:
    assert reference.is_sure(CONFIG, WEIGHTS, PROMPT, None, asked(**BEAMS))
    # Two tokens with nearly the same embedding, and so with nearly the same score.
    name = "model.decoder.embed_tokens.weight"
    twins = {**WEIGHTS, name: WEIGHTS[name].copy()}
    likely = int(record(PROMPT, **BEAMS).sequences[0, 3])
    twins[name][(likely + 1) % V] = twins[name][likely] * (1 + 1e-9)
    assert not reference.is_sure(CONFIG, twins, PROMPT, None, asked(**BEAMS))
