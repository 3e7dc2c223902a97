"""A second real family: see README.md."""

import os

# Threads that wait should sleep, not spin: on a shared machine spinning made generation several
# times slower. It has to be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
