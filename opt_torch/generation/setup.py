"""What is settled before the first pass: prompt, lengths, rules, draws, stops, weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core import arguments
from opt_core.generation import (
    ORDER,
    Call,
    GenerationConfig,
    Plan,
    Strategy,
    check_goes_on,
    given,
    plan,
    uniforms,
)
from opt_torch.decoder import Cache, check_ids
from opt_torch.evaluation import evaluating
from opt_torch.generation import cuts, rules
from opt_torch.generation.rules import Prompt, Seen
from opt_torch.packed import PackedDecoder, packed
from opt_torch.weights import agreed

#: A rule that has its arrays.
Rule = Callable[[Tensor, Seen], Tensor]
#: A compiled pass: model, ids, positions, mask and cache -> hidden states, and the cache.
FixedPass = Callable[..., tuple[Tensor, Cache]]


class Stops(NamedTuple):
    """What ends a row."""

    #: bool `[V]`: the stop tokens.
    tokens: Tensor
    #: int `[n, V]`, as `StopTable.after`; None where no strings are looked for.
    after: Tensor | None
    #: int `[B]`: how much of a string each prompt ends with.
    start: Tensor
    criteria: Sequence[Any]


class Run(NamedTuple):
    """One generation: everything that is settled before the first pass."""

    model: Any
    asked: GenerationConfig
    strategy: Strategy
    plan: Plan
    prompt: Prompt
    rules: Mapping[str, Rule]
    #: float64 `[B, N, draws]`; None where nothing is drawn.
    uniforms: Tensor | None
    stops: Stops
    #: Keys and values of the first columns, from an earlier call.
    past: Cache | None
    #: The fast form of the decoder, where there is one.
    packed: PackedDecoder | None
    #: The compiled pass of a step, if it was asked for.
    program: FixedPass | None = None
    assistant: Any = None


def settle(model: Any, call: Call, options: Mapping[str, Any]) -> Run:
    """All of a call at once.

    Raises:
        ValueError: a bad option, prompt or argument, or no room for the tokens asked for.
    """
    V = model.config.vocab_size
    merged = call.settled(model.generation_config, options)
    strategy = _strategy(call, merged, V)
    still = evaluating(model)
    copies = merged.num_return_sequences if merged.num_beams == 1 else 1
    ids = _ids(call.input_ids, merged, model)
    shown = _shown(ids, call.attention_mask, merged.padding_id)
    past = _past(model, ids, shown, merged, call.past_key_values)
    start = _prompt(ids, shown, merged, call, V)
    virtual = _virtual(still, ids, shown)
    if virtual is not None:
        _check_virtual(merged, past)
        past, start = virtual, start.behind(virtual.get_seq_length())
    drafts = call.drafts(merged) if strategy is Strategy.ASSISTED else 0
    planned = _plan(merged, model.config, start, ids.shape[1], drafts)
    start = start.repeated(copies)
    one_row = strategy in (Strategy.GREEDY, Strategy.SAMPLING) and len(start.fed) == 1
    return Run(
        still,
        merged,
        strategy,
        planned,
        start,
        _rules(merged, planned, start, call, V),
        _uniforms(merged, planned, start, model),
        _stops(merged, start, call, V),
        past if past is None or copies == 1 else repeated_cache(past, copies),
        packed(model, planned.max_new_tokens, one_row) if merged.use_cache else None,
        assistant=call.assistant_model,
    )


def _strategy(call: Call, merged: GenerationConfig, vocab_size: int) -> Strategy:
    """How tokens are chosen; nobody drafts where functions may look at several rows together.

    Raises:
        ValueError: an assistant cannot draft for it.
    """
    strategy = call.strategy(merged, vocab_size)
    functions = (call.logits_processor, call.stopping_criteria, call.prefix_allowed_tokens_fn)
    if strategy is Strategy.ASSISTED and any(functions):
        return Strategy.SAMPLING if merged.do_sample else Strategy.GREEDY
    return strategy


# The prompt


def _ids(input_ids: Any, merged: GenerationConfig, model: Any) -> Tensor:
    if input_ids is not None:
        if not isinstance(input_ids, Tensor):
            input_ids = torch.as_tensor(input_ids, device=model.device)
        return _checked(input_ids, model.config.vocab_size)
    if merged.bos_token_id is None:
        raise arguments.missing_prompt()
    return torch.tensor([[merged.bos_token_id]], device=model.device)


def _checked(ids: Tensor, vocab_size: int) -> Tensor:
    found = arguments.Given(tuple(ids.shape), str(ids.dtype), ids.is_floating_point())
    arguments.check_prompt(found)
    check_ids(ids, vocab_size)
    return ids


def _shown(ids: Tensor, mask: Any, padding: int | None) -> Tensor:
    """Bool `[B, P]`."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool) if padding is None else ids != padding
    shown: Tensor = torch.as_tensor(mask, device=ids.device)
    arguments.check_prompt_mask(tuple(shown.shape), tuple(ids.shape))
    if bool(((shown != 0) & (shown != 1)).any()):
        raise arguments.unknown_mask_values()
    return shown != 0


def _prompt(
    ids: Tensor, shown: Tensor, merged: GenerationConfig, call: Call, vocab_size: int
) -> Prompt:
    """The rows as asked and, under guidance, the rows without their prompt below them."""
    fed = ids
    if merged.is_guided:
        others, are_shown = _without_prompt(ids, shown, merged, call, vocab_size)
        width = max(ids.shape[1], others.shape[1])
        fed = torch.cat((_widened(ids, width), _widened(others, width)))
        shown = torch.cat((_widened(shown, width), _widened(are_shown, width)))
    real = shown[: len(ids)]
    # False before True: padding first, then the real tokens in their order.
    order = real.long().argsort(dim=1, stable=True)
    text = fed[: len(ids)].gather(1, order).masked_fill(~real.gather(1, order), -1)
    return Prompt(ids, text, fed, None if bool(shown.all()) else shown)


def _without_prompt(
    ids: Tensor, shown: Tensor, merged: GenerationConfig, call: Call, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """What the rows without their prompt begin with: `[B, Q]` ids and which of them are real."""
    given_ids, mask = call.negative_prompt_ids, call.negative_prompt_attention_mask
    if given_ids is None:
        # The last real token, or any where there is none: then the plan refuses the row.
        places = torch.arange(ids.shape[1], device=ids.device)
        last = torch.where(shown, places, 0).amax(1, keepdim=True)
        return ids.gather(1, last), torch.ones_like(last, dtype=torch.bool)
    arguments.check_negative_prompt(tuple(given_ids.shape), len(ids))
    given_ids = _checked(given_ids, vocab_size).to(ids)
    return given_ids, _shown(given_ids, mask, merged.padding_id)


def _widened(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (width - x.shape[1], 0))


def _plan(
    merged: GenerationConfig, config: Any, start: Prompt, given_width: int, drafts: int
) -> Plan:
    R, P = start.fed.shape
    lengths = [P] * R if start.shown is None else start.shown.sum(1).tolist()
    planned = plan(merged, config, prompt_length=given_width, row_lengths=lengths, drafts=drafts)
    if given_width == P:
        return planned
    # Hidden columns, which a wide negative prompt makes, count in no length that was asked for.
    new = merged.merged(max_new_tokens=planned.max_new_tokens, max_length=None, min_length=None)
    wider = plan(new, config, prompt_length=P, row_lengths=lengths, drafts=drafts)
    return wider._replace(min_new_tokens=planned.min_new_tokens)


def _past(
    model: Any, ids: Tensor, shown: Tensor, merged: GenerationConfig, given_past: Any
) -> Cache | None:
    """The cache of an earlier call, which holds the first columns of the prompt."""
    past = Cache.of(given_past, model.config.num_hidden_layers)
    if past is None:
        return None
    held = past.get_seq_length()
    arguments.check_past(held, len(past[0][0]), tuple(ids.shape))
    check_goes_on(merged)
    left = shown[:, held:].any(1)
    if not bool(left.all()):
        raise arguments.past_holds_row(int(left.long().argmin()))
    return past


def _virtual(model: Any, ids: Tensor, shown: Tensor) -> Cache | None:
    """The keys and values of virtual tokens that an adapter of PEFT puts before every text.

    While it generates, such an adapter takes the place of `prepare_inputs_for_generation`.
    """
    prepare = vars(model).get("prepare_inputs_for_generation")
    if prepare is None:
        return None
    inputs = prepare(ids, attention_mask=shown.long())
    embeds = inputs.get("inputs_embeds")
    if embeds is not None:
        first = embeds[:, : embeds.shape[1] - ids.shape[1]]
        inputs = model.model(inputs_embeds=first, use_cache=True, return_dict=True)
    return Cache.of(inputs.get("past_key_values"), model.config.num_hidden_layers)


def _check_virtual(merged: GenerationConfig, past: Cache | None) -> None:
    """See that all that is asked for knows tokens without ids.

    Raises:
        ValueError: something does not.
    """
    for option, clashes in (
        ("past_key_values", past is not None),
        ("use_cache=False", not merged.use_cache),
        ("guidance_scale", merged.is_guided),
        ("penalty_alpha", bool(merged.penalty_alpha)),
        ("output_attentions", merged.output_attentions),
        ("output_hidden_states", merged.output_hidden_states),
    ):
        if clashes:
            raise ValueError(
                f"an adapter of virtual tokens does not go with {option}, which knows tokens with "
                "ids alone; leave one of the two out"
            )


def repeated_cache(past: Cache, copies: int) -> Cache:
    """A cache in which every row stands so many times."""
    pairs = [(k.repeat_interleave(copies, 0), v.repeat_interleave(copies, 0)) for k, v in past]
    return cast(Cache, Cache.of(pairs, len(pairs)))


# Rules, draws and stops


def _rules(
    merged: GenerationConfig, planned: Plan, start: Prompt, call: Call, vocab_size: int
) -> dict[str, Rule]:
    """The active rules, in the order in which scores pass through them."""
    known = call.known_tokens(vocab_size)
    takes = given(merged, planned, vocab_size=vocab_size, known=known)
    of_caller = {
        "prefix_allowed_tokens_fn": call.prefix_allowed_tokens_fn,
        "logits_processor": call.logits_processor,
    }
    result: dict[str, Rule] = {}
    for name in ORDER:
        if of_caller.get(name):
            result[name] = partial(_applied, getattr(rules, name), (of_caller[name],))
        elif name in merged.rules or (name == "vocabulary" and known < vocab_size):
            rule = getattr(rules, name, None) or getattr(cuts, name)
            result[name] = partial(_applied, rule, _arrays(takes[name], start.given.device))
    return result


def _applied(
    rule: Callable[..., Tensor], takes: tuple[Any, ...], scores: Tensor, seen: Seen
) -> Tensor:
    return rule(scores, seen, *takes)


def _arrays(values: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """Numbers as Python's, so that nothing waits for an accelerator; arrays as tensors."""
    return tuple(x.item() if x.ndim == 0 else torch.from_numpy(x).to(device) for x in values)


def _uniforms(merged: GenerationConfig, planned: Plan, start: Prompt, model: Any) -> Tensor | None:
    if not merged.do_sample:
        return None
    draws = merged.candidates if merged.num_beams > 1 else 1
    numbers = uniforms(merged.seed, len(start.given), planned.max_new_tokens, draws)
    on_device = torch.from_numpy(numbers).to(start.given.device)
    return agreed(on_device, next(model.parameters()))


def _stops(merged: GenerationConfig, start: Prompt, call: Call, vocab_size: int) -> Stops:
    device = start.given.device
    tokens = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    tokens[list(merged.stops)] = True
    begun = torch.zeros(len(start.text), dtype=torch.long, device=device)
    criteria, table = call.stopping_criteria or (), call.stop_table(merged, vocab_size)
    if table is None:
        return Stops(tokens, None, begun, criteria)
    rows = ([i for i in row if i >= 0] for row in start.text.tolist())
    begun = torch.tensor([table.start(row) for row in rows], device=device)
    return Stops(tokens, torch.from_numpy(table.after).to(device), begun, criteria)
