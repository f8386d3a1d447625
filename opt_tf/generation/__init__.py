"""Decoding: one pass over the prompt, then one program that holds the whole loop."""

from opt_tf.generation.decoding import Programs, loop, prefill, select, step
from opt_tf.generation.mixin import GenerationMixin

__all__ = ["GenerationMixin", "Programs", "loop", "prefill", "select", "step"]
