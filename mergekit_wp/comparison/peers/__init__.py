"""Merge methods that mergekit does not offer, each by its authors' formula, in pure functions.

A peer may first learn something (a threshold, coefficients, weights), from task vectors alone or
from the experts' prompts; then every tensor is merged by itself. `table` lists them with grids.
"""
