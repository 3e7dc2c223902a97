"""Patch sweeps: record a model once, patch a component, replay only what follows.

Weight swaps, activation swaps, gradients and slopes, for any decoder that `architectures` declares.
"""
