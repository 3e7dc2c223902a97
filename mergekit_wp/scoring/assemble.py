"""Put the results of a run into a score file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mergekit_wp.files.manifest import Agreement, Manifest, ModelId, Scale
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.pair import Pair
from mergekit_wp.prompts import PromptFile
from mergekit_wp.runs.command import command_of, versions
from mergekit_wp.runs.references import References
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.sweeps import SweepRun
from mergekit_wp.statistics import between_halves
from mergekit_wp.terms import CriterionName


def score_tensors(run: SweepRun, pair: Pair, references: References) -> dict[str, torch.Tensor]:
    """All tensors of the score file."""
    tensors: dict[str, torch.Tensor] = {}
    for estimand, c, kind in run.changes:
        if kind not in run.request.kinds:
            continue
        scores, errors = run.scores(estimand, c, kind)
        tensors[f"{estimand}/{c}/{kind}"] = scores.float()
        if run.context.n_prompts > 1:
            tensors[f"{estimand}/{c}/{kind}.se"] = errors.float()
    tensors["delta_norm"] = torch.tensor(list(pair.delta_norm.values()), dtype=torch.float32)
    anchor = references.targets[0].anchor
    if anchor is not None:
        tensors["anchor/vector"] = anchor.vector.float().cpu()
    return tensors


def make_manifest(
    request: ScoreRequest,
    pair: Pair,
    prompts: PromptFile,
    criteria: tuple[CriterionName, ...],
    references: References,
    run: SweepRun,
    created: str,
) -> Manifest:
    """The manifest of the score file of an expert scored alone."""
    return Manifest(
        **common_fields(request, pair, prompts, references),
        criteria=criteria,
        estimands=request.estimand,
        anchor=references.anchor,
        fidelity=run.fidelity,
        noise_floor=run.noise,
        completeness=run.completeness,
        stability=tuple(_halves(run)),
        company=None,
        command=command_of(request),
        created=created,
    )


def _halves(run: SweepRun) -> Iterator[Agreement]:
    """How alike the rankings by random halves of the prompts are, kind by kind."""
    for (estimand, c, kind), changes in run.changes.items():
        if kind not in run.request.kinds:
            continue
        distance = run.context.references.values[c].distance.double().cpu().numpy()
        found = between_halves(changes.flatten(1).numpy(), distance, run.request.seed)
        if found is not None:
            yield Agreement(
                against="halves",
                name="",
                estimand=estimand,
                criterion=c,
                kind=kind,
                **vars(found),
            )


def common_fields(
    request: ScoreRequest, pair: Pair, prompts: PromptFile, references: References
) -> dict[str, Any]:
    """What every manifest says: the models, the prompts, the reference values."""
    dims = pair.partition.dims
    return {
        "base": model_id(pair.base),
        "expert": model_id(pair.expert),
        "behavior": request.behavior or request.prompts.stem,
        "n_prompts": len(prompts.prompts),
        "prompts_sha256": prompts.sha256,
        "responses": prompts.responses,
        "architecture": pair.base.architecture,
        "n_layers": dims.n_layers,
        "n_heads": dims.n_heads,
        "n_kv_groups": dims.n_kv_groups,
        "n_neurons": dims.n_neurons,
        "hidden_size": int(pair.base.text_config.hidden_size),
        "kinds": request.kinds,
        "scale": {
            name: Scale(base=float(r.base.mean()), expert=float(r.expert.mean()))
            for name, r in references.values.items()
        },
        "tensor_names": pair.partition.tensor_names,
        "dtype": request.dtype,
        "seed": request.seed,
        "versions": versions(),
    }


def model_id(checkpoint: Checkpoint) -> ModelId:
    """What a manifest says of a checkpoint."""
    return ModelId(
        reference=checkpoint.name,
        revision=checkpoint.revision,
        config_hash=checkpoint.config_hash,
        weights_dtype=checkpoint.weights_dtype,
    )
