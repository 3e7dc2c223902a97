"""Short fits of the experts of `joint_world`, in this process and as a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_wp.joint.fit import fit
from mergekit_wp.joint.request import FitRequest
from tests.joint_world import NAMES
from tests.test_scoring import Quiet


def run(world: Path, out: Path, said: Quiet | None = None, **options: Any) -> None:
    settings: dict[str, Any] = {
        "recipe": world / "recipe.yml",
        "prompts": tuple((name, world / f"{name}.jsonl") for name in NAMES),
        "out": out,
        "device": "cpu",
        "prompts_a_step": 2,
        "steps": 11,
        **options,
    }
    fit(FitRequest(**settings), said or Quiet())


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes().replace(str(folder).encode(), b"OUT")
        for path in sorted(folder.iterdir())
    }


def line(world: Path, out: Path, *more: str) -> list[str]:
    prompts = [f"--prompts={name}={world / f'{name}.jsonl'}" for name in NAMES]
    recipe, places = str(world / "recipe.yml"), (f"--out={out}", "--device=cpu")
    return ["fit", recipe, "--prompts-a-step=2", "--steps=12", *prompts, *places, *more]
