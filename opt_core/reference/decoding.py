"""Greedy and sampled decoding by the reference: every token costs one pass over all before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from opt_core.config import OPTConfig
from opt_core.generation import GenerationConfig, Plan, plan, uniforms
from opt_core.reference import rules
from opt_core.reference.heads import output_embedding
from opt_core.reference.inputs import Floats, Ints, Mask, token_ids, visible
from opt_core.reference.model import Weights, forward


class Generated(NamedTuple):
    """The tokens, and how sure each choice was."""

    #: int64 [B, P + n]: the prompt, then n tokens, n at most `max_new_tokens`.
    sequences: Ints
    #: float64 [B, n]: the smallest change that could have made the choice another one: of a score
    #: (greedy), of a probability or of a score at a cut (sampling); inf where a row was finished.
    margins: Floats


def generate(
    config: OPTConfig,
    weights: Weights,
    input_ids: Any,
    attention_mask: Any = None,
    generation: GenerationConfig | None = None,
) -> Ints:
    """Continue every row: `[B, P] int -> [B, P + n] int64`; see `generate_with_margins`."""
    return generate_with_margins(config, weights, input_ids, attention_mask, generation).sequences


def generate_with_margins(
    config: OPTConfig,
    weights: Weights,
    input_ids: Any,
    attention_mask: Any = None,
    generation: GenerationConfig | None = None,
) -> Generated:
    """Continue every row by the likeliest token, or by draws: `[B, P] int -> [B, P + n]`.

    New tokens come after column P in every row, whichever side its padding is on; their positions
    continue from the row's real tokens, and the first is chosen from the scores at the last real
    one. So padding changes no row's tokens. Without a mask, `GenerationConfig.padding_id` is
    padding. A row that has chosen a stop token is filled with `GenerationConfig.fill`; when all
    have, n ends. `num_return_sequences` repeats each row in place. Step i of row r draws by
    `uniforms(seed, rows, steps)[r, i]`. The repetition penalty counts real tokens only.

    There is no cache: n tokens cost about n passes over the whole text, some 2 * n * (P + n) *
    parameters operations for each row.

    Raises:
        ValueError: as `plan` and `forward`; scores that are NaN.
    """
    generation = generation or GenerationConfig.from_model_config(config)
    chosen = list(stream(config, weights, input_ids, attention_mask, generation))
    prompt = token_ids(input_ids, config).repeat(generation.num_return_sequences, axis=0)
    columns = [tokens[:, None] for tokens, _ in chosen]
    margins = np.stack([margin for _, margin in chosen], axis=1)
    return Generated(np.concatenate([prompt, *columns], axis=1), margins)


def stream(
    config: OPTConfig,
    weights: Weights,
    input_ids: Any,
    attention_mask: Any = None,
    generation: GenerationConfig | None = None,
    *,
    known: int | None = None,
) -> Iterator[tuple[Ints, Floats]]:
    """As `generate_with_margins`, step by step: the tokens [B] and the margins [B] of each.

    Ids from `known` on, those that a tokenizer of that length lacks, are never chosen.

    Raises:
        ValueError: as `generate_with_margins`.
    """
    generation = generation or GenerationConfig.from_model_config(config)
    ids = token_ids(input_ids, config)  # [B, P]
    if attention_mask is None and generation.padding_id is not None:
        attention_mask = ids != generation.padding_id
    mask = visible(attention_mask, *ids.shape)
    lengths = [int(count) for count in mask.sum(axis=1)]
    run = plan(generation, config, prompt_length=ids.shape[1], row_lengths=lengths)
    ids = ids.repeat(generation.num_return_sequences, axis=0)
    mask = mask.repeat(generation.num_return_sequences, axis=0)
    doubles = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    unknown = range(config.vocab_size if known is None else known, config.vocab_size)
    yield from _steps(config, doubles, ids, mask, generation, run, unknown)


def _steps(
    config: OPTConfig,
    weights: Weights,
    ids: Ints,
    mask: Mask,
    generation: GenerationConfig,
    run: Plan,
    unknown: range,
) -> Iterator[tuple[Ints, Floats]]:
    rows = len(ids)
    uniform = uniforms(generation.seed, rows, run.max_new_tokens)[..., 0]  # [B, N]
    finished = np.zeros(rows, np.bool_)
    for step in range(run.max_new_tokens):
        scores, cut = rules.process(
            generation,
            rules.suppress(next_scores(config, weights, ids, mask), unknown),
            seen=seen_tokens(ids, mask, config.vocab_size),
            suppresses_stops=step < run.min_new_tokens,
        )
        if generation.do_sample:
            tokens, margin = rules.draw(scores, uniform[:, step])
        else:
            tokens, margin = rules.best(scores)
        tokens = np.where(finished, generation.fill, tokens)
        yield tokens, np.where(finished, np.inf, np.minimum(margin, cut))
        ids = np.concatenate([ids, tokens[:, None]], axis=1)
        mask = np.concatenate([mask, np.ones((rows, 1), np.bool_)], axis=1)
        finished = finished | np.isin(tokens, generation.stops)
        if finished.all():
            return


def next_scores(config: OPTConfig, weights: Weights, ids: Ints, mask: Mask) -> Floats:
    """The scores of the token after each row's last real one: `[B, T]` twice -> `[B, V]`.

    Raises:
        ValueError: a score is NaN; names the row.
    """
    passed = forward(config, weights, input_ids=ids, attention_mask=mask)
    last = (mask * np.arange(mask.shape[1])).max(axis=1)
    hidden = passed.last_hidden_state[np.arange(len(ids)), last]  # [B, E]
    scores = np.asarray(hidden @ output_embedding(config, weights).T)  # [B, V]
    broken = np.flatnonzero(np.isnan(scores).any(axis=1))
    if broken.size:
        raise ValueError(
            f"the scores of row {broken[0]} are NaN after {int(mask[broken[0]].sum())} tokens; "
            "do the weights hold NaN or inf?"
        )
    return scores


def seen_tokens(ids: Ints, mask: Mask, vocab_size: int) -> Mask:
    """Which tokens a row holds, padding left out: `[B, T]` twice -> bool `[B, V]`."""
    seen = np.zeros((len(ids), vocab_size), np.bool_)
    rows, places = np.nonzero(mask)
    seen[rows, ids[rows, places]] = True
    return seen
