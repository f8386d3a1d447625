"""Assisted decoding: a smaller model, or the text itself, guesses what one pass then settles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_tf.decoder import Cache, positions_of
from opt_tf.generation.collecting import Carried, Found, beside
from opt_tf.generation.cuts import chosen_of
from opt_tf.generation.decoding import Net, Plain, Programs, Run, State, select
from opt_tf.generation.rules import ruled, text_of
from opt_tf.generation.setup import Made, Setup, Told


class Assisted(Run):
    """Greedy choice and sampling with drafts: the rows run one after the other."""

    def last(self) -> Any:
        """What is carried after the last choice of each row."""
        rows = range(len(self.setup.prompt))
        return [_Row(_row_of(self.setup, row)).last() for row in rows]

    def steps(self, chunk: int = 1) -> Iterator[Carried]:
        """What is carried after the first choice of the one row, and then after each round."""
        return _Row(self.setup).steps(chunk)

    def warm(self) -> None:
        """Make the programs: those of one row serve all."""
        _Row(_row_of(self.setup, 0)).warm()

    def found(self, carried: Any) -> Found:
        """The rows beside each other."""
        each = carried if isinstance(carried, list) else [carried]
        found = [_Row(_row_of(self.setup, i)).found(one) for i, one in enumerate(each)]
        lengths = np.array([one.tokens.shape[1] for one in found])
        n, fill = int(lengths.max()), self.setup.asked.fill

        def filled(tokens: Tensor) -> Tensor:
            return tf.pad(tokens, [[0, 0], [0, n - tokens.shape[1]]], constant_values=fill)

        return Found(
            tf.concat([filled(one.tokens) for one in found], axis=0),
            lambda: beside([cache for one in found if (cache := one.cache()) is not None]),
            tf.range(len(found)),
            lengths=lengths,
        )


def _row_of(setup: Setup, index: int) -> Setup:
    """The generation of one text alone."""
    rows = slice(index, index + 1)
    told = setup.told._replace(
        written=setup.told.written[rows],
        uniforms=None if setup.told.uniforms is None else setup.told.uniforms[rows],
    )
    return setup._replace(
        prompt=setup.prompt[rows],
        ids=setup.ids[rows],
        shown=setup.shown[rows],
        past=None if setup.past is None else setup.past.mapped(lambda room: room[rows]),
        matched=setup.matched[rows],
        told=told,
    )


class _Row(Plain):
    """One text. Besides, a cache is carried: what the assistant was fed; none for a lookup."""

    def first(self) -> Carried:
        """Both models are fed the prompt, and the first token is chosen."""
        carried = super().first()
        assistant, other = self.setup.assistant, Cache()
        if assistant is not None:
            alone = self.setup._replace(model=assistant, past=None, held=0)
            other = Run(alone).fed().cache
        return carried._replace(besides=other)

    def go_on(self, carried: Carried, end: Tensor) -> Carried:
        """Draft and settle until `end` columns are settled."""
        return self._rounds(carried, self.setup.plan.max_new_tokens, end)

    def steps(self, chunk: int = 1) -> Iterator[Carried]:
        """What is carried after the first choice, and then after every `chunk` rounds."""
        carried = self.begun()
        yield carried
        while int(carried.state.length) < int(self.told.end) and not self.is_done(carried.state):
            carried = self._sound(self._rounds(carried, chunk, self.told.end))
            yield carried

    def _rounds(self, carried: Carried, count: int, end: Tensor) -> Carried:
        assistant = self.setup.assistant
        drafter = None if assistant is None else Programs.of(assistant)
        program = self.program(loop, drafter, self.setup.made)
        result: Carried = program(carried, self.told, end, tf.constant(count))
        return result


def loop(
    net: Net,
    drafter: Net | None,
    made: Made,
    carried: Carried,
    told: Told,
    end: Tensor,
    rounds: Tensor,
) -> Carried:
    """Draft and settle until `end` columns are settled, or so many rounds are over."""

    def is_asked(carried: Carried, count: Tensor) -> Tensor:
        state = carried.state
        goes_on = (state.length < end) & ~tf.reduce_all(state.finished)
        return goes_on & carried.is_sound & (count < rounds)

    def one_more(carried: Carried, count: Tensor) -> tuple[Carried, Tensor]:
        state, other = carried.state, carried.besides
        if drafter is None:
            drafts = looked_up(state.tokens, state.length, made)
        else:
            drafts, other = drafted(drafter, state, other, told, made)
        settled = verified(net, state, drafts, carried.fault, told, made, end)
        return settled._replace(besides=other), count + 1

    carried, _ = tf.while_loop(is_asked, one_more, (carried, tf.constant(0)))
    return carried


def drafted(
    drafter: Net, state: State, other: Cache, told: Told, made: Made
) -> tuple[Tensor, Cache]:
    """The tokens that an assistant chooses by the same rules and uniforms: int32 `[1, drafts]`.

    It is fed the last two tokens each time: of those that were settled last it may have seen one
    less, and one that is fed again comes into the same slot.
    """
    shown, n = _shown(state, told), state.length

    def one_more(i: Tensor, tokens: Tensor, other: Cache) -> tuple[Tensor, Tensor, Cache]:
        columns = n + i - 2 + tf.range(2)
        hidden, other = _fed(drafter, tokens, columns, shown, other, told)
        scores = drafter.scores(hidden[:, 1])
        changed = ruled(scores, text_of(tokens, n + i, told), told.rules, made.functions)
        chosen = chosen_of(changed, told.uniforms, n + i)
        tokens = tf.where(tf.range(tokens.shape[1]) == n + i, chosen[:, None], tokens)
        return i + 1, tokens, other

    start = (tf.constant(0), state.tokens, other)
    _, tokens, other = tf.while_loop(lambda i, *_: i < made.drafts, one_more, start)
    return tf.slice(tokens, (0, n), (1, made.drafts)), other


def looked_up(tokens: Tensor, n: Tensor, made: Made) -> Tensor:
    """What followed the latest earlier occurrence of the longest ending: int32 `[1, drafts]`.

    -1 where nothing did: no token is chosen that equals it.
    """
    W = tokens.shape[1]
    text = tf.where(tf.range(W) < n, tokens[0], -1)  # [W]
    follows, matches = tf.constant(W), tf.ones((W,), tf.bool)
    for size in range(1, made.longest + 1):
        # Whether the `size` tokens before a column are the last ones, the column itself settled.
        before = tf.concat([tf.fill((size,), -1), text[: W - size]], axis=0)
        last = text[tf.maximum(n - size, 0)]
        matches &= (before == last) & (last >= 0) & (tf.range(W) < n)
        latest = tf.reduce_max(tf.where(matches, tf.range(W), -1))
        # A longer ending is better than a later one.
        follows = tf.where(latest >= 0, latest, follows)
    columns = follows + tf.range(made.drafts)
    found = tf.gather(text, tf.minimum(columns, W - 1))
    return tf.where(columns < W, found, -1)[None]


def verified(
    net: Net,
    state: State,
    drafts: Tensor,
    fault: Tensor,
    told: Told,
    made: Made,
    end: Tensor,
) -> Carried:
    """One pass over the newest token and the drafts, and what it settles place by place."""
    n = state.length
    columns = n - 1 + tf.range(made.drafts + 1)
    known = tf.concat([tf.gather(state.tokens, n - 1, axis=1)[:, None], drafts], axis=1)
    hidden, cache = _pass(net, tf.maximum(known, 0), columns, _shown(state, told), state.cache)
    scores = net.scores(hidden)  # [1, drafts + 1, V]

    def is_asked(carried: Carried, i: Tensor, agrees: Tensor) -> Tensor:
        state = carried.state
        goes_on = agrees & (state.length < end) & ~tf.reduce_all(state.finished)
        return goes_on & carried.is_sound

    def one_more(carried: Carried, i: Tensor, _: Tensor) -> tuple[Carried, Tensor, Tensor]:
        carried = select(carried.state, tf.gather(scores, i, axis=1), told, made)
        chosen = tf.gather(carried.state.tokens, n + i, axis=1)[0]
        draft = tf.gather(drafts[0], tf.minimum(i, made.drafts - 1))
        return carried, i + 1, (i < made.drafts) & (chosen == draft)

    # The cache stays outside: nothing of it changes here.
    bare = Carried(state._replace(cache=Cache()), fault)
    settled, *_ = tf.while_loop(is_asked, one_more, (bare, tf.constant(0), tf.constant(True)))
    done = settled.state
    cache = Cache(cache.keys, cache.values, done.length - 1)
    done = done._replace(cache=cache, positions=state.positions + done.length - n)
    return Carried(done, settled.fault)


def _shown(state: State, told: Told) -> Tensor:
    """Which slots hold real tokens, now or once they are filled: bool `[1, S]`."""
    return state.mask | (tf.range(state.mask.shape[1]) >= told.start)


def _fed(
    net: Net, tokens: Tensor, columns: Tensor, shown: Tensor, cache: Cache, told: Told
) -> tuple[Tensor, Cache]:
    """Feed some columns of a text, prompt or choices, into their slots."""
    text = tf.where(tf.range(tokens.shape[1]) < told.start, told.written, tokens)
    return _pass(net, tf.gather(text, columns, axis=1), columns, shown, cache)


def _pass(
    net: Net, ids: Tensor, columns: Tensor, shown: Tensor, cache: Cache
) -> tuple[Tensor, Cache]:
    """Feed ids `[1, T]` into the slots of their columns, each seeing what comes before it."""
    mask = shown[:, None] & (tf.range(shown.shape[1]) <= columns[:, None])  # [1, T, S]
    # Drafts may lie behind the last position; nobody reads what they give.
    positions = tf.minimum(tf.gather(positions_of(shown), columns, axis=1), net.positions - 1)
    placed = Cache(cache.keys, cache.values, columns[0])
    return net.feed(ids, positions, mask, placed)
