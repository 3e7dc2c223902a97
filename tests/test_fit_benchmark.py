"""One gate a tensor, as the benchmarks fit it, against the differences it multiplies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.fitting import fit_by_tensor
from mergekit_wp.joint.request import FitRequest
from tests.joint_world import NAMES, load, make_world
from tests.test_scoring import Quiet

torch.set_num_threads(1)


def test_a_tensor_moves_as_a_whole(tmp_path: Path) -> None:
    world = make_world("qwen2", tmp_path)
    guard = tmp_path / "plain.jsonl"
    guard.write_text(
        "".join(json.dumps({"prompt": "ab" * n, "response": "dc"}) + "\n" for n in range(1, 5))
    )
    request = FitRequest(
        recipe=world / "recipe.yml",
        prompts=tuple((name, world / f"{name}.jsonl") for name in NAMES),
        out=tmp_path / "gates",
        dtype="float64",
        prompts_a_step=2,
        steps=20,
        rate=0.05,
        guards=(guard,),
        limit=10.0,
    )
    model, state = fit_by_tensor(request, 0.0, Quiet())
    base, *experts = [dict(load(world / n).named_parameters()) for n in ("base", *NAMES)]
    found = []
    for name, weight in model.named_parameters():
        moved = (weight.detach() - base[name].detach()).flatten().numpy()
        theirs = [(e[name] - base[name]).detach().flatten().numpy() for e in experts]
        gates, *_ = np.linalg.lstsq(np.stack(theirs, 1), moved, rcond=None)
        np.testing.assert_allclose(np.stack(theirs, 1) @ gates, moved, atol=1e-9)
        found += [g for g, d in zip(gates, theirs, strict=True) if np.abs(d).max() > 0]
    # every tensor has a gate of its own, and the best ones are in the model
    assert len(np.unique(np.round(found, 6))) > len(found) // 2
    kept = state.kept[state.kept != 0]
    np.testing.assert_allclose(np.sort(found), np.sort(kept.numpy()), atol=1e-6)
    assert state.seen.shape[-1] == len(NAMES) + 1
    first, kept = state.seen[0, 1, 0, :-1], state.seen[state.judge.step, 1, 0, :-1]
    assert kept.mean() < first.mean()
