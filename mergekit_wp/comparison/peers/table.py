"""The peers of this room by name, each with what its authors use, a grid, and how it merges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mergekit_wp.comparison.peers import (
    coefficients,
    finetune,
    fisher,
    masks,
    regmean,
    spectral,
    wudi,
)
from mergekit_wp.comparison.peers.peer import Peer
from mergekit_wp.comparison.rows import Setting

SPECTRAL_LAMBDAS = (0.3, 0.5, 0.7, 1.0, 1.3, 1.7, 2.2)
#: of peers that learn step by step where no fit is compared, which says how many it took
AS_A_FIT: Setting = {"steps": 60, "prompts_a_step": 8}


@dataclass(frozen=True)
class Entry:
    """A peer and its settings.

    Attributes:
        peer: how it merges.
        untuned: its authors' parameters.
        grid: values by parameter; the others stay as untuned.
    """

    peer: Peer
    untuned: Setting
    grid: Mapping[str, tuple[float | int | bool, ...]]


PEERS = {
    "tsv_merge": Entry(Peer(spectral.tsv_merge), {"lambda": 1.0}, {"lambda": SPECTRAL_LAMBDAS}),
    "iso_c": Entry(Peer(spectral.iso_c), {"lambda": 1.0}, {"lambda": SPECTRAL_LAMBDAS}),
    "consensus_ta": Entry(
        Peer(masks.consensus),
        {"mask_lambda": 0.2, "k": 2, "lambda": 0.4},
        {"mask_lambda": (0.2, 0.4, 0.6), "lambda": (0.3, 0.5, 0.7, 1.0)},
    ),
    "localize_and_stitch_dataless": Entry(
        Peer(masks.stitched, masks.kept_thresholds, ("sparsity",)),
        {"sparsity": 0.1},
        {"sparsity": (0.01, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)},
    ),
    "wudi": Entry(
        Peer(wudi.wudi), {"steps": 300, "rate": 1e-5}, {"rate": (1e-6, 1e-5, 1e-4, 1e-3)}
    ),
    "regmean": Entry(
        Peer(regmean.regressed, regmean.reg_mean, ("off_diagonal",), needs_prompts=True),
        {"off_diagonal": 0.5},
        {"off_diagonal": (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)},
    ),
    "regmean++": Entry(
        Peer(regmean.regressed, regmean.reg_mean_plus, ("off_diagonal",), needs_prompts=True),
        {"off_diagonal": 0.1},
        {"off_diagonal": (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)},
    ),
    "fisher": Entry(
        Peer(fisher.fisher_weighted, fisher.fisher_information, needs_prompts=True),
        {"floor": 1e-10, "normalize": False},
        {"floor": (1e-10, 1e-6), "normalize": (False, True)},
    ),
    "adamerging": Entry(
        Peer(
            coefficients.weighted,
            coefficients.ada_merging,
            ("start", "rate", "steps", "prompts_a_step"),
            needs_prompts=True,
        ),
        AS_A_FIT | {"start": 0.3, "rate": 1e-3},
        {"rate": (1e-3, 1e-2, 3e-2)},
    ),
    "expert_merging": Entry(
        Peer(
            coefficients.weighted,
            coefficients.expert_merging,
            ("start", "rate", "steps", "prompts_a_step"),
            needs_prompts=True,
        ),
        AS_A_FIT | {"start": 0.1, "rate": 1e-3},
        {"start": (0.1, 0.3), "rate": (3e-2, 1e-1, 3e-1, 1.0)},
    ),
    "localize_and_stitch": Entry(
        Peer(
            masks.stitched_by_masks,
            masks.trained_masks,
            ("sparsity", "bias", "rate", "epochs", "prompts_a_step"),
            needs_prompts=True,
        ),
        {"sparsity": 0.1, "bias": 3.0, "rate": 1e8, "epochs": 1, "prompts_a_step": 8},
        {"sparsity": (0.01, 0.1), "rate": (1e6, 1e7, 1e8)},
    ),
    "joint_finetuning": Entry(
        Peer(
            finetune.tuned,
            finetune.fine_tuned,
            ("rate", "steps", "prompts_a_step"),
            needs_prompts=True,
        ),
        AS_A_FIT | {"rate": 3e-5},
        {"rate": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)},
    ),
}
