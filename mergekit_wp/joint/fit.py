"""Fit the component gates of several experts jointly.

Every expert is the teacher of its own behaviour: the objective is the mean over behaviours of the
normalised ``kl`` recovery of the merge, on prompts without labels. A guard's teacher is the base.
Joint gates by gradient go back to AdaMerging (arXiv 2310.02575), which fits one coefficient per
layer or task to the entropy of the answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from mergekit_wp.errors import UserError
from mergekit_wp.files import gatesfile
from mergekit_wp.files.atomic import written_whole
from mergekit_wp.files.gatesfile import GatedExpert, GatesFile, GatesManifest, Guard, Moment
from mergekit_wp.joint.ascent import FitState, Fitting
from mergekit_wp.joint.gates import Layout
from mergekit_wp.joint.members import Member, inputs_of, open_members
from mergekit_wp.joint.objective import guard_of, objective_of
from mergekit_wp.joint.request import GUARD_WEIGHT, FitRequest
from mergekit_wp.merging.plan import recipe_gates
from mergekit_wp.prompts import PromptFile, read_prompts
from mergekit_wp.runs.command import command_of, versions
from mergekit_wp.runs.journal import Journal
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.run import check_norms
from mergekit_wp.scoring.assemble import model_id
from mergekit_wp.terms import FINE_KINDS


def fit(request: FitRequest, progress: Progress) -> Path:
    """Fit the gates and write the gates file.

    Returns:
        A recipe that merges by it, beside it.

    Raises:
        UserError: any mistake in the inputs, before anything is fitted.
    """
    if request.guard_weight != GUARD_WEIGHT and not request.guards:
        raise UserError(
            f"--guard-weight {request.guard_weight:g} weighs guards, and none is given; add "
            "--guard FILE.jsonl"
        )
    recipe_path = _recipe_path(request)
    members = open_members(request, request.out.parent, progress)
    guards = [(path, read_prompts(path, request.max_prompts)) for path in request.guards]
    _check_names(members, request.guards)
    first = members[0].pair
    layout = Layout(first.partition, tuple(member.pair.changed for member in members))
    inputs = inputs_of(request, members)
    inputs |= {"guards": [prompts.sha256 for _, prompts in guards]}
    start = _start(request, members, layout)
    inputs |= {"start": hashlib.sha256(start.numpy().tobytes()).hexdigest()}
    with Journal(request.out, inputs, request.restart) as journal:
        if journal.resumed:
            progress.note(f"continuing the run in {journal.folder}")
        objectives = [objective_of(m, journal, progress, request.prompts_a_step) for m in members]
        objectives += [
            guard_of(path, prompts, members, request, journal, progress) for path, prompts in guards
        ]
        fitting = Fitting(request, members, objectives, layout, journal, progress)
        state = fitting.run(start)
        names = [objective.name for objective in objectives]
        result = GatesFile(
            _manifest(request, members, guards, state, names, journal.created),
            _tensors(members, layout, state.best),
        )
        gatesfile.write(result, request.out)
        _write_recipe(recipe_path, request, members)
        journal.discard()
    return recipe_path


def _start(request: FitRequest, members: Sequence[Member], layout: Layout) -> torch.Tensor:
    """Flat gates to start from: a constant, an earlier file's, or the recipe's own scores'."""
    try:
        value = float(request.start)
    except ValueError:
        value = None
    if value is not None:
        if not 0 <= value <= request.upper:
            raise UserError(f"--start {value:g} is not within 0 and {request.upper:g}")
        return torch.full((layout.size,), value, dtype=torch.float64)
    flat = torch.zeros(layout.size, dtype=torch.float64)
    parts = layout.unflat(flat)
    if request.start == "scores":
        for gates, found in zip(parts, recipe_gates(request.recipe), strict=True):
            for name, gate in found.items():
                layout.partition.put(gates, name, gate)
        return flat.clamp(0.0, request.upper)
    file = gatesfile.read(request.start)
    for e, (member, gates) in enumerate(zip(members, parts, strict=True)):
        if e >= len(file.manifest.experts):
            raise UserError(f"--start {request.start} has gates of {e} experts; {e + 1} are fitted")
        way_out = "start from gates of the same experts in the same order"
        check_norms(file.delta_norm(e), member.pair, f"gates file {request.start}", way_out)
        for kind in FINE_KINDS:
            gates[kind].copy_(file.gates(e)[kind])
    return flat.clamp(0.0, request.upper)


def _check_names(members: Sequence[Member], guards: Sequence[Path]) -> None:
    """Refuse behaviours that cannot be told apart: each is called after its prompt file.

    Raises:
        UserError: two files of one name.
    """
    files = [*(m.request.prompts for m in members), *guards]
    stems = [file.stem for file in files]
    for i, stem in enumerate(stems):
        if stem in stems[:i]:
            raise UserError(
                f"prompt files {files[stems.index(stem)]} and {files[i]} have the same name, after "
                f"which both behaviours would be called '{stem}'; rename one"
            )


def _recipe_path(request: FitRequest) -> Path:
    """Where the recipe that merges by the gates goes: beside them.

    Raises:
        UserError: the gates or the recipe that is read are there.
    """
    path = request.out.with_suffix(".yml")
    taken = {request.out.resolve(): "the gates file", request.recipe.resolve(): "the recipe"}
    if path.resolve() in taken:
        raise UserError(
            f"--out {request.out}: the recipe that merges by the gates is written to {path}, where "
            f"{taken[path.resolve()]} is; choose another name, such as gates.safetensors"
        )
    return path


def _write_recipe(path: Path, request: FitRequest, members: Sequence[Member]) -> None:
    """Write a recipe that merges by the gates."""
    recipe = {
        "merge_method": "weight_patching",
        "base_model": members[0].request.base,
        "models": [{"model": m.request.expert} for m in members],
        "parameters": {"gates": str(request.out)},
        "dtype": members[0].pair.base.weights_dtype,
    }
    with written_whole(path) as temporary:
        temporary.write_text(yaml.safe_dump(recipe, sort_keys=False))


def _tensors(
    members: Sequence[Member], layout: Layout, flat: torch.Tensor
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for e, (member, gates) in enumerate(zip(members, layout.unflat(flat), strict=True)):
        tensors |= {f"gate/{e}/{kind}": gates[kind].float() for kind in FINE_KINDS}
        norms = list(member.pair.delta_norm.values())
        tensors[f"delta_norm/{e}"] = torch.tensor(norms, dtype=torch.float32)
    return tensors


def _moments(seen: torch.Tensor, names: Sequence[str]) -> tuple[Moment, ...]:
    def part(values: torch.Tensor) -> dict[str, float] | None:
        if values.isnan().any():
            return None
        return dict(zip(names, values.tolist(), strict=True))

    return tuple(
        Moment(step=step, fitted=part(fitted), held_out=part(held_out))
        for step, (fitted, held_out) in enumerate(seen)
    )


def _manifest(
    request: FitRequest,
    members: Sequence[Member],
    guards: Sequence[tuple[Path, PromptFile]],
    state: FitState,
    names: Sequence[str],
    created: str,
) -> GatesManifest:
    pair = members[0].pair
    dims = pair.partition.dims
    return GatesManifest(
        base=model_id(pair.base),
        base_sha256=pair.base.weights_sha256(),
        experts=tuple(
            GatedExpert(
                model=model_id(m.pair.expert),
                weights_sha256=m.weights_sha256,
                behavior=str(m.request.behavior),
                prompts_sha256=m.prompts.sha256,
                n_prompts=len(m.prompts.prompts),
            )
            for m in members
        ),
        guards=tuple(
            Guard(behavior=path.stem, prompts_sha256=p.sha256, n_prompts=len(p.prompts))
            for path, p in guards
        ),
        guard_weight=request.guard_weight,
        architecture=pair.base.architecture,
        n_layers=dims.n_layers,
        n_heads=dims.n_heads,
        n_kv_groups=dims.n_kv_groups,
        n_neurons=dims.n_neurons,
        hidden_size=int(pair.base.text_config.hidden_size),
        tensor_names=pair.partition.tensor_names,
        upper=request.upper,
        start=request.start,
        rate=request.rate,
        penalty=request.penalty,
        prompts_a_step=request.prompts_a_step,
        best_step=state.best_step,
        history=_moments(state.seen, names),
        seed=request.seed,
        dtype=request.dtype,
        command=command_of(request),
        created=created,
        versions=versions(),
    )
