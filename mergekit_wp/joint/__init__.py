"""All experts of a merge together: gates fitted by gradient.

One model in memory is moved, the merge itself; one score file for each expert is written.
"""
