"""`generate` and `stream`: prefill, then one step and one choice for each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from opt_core import arguments
from opt_core.generation import GenerationConfig, Plan, Streamer, plan, receiver, uniforms
from opt_core.outputs import GenerateOutput
from opt_torch.attention import Visible, choose
from opt_torch.decoder import Cache, Decoder, check_ids, positions_of
from opt_torch.generation.rules import State, draw, ruled
from opt_torch.linear import linear
from opt_torch.packed import PackedDecoder, packed
from opt_torch.weights import agreed

FixedStep = Callable[[Any, Tensor, Tensor, Tensor, Cache], tuple[Tensor, Cache]]


class GenerationMixin:
    """`generate` and `stream` for a model with `model.decoder` and `lm_head`."""

    generation_config: GenerationConfig

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Tensor | None = None,
        streamer: Streamer | Callable[[Tensor], None] | None = None,
        tokenizer: Sized | None = None,
        compiled: bool | str = False,
        **options: Any,
    ) -> Tensor | GenerateOutput:
        """Continue every row: `[B, P]` int -> `[B, P + n]`, the prompt included.

        Options are those of `GenerationConfig`; what is not given comes from `generation_config`,
        else from the model's own. Padding may be on either side and changes nothing. New tokens
        come after column P; a row that has chosen a stop token is filled with the pad id. Without
        `input_ids` every text starts with the bos token. `streamer` is called with the tokens `[B]`
        of each step. With a `tokenizer`, ids that it does not know are never chosen. `compiled`
        runs each step through `torch.compile` (True, or the name of a backend): its shapes are
        those of `Plan`, so one program serves every text of about the same length. With
        `return_dict_in_generate` the result is a record with `sequences` and `past_key_values`.

        Raises:
            ValueError: a bad option or prompt, no room for the tokens asked for (before anything
                is computed), or scores that are NaN.
        """
        run = _Run.of(self, input_ids, attention_mask, generation_config, tokenizer, options)
        if compiled:
            run = run.compiled_by("inductor" if compiled is True else compiled)
        put, end = receiver(streamer, run.prompt, Tensor.cpu)
        state = None
        for state in run.states():
            put(state.tokens[:, state.length - 1])
        end()
        assert state is not None
        sequences = state.tokens[:, : state.length]
        if run.generation.return_dict_in_generate:
            return GenerateOutput(sequences=sequences, past_key_values=state.cache.counted())
        return sequences

    def stream(
        self,
        input_ids: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Tensor | None = None,
        tokenizer: Sized | None = None,
        **options: Any,
    ) -> Iterator[Tensor]:
        """As `generate`, but an iterator over the tokens `[B]` of each step."""
        with torch.no_grad():
            run = _Run.of(self, input_ids, attention_mask, generation_config, tokenizer, options)
        return _newest_tokens(run.states())

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, **inputs: Any
    ) -> dict[str, Any]:
        """The arguments of the next call in a decoding loop of one's own (PEFT asks for it)."""
        if past_key_values is not None and len(past_key_values):
            input_ids = input_ids[:, past_key_values.get_seq_length() :]
        return {"input_ids": input_ids, "past_key_values": past_key_values, **inputs}


class _Run(NamedTuple):
    """One generation: everything that is settled before the first pass."""

    model: Any
    generation: GenerationConfig
    plan: Plan
    prompt: Tensor  # int [B, P]
    shown: Tensor | None  # bool [B, P]; None where nothing is padded
    uniforms: Tensor | None  # float64 [B, N]; None for a greedy choice
    known: int  # ids from here on are never chosen
    stops: Tensor  # int [n]: the stop tokens
    packed: PackedDecoder | None  # the fast form of the decoder, where there is one
    program: FixedStep | None  # the compiled step, if it was asked for

    @classmethod
    def of(
        cls,
        model: Any,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        generation: GenerationConfig | None,
        tokenizer: Sized | None,
        options: dict[str, Any],
    ) -> _Run:
        config = model.config
        merged = (generation or model.generation_config).merged(**options)
        prompt = _prompt(input_ids, merged, config.vocab_size, model.device)
        shown = _shown(prompt, attention_mask, merged.padding_id)
        lengths = shown.sum(1).tolist() if shown is not None else [prompt.shape[1]] * len(prompt)
        planned = plan(merged, config, prompt_length=prompt.shape[1], row_lengths=lengths)
        copies = merged.num_return_sequences
        if copies > 1:
            prompt = prompt.repeat_interleave(copies, 0)
            shown = None if shown is None else shown.repeat_interleave(copies, 0)
        drawn = None
        if merged.do_sample:
            numbers = uniforms(merged.seed, len(prompt), planned.max_new_tokens)[..., 0]
            drawn = agreed(torch.from_numpy(numbers).to(prompt.device), next(model.parameters()))
        known = config.vocab_size if tokenizer is None else len(tokenizer)
        stops = torch.tensor(merged.stops, dtype=prompt.dtype, device=prompt.device)
        form = packed(model, planned.max_new_tokens) if merged.use_cache else None
        return cls(model, merged, planned, prompt, shown, drawn, known, stops, form, None)

    def compiled_by(self, backend: str) -> _Run:
        """The same run with its steps compiled.

        Raises:
            ValueError: it has no cache, so that its shapes grow.
        """
        if not self.generation.use_cache:
            raise ValueError("compiled steps need the cache: leave use_cache at True")
        return self._replace(packed=None, program=_compiled(backend))

    def states(self) -> Iterator[State]:
        """The state after each choice."""
        state, scores = prefill(self)
        for count in range(self.plan.max_new_tokens):
            state = select(self, state, scores, count)
            yield state
            if self.generation.stops and bool(state.finished.all()):
                return
            if count + 1 < self.plan.max_new_tokens:
                state, scores = step(self, state)


def _newest_tokens(states: Iterator[State]) -> Iterator[Tensor]:
    while True:
        # Not around the loop: between two tokens the caller's own code runs.
        with torch.no_grad():
            state = next(states, None)
        if state is None:
            return
        yield state.tokens[:, state.length - 1]


def prefill(run: _Run) -> tuple[State, Tensor]:
    """The state of a prompt, and the scores `[B, V]` after each row's last real token."""
    B, P = run.prompt.shape
    N, S, device = run.plan.max_new_tokens, run.plan.capacity, run.prompt.device
    tokens = run.prompt.new_full((B, P + N), run.generation.fill)
    tokens[:, :P] = run.prompt
    mask = torch.zeros(B, S, dtype=torch.bool, device=device)
    mask[:, :P] = True if run.shown is None else run.shown
    state = State(
        tokens=tokens,
        length=cast(Tensor, P),
        finished=torch.zeros(B, dtype=torch.bool, device=device),
        positions=mask.sum(1),
        mask=mask,
        cache=Cache(run.model.config.num_hidden_layers, capacity=S),
    )
    state, scores = _whole_pass(run, state)
    return (state if run.program is None else state._replace(cache=state.cache.fixed())), scores


def step(run: _Run, state: State) -> tuple[State, Tensor]:
    """Feed every row's newest token: the state, and the scores `[B, V]` of the next."""
    if not run.generation.use_cache:
        return _whole_pass(run, state)
    newest = state.tokens[:, state.length - 1, None]  # [B, 1]
    positions = state.positions[:, None]
    if run.program is not None:
        # Contiguous, since the stride of a column would tell the program how long the text gets.
        newest = newest.contiguous()
        scores, cache = run.program(run.model, newest, positions, state.mask, state.cache)
        return state._replace(cache=cache, positions=state.positions + 1), scores
    hidden, cache = _decode(run, newest, positions, state)
    state = state._replace(cache=cache, positions=state.positions + 1)
    return state, _scores(run, hidden[:, -1])


def fixed_step(
    model: Any, newest: Tensor, positions: Tensor, mask: Tensor, cache: Cache
) -> tuple[Tensor, Cache]:
    """A step whose shapes do not depend on how far it is.

    `[B, 1]` tokens and positions, bool `[B, S]` mask -> `[B, V]` scores. The cache is one of fixed
    shapes, and is written in place.
    """
    decoder: Decoder = model.model.decoder
    cache = cache.extended(1)
    embeds = decoder.embed_tokens(newest)
    attend = choose(
        model.attn_implementation,
        Visible(cache.start, 1, mask.shape[1], mask),
        dropout=0.0,
        weights=False,
        dtype=embeds.dtype,
        device=embeds.device,
    )
    nothing: list[Tensor | None] = [None] * len(decoder.layers)
    out = decoder(embeds, positions, attend, cache, nothing, False)
    return model.lm_head(out.last[:, -1]), cache


@lru_cache(maxsize=8)
def _compiled(backend: str) -> FixedStep:
    return torch.compile(fixed_step, backend=backend, fullgraph=True, dynamic=False)


def _whole_pass(run: _Run, state: State) -> tuple[State, Tensor]:
    """Feed all columns so far, and score what follows each row's last real token."""
    length = int(state.length)
    shown = state.mask[:, :length]
    hidden, cache = _decode(run, state.tokens[:, :length], positions_of(shown, length), state)
    places = torch.arange(length, device=shown.device).expand_as(shown)
    last = torch.where(shown, places, 0).amax(1)
    rows = torch.arange(len(last), device=last.device)
    scores = _scores(run, hidden[rows, last])  # only these: [B, V], not [B, P, V]
    return (state._replace(cache=cache) if run.generation.use_cache else state), scores


def _decode(run: _Run, ids: Tensor, positions: Tensor, state: State) -> tuple[Tensor, Cache]:
    """`[B, T]` ids that follow the state's cache -> `[B, T, E]`, and the cache that holds them."""
    decoder: Decoder = run.model.model.decoder
    T = ids.shape[1]
    cache = state.cache.extended(T)
    held = cache.get_seq_length()
    embeds = decoder.embed_tokens(ids)
    attend = choose(
        run.model.attn_implementation,
        Visible(held - T, T, held, None if run.shown is None else state.mask[:, :held]),
        dropout=0.0,
        weights=False,
        dtype=embeds.dtype,
        device=embeds.device,
    )
    if run.packed is not None:
        return run.packed(embeds, positions, attend, cache), cache
    nothing: list[Tensor | None] = [None] * len(decoder.layers)
    out = decoder(embeds, positions, attend, cache, nothing, False)
    return out.last, cache


def _scores(run: _Run, last: Tensor) -> Tensor:
    """`[B, E]` hidden states of the last tokens -> `[B, V]`."""
    return linear(run.model.lm_head, last) if run.packed is None else run.packed.head(last)


def select(run: _Run, state: State, scores: Tensor, count: int) -> State:
    """Choose the token of every row from its scores, and note it."""
    scores = ruled(
        scores,
        state,
        run.generation,
        known=run.known,
        suppresses_stops=count < run.plan.min_new_tokens,
    )
    # Of equal scores argmax takes the lowest id.
    chosen = scores.argmax(1) if run.uniforms is None else draw(scores, run.uniforms[:, count])
    if bool(scores.gather(1, chosen[:, None]).isnan().any()):
        raise arguments.nan_scores(int(state.length))
    chosen = chosen.masked_fill(state.finished, run.generation.fill)
    state.tokens[:, state.length] = chosen
    state.mask[:, state.length] = True
    finished = state.finished | torch.isin(chosen, run.stops)
    return state._replace(length=state.length + 1, finished=finished)


def _prompt(
    input_ids: Tensor | None,
    generation: GenerationConfig,
    vocab_size: int,
    device: torch.device,
) -> Tensor:
    if input_ids is not None:
        is_float = input_ids.is_floating_point()
        arguments.check_prompt(
            arguments.Given(tuple(input_ids.shape), str(input_ids.dtype), is_float)
        )
        check_ids(input_ids, vocab_size)
        return input_ids
    if generation.bos_token_id is None:
        raise arguments.missing_prompt()
    return torch.tensor([[generation.bos_token_id]], device=device)


def _shown(prompt: Tensor, mask: Tensor | None, padding: int | None) -> Tensor | None:
    """Bool `[B, P]`, or None where nothing is padded."""
    if mask is None:
        shown = torch.ones_like(prompt, dtype=torch.bool) if padding is None else prompt != padding
    else:
        arguments.check_prompt_mask(tuple(mask.shape), tuple(prompt.shape))
        shown = mask.to(prompt.device) != 0
    return None if bool(shown.all()) else shown
