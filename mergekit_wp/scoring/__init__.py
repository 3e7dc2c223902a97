"""One expert alone: from two checkpoints and a prompt file to a score file.

Sweeps are made of blocks: exact swaps, first-order passes and steps of the share integral.
"""
