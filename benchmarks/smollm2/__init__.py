"""A real small model, end to end: see README.md."""

import os

# Threads that wait must sleep, not spin: on a shared machine spinning made generation 8 times
# slower, and on a quiet one sleeping costs nothing. It has to be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
