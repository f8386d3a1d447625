"""`generate`, `stream` and `warmup`: a call is settled, run by compiled programs, and recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from opt_core import arguments
from opt_core.generation import Call, GenerationConfig, Strategy, Streamer, check_chunk, receiver
from opt_core.outputs import GenerateOutput
from opt_flax.decoder import is_traced
from opt_flax.generation import assisted, beams, collecting, constrained, contrastive, decoding
from opt_flax.generation.collecting import Outcome
from opt_flax.generation.decoding import Asked, Begun, Program, Seen
from opt_flax.generation.setup import Run, settled

#: Where each strategy's `start`, `step` and `goes_on` are.
_ROOMS: Mapping[Strategy, ModuleType] = {
    Strategy.GREEDY: decoding,
    Strategy.SAMPLING: decoding,
    Strategy.BEAMS: beams,
    Strategy.CONTRASTIVE: contrastive,
    Strategy.ASSISTED: assisted,
}


class GenerationMixin:
    """`generate`, `stream` and `warmup` for a model over a module with `model.decoder`, a head."""

    generation_config: GenerationConfig

    def generate(
        self,
        input_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        prng_key: Any = None,
        trace: bool = True,
        params: Any = None,
        logits_processor: Sequence[Callable[..., Any]] | None = None,
        *,
        attention_mask: Any = None,
        past_key_values: Any = None,
        stopping_criteria: Sequence[Callable[..., Any]] | None = None,
        prefix_allowed_tokens_fn: Callable[..., Any] | None = None,
        assistant_model: Any = None,
        negative_prompt_ids: Any = None,
        negative_prompt_attention_mask: Any = None,
        streamer: Streamer | Callable[[Array], None] | None = None,
        tokenizer: Any = None,
        compiled: bool = True,
        **options: Any,
    ) -> Array | GenerateOutput:
        """Continue every row: `[B, P]` int -> `[R, P + n]` int32, the prompt included.

        Options are those of `GenerationConfig`; what is not given comes from `generation_config`,
        else from the model's own. Padding may be on either side and changes nothing. New tokens
        come after column P; a row that has ended is filled with the pad id. Without `input_ids`
        every text starts with the bos token. `params` stands for the model's own. `prng_key` stands
        for `seed`: its last two words, so that `jax.random.key(5)` is `seed=5`. `past_key_values`
        of an earlier call hold the first columns of `input_ids`, which are then not fed again.
        `streamer` is called with the tokens `[B]` of each step. With a `tokenizer`, ids that it
        does not know are never chosen; `stop_strings` need one. With `assistant_model`, or
        `prompt_lookup_num_tokens`, one pass settles several tokens, the same ones; rows then run
        one after the other. With `return_dict_in_generate` the result is a `GenerateOutput`.

        There are two programs, for the prompt and for all that follows. Their shapes are those of
        `Plan`, so they serve every text of about the same length and all values of the options.
        `trace=False`, or `compiled=False`, runs without them, for debuggers.

        A `logits_processor` is called as `(input_ids, scores, cur_len)` and returns `[n, V]`, a
        criterion likewise and returns a bool or `[n]`, `prefix_allowed_tokens_fn` as
        `(row, input_ids, cur_len)` and returns bool `[V]`, or a list of ids. Of beams a criterion
        gets all candidates, and the scores that each was chosen from. They get all columns, of
        which `cur_len` are settled, and become a part of the programs: define each once, since
        another function is another program. Those without `cur_len` get the settled columns alone.
        They run on the host between compiled steps, as do those that cannot be traced or return
        ids, and everything with `output_scores` or `output_logits`: slower, the same tokens. Drafts
        are left out where functions see several rows.

        Inside a program of the caller's own, which takes what is not collected and needs no host,
        n is always the most tokens asked for, every row counts as P tokens long when room is
        checked, draws need a `seed`, and from the first token on that would be chosen from NaN all
        are negative.

        Raises:
            ValueError: a bad option or prompt, no room for the tokens asked for (before anything
                is computed), or scores of which none can be chosen.
        """
        options |= _seeded(prng_key, options.get("seed"))
        call = Call(
            input_ids,
            generation_config,
            attention_mask,
            past_key_values,
            logits_processor,
            stopping_criteria,
            prefix_allowed_tokens_fn,
            assistant_model,
            negative_prompt_ids,
            negative_prompt_attention_mask,
            tokenizer,
        )
        run = _run(self, call, options, params)
        mode = _mode(run, compiled=compiled, traced=trace)
        if streamer is None:
            with mode:
                outcome = _outcome(run)
            return collecting.record(self, run, outcome)
        _check_stream(run)
        put, end = receiver(streamer, run.prompt, np.asarray)
        with mode:
            for left, columns in _chunks(run, 1):
                outcome = left
                for tokens in columns:
                    put(tokens)
        end()
        return collecting.record(self, run, outcome)

    def stream(
        self,
        input_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        prng_key: Any = None,
        params: Any = None,
        *,
        chunk: int = 1,
        **given: Any,
    ) -> Iterator[Array]:
        """As `generate`, but an iterator over the tokens `[B]` of each step.

        The other arguments are those of `generate`, but for a streamer. `chunk` steps are computed
        at once, and then yielded one by one.

        Raises:
            ValueError: as `generate`, or nothing can be streamed: beams settle at the end.
        """
        call = Call.taken(given, input_ids=input_ids, generation_config=generation_config)
        run = _run(self, call, given | _seeded(prng_key, given.get("seed")), params)
        _check_stream(run)
        check_chunk(chunk)
        return (tokens for _, columns in _chunks(run, chunk) for tokens in columns)

    def warmup(
        self,
        batch_size: int = 1,
        prompt_length: int = 8,
        *,
        streamer: Any = None,
        compiled: bool = True,
        trace: bool = True,
        prng_key: Any = None,
        params: Any = None,
        **given: Any,
    ) -> None:
        """Compile what `generate` needs for prompts of about this size.

        The other arguments are those of `generate`, too. With a `streamer`, which is not called, it
        is what a stream needs.
        """
        token = self.generation_config.bos_token_id or 0
        ids = np.full((batch_size, prompt_length), token, np.int32)
        given = {"attention_mask": np.ones_like(ids), **given, "input_ids": ids}
        call = Call.taken(given)
        run = _run(self, call, given | _seeded(prng_key, given.get("seed")), params)
        # Two choices run every program there is.
        end = min(run.plan.max_new_tokens, 2)
        last: Any = np.int32(run.plan.prompt_length + end)
        asked = run.asked._replace(end=last)
        run = run._replace(asked=asked, plan=run.plan._replace(max_new_tokens=end))
        with _mode(run, compiled=compiled, traced=trace):
            if streamer is None:
                _outcome(run)
                return
            _check_stream(run)
            for _ in _chunks(run, 1):
                pass


def _run(model: Any, call: Call, options: dict[str, Any], params: Any) -> Run:
    """A settled call, without drafts where functions see all rows, or every step is looked at."""
    run = settled(model, call, options, params)
    functions, asked = run.program.functions, run.generation
    sees_rows = functions.on_host or (functions.all and run.texts.rows > 1)
    if sees_rows or asked.output_scores or asked.output_logits:
        return assisted.plain(run)
    return run


@partial(jax.jit, static_argnums=0)
def _start(program: Program, params: Any, begun: Begun, asked: Asked) -> Any:
    return _ROOMS[program.strategy].start(program, params, begun, asked)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(program: Program, params: Any, state: Any, asked: Asked) -> Any:
    return _ROOMS[program.strategy].step(program, params, state, asked)


# A state is used up by its heir.
@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _loop(program: Program, params: Any, state: Any, asked: Asked, until: Array) -> Any:
    room = _ROOMS[program.strategy]
    return decoding.loop(
        lambda state: room.step(program, params, state, asked)[0],
        lambda state: room.goes_on(state, asked),
        state,
        until,
    )


@partial(jax.jit, static_argnums=0)
def _goes_on(program: Program, state: Any, asked: Asked) -> Array:
    going: Array = _ROOMS[program.strategy].goes_on(state, asked)
    return going


def _outcome(run: Run) -> Outcome:
    """What a whole generation leaves behind."""
    if run.program.functions.on_host:
        run.check_outside("a function that cannot be traced")
    if run.program.strategy is Strategy.CONSTRAINED:
        run.check_outside("a search for forced words")
        return constrained.search(run)
    asked = run.generation
    if run.program.functions.on_host or asked.output_scores or asked.output_logits:
        run.check_outside("what is collected")
        return _collected(run)
    if run.program.strategy is Strategy.ASSISTED:
        run.check_outside("assisted decoding")
        rows = [_finished(assisted.row(run, place)) for place in range(run.texts.rows)]
        for place, state in enumerate(rows):
            collecting.check(assisted.row(run, place), state.tokens)
        return collecting.of_rows(rows, ())
    return _of(run, _finished(run), ())


def _finished(run: Run) -> Any:
    state, _ = _start(run.program, run.params, run.begun, run.asked)
    return _loop(run.program, run.params, state, run.asked, run.asked.end)


def _collected(run: Run) -> Outcome:
    """Step by step: what every token was chosen from, and functions on the host."""
    states = _steps(run)
    state, one = next(states)
    seen = [one]
    for after, found in states:
        state, seen = after, [*seen, found]
    return _of(run, state, tuple(found for found in seen if found is not None))


def _steps(run: Run) -> Iterator[tuple[Any, Seen | None]]:
    """The state after every step, and what its tokens were chosen from."""
    room, on_host = _ROOMS[run.program.strategy], run.program.functions.on_host
    start, step = (room.start, room.step) if on_host else (_start, _step)
    state, seen = start(run.program, run.params, run.begun, run.asked)
    while True:
        collecting.check(run, state.tokens)
        yield state, seen
        if not bool(_goes_on(run.program, state, run.asked)):
            return
        state, seen = step(run.program, run.params, state, run.asked)


def _of(run: Run, state: Any, seen: tuple[Seen, ...]) -> Outcome:
    if run.program.strategy is Strategy.BEAMS:
        if not is_traced(state.tokens):
            collecting.check(run, state.tokens)
        return collecting.of_beams(run, state, seen)
    return collecting.of_rows([state], seen)


def _chunks(run: Run, chunk: int) -> Iterator[tuple[Outcome, list[Array]]]:
    """The tokens `[B]` of some steps after another, and what is left behind after them."""
    asked, count, seen = run.generation, run.plan.prompt_length, []
    collects = asked.output_scores or asked.output_logits
    if collects or run.program.functions.on_host:
        states: Iterator[tuple[Any, Seen | None]] = _steps(run)
    else:
        states = _strides(run, chunk)
    for state, one in states:
        if collects and one is not None:
            seen.append(one)
        tokens, end = np.asarray(state.tokens), int(state.length)
        columns = [jnp.asarray(tokens[:, column]) for column in range(count, end)]
        count = end
        yield collecting.of_rows([state], tuple(seen)), columns


def _strides(run: Run, chunk: int) -> Iterator[tuple[Any, None]]:
    """The state after every call of the loop, for so many steps each."""
    run = assisted.row(run, 0) if run.program.strategy is Strategy.ASSISTED else run
    program, params, asked = run.program, run.params, run.asked
    state, _ = _start(program, params, run.begun, asked)
    while True:
        collecting.check(run, state.tokens)
        yield state, None
        if not bool(_goes_on(program, state, asked)):
            return
        state = _loop(program, params, state, asked, state.length + chunk)


def _check_stream(run: Run) -> None:
    """Refuse to stream what is settled at the end."""
    run.check_outside("a stream")
    if run.program.strategy in (Strategy.BEAMS, Strategy.CONSTRAINED):
        raise arguments.beams_settle_late()
    if run.program.strategy is Strategy.ASSISTED and run.texts.rows > 1:
        raise arguments.one_row_at_a_time(run.texts.rows)


def _mode(run: Run, *, compiled: Any, traced: bool) -> AbstractContextManager[Any]:
    """With or without programs."""
    if compiled not in (True, False):
        raise ValueError(f"compiled is {compiled!r}; it must be True or False")
    if compiled and traced:
        return nullcontext()
    run.check_outside("a run without programs")
    return jax.disable_jit()


def _seeded(prng_key: Any, seed: Any) -> dict[str, int]:
    """The seed that a key of `jax.random` stands for, as an option; nothing without a key.

    Raises:
        ValueError: a seed was given too, it is not one key, or its value is not known.
    """
    if prng_key is None:
        return {}
    if seed is not None:
        raise ValueError("give either prng_key or seed; found both")
    if is_traced(prng_key):
        raise ValueError(
            "prng_key is not known inside a compiled program; give a seed, or call generate "
            "outside of jax.jit"
        )
    is_typed = jnp.issubdtype(prng_key.dtype, jax.dtypes.prng_key)
    words = np.asarray(jax.random.key_data(prng_key) if is_typed else prng_key)
    if words.ndim != 1 or words.dtype != np.uint32 or len(words) < 2:
        raise ValueError(f"prng_key is {words.dtype} {words.shape}; give one key of jax.random")
    return {"seed": int(words[-2]) << 32 | int(words[-1])}
