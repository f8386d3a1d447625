"""One pass over the prompt, the step, the choice and the loop that all strategies share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_core.generation import DecodeState
from opt_tf.attention import Visible, choose
from opt_tf.decoder import Cache, positions_of
from opt_tf.generation.collecting import Carried, Fed, Found, in_room, joined, kept
from opt_tf.generation.cuts import ERRORS, SOUND, chosen_of, fault_of
from opt_tf.generation.rules import after, guided, is_met, keyed, ruled, text_of
from opt_tf.generation.setup import Made, Setup, Told

#: As in the core; the cache is joined: see `joined`.
State = DecodeState[Tensor, Cache]

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


#: The parts of a net that are programs where it is outside of one.
_PARTS = ("feed", "whole", "scores")


class Programs:
    """What is compiled for a model, once for each batch size and the widths of `Plan`.

    Without a model: what models of one shape share.
    """

    def __init__(self, model: Any = None) -> None:
        # Weak, since a program that held its model would keep it for ever.
        self._model = None if model is None else ref(model)
        self._weights = () if model is None else tuple(map(ref, model.weights))
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
        held = [m._model if isinstance(m, Programs) else m for m in made]
        if self._model is not None:
            held.insert(0, self._model)

        def called(*tensors: Any) -> Any:
            key = (function, compiled, *map(_key, made), _shapes(tensors))
            found = self._made.get(key)
            if found is None:
                # One for each shape, and partial: TensorFlow warns of code that it traces often.
                whole = partial(_run, function, held)
                fresh = tf.function(whole, jit_compile=compiled, autograph=False)
                found = self._made.setdefault(key, fresh)
                for oldest in list(self._made)[:-_MOST_PROGRAMS]:
                    self._made.pop(oldest, None)  # another thread may have been quicker
            return found(*tensors)

        return called

    def pieces(self, compiled: bool) -> Net:
        """The model outside: each of its passes is a program."""
        feed, whole, scores = (self.program(_part, n, compiled=compiled) for n in _PARTS)
        assert self._model is not None
        return Net(feed, whole, scores, _net(self._model).positions)

    @property
    def traces(self) -> int:
        """How often a program was made."""
        return sum(p.experimental_get_tracing_count() for p in self._made.values())  # type: ignore[attr-defined]

    def _reads(self, weights: Sequence[Any]) -> bool:
        read = [reference() for reference in self._weights]
        return len(read) == len(weights) and all(a is b for a, b in zip(read, weights, strict=True))


#: Those that know no model.
_SHARED = Programs()

#: Beside the models, not in them: Keras saves, and TensorFlow exports, what a model holds.
_PROGRAMS: WeakKeyDictionary[Any, Programs] = WeakKeyDictionary()


def _key(made: Any) -> Any:
    return (keyed(made.functions), *made[1:]) if isinstance(made, Made) else made


def _run(function: Callable[..., Any], held: Sequence[Any], *tensors: Any) -> Any:
    return function(*(_net(m) if isinstance(m, ref) else m for m in held), *tensors)


def _net(model: ref[Any]) -> Net:
    """A model inside a program."""
    found: Any = model()
    positions = found.config.max_position_embeddings
    return Net(partial(_feed, found), partial(_whole, found), found.scores, positions)


def _shapes(tensors: Any) -> Hashable:
    flat = tf.nest.flatten(tensors, expand_composites=True)
    return tuple(None if x is None else (x.dtype, tuple(x.shape)) for x in flat)


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
        """Make the programs, and run no further than needed: a loop in Python for one step."""
        end = (carried := self.first()).state.length + int(self.setup.hosted)
        self.go_on(carried, tf.minimum(end, self.told.end))

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
        return _SHARED.program(function, made, compiled=self.setup.compiled)

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
            last = self.part("whole", self.told.fed, tf.constant(mask[:, :W]))
            return Fed(last, Cache(), None)
        new = np.zeros((len(ids), setup.room), np.int32)
        new[:, : P - held] = ids[:, held:]
        program = self.programs.program(prefill, S, compiled=setup.compiled)
        past = Cache() if setup.past is None else setup.past.fixed(S)
        starts = tf.constant(held), tf.constant(P)
        return Fed(*program(tf.constant(new), tf.constant(mask), *starts, past))

    def part(self, name: str, *tensors: Tensor) -> Any:
        """What a part of the net gives, as a program."""
        return self.programs.program(_part, name, compiled=self.setup.compiled)(*tensors)

    def _sound(self, carried: Carried) -> Carried:
        faults = carried.fault.numpy()
        if faults.any():
            row = int(faults.argmax())
            new = int(carried.state.length) - 1 - self.setup.plan.prompt_length
            length = int(self.setup.shown[row].sum()) + new
            raise ERRORS[int(faults[row])](length)
        return carried


class Plain(Run):
    """Greedy choice and sampling."""

    def first(self) -> Carried:
        """The prompt is fed, and the first token of every row chosen."""
        fed = self.fed()
        state = self.started(fed.cache)
        chosen: Carried = self.choice(_first_choice)(
            state, self.part("scores", fed.last), self.told
        )
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
        result: Carried = self.program(loop, self.setup.made)(carried, self.told, end)
        return result

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
        return (state.length < end) & carried.is_sound & ~tf.reduce_all(state.finished)

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
        cache = in_room(cache, length, S)
    else:
        shown = mask[:, None, :T] & (tf.range(T) <= tf.range(T)[:, None])
        hidden, cache = net.feed(ids, positions[:, :T], shown, past)
        cache = joined(in_room(cache, length, S))
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
    text = text_of(state.tokens, state.length, told)
    asked = guided(scores, told)
    changed = ruled(asked, text, told.rules, made.functions)
    chosen = chosen_of(changed, told.uniforms, state.length)
    kind = {"is_mended": told.is_mended, "is_drawn": told.uniforms is not None}
    fault = fault_of(scores, asked, changed, chosen, **kind)
    return noted(state, chosen, scores[: chosen.shape[0]], changed, fault, told, made)


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
    fault = tf.where(state.finished, SOUND, fault)
    seen = (raw, tf.cast(changed, tf.float32)) if made.collects else ()
    return Carried(following, fault, seen)


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


def _part(net: Net, name: str, *tensors: Any) -> Any:
    return getattr(net, name)(*tensors)
