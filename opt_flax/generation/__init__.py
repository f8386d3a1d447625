"""Decoding: one pass over the prompt, then the loop of steps and choices as one program."""

from opt_flax.generation.mixin import GenerationMixin

__all__ = ["GenerationMixin"]
