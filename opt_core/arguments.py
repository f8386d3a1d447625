"""What a call of a model may be given: shapes and ranges, in the same words in every framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from opt_core.config import OPTConfig
from opt_core.generation.configuration import GenerationConfig

#: The label of what does not count in a loss.
IGNORED = -100

Shape = tuple[int, ...]


class Given(NamedTuple):
    """An array that a caller passed, as far as an error needs to know it."""

    shape: Shape
    dtype: str
    is_float: bool


def check_tokens(config: OPTConfig, ids: Given | None, embeds: Given | None) -> tuple[int, int]:
    """The batch size B and the number of tokens T of the one that was given.

    Raises:
        ValueError: both or none, another number of axes, floating ids, another width, or no token.
    """
    if (ids is None) == (embeds is None):
        found = "neither" if ids is None else "both"
        raise ValueError(f"give either input_ids or inputs_embeds; found {found}")
    if embeds is not None:
        given, E = embeds, config.word_embed_proj_dim
        if len(given.shape) != 3 or given.shape[2] != E:
            raise ValueError(
                f"inputs_embeds are {given.shape}, expected (batch, tokens, {E}): "
                "the width of embed_tokens"
            )
    else:
        assert ids is not None
        given = ids
        if len(given.shape) != 2 or given.is_float:
            raise ValueError(
                f"input_ids are {given.dtype} {given.shape}, expected whole numbers (batch, tokens)"
            )
    if 0 in given.shape[:2]:
        raise ValueError(f"the input is empty: {given.shape}; give at least one token")
    return given.shape[0], given.shape[1]


def unknown_id(wrong: int, row: int, place: int, vocab_size: int) -> ValueError:
    """The error for an id outside the vocabulary."""
    return ValueError(
        f"input_ids hold {wrong} in row {row} at place {place}; the vocabulary goes from 0 to "
        f"{vocab_size - 1}: was the text encoded for another model?"
    )


def check_mask_shape(shape: Shape, B: int, held: int, T: int) -> None:
    """See that a mask covers the tokens in the cache and the new ones.

    Raises:
        ValueError: it has another shape; names both lengths.
    """
    if shape != (B, held + T):
        raise ValueError(
            f"attention_mask is {shape}, expected {(B, held + T)}: {held} tokens in "
            f"the cache and {T} new ones"
        )


def unknown_mask_values() -> ValueError:
    """The error for a mask that is not one of 0 and 1."""
    return ValueError(
        "attention_mask holds values other than 0 and 1; give 1 for what may be attended to "
        "and 0 for padding (not a mask to add to scores)"
    )


def check_position_shape(shape: Shape, B: int, T: int) -> None:
    """See that there is a position for each token, or one row of them for all rows.

    Raises:
        ValueError: there is not.
    """
    if shape not in ((B, T), (1, T)):
        raise ValueError(f"position_ids are {shape}, expected {(B, T)}")


def check_reach(config: OPTConfig, last: int, least: int = 0) -> None:
    """See that positions lie in the table: -1 stands for padding, 0 for the first token.

    Raises:
        ValueError: the first or the last does not.
    """
    most = config.max_position_embeddings
    if last >= most or least < -1:
        wrong = last if last >= most else least
        raise ValueError(
            f"the input asks for position {wrong}, but positions go from 0 to {most - 1} "
            f"(max_position_embeddings is {most}); shorten the input"
        )


def kept_heads(config: OPTConfig, shape: Shape) -> list[list[int]]:
    """The heads that each layer still has, by which a head mask of this shape is read.

    Raises:
        ValueError: it is neither (layers, heads) nor (heads,), counted as before pruning.
    """
    L, H = config.num_hidden_layers, config.num_attention_heads
    if shape not in ((H,), (L, H)):
        raise ValueError(f"head_mask is {shape}, expected {(L, H)} (layers, heads) or {(H,)}")
    gone = config.pruned_heads
    return [[head for head in range(H) if head not in gone.get(i, ())] for i in range(L)]


def check_language_labels(shape: Shape, expected: Shape) -> None:
    """See that there is a label for each token.

    Raises:
        ValueError: there is not.
    """
    if shape != expected:
        raise ValueError(f"labels are {shape}, expected {expected} as the input")


def unknown_label(name: str, wrong: int, classes: int) -> ValueError:
    """The error for a label that is no class."""
    return ValueError(
        f"{name} hold {wrong}, outside 0 to {classes - 1}; {IGNORED} marks what does not count"
    )


def problem_of(config: OPTConfig, *, whole: bool) -> str:
    """What a classifier is trained for: `problem_type`, else what its labels look like.

    One label means regression, labels of `whole` numbers one class a row, others several.
    """
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "single_label_classification" if whole else "multi_label_classification"


def check_class_labels(problem: str, shape: Shape, logits: Shape) -> None:
    """See that labels fit `[B, num_labels]` logits: one for each row, or for each logit.

    Raises:
        ValueError: they do not.
    """
    rows, classes = logits
    count = 1
    for length in shape:
        count *= length
    if problem == "single_label_classification":
        if count != rows:
            raise ValueError(f"labels are {shape}, expected one class for each of {rows} rows")
    elif count != rows * classes:
        raise ValueError(f"labels are {shape}, expected {logits} for {problem}")


def check_both_places(start_is_given: bool, end_is_given: bool) -> None:
    """See that an answer has a start and an end, or neither.

    Raises:
        ValueError: it has one of them.
    """
    if start_is_given != end_is_given:
        raise ValueError("give both start_positions and end_positions, or neither")


def check_places(name: str, shape: Shape, rows: int) -> None:
    """See that `name` ("start" or "end") has one place for each row, `[B]` or `[B, 1]`.

    Raises:
        ValueError: it has not.
    """
    if shape not in ((rows,), (rows, 1)):
        raise ValueError(
            f"{name}_positions are {shape}, expected one place for each of {rows} rows"
        )


def unknown_ends(rows: int) -> ValueError:
    """The error for rows of which nobody knows where they end."""
    return ValueError(
        f"{rows} rows without attention_mask, and the configuration has no pad_token_id: nobody "
        "knows where they end; pass attention_mask or set pad_token_id"
    )


def check_prompt(given: Given) -> None:
    """See that a prompt is ids `[B, P]` with at least one token.

    Raises:
        ValueError: it is not.
    """
    if len(given.shape) != 2 or given.is_float or 0 in given.shape:
        raise ValueError(
            f"input_ids are {given.dtype} {given.shape}, expected whole numbers "
            "(batch, tokens) with at least one token"
        )


def check_prompt_mask(shape: Shape, prompt: Shape) -> None:
    """See that a prompt's mask has its shape.

    Raises:
        ValueError: it has not.
    """
    if shape != prompt:
        raise ValueError(f"attention_mask is {shape}, expected {prompt} as input_ids")


def missing_prompt() -> ValueError:
    """The error for a generation from nothing."""
    return ValueError("give input_ids, or a bos_token_id to start every text with")


def nan_scores(length: int) -> ValueError:
    """The error for scores that no token can be chosen from."""
    return ValueError(
        f"the scores are NaN after {length} tokens; do the weights hold NaN or inf, or "
        "does the model overflow in this dtype?"
    )


def infinite_scores(length: int) -> ValueError:
    """The error for a score of +inf, beside which no other token has a probability."""
    return ValueError(
        f"a score is +inf after {length} tokens, beside which nothing can be drawn or weighed; "
        "does the model overflow in this dtype, or does a function given to generate set it? "
        "remove_invalid_values=True makes it the largest number"
    )


def no_token_left(length: int) -> ValueError:
    """The error for a row whose every token is forbidden."""
    return ValueError(
        f"no token may be chosen after {length} tokens: every score is -inf; do the rules, or "
        "the functions given to generate, forbid the whole vocabulary?"
    )


def check_past(held: int, rows: int, prompt: Shape) -> None:
    """See that a cache of an earlier call holds the start of a prompt, and not all of it.

    Raises:
        ValueError: it holds other rows, or nothing is left to feed.
    """
    if rows != prompt[0]:
        raise ValueError(f"past_key_values hold {rows} rows, but input_ids {prompt[0]}")
    if held >= prompt[1]:
        raise ValueError(
            f"past_key_values hold {held} tokens, but input_ids have {prompt[1]} columns; give "
            "the whole text, at least one token longer than what the cache holds"
        )


def past_without(option: str) -> ValueError:
    """The error for an option that needs more of the earlier text than a cache holds."""
    return ValueError(
        f"past_key_values do not go with {option}, which needs the whole text again; leave one of "
        "the two out"
    )


def past_holds_row(row: int) -> ValueError:
    """The error for a row that ends within a cache, so that nothing of it is left to feed."""
    return ValueError(
        f"past_key_values hold all of row {row}: no real token of it comes after them; pad on the "
        "left, or leave the last token out of the cache"
    )


def check_negative_prompt(shape: Shape, rows: int) -> None:
    """See that there is a negative prompt for each row.

    Raises:
        ValueError: there is not.
    """
    if len(shape) != 2 or shape[0] != rows or shape[1] == 0:
        raise ValueError(
            f"negative_prompt_ids are {shape}, expected ({rows}, tokens): one row for each of "
            "input_ids"
        )


def unused_negative_prompt() -> ValueError:
    """The error for a negative prompt, or its mask, that nothing asks for."""
    return ValueError(
        "a negative prompt guides nothing without guidance_scale, and its mask nothing without "
        "negative_prompt_ids; give a guidance_scale other than 1 and the ids"
    )


def check_assistant(strategy: str, vocab_size: int, drafts: int) -> None:
    """See that a model may draft for another one.

    `strategy` says how tokens are chosen without it, `vocab_size` and `drafts` are the sizes of
    the model's and the assistant's vocabulary.

    Raises:
        ValueError: another strategy was asked for, or the vocabularies differ.
    """
    if strategy not in ("greedy", "sampling"):
        raise ValueError(
            "assistant_model drafts for greedy choice and sampling, but other options ask for "
            f"{'prompt_lookup_num_tokens' if strategy == 'assisted' else strategy}; leave one of "
            "the two out"
        )
    if vocab_size != drafts:
        raise ValueError(
            f"assistant_model has a vocabulary of {drafts}, the model one of {vocab_size}; an "
            "assistant must know the same tokens"
        )


def assistant_needs(option: str, value: str) -> ValueError:
    """The error for an option that does not go with drafts of an assistant."""
    return ValueError(f"assistant_model needs {option}={value}; leave one of the two out")


def beams_settle_late() -> ValueError:
    """The error for a stream of what is settled at the end."""
    return ValueError(
        "beams settle at the end, so there is nothing to stream before it; call generate without "
        "a streamer, or leave out num_beams"
    )


def one_row_at_a_time(rows: int) -> ValueError:
    """The error for a stream of rows that run one after the other."""
    return ValueError(
        f"assisted decoding runs its {rows} rows one after the other, so they cannot be streamed "
        "together; stream one row, or leave the drafts out"
    )


def missing_tokenizer() -> ValueError:
    """The error for stop strings that nobody can spell."""
    return ValueError("stop_strings are looked for in text: give the tokenizer as well")


def check_generation_config(value: object) -> None:
    """See that options come as our own configuration, which knows and has checked them all.

    Raises:
        ValueError: they do not; names what was given.
    """
    if value is not None and not isinstance(value, GenerationConfig):
        given = type(value)
        raise ValueError(
            f"generation_config is a {given.__module__}.{given.__qualname__}; give a "
            "GenerationConfig of opt_core.generation, such as "
            "GenerationConfig.from_dict(value.to_dict()), or the options themselves"
        )


def check_functions(name: str, functions: Any) -> None:
    """See that an argument is a list of functions.

    Raises:
        ValueError: it is not; names the argument.
    """
    is_list = isinstance(functions, Sequence) and not isinstance(functions, str)
    if functions is not None and not (is_list and all(map(callable, functions))):
        raise ValueError(
            f"{name} is {type(functions).__name__}; give a list of functions, such as "
            f"{name}=[function]"
        )


def unknown_allowed(function: object, row: int, vocab_size: int) -> ValueError:
    """The error for an answer of `prefix_allowed_tokens_fn` that is no list of ids."""
    name = getattr(function, "__name__", type(function).__name__)
    return ValueError(
        f"prefix_allowed_tokens_fn {name} returned for text {row} what is not a list of ids from 0 "
        f"to {vocab_size - 1}, nor bool ({vocab_size},)"
    )


def check_answer(
    function: object, kind: str, found: Shape | None, allowed: Sequence[Shape]
) -> None:
    """See that a function of the caller's gave what it must; None stands for no array of numbers.

    Raises:
        ValueError: it gave another shape, or no array; names the function.
    """
    if found not in allowed:
        name = getattr(function, "__name__", type(function).__name__)
        what = "no array of numbers" if found is None else f"the shape {found}"
        raise ValueError(
            f"the {kind} {name} returned {what}, expected " + " or ".join(map(str, allowed))
        )
