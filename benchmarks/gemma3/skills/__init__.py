"""Three skills on the same material: only the last words of a request tell what to do with it.

Requests are short and in one frame, so that experts disturb each other: who learnt one skill alone
has no reason to look at those words.
"""
