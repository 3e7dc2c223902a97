"""Experts scored or fitted together, by one name for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_wp.joint.company import score_company
from mergekit_wp.joint.fit import fit
from mergekit_wp.joint.request import CompanyRequest, FitRequest
from tests.test_company import NAMES
from tests.test_scoring import Quiet

COMMANDS = ("company", "fit")


def run(command: str, world: Path, out: Path, said: Quiet | None = None, **options: Any) -> None:
    given: dict[str, Any] = {
        "recipe": world / "recipe.yml",
        "prompts": tuple((name, world / f"{name}.jsonl") for name in NAMES),
        "out": out,
        "device": "cpu",
        **options,
    }
    if command == "company":
        settings = {"batch_size": 3, "path_steps": 3} | given
        score_company(CompanyRequest(**settings), said or Quiet())
    else:
        settings = {"prompts_a_step": 2, "steps": 11} | given
        fit(FitRequest(**settings), said or Quiet())


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes().replace(str(folder).encode(), b"OUT")
        for path in sorted(folder.iterdir())
    }


def line(command: str, world: Path, out: Path, *more: str) -> list[str]:
    whole = {
        "company": ["score", f"--company={world / 'recipe.yml'}", "--batch-size=3"],
        "fit": ["fit", str(world / "recipe.yml"), "--prompts-a-step=2", "--steps=12"],
    }
    prompts = [f"--prompts={name}={world / f'{name}.jsonl'}" for name in NAMES]
    return [*whole[command], *prompts, f"--out={out}", "--device=cpu", *more]
