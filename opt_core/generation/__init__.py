"""How decoding is asked for and planned: options, rules, lengths, uniforms, the states."""

from opt_core.generation.answers import allowed_tokens
from opt_core.generation.calls import Call, check_assistant, check_goes_on, check_negative_prompt
from opt_core.generation.chain import ORDER, STEADY, Given, given
from opt_core.generation.configuration import GENERATION_FILE, GenerationConfig, Strategy
from opt_core.generation.constraints import Candidate, ForcedWords, Hypothesis
from opt_core.generation.draws import fresh_seed, uniforms
from opt_core.generation.options import NEUTRAL, OPTIONS
from opt_core.generation.planning import DEFAULT_NEW_TOKENS, Plan, bucket, plan, prompt_room
from opt_core.generation.states import BeamState, DecodeState
from opt_core.generation.stops import StopTable
from opt_core.generation.streaming import (
    Streamer,
    TextIteratorStreamer,
    TextStreamer,
    check_chunk,
    receiver,
)

__all__ = [
    "DEFAULT_NEW_TOKENS",
    "GENERATION_FILE",
    "NEUTRAL",
    "OPTIONS",
    "ORDER",
    "STEADY",
    "BeamState",
    "Call",
    "Candidate",
    "DecodeState",
    "ForcedWords",
    "GenerationConfig",
    "Given",
    "Hypothesis",
    "Plan",
    "StopTable",
    "Strategy",
    "Streamer",
    "TextIteratorStreamer",
    "TextStreamer",
    "allowed_tokens",
    "bucket",
    "check_assistant",
    "check_chunk",
    "check_goes_on",
    "check_negative_prompt",
    "fresh_seed",
    "given",
    "plan",
    "prompt_room",
    "receiver",
    "uniforms",
]
