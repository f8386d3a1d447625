"""Decoding: one pass over the prompt, then one program that holds the whole loop."""

from opt_tf.generation.decoding import GenerationMixin, go_on, prefill, select, step
from opt_tf.generation.rules import draw

__all__ = ["GenerationMixin", "draw", "go_on", "prefill", "select", "step"]
