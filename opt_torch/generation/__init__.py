"""Decoding: one pass over the prompt, then one step a token over a cache of fixed room."""

from opt_torch.generation.decoding import GenerationMixin, fixed_step, prefill, select, step
from opt_torch.generation.rules import draw

__all__ = ["GenerationMixin", "draw", "fixed_step", "prefill", "select", "step"]
