"""`generate` and `stream`: a program for the prompt, and one that holds the whole loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow import Tensor

from opt_core import arguments
from opt_core.generation import GenerationConfig, Plan, Streamer, plan, receiver, uniforms
from opt_core.outputs import GenerateOutput
from opt_tf.attention import Visible, choose
from opt_tf.decoder import Cache, positions_of
from opt_tf.generation.rules import Rules, State, draw, held_back, ruled, without
from opt_tf.layers import check_ids


class GenerationMixin:
    """`generate` and `stream` for a model with a decoder and scores of its tokens."""

    generation_config: GenerationConfig

    def generate(
        self,
        input_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Any = None,
        streamer: Streamer | Callable[[Tensor], None] | None = None,
        tokenizer: Sized | None = None,
        compiled: bool = True,
        **options: Any,
    ) -> Tensor | GenerateOutput:
        """Continue every row: `[B, P]` int -> `[B, P + n]`, the prompt included.

        Options are those of `GenerationConfig`; what is not given comes from `generation_config`,
        else from the model's own. Padding may be on either side and changes nothing. New tokens
        come after column P; a row that has chosen a stop token is filled with the pad id. Without
        `input_ids` every text starts with the bos token. `streamer` is called with the tokens `[B]`
        of each step. With a `tokenizer`, ids that it does not know are never chosen. The shapes
        are those of `Plan`, so that XLA's programs serve every text of about the same length;
        `compiled=False` leaves XLA out, for debugging or a device without it. With
        `return_dict_in_generate` the result is a record with `sequences` and `past_key_values`.

        Raises:
            ValueError: a bad option or prompt, no room for the tokens asked for (before anything
                is computed), scores that are NaN, or a call inside `tf.function`.
        """
        run = _Run.of(
            self, input_ids, attention_mask, generation_config, tokenizer, compiled, options
        )
        if streamer is None:
            state = run.last()
        else:
            put, end = receiver(streamer, run.prompt, lambda tokens: tokens.numpy())
            for state in run.states():
                put(run.newest(state))
            end()
        sequences = tf.cast(state.tokens[:, : state.length], run.prompt.dtype)
        if run.generation.return_dict_in_generate:
            return GenerateOutput(sequences=sequences, past_key_values=state.cache.counted())
        return sequences

    def stream(
        self,
        input_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Any = None,
        tokenizer: Sized | None = None,
        compiled: bool = True,
        **options: Any,
    ) -> Iterator[Tensor]:
        """As `generate`, but an iterator over the tokens `[B]` of each step."""
        run = _Run.of(
            self, input_ids, attention_mask, generation_config, tokenizer, compiled, options
        )
        return map(run.newest, run.states())

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, **inputs: Any
    ) -> dict[str, Any]:
        """The arguments of the next call in a decoding loop of one's own."""
        if past_key_values is not None and len(past_key_values):
            input_ids = input_ids[:, past_key_values.get_seq_length() :]
        return {"input_ids": input_ids, "past_key_values": past_key_values, **inputs}


class _Run(NamedTuple):
    """One generation: everything that is settled before the first pass."""

    generation: GenerationConfig
    plan: Plan
    prompt: Tensor  # int [B, P]
    shown: NDArray[np.bool_]  # [B, P]
    rules: Rules
    uniforms: Tensor  # float64 [B, S], that of each column; zeros for a greedy choice
    compiled: bool
    programs: _Programs

    @classmethod
    def of(
        cls,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        generation: GenerationConfig | None,
        tokenizer: Sized | None,
        compiled: bool,
        options: dict[str, Any],
    ) -> _Run:
        if not tf.executing_eagerly():
            raise ValueError(
                "generate runs programs of its own, compiled by XLA unless compiled=False: call "
                "it outside tf.function"
            )
        config = model.config
        merged = (generation or model.generation_config).merged(**options)
        prompt = _prompt(input_ids, merged, config.vocab_size)
        shown = _shown(prompt, attention_mask, merged.padding_id)
        width = prompt.shape[1]
        lengths = shown.sum(1).tolist()
        planned = plan(merged, config, prompt_length=width, row_lengths=lengths)
        copies = merged.num_return_sequences
        prompt, shown = tf.repeat(prompt, copies, axis=0), shown.repeat(copies, axis=0)
        drawn = np.zeros((len(shown), planned.capacity))
        if merged.do_sample:
            numbers = uniforms(merged.seed, len(shown), planned.max_new_tokens)[..., 0]
            drawn[:, width : width + planned.max_new_tokens] = numbers
        known = config.vocab_size if tokenizer is None else len(tokenizer)
        rules = Rules.of(merged, planned, config.vocab_size, known)
        return cls(
            merged,
            planned,
            prompt,
            shown,
            rules,
            tf.constant(drawn),
            compiled,
            _Programs.of(model, compiled),
        )

    def first(self) -> State:
        """The state after the first choice."""
        B, P = self.shown.shape
        after = [[0, 0], [0, self.plan.capacity - P]]
        prompt = tf.cast(self.prompt, tf.int32)
        state = State(
            tokens=tf.pad(prompt, after, constant_values=self.generation.fill),
            length=tf.constant(P),
            finished=tf.zeros(B, tf.bool),
            positions=tf.constant(self.shown.sum(1), tf.int32),
            mask=tf.constant(np.pad(self.shown, after)),
            cache=Cache(),
        )
        room = self.plan.prompt_room if self.generation.use_cache else None
        fed = self.programs.prefill(state, room)
        return _sound(*_choice(self.compiled)(*fed, self.rules, self.uniforms))

    def until(self, state: State, length: int) -> State:
        """The state when `length` columns are settled, or every row is finished."""
        caches = self.generation.use_cache
        end = tf.constant(length)
        return _sound(*self.programs.go_on(state, self.rules, self.uniforms, end, caches))

    def last(self) -> State:
        """The state after the last choice."""
        state, count = self.first(), self.plan.max_new_tokens
        # One token needs no second program.
        return state if count == 1 else self.until(state, self.plan.prompt_length + count)

    def states(self) -> Iterator[State]:
        """The state after each choice."""
        state = self.first()
        yield state
        for count in range(1, self.plan.max_new_tokens):
            if bool(tf.reduce_all(state.finished)):
                return
            state = self.until(state, self.plan.prompt_length + count + 1)
            yield state

    def newest(self, state: State) -> Tensor:
        """The tokens `[B]` of the last choice."""
        return tf.cast(state.tokens[:, state.length - 1], self.prompt.dtype)


class _Programs(NamedTuple):
    """What is compiled for a model, once for each batch size and the widths of `Plan`."""

    prefill: Callable[..., tuple[State, Tensor]]
    go_on: Callable[..., tuple[State, Tensor]]
    weights: tuple[ref[Any], ...]  # the variables that they read

    @classmethod
    def of(cls, model: Any, compiled: bool) -> _Programs:
        """Those of the model as it is: other variables, as after pruning, need other programs."""
        weights = model.weights
        own = _PROGRAMS.setdefault(model, {})
        found = own.get(compiled)
        if found is None or not found._read(weights):
            found = own[compiled] = cls(
                prefill=_program(prefill, model, compiled),
                go_on=_program(go_on, model, compiled),
                weights=tuple(map(ref, weights)),
            )
        return found

    def _read(self, weights: Sequence[Any]) -> bool:
        read = [reference() for reference in self.weights]
        return len(read) == len(weights) and all(a is b for a, b in zip(read, weights, strict=True))


#: Beside the models, not in them: Keras saves, and TensorFlow exports, what a model holds.
_PROGRAMS: WeakKeyDictionary[Any, dict[bool, _Programs]] = WeakKeyDictionary()


def _program(function: Callable[..., Any], model: Any, compiled: bool) -> Callable[..., Any]:
    # Weak, since a program that held its model would keep it for ever.
    weak = ref(model)

    def run(*given: Any) -> Any:
        return function(weak(), *given)

    program: Callable[..., Any] = tf.function(run, jit_compile=compiled, autograph=False)
    return program


@lru_cache
def _choice(compiled: bool) -> Callable[..., tuple[State, Tensor]]:
    """The program of the first choice, which knows no model: those of one shape share it."""
    program: Callable[..., tuple[State, Tensor]]
    program = tf.function(select, jit_compile=compiled, autograph=False)
    return program


def _sound(state: State, is_broken: Tensor) -> State:
    if bool(is_broken):
        raise arguments.nan_scores(int(state.length) - 1)
    return state


def go_on(
    model: Any, state: State, rules: Rules, uniforms: Tensor, end: Tensor, caches: bool
) -> tuple[State, Tensor]:
    """Feed and choose until `end` columns are settled; the state, and the bool of `select`."""

    def is_asked(state: State, is_broken: Tensor) -> Tensor:
        return (state.length < end) & ~is_broken & ~tf.reduce_all(state.finished)

    def one_more(state: State, _: Tensor) -> tuple[State, Tensor]:
        fed = step(model, state) if caches else prefill(model, state, None)
        return select(*fed, rules, uniforms)

    carried = state._replace(cache=_joined(state.cache))
    state, is_broken = tf.while_loop(is_asked, one_more, (carried, tf.constant(False)))
    return state._replace(cache=_parted(state.cache, state.tokens.shape[0])), is_broken


def prefill(model: Any, state: State, room: int | None) -> tuple[State, Tensor]:
    """Feed what is settled: the state, and the scores `[B, V]` after each row's last real token.

    The pass is `room` columns wide. What lies behind the settled ones is hidden, and leaves
    nothing in the cache. With None all columns are fed, and no cache is kept.
    """
    S = state.tokens.shape[1]
    width = room or S
    shown = state.mask[:, :width]
    visible = Visible(0, width, width, shown)
    past = None if room is None else Cache()
    hidden, cache = _decode(model, state.tokens[:, :width], positions_of(shown), visible, past)
    last = tf.reduce_max(tf.where(shown, tf.range(width), 0), axis=1)
    # The head meets these alone: [B, V], not [B, P, V].
    scores = model.scores(tf.gather(hidden, last, batch_dims=1))
    if cache is not None:
        state = state._replace(cache=_in_room(cache, state.length, S))
    return state, scores


def step(model: Any, state: State) -> tuple[State, Tensor]:
    """Feed every row's newest token: the state, and the scores `[B, V]` of the next."""
    newest = tf.gather(state.tokens, state.length - 1, axis=1)[:, None]  # [B, 1]
    visible = Visible(state.length - 1, 1, state.mask.shape[1], state.mask)
    hidden, cache = _decode(model, newest, state.positions[:, None], visible, state.cache)
    assert cache is not None
    state = state._replace(cache=cache, positions=state.positions + 1)
    return state, model.scores(hidden[:, 0])


def _decode(
    model: Any, ids: Tensor, positions: Tensor, visible: Visible, cache: Cache | None
) -> tuple[Tensor, Cache | None]:
    """`[B, T]` ids that follow a cache -> `[B, T, E]`, and the cache that holds them."""
    decoder = model.model.decoder
    attend = choose(model.attn_implementation, visible, dropout=0.0, weights=False)
    embeds = decoder.embed_tokens(ids)
    out = decoder(embeds, positions=positions, attend=attend, cache=cache, training=False)
    return out.last, out.cache


def _in_room(cache: Cache, length: Tensor, capacity: int) -> Cache:
    """A growing cache in fixed shapes that holds its first `length` tokens, and else zero."""
    is_held = (tf.range(cache.capacity) < length)[:, None]  # [S, 1]
    behind = [[0, 0], [0, 0], [0, capacity - cache.capacity], [0, 0]]

    def put(rooms: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(tf.pad(tf.where(is_held, room, tf.zeros_like(room)), behind) for room in rooms)

    return Cache(put(cache.keys), put(cache.values), length)


def _joined(cache: Cache) -> Cache:
    """Fixed shapes with rows and heads in one axis, `[B * H, S, D]`.

    XLA multiplies matrices along one batch axis. With two it would copy every buffer twice in every
    step: once to write into, once to look at in the other shape.
    """
    keys = tuple(tf.reshape(key, (-1, *key.shape[2:])) for key in cache.keys)
    return Cache(keys, tuple(tf.reshape(v, (-1, *v.shape[2:])) for v in cache.values), cache.held)


def _parted(cache: Cache, B: int) -> Cache:
    """Joined rows and heads in axes of their own again, `[B, H, S, D]`."""
    keys = tuple(tf.reshape(key, (B, -1, *key.shape[1:])) for key in cache.keys)
    return Cache(
        keys, tuple(tf.reshape(v, (B, -1, *v.shape[1:])) for v in cache.values), cache.held
    )


def select(state: State, scores: Tensor, rules: Rules, uniforms: Tensor) -> tuple[State, Tensor]:
    """Choose the token of every row from its scores, and note it: the state, and a bool [].

    The bool says that there was nothing to choose by: a score is NaN.
    """
    S, V = state.tokens.shape[1], scores.shape[1]
    scores = without(tf.range(V) >= rules.known, scores)

    def drawn(changed: Tensor) -> Tensor:
        return draw(changed, tf.gather(uniforms, state.length, axis=1))

    def chosen_by_rules() -> Tensor:
        changed = ruled(scores, state, rules)
        return tf.cond(rules.samples, lambda: drawn(changed), lambda: _likeliest(changed))

    def chosen_as_they_are() -> Tensor:
        return _likeliest(held_back(scores, state, rules))

    chosen = tf.cond(rules.change_nothing, chosen_as_they_are, chosen_by_rules)
    chosen = tf.where(state.finished, rules.fill, chosen)
    is_new = tf.range(S) == state.length
    noted = state._replace(
        tokens=tf.where(is_new, chosen[:, None], state.tokens),
        mask=is_new | state.mask,
        length=state.length + 1,
        finished=state.finished | tf.gather(rules.stops, chosen),
    )
    return noted, tf.reduce_any(tf.math.is_nan(scores))


def _likeliest(scores: Tensor) -> Tensor:
    """The best token of every row, of equals the lowest id: int32 `[B]`."""
    return tf.argmax(scores, axis=1, output_type=tf.int32)


def _prompt(input_ids: Any, generation: GenerationConfig, vocab_size: int) -> Tensor:
    if input_ids is None:
        if generation.bos_token_id is None:
            raise arguments.missing_prompt()
        return tf.constant([[generation.bos_token_id]])
    prompt = tf.convert_to_tensor(input_ids)
    kind = prompt.dtype
    arguments.check_prompt(arguments.Given(tuple(prompt.shape), kind.name, kind.is_floating))
    check_ids(prompt, vocab_size)
    return prompt


def _shown(prompt: Tensor, mask: Any, padding: int | None) -> NDArray[np.bool_]:
    """Where the real tokens of a prompt are, bool `[B, P]`."""
    if mask is None:
        shown = np.ones(prompt.shape, np.bool_) if padding is None else prompt.numpy() != padding
        return np.asarray(shown)
    given = tf.convert_to_tensor(mask)
    arguments.check_prompt_mask(tuple(given.shape), tuple(prompt.shape))
    return np.asarray(given.numpy() != 0)
