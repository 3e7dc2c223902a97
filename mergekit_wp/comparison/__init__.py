"""Merges by every method, measured on the same items, with paired intervals.

A plan is checked, its jobs run and kept, the best settings chosen, the table and page drawn.
"""
