"""What is settled before the first pass: prompt and masks, lengths, numbers, functions."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opt_core import arguments
from opt_core.config import OPTConfig
from opt_core.generation import (
    Call,
    GenerationConfig,
    Plan,
    StopTable,
    Strategy,
    bucket,
    check_goes_on,
    given,
    plan,
    prompt_room,
    uniforms,
)
from opt_flax.attention import wide
from opt_flax.decoder import Cache, is_traced
from opt_flax.generation.cuts import parts
from opt_flax.generation.decoding import Asked, Begun, Program
from opt_flax.generation.rules import Functions, functions_of
from opt_flax.models.inputs import checked_ids, parts_of, told

#: Lists of stop tokens are rounded up to multiples of this, so that programs are reused.
_STOPS = 8
#: Numbers as programs take them.
REAL: Any = np.float32
WHOLE: Any = np.int32
#: `early_stopping` as a number; 3 for `waits_for_batch`.
_EARLY: dict[Any, int] = {None: 0, False: 0, True: 1, "never": 2}


class Run(NamedTuple):
    """One generation: everything that is settled before the first pass."""

    program: Program
    params: Any
    generation: GenerationConfig
    plan: Plan
    begun: Begun
    asked: Asked
    texts: Texts

    @property
    def is_traced(self) -> bool:
        """Whether a program of the caller's own is being compiled."""
        return any(map(is_traced, jax.tree.leaves((self.texts[:3], self.params))))

    @property
    def prompt(self) -> Any:
        """The prompts as given, one for each row that is chosen for: `[B, P]`."""
        return self.texts.ids[: self.texts.rows, self.texts.widened :]

    def check_outside(self, what: str) -> None:
        """Refuse what cannot be a part of a program of the caller's own."""
        if self.is_traced:
            raise ValueError(f"{what} needs values as they come; call it outside of jax.jit")

    @property
    def model_params(self) -> Any:
        """The parameters of the model alone."""
        return self.params if self.program.assistant is None else self.params[0]


class Texts(NamedTuple):
    """The prompts of the R rows that are fed, on the host where their values are known."""

    ids: Any  # int32 [R, P]
    shown: Any  # bool [R, P]
    past: Cache | None
    #: How many rows are chosen for, and how many columns were put before the prompt.
    rows: int
    widened: int = 0

    @property
    def library(self) -> Any:
        """`numpy` where values are known, else `jax.numpy`."""
        return jnp if is_traced(self.ids) or is_traced(self.shown) else np

    @property
    def held(self) -> int:
        """How many columns lie in a cache already."""
        return 0 if self.past is None else int(self.past.length)

    def compact(self) -> Any:
        """The real tokens of the first B rows, moved up to the last column: int32 `[B, P]`."""
        library, ids, shown = self.library, self.ids[: self.rows], self.shown[: self.rows]
        order = library.argsort(shown, axis=1, stable=True)
        columns = library.arange(ids.shape[1])[None]
        missing = columns < ids.shape[1] - shown.sum(1)[:, None]
        return library.where(missing, -1, library.take_along_axis(ids, order, axis=1))

    def filled(self, width: int, fill: int) -> Any:
        """All rows as given, filled up: int32 `[R, W]`."""
        rest = ((0, 0), (0, width - self.ids.shape[1]))
        return self.library.pad(self.ids, rest, constant_values=fill)

    def repeated(self, copies: int) -> Texts:
        """Every row several times, side by side."""
        if copies == 1:
            return self
        rows = np.repeat(np.arange(self.rows), copies)
        past = None if self.past is None else self.past.rows(rows)
        ids, shown = (self.library.repeat(x, copies, axis=0) for x in self[:2])
        return Texts(ids, shown, past, self.rows * copies)

    def guided(self, others: Texts | None) -> Texts:
        """With rows of the same texts without their prompt, or with a negative one in its place."""
        if others is None:
            last = self.compact()[:, -1:]
            others = Texts(last, last >= 0, None, self.rows)
        library = jnp if jnp in (self.library, others.library) else np
        width = max(self.ids.shape[1], others.ids.shape[1])

        def joined(*values: Any) -> Any:
            wide = (library.pad(x, ((0, 0), (width - x.shape[1], 0))) for x in values)
            return library.concatenate(list(wide))

        ids, shown = joined(self.ids, others.ids), joined(self.shown, others.shown)
        return self._replace(ids=ids, shown=shown, widened=width - self.ids.shape[1])


def settled(model: Any, call: Call, options: dict[str, Any], params: Any = None) -> Run:
    """Check and settle a call; `params` stand for those of the model.

    Raises:
        ValueError: a bad option or prompt, or no room for the tokens asked for.
    """
    config: OPTConfig = model.config
    asked = call.settled(model.generation_config, options)
    params = model.params if params is None else params
    strategy, drafts = call.strategy(asked, config.vocab_size), call.drafts(asked)
    texts = _texts(call, asked, config)
    planned = _planned(asked, config, texts, drafts)
    if asked.num_beams == 1:
        texts = texts.repeated(asked.num_return_sequences)
    if asked.is_guided:
        texts = _with_guidance(call, asked, config, texts)
        planned = _planned(asked, config, texts, drafts)
    program = _program(model, asked, planned, strategy, drafts)
    program = replace(program, functions=_functions(call, texts.rows, program, config))
    if call.assistant_model is not None:
        module = call.assistant_model.module
        program = program.assisted(module, parts_of(module))
        params = (params, call.assistant_model.params)
    table = call.stop_table(asked, config.vocab_size)
    numbers = _asked(asked, planned, config, program, texts, call.known_tokens(config.vocab_size))
    if table is not None:
        after: Any = table.after
        numbers = numbers._replace(table=after)
    begun = _begun(asked, planned, texts, table)
    if program.assistant is not None:
        begun = begun._replace(whole=_whole(begun, planned))
    run = Run(program, params, asked, planned, begun, numbers, texts)
    if run.is_traced and asked.do_sample and asked.seed is None:
        raise ValueError(
            "inside a compiled program fresh entropy would be the same at every call; "
            "give a seed, or call generate outside of jax.jit"
        )
    return run


def _texts(call: Call, asked: GenerationConfig, config: OPTConfig) -> Texts:
    ids = _prompt(config, call.input_ids, asked)
    shown = _shown(ids, call.attention_mask, asked.padding_id)
    past = Cache.of(call.past_key_values, config.num_hidden_layers)
    if past is not None:
        if is_traced(past.length):
            raise ValueError(
                "past_key_values of a program that is being compiled have no known length; "
                "call generate outside of jax.jit"
            )
        held = int(past.length)
        arguments.check_past(held, len(past.keys[0]), tuple(ids.shape))
        check_goes_on(asked)
        if not is_traced(shown) and not (real := shown[:, held:].any(1)).all():
            raise arguments.past_holds_row(int(real.argmin()))
        past = past if held else None
    return Texts(ids, shown, past, len(ids))


def _with_guidance(call: Call, asked: GenerationConfig, config: OPTConfig, texts: Texts) -> Texts:
    if call.negative_prompt_ids is None:
        return texts.guided(None)
    ids = _prompt(config, call.negative_prompt_ids, asked)
    copies = asked.num_return_sequences if asked.num_beams == 1 else 1
    arguments.check_negative_prompt(tuple(ids.shape), texts.rows // copies)
    shown = _shown(ids, call.negative_prompt_attention_mask, asked.padding_id)
    return texts.guided(Texts(ids, shown, None, len(ids)).repeated(copies))


def _planned(asked: GenerationConfig, config: OPTConfig, texts: Texts, drafts: int) -> Plan:
    rows, P = texts.ids.shape
    lengths = [P] * rows if is_traced(texts.shown) else texts.shown.sum(1).tolist()
    if texts.widened:
        # Lengths that count columns do not count those that guidance has put before them.
        asked = copy.copy(asked)
        for name in ("max_length", "min_length"):
            if (length := getattr(asked, name)) is not None:
                setattr(asked, name, length + texts.widened)
    planned = plan(asked, config, prompt_length=P, row_lengths=lengths, drafts=drafts)
    if not asked.use_cache:
        return planned._replace(prompt_room=planned.width)
    if texts.held:
        # The same few sizes for what is left to feed, and room for it behind what is held.
        room = prompt_room(P - texts.held)
        capacity = max(planned.capacity, bucket(texts.held + room))
        return planned._replace(capacity=capacity, prompt_room=room)
    return planned


def _program(
    model: Any, asked: GenerationConfig, planned: Plan, strategy: Strategy, drafts: int
) -> Program:
    beams, groups = asked.num_beams, asked.num_beam_groups
    candidates = asked.candidates if beams > 1 else 0
    if strategy is Strategy.CONTRASTIVE:
        candidates = min(asked.candidates, model.config.vocab_size)
    return Program(
        model.module,
        parts_of(model.module),
        strategy,
        planned.width,
        planned.capacity,
        asked.do_sample,
        asked.use_cache,
        beams,
        groups,
        candidates,
        drafts,
        asked.num_return_sequences if beams > 1 else 1,
    )


def _functions(call: Call, rows: int, program: Program, config: OPTConfig) -> Functions:
    shape = (rows * (program.beams // program.groups), config.vocab_size)
    return functions_of(
        call.prefix_allowed_tokens_fn,
        call.logits_processor,
        call.stopping_criteria,
        scores=jax.ShapeDtypeStruct(shape, wide(program.module.dtype)),
        texts=rows * (program.candidates if program.beams > 1 else 1),
        width=program.width,
    )


def _asked(
    asked: GenerationConfig,
    planned: Plan,
    config: OPTConfig,
    program: Program,
    texts: Texts,
    known: int,
) -> Asked:
    V, P = config.vocab_size, planned.prompt_length
    stops: Any = np.full(max(1, -(-len(asked.stops) // _STOPS)) * _STOPS, V, np.int32)
    stops[: len(asked.stops)] = asked.stops
    numbers = given(asked, planned, vocab_size=V, known=known)
    wanted = not program.keeps_cache or bool(program.functions.all)
    result = Asked(
        stops=stops,
        fill=WHOLE(asked.fill),
        first=WHOLE(P),
        end=WHOLE(P + planned.max_new_tokens),
        row=WHOLE(0),
        given={name: tuple(map(_narrow, arrays)) for name, arrays in numbers.items()},
        uniforms=_drawn(asked, planned, texts.rows, program) if asked.do_sample else None,
        guidance=REAL(asked.guidance_scale) if asked.is_guided else None,
        prompt=texts.filled(planned.width, asked.fill) if wanted else None,
        alpha=REAL(asked.penalty_alpha) if asked.penalty_alpha else None,
    )
    if asked.num_beams > 1:
        early = WHOLE(3 if asked.waits_for_batch else _EARLY[asked.early_stopping])
        result = result._replace(ranking=(early, REAL(asked.length_penalty)))
    if asked.prompt_lookup_num_tokens and program.assistant is None:
        result = result._replace(matching=WHOLE(asked.max_matching_ngram_size or 2))
    return result


def _drawn(asked: GenerationConfig, planned: Plan, rows: int, program: Program) -> Any:
    """float32 `[rows, W, draws, 2]`."""
    draws = program.candidates if program.beams > 1 else 1
    result = np.zeros((rows, planned.width, draws, 2), np.float32)
    numbers = uniforms(asked.seed, rows, planned.max_new_tokens, draws)
    result[:, : planned.max_new_tokens] = parts(numbers)
    return result


def _begun(asked: GenerationConfig, planned: Plan, texts: Texts, table: StopTable | None) -> Begun:
    library, held, P = texts.library, texts.held, planned.prompt_length
    tokens = texts.compact()
    matched = np.zeros(texts.rows, np.int32)
    if table is not None:
        if library is jnp:
            raise ValueError("stop_strings need the prompt's values; call it outside of jax.jit")
        matched[:] = [table.start(row[row >= 0].tolist()) for row in tokens]
    ids = texts.ids[:, held:]
    rest = ((0, 0), (0, max(0, planned.prompt_room - ids.shape[1])))
    behind = ((0, 0), (0, planned.width - P))
    return Begun(
        ids=library.pad(ids, rest),
        shown=library.pad(texts.shown, ((0, 0), (0, planned.capacity - P))),
        tokens=library.pad(tokens, behind, constant_values=asked.fill).astype(np.int32),
        matched=matched,
        past=texts.past,
    )


def _whole(begun: Begun, planned: Plan) -> Any:
    """The prompts without their padding, which an assistant is fed whatever a cache holds."""
    ids = begun.tokens[:, : planned.prompt_length]
    library = jnp if is_traced(ids) else np
    room = prompt_room(planned.prompt_length)
    return library.pad(library.maximum(ids, 0), ((0, 0), (0, room - planned.prompt_length)))


def _prompt(config: OPTConfig, input_ids: Any, generation: GenerationConfig) -> Any:
    """int32 `[B, P]`, on the host where its values are known."""
    if input_ids is None:
        if generation.bos_token_id is None:
            raise arguments.missing_prompt()
        return np.array([[generation.bos_token_id]], np.int32)
    ids = input_ids if is_traced(input_ids) else np.asarray(input_ids)
    arguments.check_prompt(told(ids))
    return checked_ids(config, ids).astype(np.int32)


def _shown(prompt: Any, mask: Any, padding: int | None) -> Any:
    """Bool `[B, P]`, where real tokens are."""
    if mask is None:
        return prompt == prompt if padding is None else prompt != padding
    mask = mask if is_traced(mask) else np.asarray(mask)
    arguments.check_prompt_mask(tuple(mask.shape), tuple(prompt.shape))
    if not is_traced(mask) and not np.isin(mask, (0, 1)).all():
        raise arguments.unknown_mask_values()
    return mask != 0


def _narrow(array: Any) -> Any:
    with np.errstate(over="ignore"):
        return array.astype(np.float32) if array.dtype == np.float64 else array
