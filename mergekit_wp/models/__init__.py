"""Checkpoints: found on disk or on the Hub, refused by name, streamed, placed and run.

A pair of them is compared before anything is measured; only one model is ever held in memory.
"""
