"""The merge method `weight_patching` inside mergekit, and recipes checked before the first hour.

Scores become gates (`fusion`), gates become merged weights, tensor by tensor.
"""
