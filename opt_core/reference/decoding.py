"""Decoding by the reference, every strategy: each token costs a pass over all before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from opt_core import arguments
from opt_core.config import OPTConfig
from opt_core.generation import GenerationConfig, Hypothesis, Strategy
from opt_core.reference.beams import Searched, search
from opt_core.reference.constrained import constrained
from opt_core.reference.contrastive import contrastive
from opt_core.reference.inputs import Floats, Ints
from opt_core.reference.model import Weights
from opt_core.reference.setup import Call, Run, settle
from opt_core.reference.steps import Step, plain

_WITH_BEAMS = (Strategy.BEAMS, Strategy.CONSTRAINED)

#: What `is_sure` changes weights by.
DISTURBANCE = 1e-5


class Generated(NamedTuple):
    """The tokens, and how sure each choice was."""

    #: int64 [B, P + n]: the prompt, then n tokens, n at most `max_new_tokens`.
    sequences: Ints
    #: float64 [B, n]: the smallest change that could have made the choice another one: of a score
    #: (greedy), of a probability or of a score at a cut (sampling), of a merit or of a probability
    #: at the cut (contrastive search); inf where a row was finished.
    margins: Floats


class Record(NamedTuple):
    """All that a generation says, for R sequences and X running texts: R, or B * K with beams."""

    #: int64 [R, P + n].
    sequences: Ints
    #: n times float64 [X, V]: what each token was chosen from; with beams log-probabilities after
    #: the rules, without the beam's sum. Rows that are finished hold what nobody reads.
    scores: tuple[Floats, ...]
    #: n times float64 [X, V]: what the model gave, before guidance and rules.
    logits: tuple[Floats, ...]
    #: float64 [R], with beams: sum / (number of new tokens ** length_penalty).
    sequences_scores: Floats | None = None
    #: int64 [R, n], with beams: the running text, of all X, that each new token followed; -1 after
    #: the last one.
    beam_indices: Ints | None = None


def generate(
    config: OPTConfig,
    weights: Weights,
    input_ids: Any,
    attention_mask: Any = None,
    generation: GenerationConfig | None = None,
    *,
    known: int | None = None,
    call: Call | None = None,
) -> Ints:
    """Continue every row by any strategy: `[B, P] int -> [R, P + n] int64`; see `record`."""
    return record(
        config, weights, input_ids, attention_mask, generation, known=known, call=call
    ).sequences


def record(
    config: OPTConfig,
    weights: Weights,
    input_ids: Any,
    attention_mask: Any = None,
    generation: GenerationConfig | None = None,
    *,
    known: int | None = None,
    call: Call | None = None,
) -> Record:
    """Continue every row by any strategy, and say from what: `[B, P] int -> [R, P + n] int64`.

    New tokens come after column P in every row, whichever side its padding is on; their positions
    continue from the row's real tokens, and the first is chosen from the scores at the last real
    one. So padding changes no row's tokens. Without a mask, `GenerationConfig.padding_id` is
    padding. A row that has ended is filled with `GenerationConfig.fill`; when all have, n ends.
    `num_return_sequences` stand next to each other, R = B times as many. Step i of sampled row r
    draws by `uniforms(seed, R, steps)[r, i]`. Ids from `known` on, those that a tokenizer of that
    length lacks, are never chosen.

    There is no cache: n tokens cost about n passes over the whole text, some 2 * n * (P + n) *
    parameters operations for each row and beam.

    Raises:
        ValueError: as `plan` and `forward`; scores that are NaN; nothing left to choose.
    """
    run = settle(config, weights, input_ids, attention_mask, generation, known, call or Call())
    if run.asked.strategy in _WITH_BEAMS:
        is_forced = run.asked.strategy is Strategy.CONSTRAINED
        return _of_beams(run, constrained(run) if is_forced else search(run))
    steps = list(_steps(run))
    return Record(
        _sequences(run, steps),
        tuple(step.scores for step in steps),
        tuple(step.logits for step in steps),
    )


def generate_with_margins(
    config: OPTConfig,
    weights: Weights,
    input_ids: Any,
    attention_mask: Any = None,
    generation: GenerationConfig | None = None,
    *,
    known: int | None = None,
    call: Call | None = None,
) -> Generated:
    """As `generate`, without beams, and how sure each choice was; for beams see `is_sure`.

    Raises:
        ValueError: as `record`; beams were asked for.
    """
    run = settle(config, weights, input_ids, attention_mask, generation, known, call or Call())
    steps = list(_steps(run))
    return Generated(_sequences(run, steps), np.stack([step.margins for step in steps], axis=1))


def stream(
    config: OPTConfig,
    weights: Weights,
    input_ids: Any,
    attention_mask: Any = None,
    generation: GenerationConfig | None = None,
    *,
    known: int | None = None,
    call: Call | None = None,
) -> Iterator[tuple[Ints, Floats]]:
    """As `generate_with_margins`, step by step: the tokens [R] and the margins [R] of each.

    Raises:
        ValueError: as `generate_with_margins`.
    """
    run = settle(config, weights, input_ids, attention_mask, generation, known, call or Call())
    return ((step.tokens, step.margins) for step in _steps(run))


def is_sure(
    config: OPTConfig,
    weights: Weights,
    input_ids: Any,
    attention_mask: Any = None,
    generation: GenerationConfig | None = None,
    *,
    known: int | None = None,
    call: Call | None = None,
    disturbances: int = 3,
) -> bool:
    """Whether the tokens are the same with every weight changed a little: no choice was close.

    Each time weights are multiplied by 1 + `DISTURBANCE` * (normal noise), which moves scores by
    far more than float32 rounding does. For every strategy; sampling needs a seed.
    """
    found = [
        generate(config, one, input_ids, attention_mask, generation, known=known, call=call)
        for one in [weights, *(disturbed(weights, seed) for seed in range(disturbances))]
    ]
    return all(np.array_equal(found[0], other) for other in found[1:])


def disturbed(weights: Weights, seed: int) -> dict[str, Floats]:
    """The weights, each multiplied by 1 + `DISTURBANCE` * (normal noise)."""
    noise = np.random.default_rng(seed)
    return {
        name: np.asarray(array, np.float64)
        * (1 + DISTURBANCE * noise.standard_normal(np.shape(array)))
        for name, array in weights.items()
    }


def _steps(run: Run) -> Iterator[Step]:
    """What the strategies without beams do. Drafts change no token, so nobody drafts here."""
    if run.asked.strategy in _WITH_BEAMS:
        raise arguments.beams_settle_late()
    if run.asked.strategy is Strategy.CONTRASTIVE:
        return contrastive(run)
    return plain(run.repeated(run.asked.num_return_sequences))


def _sequences(run: Run, steps: list[Step]) -> Ints:
    prompt = run.prompt.repeat(run.asked.num_return_sequences, axis=0)
    return np.concatenate([prompt, *(step.tokens[:, None] for step in steps)], axis=1)


def _of_beams(run: Run, searched: Searched) -> Record:
    """The found sequences as arrays; those that do not exist have no tokens and score -inf."""
    count, K = run.asked.num_return_sequences, run.asked.num_beams
    nothing = Hypothesis(-np.inf, [], [], True)
    found = [
        (text, one)
        for text, best in enumerate(searched.found)
        for one in best + [nothing] * (count - len(best))
    ]
    width = max(len(one.tokens) for _, one in found)

    def filled(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (width - len(values))

    sequences = [[*run.prompt[text], *filled(one.tokens, run.asked.fill)] for text, one in found]
    paths = [filled([text * K + beam for beam in one.path], -1) for text, one in found]
    return Record(
        np.array(sequences, np.int64),
        tuple(searched.scores),
        tuple(searched.logits),
        np.array([one.score for _, one in found]),
        np.array(paths, np.int64),
    )
