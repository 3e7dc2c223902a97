"""The experts of a recipe, each with its base, its behaviour and its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mergekit_wp
from mergekit_wp.errors import UserError, option
from mergekit_wp.joint.request import MembersRequest
from mergekit_wp.merging.recipe import Experts
from mergekit_wp.models.backoff import fitting
from mergekit_wp.models.model_names import last_name
from mergekit_wp.models.pair import Pair
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import PromptFile, read_prompts
from mergekit_wp.runs.journal import Journal
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.references import References, measure_references
from mergekit_wp.runs.request import DTYPES
from mergekit_wp.runs.run import open_inputs
from mergekit_wp.runs.texts import Encoded, auto_batch_size, with_responses
from mergekit_wp.scoring.request import ScoreRequest


@dataclass(frozen=True)
class Member:
    """One expert of the company with its behaviour."""

    request: ScoreRequest
    prompts: PromptFile
    pair: Pair
    tokenizer: Any
    texts: Encoded
    weights_sha256: str

    @property
    def name(self) -> str:
        """Name of its score file."""
        return self.request.out.stem


def open_members(request: MembersRequest, folder: Path, progress: Progress) -> list[Member]:
    """Open all experts of a recipe with their prompts.

    Args:
        request: names the recipe and the prompt files.
        folder: where a file of each expert would be written.
        progress: told how far it is.

    Raises:
        UserError: prompts that fit no expert, or several; two experts of one name or with the
            same weights; any mistake in a checkpoint or prompt file.
    """
    members = [_open(r, progress) for r in _requests(request, folder)]
    _check_alike(members)
    return members


def inputs_of(request: MembersRequest, members: Sequence[Member]) -> dict[str, Any]:
    """All that the results depend on, by the names a user knows."""
    options = request.model_dump(mode="json", exclude={"out", "restart", "prompts", "recipe"})
    return {
        **options,
        "base weights": members[0].pair.base.weights_sha256(),
        "base config": members[0].pair.base.config_hash,
        "experts": {m.name: m.weights_sha256 for m in members},
        "expert configs": {m.name: m.pair.expert.config_hash for m in members},
        "prompts": {m.name: m.prompts.sha256 for m in members},
        "tokens": {m.name: m.texts.sha256() for m in members},
        "mergekit-wp": mergekit_wp.__version__,
    }


def measure(
    member: Member, journal: Journal, progress: Progress, size: int | None = None
) -> References:
    """Base and expert on a member's prompts, by ``kl``.

    Args:
        member: the expert.
        journal: keeps its answers.
        progress: told how far it is.
        size: prompts per batch; as many as fit where None.

    Raises:
        UserError: base and expert do not differ on the prompts.
    """
    request, pair = member.request, member.pair
    resident = ResidentModel(pair, DTYPES[request.dtype], request.device)
    samples = with_responses(
        request,
        member.texts,
        member.tokenizer,
        resident,
        journal,
        progress,
        prefix=f"{member.name}.",
    )
    vocabulary = pair.vocabulary
    size = size or request.batch_size or auto_batch_size(samples, vocabulary, request.device)
    progress.stage(f"base and {member.name} on the prompts", 1, "pair")
    _, references = fitting(
        size,
        lambda at_once: measure_references(
            resident, samples, ([], []), ("kl",), None, size, at_once
        ),
        progress.note,
    )
    progress.advance(1)
    return references


def _requests(request: MembersRequest, folder: Path) -> list[ScoreRequest]:
    """One request per expert of the recipe; ``folder`` is where their files would be.

    Raises:
        UserError: prompts that fit no expert, or several; an expert without prompts; two experts
            of one name.
    """
    experts = Experts.read(request.recipe)
    files: dict[str, Path] = {}
    for key, path in request.prompts:
        given = option("prompts", f"{key}={path}")
        fitting = [m for m in experts.models if key in (m, last_name(m), m.split("@")[0])]
        if len(fitting) != 1:
            known = ", ".join(experts.models)
            what = "several experts" if fitting else "no expert"
            raise UserError(f"{given}: '{key}' is {what} of the recipe; it has {known}")
        if fitting[0] in files:
            raise UserError(f"{given}: '{key}' has prompts already")
        files[fitting[0]] = path
    names = [last_name(model) for model in experts.models]
    found = []
    for model, name in zip(experts.models, names, strict=True):
        if model not in files:
            raise UserError(
                f"recipe {request.recipe}: expert '{model}' has no prompts; add "
                f"{option('prompts', f'{name}=FILE.jsonl')}"
            )
        if names.count(name) > 1:
            raise UserError(
                f"recipe {request.recipe}: two experts are called '{name}', so their score files "
                "would be too; give one as a folder of another name"
            )
        found.append(
            ScoreRequest(
                base=experts.base,
                expert=model,
                prompts=files[model],
                out=folder / f"{name}.safetensors",
                behavior=files[model].stem,
                criterion=("kl",),
                max_prompts=request.max_prompts,
                batch_size=request.batch_size,
                dtype=request.dtype,
                device=request.device,
                seed=request.seed,
                verify=0,
                share_steps=1,
                max_new_tokens=request.max_new_tokens,
            )
        )
    return found


def _open(request: ScoreRequest, progress: Progress) -> Member:
    prompts = read_prompts(request.prompts, request.max_prompts)
    opened = open_inputs(request.base, request.expert, prompts.prompts, request.prompts, progress)
    pair = opened.pair
    pair.partition.dims.require_map("scoring in company, or fitting gates,")
    progress.stage("hashing weights", 1, "expert")
    sha256 = pair.expert.weights_sha256()
    progress.advance(1)
    return Member(request, prompts, pair, opened.tokenizer, opened.texts, sha256)


def _check_alike(members: Sequence[Member]) -> None:
    seen: dict[str, str] = {}
    for member in members:
        if (other := seen.setdefault(member.weights_sha256, member.request.expert)) != (
            member.request.expert
        ):
            raise UserError(
                f"experts '{other}' and '{member.request.expert}' have the same weights; a company "
                "needs different experts"
            )
