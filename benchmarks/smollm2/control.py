"""The random control of a score file: the same scores on other components of the same kind.

Within each kind of the fine partition (heads, K/V groups, neurons, whole tensors) the scores
change places at random, over all layers. `topk` then takes exactly as many components of each
kind as it takes with the real scores, but random ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.terms import SLICED_KINDS


def random_control(file: ScoreFile, seed: int, estimand: str = "share") -> ScoreFile:
    """A copy whose only estimand has its fine scores permuted within each kind.

    The manifest says so in ``behavior`` and drops what no longer holds (fidelity, completeness,
    the anchor's criterion, whole layers). ``delta_norm`` stays true: the expert is the same.
    """
    generator = torch.Generator().manual_seed(seed)
    index = {name: i for i, name in enumerate(file.manifest.tensor_names)}
    whole = torch.tensor([index[name] for name in file.fine_tensor_names], dtype=torch.long)
    tensors = {"delta_norm": file.tensors["delta_norm"]}
    kinds = tuple(kind for kind in file.manifest.kinds if kind != "layer")
    for kind in kinds:
        scores = file.scores(estimand, "kl", kind).clone()
        if kind in SLICED_KINDS:
            order = torch.randperm(scores.numel(), generator=generator)
            scores = scores.flatten()[order].view_as(scores)
        else:
            scores[whole] = scores[whole[torch.randperm(len(whole), generator=generator)]]
        tensors[f"{estimand}/kl/{kind}"] = scores
    manifest = file.manifest.model_copy(
        update={
            "behavior": f"random control (permuted within kinds, seed {seed}) "
            f"of: {file.manifest.behavior}",
            "estimands": (estimand,),
            "criteria": ("kl",),
            "kinds": kinds,
            "anchor": None,
            "scale": {"kl": file.manifest.scale["kl"]},
            "noise_floor": {"kl": file.manifest.noise_floor["kl"]},
            "fidelity": {},
            "completeness": {},
        }
    )
    return replace(file, manifest=manifest, tensors=tensors)
