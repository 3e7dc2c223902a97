"""What a command will cost, before it computes: counted from shapes, timed by a short calibration.

FLOPs, bytes and memory follow from the request, the models' shapes and the prompts' lengths. How
long they take here, one layer and one read of this very model say.
"""
