"""What is carried from one step of decoding to the next, the same in every framework."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

Array = TypeVar("Array")
CacheType = TypeVar("CacheType")


class DecodeState(NamedTuple, Generic[Array, CacheType]):
    """What a step takes and gives, unless it searches with beams.

    P is the width of the prompt, N `Plan.max_new_tokens`, W `Plan.width`, S `Plan.capacity`. R is
    B, or 2 * B under guidance: the rows as asked, then the rows without their prompt.

    A step feeds the newest token of every row at its position, appends the token that is chosen
    from the scores, and stops being asked once every row is finished or `length` is P + N.
    """

    #: int [B, W], or [B, P + N] where nothing is compiled: each row's real tokens, moved up to
    #: column P - 1, with -1 before them; from column P on what was chosen, and
    #: `GenerationConfig.fill` where nothing is chosen yet and after a row is finished. So rules
    #: that look back see the row's text, whatever its padding; -1 equals no token.
    tokens: Array
    #: int []: how many columns of `tokens` are settled; P before the first choice.
    length: Array
    #: bool [B]: the row has chosen a stop token, or written a stop string.
    finished: Array
    #: int [B]: how much of a stop string the row ends with: its state in `StopTable`.
    matched: Array
    #: int [R]: the position (without the table's offset) at which a row's newest token is fed:
    #: the number of its real tokens before it. Padding, on either side, has no position.
    positions: Array
    #: bool [R, S]: the slots of the cache that may be attended to; False for padding and for what
    #: is not filled yet. Slot i belongs to column i of the prompt as it was given, and from P on
    #: to column i of `tokens`.
    mask: Array
    #: Keys and values of the columns that were fed: all but the newest one.
    cache: CacheType


class BeamState(NamedTuple, Generic[Array, CacheType]):
    """What a step of beam search takes and gives, for B texts of K beams in G groups.

    Beams of one text share one row of the cache: the prompt lies there once, and the K tokens that
    step t feeds lie in slots P + t * K to P + (t + 1) * K - 1. A step is one call of the decoder
    with T = K queries, each of which sees the prompt and the slots of its own past. When beams are
    reordered, only `slots` and `mask` move; keys and values never do.

    Group g holds beams g * K / G and following, in the running beams and in the pool.
    """

    #: int [B, K, W]: as in `DecodeState`, for each running beam, best first within its group.
    tokens: Array
    #: int []: how many columns of `tokens` are settled; P before the first choice.
    length: Array
    #: float [B, K]: the sum of the (processed) log-probabilities of what a beam has chosen; -inf
    #: for a beam that does not exist: before the first choice all but the first of each group.
    scores: Array
    #: int [B, K]: as in `DecodeState`.
    matched: Array
    #: int [B, K, W]: the slot in which column c of a beam was fed, from column P on.
    slots: Array
    #: bool [R, K, S]: the slots that a beam's newest token may attend to, its own included.
    mask: Array
    #: int [R, K]: as in `DecodeState`.
    positions: Array
    #: The finished sequences of each group, best first: as many as the group has beams.
    #: int [B, K, W], filled with `GenerationConfig.fill` behind the last token.
    pool: Array
    #: float [B, K]: sum / (number of new tokens ** length_penalty); -inf where there is none yet.
    pool_scores: Array
    #: int [B, K]: the number of new tokens, the stop token included.
    pool_lengths: Array
    #: int [B, K, W]: as `slots`.
    pool_slots: Array
    #: bool [B, G]: nothing that goes on can enter the pool; the group stays as it is.
    done: Array
    #: Keys and values [B, H, S, D].
    cache: CacheType
