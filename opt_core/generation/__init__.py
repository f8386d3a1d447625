"""How decoding is asked for and planned: options, stopping rules, lengths, uniforms, the state."""

from opt_core.generation.configuration import GENERATION_FILE, GenerationConfig
from opt_core.generation.draws import fresh_seed, uniforms
from opt_core.generation.options import NEUTRAL, OPTIONS
from opt_core.generation.planning import DEFAULT_NEW_TOKENS, DecodeState, Plan, bucket, plan
from opt_core.generation.streaming import Streamer, receiver

__all__ = [
    "DEFAULT_NEW_TOKENS",
    "GENERATION_FILE",
    "NEUTRAL",
    "OPTIONS",
    "DecodeState",
    "GenerationConfig",
    "Plan",
    "Streamer",
    "bucket",
    "fresh_seed",
    "plan",
    "receiver",
    "uniforms",
]
