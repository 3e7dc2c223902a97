"""Who does what: sets swapped together, circuits of suppliers, anchors, stability of rankings.

These read a score file and measure its models again, to tell sources from what passes on.
"""
