"""What every measuring command shares: one opening, and what is kept of it.

Two checkpoints, prompts in tokens, reference values, recorded runs, and a journal of what is done.
"""
