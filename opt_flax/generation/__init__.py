"""Decoding: one pass over the prompt, then one step a token, the whole loop in one program."""

from opt_flax.generation.decoding import GenerationMixin, loop, prefill, select, step
from opt_flax.generation.rules import draw

__all__ = ["GenerationMixin", "draw", "loop", "prefill", "select", "step"]
