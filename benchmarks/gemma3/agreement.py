"""Divergence against answers: see benchmarks/family_agreement.py.

``python -m benchmarks.gemma3.agreement`` merges, measures and prints; it resumes.
"""

from benchmarks.family_agreement import main
from benchmarks.gemma3.tasks import GEMMA3

if __name__ == "__main__":
    main(GEMMA3)()
