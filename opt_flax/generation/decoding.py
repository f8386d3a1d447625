"""`generate` and `stream`: prefill, then the loop of steps and choices as one program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

from opt_core import arguments
from opt_core.config import OPTConfig
from opt_core.generation import GenerationConfig, Plan, Streamer, plan, receiver
from opt_core.outputs import GenerateOutput
from opt_flax.attention import Visible, choose
from opt_flax.decoder import Cache, is_traced, positions_of
from opt_flax.generation.rules import (
    NO_TOKEN,
    Asked,
    State,
    choice,
    goes_on,
    newest,
    seeded,
    voided,
)
from opt_flax.models.inputs import checked_ids, parts_of, told


class GenerationMixin:
    """`generate` and `stream` for a model over a module with `model.decoder` and a head."""

    generation_config: GenerationConfig

    def generate(
        self,
        input_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        prng_key: Any = None,
        trace: bool = True,
        params: Any = None,
        logits_processor: Any = None,
        *,
        attention_mask: Any = None,
        streamer: Streamer | Callable[[Array], None] | None = None,
        tokenizer: Sized | None = None,
        compiled: bool = True,
        **options: Any,
    ) -> Array | GenerateOutput:
        """Continue every row: `[B, P]` int -> `[B, P + n]` int32, the prompt included.

        Options are those of `GenerationConfig`; what is not given comes from `generation_config`,
        else from the model's own. Padding may be on either side and changes nothing. New tokens
        come after column P; a row that has chosen a stop token is filled with the pad id. Without
        `input_ids` every text starts with the bos token. `params` stands for the model's own.
        `prng_key` stands for `seed`: its last two words, so that `jax.random.key(5)` is `seed=5`.
        `streamer` is called with the tokens `[B]` of each step. With a `tokenizer`, ids that it
        does not know are never chosen. With `return_dict_in_generate` the result is a record with
        `sequences` and `past_key_values`.

        There are two programs, for the prompt and for all that follows. Their shapes are those of
        `Plan`, so they serve every text of about the same length and all values of the options.
        `trace=False`, or `compiled=False`, runs without them, for debuggers.

        Inside a program of the caller's own, n is always the most tokens asked for, every row
        counts as P tokens long when room is checked, draws need a `seed`, and from the first token
        on that would be chosen from NaN all are -1.

        Raises:
            ValueError: a bad option or prompt, no room for the tokens asked for (before anything
                is computed), or scores that are NaN.
        """
        options |= {} if logits_processor is None else {"logits_processor": logits_processor}
        options |= seeded(prng_key, options.get("seed"))
        run = _Run.of(
            self, input_ids, attention_mask, generation_config, tokenizer, params, options
        )
        run = run if compiled is True and trace is True else run.without_programs(compiled)
        if streamer is None:
            return run.result(run.finished())
        put, end = receiver(streamer, run.asked_prompt, np.asarray)
        for state in run.states():
            put(_newest(state))
        end()
        return run.result(state)

    def stream(
        self,
        input_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        prng_key: Any = None,
        params: Any = None,
        *,
        attention_mask: Any = None,
        tokenizer: Sized | None = None,
        **options: Any,
    ) -> Iterator[Array]:
        """As `generate`, but an iterator over the tokens `[B]` of each step."""
        options |= seeded(prng_key, options.get("seed"))
        run = _Run.of(
            self, input_ids, attention_mask, generation_config, tokenizer, params, options
        )
        return map(_newest, run.states())


@dataclass(frozen=True)
class Program:
    """What programs are compiled for besides shapes; equal where the same ones serve."""

    module: nn.Module = field(compare=False)
    #: What the module is made of. It stands for the module itself, which has no hash.
    parts: tuple[Any, ...]
    capacity: int
    prompt_room: int
    samples: bool
    keeps_cache: bool


class _Run(NamedTuple):
    """One generation: everything that is settled before the first pass."""

    program: Program
    params: Any
    generation: GenerationConfig
    plan: Plan
    prompt: Any  # int32 [B, P]
    shown: Any  # bool [B, P]
    asked: Asked
    asked_prompt: Any  # as given
    is_compiled: bool = True

    @classmethod
    def of(
        cls,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        generation: GenerationConfig | None,
        tokenizer: Sized | None,
        params: Any,
        options: dict[str, Any],
    ) -> _Run:
        config = model.config
        merged = (generation or model.generation_config).merged(**options)
        params = model.params if params is None else params
        prompt = _prompt(config, input_ids, merged)
        shown = _shown(prompt, attention_mask, merged.padding_id)
        B, P = prompt.shape
        lengths = [P] * B if is_traced(shown) else shown.sum(1).tolist()
        planned = plan(merged, config, prompt_length=P, row_lengths=lengths)
        room = planned.prompt_room if merged.use_cache else planned.capacity
        module, samples = model.module, merged.do_sample
        key = (parts_of(module), planned.capacity, room, samples, merged.use_cache)
        program = Program(module, *key)
        copies = merged.num_return_sequences
        known = config.vocab_size if tokenizer is None else len(tokenizer)
        asked = Asked.of(
            merged, planned, rows=B * copies, vocab_size=config.vocab_size, known=known
        )
        if copies > 1:
            library: Any = jnp if is_traced(prompt) or is_traced(shown) else np
            prompt, shown = (library.repeat(x, copies, axis=0) for x in (prompt, shown))
        run = cls(program, params, merged, planned, prompt, shown, asked, input_ids)
        if run.is_traced and merged.do_sample and merged.seed is None:
            raise ValueError(
                "inside a compiled program fresh entropy would be the same at every call; "
                "give a seed, or call generate outside of jax.jit"
            )
        return run

    @property
    def is_traced(self) -> bool:
        """Whether a program of the caller's own is being compiled."""
        return any(map(is_traced, (self.prompt, self.shown, *jax.tree.leaves(self.params))))

    def without_programs(self, compiled: Any) -> _Run:
        """The same run step by step."""
        if compiled not in (True, False):
            raise ValueError(f"compiled is {compiled!r}; it must be True or False")
        self.check_outside("a run without programs")
        return self._replace(is_compiled=False)

    def check_outside(self, what: str) -> None:
        """Refuse what cannot be a part of a program of the caller's own."""
        if self.is_traced:
            raise ValueError(f"{what} needs values as they come; call it outside of jax.jit")

    def finished(self) -> Any:
        """The state after the last choice."""
        with self._mode():
            return _loop(self.program, self.params, self._start(), self.asked)

    def states(self) -> Iterator[State]:
        """The state after each choice; it is used up by the next."""
        self.check_outside("a stream")
        with self._mode():
            state = self._start()
        while True:
            self.check(state)
            yield state
            if not bool(_goes_on(state, self.asked)):
                return
            with self._mode():
                state = _step(self.program, self.params, state, self.asked)

    def result(self, state: State) -> Array | GenerateOutput:
        """What `generate` returns."""
        self.check(state)
        if is_traced(state.tokens):
            tokens = state.tokens[:, : self.plan.prompt_length + self.plan.max_new_tokens]
        else:
            # By way of the host: a slice on the device is a program for each length.
            tokens = jax.device_put(np.asarray(state.tokens)[:, : int(state.length)])
        if not self.generation.return_dict_in_generate:
            return tokens
        cache = state.cache if self.program.keeps_cache else None
        return GenerateOutput(sequences=tokens, past_key_values=cache)

    def check(self, state: State) -> None:
        """Refuse tokens that were not chosen from numbers."""
        if not is_traced(state.tokens) and (np.asarray(_newest(state)) == NO_TOKEN).any():
            raise arguments.nan_scores(int(state.length) - 1)

    def _start(self) -> State:
        room = self.program.prompt_room - self.plan.prompt_length
        library: Any = jnp if is_traced(self.prompt) or is_traced(self.shown) else np
        prompt, shown = (library.pad(x, ((0, 0), (0, room))) for x in (self.prompt, self.shown))
        state: State = _prefill(self.program, self.params, prompt, shown, self.asked)
        return state

    def _mode(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.is_compiled else jax.disable_jit()


def prefill(program: Program, params: Any, prompt: Array, shown: Array, asked: Asked) -> State:
    """The state after the first choice: int and bool `[B, room]`, the prompt and what is real."""
    B, room = prompt.shape
    S, first = program.capacity, asked.first
    columns = jnp.arange(S, dtype=jnp.int32)[None]
    widths = ((0, 0), (0, S - room))
    cache = Cache((), (), jnp.int32(0))
    if program.keeps_cache:
        module: Any = program.module
        cache = Cache.empty(module.config, B, S, module.dtype)
    state = State(
        tokens=jnp.where(columns < first, jnp.pad(prompt, widths), asked.fill),
        length=first,
        finished=jnp.zeros(B, bool),
        positions=shown.sum(1, dtype=jnp.int32),
        mask=jnp.pad(shown, widths),
        cache=cache,
    )
    state, scores = _whole_pass(program, params, state, room)
    return select(program, state, scores, asked)


def step(program: Program, params: Any, state: State, asked: Asked) -> State:
    """Feed every row's newest token, and choose the next."""
    if not program.keeps_cache:
        state, scores = _whole_pass(program, params, state, program.capacity)
        return select(program, state, scores, asked)
    visible = Visible(state.cache.length, 1, program.capacity, state.mask)
    ids, positions = newest(state)[:, None], state.positions[:, None]  # [B, 1] twice
    hidden, cache = _decode(program, params, visible, ids, positions, state.cache)
    scores = _scores(program, params, hidden[:, -1])
    assert cache is not None
    state = state._replace(cache=cache, positions=state.positions + 1)
    return select(program, state, scores, asked)


def loop(program: Program, params: Any, state: State, asked: Asked) -> State:
    """All steps, until every row is finished or as long as it may get."""

    def body(state: State) -> State:
        return step(program, params, state, asked)

    goes = partial(goes_on, asked=asked)
    return voided(_flat(lambda state: lax.while_loop(goes, body, state), state))


def one(program: Program, params: Any, state: State, asked: Asked) -> State:
    """A single step, as streams take them."""
    return _flat(lambda state: step(program, params, state, asked), state)


def _flat(run: Callable[[State], State], state: State) -> State:
    """Run with a cache of `[B * H, S, D]` buffers where XLA's CPU compiler wants them.

    It computes products over one axis of rows; of buffers with two it makes copies in each step.
    """
    B, cache = len(state.tokens), state.cache
    if jax.default_backend() != "cpu" or not len(cache):
        return run(state)
    state = run(state._replace(cache=cache.reshaped(-1)))
    return state._replace(cache=state.cache.reshaped(B, -1))


def select(program: Program, state: State, scores: Array, asked: Asked) -> State:
    """Choose the token of every row from its scores `[B, V]`, and note it."""
    chosen = choice(scores, state, asked, samples=program.samples)
    write = partial(lax.dynamic_update_index_in_dim, index=state.length, axis=1)
    return state._replace(
        tokens=write(state.tokens, chosen),
        mask=write(state.mask, jnp.ones_like(chosen, bool)),
        finished=state.finished | (chosen[:, None] == asked.stops[None]).any(1),
        length=state.length + 1,
    )


# Compiled once for each `Program` and shape, whichever model asks; a state is used up by its heir.
_prefill = jax.jit(prefill, static_argnums=0)
_step = jax.jit(one, static_argnums=0, donate_argnums=2)
_loop = jax.jit(loop, static_argnums=0, donate_argnums=2)
_goes_on, _newest = jax.jit(goes_on), jax.jit(newest)


def _whole_pass(program: Program, params: Any, state: State, room: int) -> tuple[State, Array]:
    """Feed all columns so far, and score what follows each row's last real token: `[B, V]`.

    The columns up to `room` are fed; those that are not settled yet are hidden.
    """
    ids, shown = state.tokens[:, :room], state.mask[:, :room]
    cache = state.cache if program.keeps_cache else None
    visible, positions = Visible(0, room, room, shown), positions_of(shown, room)
    hidden, cache = _decode(program, params, visible, ids, positions, cache)
    places = jnp.arange(room, dtype=jnp.int32)[None]
    last = jnp.where(shown, places, 0).max(1)[:, None, None]  # [B, 1, 1]
    scores = _scores(program, params, jnp.take_along_axis(hidden, last, axis=1)[:, 0])
    # A row without any token has no last one; where Python could look it was refused.
    scores = jnp.where(shown.any(1, keepdims=True), scores, jnp.nan)
    if cache is not None:
        # The next token goes to the column after the prompt, over what was hidden there.
        state = state._replace(cache=Cache(cache.keys, cache.values, state.length))
    return state, scores


def _decode(
    program: Program,
    params: Any,
    visible: Visible,
    ids: Array,
    positions: Array,
    cache: Cache | None,
) -> tuple[Array, Cache | None]:
    """`[B, T]` ids that follow the cache -> `[B, T, E]`, and the cache that holds them."""

    def decode(module: Any) -> tuple[Array, Cache | None]:
        decoder = module.model.decoder
        attend = choose(
            module.attn_implementation,
            visible,
            dropout=0.0,
            weights=False,
            dtype=module.dtype,
            platform=jax.default_backend(),
        )
        nothing = (None,) * module.config.num_hidden_layers
        out = decoder(decoder.embed_tokens(ids), positions, attend, cache, nothing, False, True)
        return out.last, out.cache

    out: Any = program.module.apply({"params": params}, method=decode)
    return out[0], out[1]


def _scores(program: Program, params: Any, last: Array) -> Array:
    """`[B, E]` hidden states of the last tokens -> `[B, V]`."""

    def head(module: Any) -> Any:
        tied = module.config.tie_word_embeddings
        table = module.model.decoder.embed_tokens.embedding if tied else None
        return module.lm_head(last, table)

    scores: Any = program.module.apply({"params": params}, method=head)
    return jnp.asarray(scores)


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
    return mask != 0
