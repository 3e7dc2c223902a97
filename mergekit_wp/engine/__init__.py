"""Patch sweeps: record a model once, patch a component, replay only what follows."""
