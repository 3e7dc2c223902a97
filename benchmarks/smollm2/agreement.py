"""Divergence against answers: see benchmarks/family_agreement.py.

``python -m benchmarks.smollm2.agreement`` merges, measures and prints; it resumes.
"""

from benchmarks.family_agreement import main
from benchmarks.smollm2.paths import SMOLLM2

if __name__ == "__main__":
    main(SMOLLM2)()
