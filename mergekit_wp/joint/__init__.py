"""All experts of a merge together: the guided path, and gates fitted by gradient.

Both move one model in memory, the merge itself, and write one score file for each expert.
"""
