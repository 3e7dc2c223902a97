"""A fit by a model that is spread or offloaded: the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_wp.models import resident as module
from mergekit_wp.models.placement import DISK, placement
from tests.joint_runs import files, run
from tests.joint_world import make_world
from tests.models import count_fetched

torch.set_num_threads(1)
QUICK = ("llama-tied", "gpt2")
SLOW = ("qwen2", "olmo2", "qwen3_moe", "gemma3")


@pytest.mark.parametrize(
    "family", [*QUICK, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]
)
def test_files_are_those_of_a_model_on_one_device(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    world = make_world(family, tmp_path)
    options: dict[str, Any] = {"unguarded": family == "gpt2"}
    run(world, tmp_path / "held", **options)
    places = (DISK, "cpu:0", "cpu")

    def instead(*args: Any) -> dict[str, str]:
        """Weights go to some places in turn; to torch, cpu:0 stands for memory beside a GPU."""
        return {name: places[i % 3] for i, name in enumerate(placement(*args))}

    monkeypatch.setattr(module, "placement", instead)
    names = count_fetched(monkeypatch)
    limits = {"device_map": "auto", "max_memory": {"cpu": 0}}
    run(world, tmp_path / "spread", **options, **limits)
    assert files(tmp_path / "spread") == files(tmp_path / "held")
    assert len(set(names)) > 10
