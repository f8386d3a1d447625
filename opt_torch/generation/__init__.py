"""Decoding: one pass over the prompt, then one step a token over a cache of fixed room."""

from opt_torch.generation.mixin import GenerationMixin

__all__ = ["GenerationMixin"]
