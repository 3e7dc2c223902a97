"""Whole benchmarks as data: models, prompts and tasks in one file, from which one command goes.

A suite is read and placed, its experts are fitted together once, and the comparison follows.
"""
