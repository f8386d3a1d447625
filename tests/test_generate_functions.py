"""Functions of the caller: what they see, what they must give, traced or on the host."""

from typing import Any

import numpy as np
import pytest

from tests.cases import padded, words
from tests.subject import Subject
from tests.wings import Wing

NEW = 6
TEXTS = [words(1, count, seed=count)[0] for count in (5, 3)]
BATCH = padded(TEXTS, "left")
P = BATCH.ids.shape[1]
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None}
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": [3, 4], "top_k": 10},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True, "seed": 3},
    "contrastive": {"penalty_alpha": 0.4, "top_k": 4},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "guidance": {"guidance_scale": 2.0},
}
#: In Keras and Flax every function of every strategy is another program, so the rest runs rarely.
CHOSEN = [
    pytest.param(name, marks=() if name in ("greedy", "beams", "lookup") else pytest.mark.deep)
    for name in STRATEGIES
]
#: What the functions below add to the score of token 7.
BIAS = 3.0


@pytest.fixture(scope="module")
def subject(wing: Wing) -> Subject:
    return Subject(wing, lightly=True)


@pytest.fixture(params=["on the host", "traced"])
def functions(request: pytest.FixtureRequest, wing: Wing) -> Any:
    """A processor that favours token 7, a criterion for token 7, every second token allowed."""
    if request.param == "traced":
        if not wing.traces:
            pytest.skip("PyTorch runs functions as they are: nothing is traced")
        return wing.traced(token=7, bias=BIAS, vocab_size=40)
    return (
        wing.on_host(_favours),
        wing.on_host(lambda ids, scores: ids[:, -1] == 7),
        lambda text, ids: list(range(len(ids) % 2, 40, 2)),
    )


def _favours(ids: Any, scores: Any) -> Any:
    scores = scores.copy()
    scores[:, 7] += BIAS
    return scores


@pytest.mark.parametrize("strategy", CHOSEN)
def test_a_processor_changes_the_scores(subject: Subject, functions: Any, strategy: str) -> None:
    asked = {**OPTIONS, **STRATEGIES[strategy]}
    right = subject.generate(BATCH.ids, BATCH.mask, sequence_bias=[[[7], BIAS]], **asked)
    found = subject.generate(BATCH.ids, BATCH.mask, logits_processor=[functions[0]], **asked)
    np.testing.assert_array_equal(found, right)
    assert (found != subject.generate(BATCH.ids, BATCH.mask, **asked)).any()


@pytest.mark.parametrize("strategy", CHOSEN)
def test_a_criterion_ends_each_text_for_itself(
    subject: Subject, functions: Any, strategy: str
) -> None:
    """As a stop token does, but that a criterion takes nothing from a token's length."""
    asked = {**OPTIONS, **STRATEGIES[strategy], "sequence_bias": [[[7], BIAS]]}
    right = subject.generate(BATCH.ids, BATCH.mask, **{**asked, "eos_token_id": 7})
    found = subject.generate(BATCH.ids, BATCH.mask, stopping_criteria=[functions[1]], **asked)
    np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("strategy", CHOSEN)
def test_only_the_allowed_tokens_are_chosen(
    subject: Subject, functions: Any, strategy: str
) -> None:
    asked = {**OPTIONS, **STRATEGIES[strategy]}
    found = subject.generate(BATCH.ids, BATCH.mask, prefix_allowed_tokens_fn=functions[2], **asked)
    parities = found[:, P:] % 2
    np.testing.assert_array_equal(parities, np.broadcast_to((np.arange(NEW) + P) % 2, (2, NEW)))


def test_functions_see_the_prompt_as_it_was_given_and_what_follows(
    subject: Subject, wing: Wing
) -> None:
    seen: list[Any] = []
    stopped: list[Any] = []
    allowed: list[Any] = []

    def processor(ids: Any, scores: Any) -> Any:
        seen.append((ids.copy(), scores.copy()))
        return scores

    def criterion(ids: Any, scores: Any) -> Any:
        stopped.append(ids.copy())
        return len(stopped) == 3

    def prefix(text: Any, ids: Any) -> list[int]:
        allowed.append((int(text), np.asarray(ids)))
        return list(range(30))

    found = subject.generate(
        BATCH.ids,
        BATCH.mask,
        logits_processor=[wing.on_host(processor)],
        stopping_criteria=[wing.on_host(criterion)],
        prefix_allowed_tokens_fn=prefix,
        suppress_tokens=[8],
        **OPTIONS,
    )
    assert found.shape == (2, P + 3)
    for step, ((ids, scores), after) in enumerate(zip(seen, stopped, strict=True)):
        np.testing.assert_array_equal(ids, found[:, : P + step])
        np.testing.assert_array_equal(after, found[:, : P + step + 1])
        assert scores.shape == (2, 40)
        assert np.isneginf(scores[:, [8, *range(30, 40)]]).all()
        for row in range(2):
            text, prefixed = allowed[2 * step + row]
            assert text == row
            np.testing.assert_array_equal(prefixed, found[row, : P + step])


def test_with_beams_functions_see_every_beam(subject: Subject, wing: Wing) -> None:
    shapes: list[Any] = []
    texts: list[int] = []

    def processor(ids: Any, scores: Any) -> Any:
        shapes.append((ids.shape, scores.shape))
        return scores

    def prefix(text: Any, ids: Any) -> list[int]:
        texts.append(int(text))
        return list(range(40))

    subject.generate(
        BATCH.ids,
        BATCH.mask,
        num_beams=3,
        logits_processor=[wing.on_host(processor)],
        prefix_allowed_tokens_fn=prefix,
        **OPTIONS,
    )
    assert shapes == [((6, P + step), (6, 40)) for step in range(NEW)]
    # Before the first choice all beams of a text are one.
    assert texts[-6 * (NEW - 1) :] == [0, 0, 0, 1, 1, 1] * (NEW - 1)


def test_processors_follow_each_other(subject: Subject, wing: Wing) -> None:
    order: list[str] = []

    def noting(name: str) -> Any:
        def processor(ids: Any, scores: Any) -> Any:
            order.append(name)
            return scores

        return wing.on_host(processor)

    subject.generate(BATCH.ids, logits_processor=[noting("a"), noting("b")], max_new_tokens=1)
    assert order == ["a", "b"]


def test_what_cannot_be_traced_runs_on_the_host(subject: Subject, wing: Wing) -> None:
    if not wing.traces:
        pytest.skip("PyTorch runs functions as they are: nothing is traced")

    def stubborn(ids: Any, scores: Any, length: Any) -> Any:
        told.append(int(length))
        return wing.array(_favours(np.asarray(ids), np.asarray(scores)))

    told: list[int] = []
    right = subject.generate(BATCH.ids, BATCH.mask, sequence_bias=[[[7], BIAS]], **OPTIONS)
    found = subject.generate(BATCH.ids, BATCH.mask, logits_processor=[stubborn], **OPTIONS)
    np.testing.assert_array_equal(found, right)
    assert told == list(range(P, P + NEW))


def test_what_is_traced_is_not_called_again(subject: Subject, wing: Wing) -> None:
    if not wing.traces:
        pytest.skip("PyTorch runs functions as they are: nothing is traced")
    calls: list[int] = []
    favours = wing.traced(token=7, bias=BIAS, vocab_size=40)[0]

    def counted(input_ids: Any, scores: Any, cur_len: Any) -> Any:
        calls.append(1)
        return favours(input_ids, scores, cur_len)

    for _ in range(2):
        subject.generate(BATCH.ids, BATCH.mask, logits_processor=[counted], **OPTIONS)
    assert len(calls) < NEW


def test_a_function_that_gives_another_shape_is_named(subject: Subject, wing: Wing) -> None:
    def crooked(ids: Any, scores: Any) -> Any:
        return scores[:, :3]

    def hasty(ids: Any, scores: Any) -> Any:
        return np.ones(5, np.bool_)

    with pytest.raises(ValueError, match=r"returned the shape \(2, 3\), expected \(2, 40\)"):
        subject.generate(BATCH.ids, logits_processor=[wing.on_host(crooked)])
    with pytest.raises(ValueError, match=r"returned the shape \(5,\), expected \(\) or \(2,\)"):
        subject.generate(BATCH.ids, stopping_criteria=[wing.on_host(hasty)])


# What functions may give, and how they are asked


DRAWN: dict[str, Any] = {"do_sample": True, "seed": 1}
#: What draws from scores, adds them up or sets them against something else.
NEEDS_FINITE: dict[str, dict[str, Any]] = {
    "sampling": DRAWN,
    "beams": {"num_beams": 2},
    "beam sampling": {"num_beams": 2, **DRAWN},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "forced words": {"num_beams": 2, "force_words_ids": [[7]]},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
}


@pytest.mark.parametrize("strategy", NEEDS_FINITE)
def test_a_score_of_inf_leaves_nothing_to_draw_or_to_weigh(
    subject: Subject, wing: Wing, strategy: str
) -> None:
    asked = {"max_new_tokens": 2, **NEEDS_FINITE[strategy]}
    with pytest.raises(ValueError, match=r"a score is \+inf after \d tokens, beside which"):
        subject.generate(words(2, 4), logits_processor=[wing.on_host(_certain)], **asked)


def test_a_score_of_inf_is_the_best_one(subject: Subject, wing: Wing) -> None:
    found = subject.generate(
        BATCH.ids, BATCH.mask, logits_processor=[wing.on_host(_certain)], **OPTIONS
    )
    assert (found[:, P:] == 7).all()


def _certain(ids: Any, scores: Any) -> Any:
    scores = scores.copy()
    scores[:, 7] = np.inf
    return scores


def test_what_is_no_list_of_functions_is_refused(subject: Subject) -> None:
    for name in ("logits_processor", "stopping_criteria"):
        for given in (_favours, [3], "text", {"a": _favours}):
            message = f"{name} is {type(given).__name__}; give a list of functions, such as {name}="
            with pytest.raises(ValueError, match=message):
                subject.generate(BATCH.ids, max_new_tokens=1, **{name: given})


@pytest.mark.parametrize("answer", [None, "text", {}], ids=["nothing", "text", "a dictionary"])
def test_a_function_that_gives_no_array_is_named(subject: Subject, answer: Any) -> None:
    def forgetful(ids: Any, scores: Any) -> Any:
        return answer

    with pytest.raises(ValueError, match="the logits processor forgetful returned"):
        subject.generate(BATCH.ids, logits_processor=[forgetful], max_new_tokens=1)
    with pytest.raises(ValueError, match="the stopping criterion forgetful returned"):
        subject.generate(BATCH.ids, stopping_criteria=[forgetful], max_new_tokens=1)


def test_functions_may_answer_with_arrays_of_numpy(subject: Subject) -> None:
    def processor(ids: Any, scores: Any) -> Any:
        return _favours(np.asarray(ids), np.asarray(scores))

    def criterion(ids: Any, scores: Any) -> Any:
        return np.asarray(ids)[:, -1] == 7

    bias: Any = [[[7], BIAS]]
    right = subject.generate(
        BATCH.ids, BATCH.mask, sequence_bias=bias, **{**OPTIONS, "eos_token_id": 7}
    )
    found = subject.generate(
        BATCH.ids,
        BATCH.mask,
        logits_processor=[processor],
        stopping_criteria=[criterion],
        **OPTIONS,
    )
    np.testing.assert_array_equal(found, right)


EVEN = np.arange(40) % 2 == 0


@pytest.mark.parametrize(
    ("answer", "beams"),
    [
        (list(range(0, 40, 2)), 1),
        (list(range(0, 40, 2)), 2),
        (np.arange(0, 40, 2), 1),
        (EVEN, 1),
        (EVEN.tolist(), 1),
    ],
    ids=["ids", "ids for beams", "an array of ids", "an array of bools", "bools"],
)
def test_allowed_tokens_are_ids_or_bools(subject: Subject, answer: Any, beams: int) -> None:
    asked = {**OPTIONS, "num_beams": beams}
    odd = list(range(1, 40, 2))
    right = subject.generate(BATCH.ids, BATCH.mask, suppress_tokens=odd, **asked)
    found = subject.generate(
        BATCH.ids, BATCH.mask, prefix_allowed_tokens_fn=lambda text, ids: answer, **asked
    )
    np.testing.assert_array_equal(found, right)
    if subject.wing.traces and beams == 1:
        found = subject.generate(
            BATCH.ids,
            BATCH.mask,
            prefix_allowed_tokens_fn=lambda text, ids, length: answer,
            **asked,
        )
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize(
    "answer",
    [[40], [3, -1], [1.5], None, 3, "text", [[3]], np.ones(39, np.bool_)],
    ids=["too large", "negative", "a fraction", "nothing", "a number", "text", "nested", "short"],
)
def test_what_cannot_be_allowed_tokens_is_refused(subject: Subject, answer: Any) -> None:
    def allowed(text: Any, ids: Any) -> Any:
        return answer

    message = "prefix_allowed_tokens_fn allowed returned for text 0 what is not a list of ids from"
    with pytest.raises(ValueError, match=message):
        subject.generate(BATCH.ids, prefix_allowed_tokens_fn=allowed, max_new_tokens=1)


def test_functions_see_all_rows_also_where_drafts_are_asked_for(
    subject: Subject, wing: Wing
) -> None:
    shapes: list[Any] = []

    def processor(ids: Any, scores: Any) -> Any:
        shapes.append((ids.shape, scores.shape))
        return scores

    drafted = {**OPTIONS, **STRATEGIES["lookup"], "logits_processor": [wing.on_host(processor)]}
    right = subject.generate(BATCH.ids, BATCH.mask, **OPTIONS)
    found = subject.generate(BATCH.ids, BATCH.mask, **drafted)
    np.testing.assert_array_equal(found, right)
    assert shapes == [((2, P + step), (2, 40)) for step in range(NEW)]
    # Without drafts several rows go on together, so they can be streamed.
    steps = list(wing.stream(subject.model, BATCH.ids, attention_mask=BATCH.mask, **drafted))
    np.testing.assert_array_equal(np.stack(steps, axis=1), right[:, P:])


@pytest.mark.parametrize("more", [{}, {"force_words_ids": [[7]]}], ids=["beams", "forced words"])
def test_with_beams_a_criterion_sees_candidates_and_the_scores_behind_them(
    subject: Subject, wing: Wing, more: Any
) -> None:
    seen: list[Any] = []

    def criterion(ids: Any, scores: Any) -> Any:
        seen.append((ids.copy(), scores.copy()))
        return np.zeros(len(ids), np.bool_)

    subject.generate(
        words(2, 4),
        num_beams=3,
        stopping_criteria=[wing.on_host(criterion)],
        max_new_tokens=3,
        eos_token_id=None,
        **more,
    )
    if not more:
        # Twice as many candidates as beams, for each of two texts.
        assert [ids.shape for ids, _ in seen] == [(12, 5), (12, 6), (12, 7)]
    for ids, scores in seen:
        assert scores.shape == (len(ids), 40)
        logits = wing.call(subject.model, input_ids=ids[:, :-1]).logits[:, -1].astype(np.float64)
        right = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(scores, right, rtol=0, atol=1e-3)
