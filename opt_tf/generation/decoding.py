"""One pass over the prompt, the step, the choice and the loop that all strategies share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_core import arguments
from opt_core.generation import DecodeState
from opt_tf.attention import Visible, choose
from opt_tf.decoder import Cache, positions_of
from opt_tf.generation.cuts import draw, likeliest
from opt_tf.generation.rules import Text, is_met, keyed, ruled
from opt_tf.generation.setup import Made, Setup, Told

#: As in the core; the cache is joined: see `joined`.
State = DecodeState[Tensor, Cache]

#: What is wrong with the scores of a step: nothing, they are NaN, or all are -inf.
SOUND, NAN, NOTHING = range(3)

#: The most programs that are kept for one model.
_MOST_PROGRAMS = 128


class Net(NamedTuple):
    """What strategies ask of a model, inside a program or, piece by piece, outside."""

    #: ids and positions `[R, T]`, bool `[R, T, S]`, cache -> `[R, T, E]`, and the cache after them.
    feed: Callable[[Tensor, Tensor, Tensor, Cache], tuple[Tensor, Cache]]
    #: ids `[R, W]` and which of them are there -> the last hidden state of each row `[R, E]`.
    whole: Callable[[Tensor, Tensor], Tensor]
    #: `[..., E]` -> `[..., V]`.
    scores: Callable[[Tensor], Tensor]
    #: How many positions it knows.
    positions: int


class Carried(NamedTuple):
    """What goes through the loop."""

    state: Any
    fault: Tensor  # int32 []
    #: Where they are collected: the scores of the last step as the model gave them, and ruled.
    seen: tuple[Tensor, ...] = ()


class Programs:
    """What is compiled for a model, once for each batch size and the widths of `Plan`."""

    def __init__(self, model: Any) -> None:
        # Weak, since a program that held its model would keep it for ever.
        self._model = ref(model)
        self._weights = tuple(map(ref, model.weights))
        self._made: dict[Hashable, Callable[..., Any]] = {}

    @classmethod
    def of(cls, model: Any) -> Programs:
        """Those of the model as it is: other variables, as after pruning, need other programs."""
        found = _PROGRAMS.get(model)
        if found is None or not found._reads(model.weights):
            found = _PROGRAMS[model] = cls(model)
        return found

    def program(self, function: Callable[..., Any], *made: Any, compiled: bool) -> Any:
        """`function(net, *made, *tensors)` as a program of tensors; see `Net`."""
        key = (function, compiled, *map(_key, made))
        found = self._made.get(key)
        if found is None:

            def run(*tensors: Any) -> Any:
                nets = (m.net() if isinstance(m, Programs) else m for m in made)
                return function(self.net(), *nets, *tensors)

            fresh = tf.function(run, jit_compile=compiled, autograph=False)
            found = self._made.setdefault(key, fresh)
            while len(self._made) > _MOST_PROGRAMS:
                self._made.pop(next(iter(self._made)))
        return found

    def net(self) -> Net:
        """The model inside a program."""
        model = self._model()
        assert model is not None
        positions = model.config.max_position_embeddings
        return Net(partial(_feed, model), partial(_whole, model), model.scores, positions)

    def pieces(self, compiled: bool) -> Net:
        """The model outside: each of its passes is a program."""
        feed, whole, scores = (
            self.program(piece, compiled=compiled) for piece in (_fed, _taken_whole, _scored)
        )
        return Net(feed, whole, scores, self.net().positions)

    @property
    def traces(self) -> int:
        """How often a program was made."""
        return sum(p.experimental_get_tracing_count() for p in self._made.values())  # type: ignore[attr-defined]

    def _reads(self, weights: Sequence[Any]) -> bool:
        read = [reference() for reference in self._weights]
        return len(read) == len(weights) and all(a is b for a, b in zip(read, weights, strict=True))


#: Beside the models, not in them: Keras saves, and TensorFlow exports, what a model holds.
_PROGRAMS: WeakKeyDictionary[Any, Programs] = WeakKeyDictionary()


def _key(made: Any) -> Any:
    return (keyed(made.functions), *made[1:]) if isinstance(made, Made) else made


@lru_cache(64)
def _alone(function: Callable[..., Any], made: Any, compiled: bool) -> Any:
    return tf.function(partial(function, made.made), jit_compile=compiled, autograph=False)


class _Alike:
    """What a program is made with, equal where its functions are the same."""

    def __init__(self, made: Made) -> None:
        self.made, self._key = made, _key(made)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Alike) and self._key == other._key


class Run:
    """One generation by a strategy. A strategy says how its loop starts and goes on.

    `first` is what the loop carries after the first choice, `until` when `length` columns are
    settled or nothing goes on, and `made` the functions of which they are made.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup, self.told = setup, setup.told
        self.programs = Programs.of(setup.model)

    def first(self) -> Carried:
        """The prompt is fed, and the first token of every text chosen."""
        raise AssertionError("every strategy says how it starts")

    def go_on(self, carried: Carried, end: Tensor) -> Carried:
        """On until `end` columns are settled, or every text is finished."""
        raise AssertionError("every strategy says how it goes on")

    def found(self, carried: Carried) -> Found:
        """What is returned."""
        raise AssertionError("every strategy says what it found")

    def warm(self) -> None:
        """Make the programs, and run them no further than the first choice."""
        carried = self.first()
        self.go_on(carried, carried.state.length)

    def begun(self) -> Carried:
        """`first`, if its scores are sound."""
        return self._sound(self.first())

    def until(self, carried: Carried, length: int) -> Carried:
        """`go_on`, if its scores are sound."""
        return self._sound(self.go_on(carried, tf.constant(length)))

    def last(self) -> Carried:
        """What is carried after the last choice."""
        carried, count = self.begun(), self.setup.plan.max_new_tokens
        # One token needs no second program.
        return carried if count == 1 else self.until(carried, int(self.told.end))

    def steps(self, chunk: int = 1) -> Iterator[Carried]:
        """What is carried after the first choice, and then after every `chunk` of them."""
        carried, end = self.begun(), int(self.told.end)
        yield carried
        while int(carried.state.length) < end and not self.is_done(carried.state):
            carried = self.until(carried, min(end, int(carried.state.length) + chunk))
            yield carried

    def is_done(self, state: Any) -> bool:
        """Whether every text is finished."""
        return bool(tf.reduce_all(state.finished))

    def program(self, function: Callable[..., Any], *made: Any) -> Any:
        """A function of a net as a program, or where it cannot be one, over those of its passes."""
        if self.setup.hosted:
            return partial(function, self.programs.pieces(self.setup.compiled), *made)
        return self.programs.program(function, *made, compiled=self.setup.compiled)

    def choice(self, function: Callable[..., Any]) -> Any:
        """A program that knows no model: models of one shape share it."""
        made = self.setup.made
        if self.setup.hosted:
            return partial(function, made)
        return _alone(function, _Alike(made), self.setup.compiled)

    def fed(self) -> Fed:
        """The prompt is fed: by an own program, since its length is another."""
        setup = self.setup
        ids, shown = setup.ids, setup.shown
        S, P, held = setup.plan.capacity, setup.plan.prompt_length, setup.held
        mask = np.zeros((len(ids), S), np.bool_)
        mask[:, :P] = shown
        if not setup.asked.use_cache:
            assert self.told.fed is not None
            W = setup.plan.width
            whole = self.programs.program(_taken_whole, compiled=setup.compiled)
            return Fed(whole(self.told.fed, tf.constant(mask[:, :W])), Cache(), None)
        new = np.zeros((len(ids), setup.room), np.int32)
        new[:, : P - held] = ids[:, held:]
        program = self.programs.program(prefill, S, compiled=setup.compiled)
        past = Cache() if setup.past is None else setup.past
        starts = tf.constant(held), tf.constant(P)
        return Fed(*program(tf.constant(new), tf.constant(mask), *starts, past))

    def scored(self, hidden: Tensor) -> Tensor:
        """The scores of last hidden states."""
        return self.programs.program(_scored, compiled=self.setup.compiled)(hidden)

    def _sound(self, carried: Carried) -> Carried:
        fault = int(carried.fault)
        if fault:
            length = int(carried.state.length) - 1
            raise (arguments.nan_scores if fault == NAN else arguments.no_token_left)(length)
        return carried


class Fed(NamedTuple):
    """What a pass over the prompt leaves."""

    last: Tensor  # [R, E]: the hidden state of each row's last real token
    cache: Cache
    states: Tensor | None  # [R, room, E]: those of all that was fed


class Found(NamedTuple):
    """What a strategy found: R returned sequences, n the most new tokens of one."""

    tokens: Tensor  # int32 [R, n]
    #: Made when it is asked for.
    cache: Callable[[], Cache | None]
    #: Which text each sequence belongs to.
    texts: Tensor  # int32 [R]
    scores: Tensor | None = None  # float64 [R]
    beams: Tensor | None = None  # int32 [R, n]


class Plain(Run):
    """Greedy choice and sampling."""

    def first(self) -> Carried:
        """The prompt is fed, and the first token of every row chosen."""
        fed = self.fed()
        state = self.started(fed.cache)
        chosen: Carried = self.choice(_first_choice)(state, self.scored(fed.last), self.told)
        return chosen

    def started(self, cache: Cache) -> State:
        """The state before the first choice."""
        setup = self.setup
        P, S = setup.plan.prompt_length, setup.plan.capacity
        return State(
            tokens=tf.constant(setup.compacted()),
            length=tf.constant(P),
            finished=tf.zeros(len(setup.prompt), tf.bool),
            matched=tf.constant(setup.matched),
            positions=tf.constant(setup.shown.sum(1), tf.int32),
            mask=tf.constant(np.pad(setup.shown, [(0, 0), (0, S - P)])),
            cache=cache,
        )

    def go_on(self, carried: Carried, end: Tensor) -> Carried:
        """Feed and choose until `end` columns are settled."""
        carried = self.program(loop, self.setup.made)(carried, self.told, end)
        return carried

    def found(self, carried: Carried) -> Found:
        """The rows as they are."""
        state, P = carried.state, self.setup.plan.prompt_length
        length = int(state.length)
        tokens = state.tokens[:, P:length]
        return Found(
            tokens, lambda: kept(state.cache, self.setup, length - 1), tf.range(len(tokens))
        )


def _first_choice(made: Made, state: State, scores: Tensor, told: Told) -> Carried:
    return select(state, scores, told, made)


def loop(net: Net, made: Made, carried: Carried, told: Told, end: Tensor) -> Carried:
    """Feed and choose until `end` columns are settled, every row is finished, or a score is bad."""

    def is_asked(carried: Carried) -> Tensor:
        state = carried.state
        sound = carried.fault == SOUND
        return (state.length < end) & sound & ~tf.reduce_all(state.finished)

    def one_more(carried: Carried) -> tuple[Carried]:
        return (select(*step(net, carried.state, told), told, made),)

    (carried,) = tf.while_loop(is_asked, one_more, (carried,))
    return carried


def prefill(
    net: Net, S: int, ids: Tensor, mask: Tensor, start: Tensor, length: Tensor, past: Cache
) -> tuple[Tensor, Cache, Tensor]:
    """Feed what follows a cache: `[R, T]` ids, bool `[R, S]` mask -> the fields of `Fed`.

    The pass is T columns wide. What lies behind `length` is hidden, and leaves nothing in the
    cache.
    """
    T = ids.shape[1]
    positions = positions_of(mask)
    if past.keys:
        places = start + tf.range(T)
        shown = mask[:, None] & (tf.range(S) <= places[:, None])
        positions = tf.gather(positions, tf.minimum(places, S - 1), axis=1)
        hidden, cache = net.feed(ids, positions, shown, joined(past))
        cache = _in_room(cache, length, S)
    else:
        shown = mask[:, None, :T] & (tf.range(T) <= tf.range(T)[:, None])
        hidden, cache = net.feed(ids, positions[:, :T], shown, past)
        cache = joined(_in_room(cache, length, S))
    real = tf.gather(mask, tf.minimum(start + tf.range(T), S - 1), axis=1)
    last = tf.reduce_max(tf.where(real, tf.range(T), 0), axis=1)
    # The head meets these alone: [R, V], not [R, T, V].
    return tf.gather(hidden, last, batch_dims=1), cache, hidden


def step(net: Net, state: State, told: Told) -> tuple[State, Tensor]:
    """Feed every row's newest token: the state, and the scores `[R, V]` of the next."""
    if told.fed is not None:
        ids, shown = written(told.fed, state, told), state.mask[:, : told.fed.shape[1]]
        return state, net.scores(net.whole(ids, shown))
    newest = tf.gather(state.tokens, state.length - 1, axis=1)[:, None]  # [B, 1]
    ids = tf.tile(newest, (state.mask.shape[0] // newest.shape[0], 1))  # [R, 1]
    hidden, cache = net.feed(ids, state.positions[:, None], state.mask[:, None], state.cache)
    state = state._replace(cache=cache, positions=state.positions + 1)
    return state, net.scores(hidden[:, 0])


def select(state: State, scores: Tensor, told: Told, made: Made) -> Carried:
    """Choose the token of every row from its scores `[R, V]`, and note it."""
    raw, scores = scores[: state.tokens.shape[0]], guided(scores, told)
    text = text_of(state.tokens, state.length, told)
    changed = ruled(scores, text, told.rules, made.functions)
    chosen = chosen_of(changed, state.length, told)
    fault = fault_of(scores, changed, chosen, told)
    return noted(state, chosen, raw, changed, fault, told, made)


def noted(
    state: State,
    chosen: Tensor,
    raw: Tensor,
    changed: Tensor,
    fault: Tensor,
    told: Told,
    made: Made,
) -> Carried:
    """The state with the token of every row, and whether the row has ended with it."""
    W = state.tokens.shape[1]
    chosen = tf.where(state.finished, told.fill, chosen)
    tokens = tf.where(tf.range(W) == state.length, chosen[:, None], state.tokens)
    finished, matched = tf.gather(told.stops, chosen), state.matched
    if told.table is not None:
        matched = after(told.table, matched, chosen)
        finished |= matched == told.table.shape[0] - 1
    for criterion in made.functions.criteria:
        ended = text_of(tokens, state.length + 1, told)
        finished |= is_met(criterion, ended, tf.cast(changed, tf.float32))
    following = state._replace(
        tokens=tokens,
        mask=(tf.range(state.mask.shape[1]) == state.length) | state.mask,
        length=state.length + 1,
        finished=state.finished | finished,
        matched=matched,
    )
    fault = tf.reduce_max(tf.where(state.finished, SOUND, fault))
    seen = (raw, tf.cast(changed, tf.float32)) if made.collects else ()
    return Carried(following, fault, seen)


def chosen_of(scores: Tensor, column: Tensor, told: Told) -> Tensor:
    """The token of every row for a column, drawn or the likeliest: int32 `[B]`."""
    if told.uniforms is None:
        return likeliest(scores)
    return draw(scores, tf.gather(told.uniforms, column, axis=1)[:, 0])


def guided(scores: Tensor, told: Told) -> Tensor:
    """`[R, V]` -> `[B, V]`: with guidance, away from what is likely without the prompt."""
    if told.guidance is None:
        return scores
    logarithms = tf.nn.log_softmax(tf.cast(scores, tf.float64))
    asked, unasked = tf.split(logarithms, 2)
    return told.guidance * (asked - unasked) + unasked


def fault_of(scores: Tensor, changed: Tensor, chosen: Tensor, told: Told) -> Tensor:
    """What is wrong with the scores of each row, before the rules or after: int32 `[B]`."""
    best = tf.gather(changed, chosen, batch_dims=1)
    is_nan = tf.reduce_any(tf.math.is_nan(changed), axis=1)
    if "remove_invalid_values" not in told.rules:
        is_nan |= tf.reduce_any(tf.math.is_nan(scores), axis=1)
    nothing = tf.where(best == -np.inf, NOTHING, SOUND)
    return tf.where(is_nan, NAN, nothing)


def after(table: Tensor, matched: Tensor, chosen: Tensor) -> Tensor:
    """The states of stop strings after tokens: ints of one shape -> int32 of that shape."""
    return tf.gather_nd(table, tf.stack([matched, chosen], axis=-1))


def text_of(tokens: Tensor, length: Tensor, told: Told, copies: int = 1) -> Text:
    """What rules look at of texts `[N, W]`; `copies` of each text that was asked for."""
    prompt = told.written if copies == 1 else tf.repeat(told.written, copies, axis=0)
    settled = tf.range(tokens.shape[1])
    text = tf.where(settled < told.start, prompt, tokens)
    seen, shown = tf.where(settled < length, tokens, -1), length
    if told.hidden is not None:
        text, shown = tf.roll(text, -told.hidden, axis=1), length - told.hidden
    return Text(seen, text, length, shown, copies)


def written(fed: Tensor, state: State, told: Told) -> Tensor:
    """The columns as they are fed, prompt and choices: int32 `[R, W]`."""
    copies = fed.shape[0] // state.tokens.shape[0]
    tokens = tf.tile(state.tokens, (copies, 1))
    return tf.where(tf.range(fed.shape[1]) < told.start, fed, tokens)


# --- passes of the model -----------------------------------------------------------------------


def _feed(
    model: Any, ids: Tensor, positions: Tensor, mask: Tensor, cache: Cache
) -> tuple[Tensor, Cache]:
    decoder = model.model.decoder
    visible = Visible(0, mask.shape[1], mask.shape[2], mask)
    attend = choose(model.attn_implementation, visible, dropout=0.0, weights=False)
    embeds = decoder.embed_tokens(ids)
    out = decoder(embeds, positions=positions, attend=attend, cache=cache, training=False)
    return out.last, out.cache


def _whole(model: Any, ids: Tensor, shown: Tensor) -> Tensor:
    decoder, W = model.model.decoder, ids.shape[1]
    attend = choose(model.attn_implementation, Visible(0, W, W, shown), dropout=0.0, weights=False)
    embeds = decoder.embed_tokens(ids)
    out = decoder(embeds, positions=positions_of(shown), attend=attend, training=False)
    last = tf.reduce_max(tf.where(shown, tf.range(W), 0), axis=1)
    return tf.gather(out.last, last, batch_dims=1)


def _fed(net: Net, *given: Any) -> tuple[Tensor, Cache]:
    return net.feed(*given)


def _taken_whole(net: Net, *given: Any) -> Tensor:
    return net.whole(*given)


def _scored(net: Net, hidden: Tensor) -> Tensor:
    return net.scores(hidden)


# --- the cache of a loop -----------------------------------------------------------------------


def _in_room(cache: Cache, length: Tensor, capacity: int) -> Cache:
    """A cache in fixed shapes that holds its first `length` tokens, and else zero."""

    def put(rooms: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(map(one, rooms))

    def one(room: Tensor) -> Tensor:
        size = room.shape[-2]
        is_held = (tf.range(size) < length)[:, None]  # [S, 1]
        held = tf.where(is_held, room, tf.zeros_like(room))
        return tf.pad(held, [*[[0, 0]] * (room.shape.rank - 2), [0, capacity - size], [0, 0]])

    return Cache(put(cache.keys), put(cache.values), length)


def joined(cache: Cache) -> Cache:
    """Fixed shapes with rows and heads in one axis, `[B * H, S, D]`.

    XLA multiplies matrices along one batch axis. With two it would copy every buffer twice in every
    step: once to write into, once to look at in the other shape.
    """
    keys = tuple(tf.reshape(key, (-1, *key.shape[2:])) for key in cache.keys)
    return Cache(keys, tuple(tf.reshape(v, (-1, *v.shape[2:])) for v in cache.values), cache.held)


def parted(cache: Cache, R: int) -> Cache:
    """Joined rows and heads in axes of their own again, `[R, H, S, D]`."""
    keys = tuple(tf.reshape(key, (R, -1, *key.shape[1:])) for key in cache.keys)
    return Cache(
        keys, tuple(tf.reshape(v, (R, -1, *v.shape[1:])) for v in cache.values), cache.held
    )


def kept(cache: Cache, setup: Setup, length: int) -> Cache | None:
    """What a loop leaves in its joined cache, for the texts alone: `[B, H, length, D]`."""
    if not cache.keys:
        return None
    B, held = len(setup.prompt), setup.held
    whole = parted(cache, len(setup.ids)).rows(slice(B))
    whole = Cache(whole.keys, whole.values, tf.constant(length)).counted()
    widened = setup.plan.prompt_length - setup.prompt.shape[1]
    if not widened:
        return whole

    def narrow(room: Tensor) -> Tensor:
        return tf.concat([room[:, :, :held], room[:, :, held + widened :]], axis=2)

    return Cache(tuple(map(narrow, whole.keys)), tuple(map(narrow, whole.values)))
