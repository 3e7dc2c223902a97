"""Where the benchmark reads and writes."""

from __future__ import annotations

from benchmarks.family import Family

SMOLLM2 = Family("smollm2", ("instruction", "math", "code"))
BUILD, BASE = SMOLLM2.build, SMOLLM2.base
EXPERT = BUILD / "caps"
PROMPTS = BUILD / "prompts"
SCORES = BUILD / "caps.safetensors"
