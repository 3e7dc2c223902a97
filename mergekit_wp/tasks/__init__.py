"""What merged models are asked, and what counts as a right answer.

Items in JSONL files, tasks of lm-eval, rules of IFEval, and built-in behaviours.
"""
