"""The experts of a recipe, each with its base, its behaviour and its prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_wp.errors import UserError, option
from mergekit_wp.joint.cache import CachePlan
from mergekit_wp.joint.request import MembersRequest, NamedExperts
from mergekit_wp.merging.interface import differences, note_of
from mergekit_wp.merging.recipe import Experts
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.models.model_names import file_names, is_called
from mergekit_wp.models.pair import Pair
from mergekit_wp.prompts import Prompt, PromptSet, PromptSource, read_prompts, source_name
from mergekit_wp.runs.journal import Journal
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.references import References, measure_references
from mergekit_wp.runs.run import Run
from mergekit_wp.runs.warnings import warn_of_references
from mergekit_wp.scoring.request import ScoreRequest


@dataclass(frozen=True)
class Member:
    """One of the experts that are fitted together, with its behaviour.

    Attributes:
        name: of its score file.
        request: as if it were scored alone.
        run: its checkpoints and prompts.
    """

    name: str
    request: ScoreRequest
    run: Run

    @property
    def pair(self) -> Pair:
        """Base and expert."""
        return self.run.pair

    @property
    def prompts(self) -> PromptSet:
        """What elicits its behaviour."""
        return self.run.prompts

    @property
    def weights_sha256(self) -> str:
        """Hash of the expert's weights."""
        return self.run.expert_sha256


def open_members(
    request: MembersRequest, folder: Path | None, progress: Progress, date: str
) -> list[Member]:
    """Open all experts of a recipe with their prompts.

    Args:
        request: names the recipe and the prompts.
        folder: where a file of each expert would be written, if any is.
        progress: told how far it is.
        date: on which the run began.

    Raises:
        UserError: prompts that fit no expert, or several; two experts of one name or with the
            same weights; any mistake in a checkpoint or prompt file; a cache that cannot be.
    """
    members = [_open(name, r, progress, date) for name, r in requests_of(request, folder).items()]
    _check_alike(members)
    if request.cache_size is not None:
        CachePlan.of([member.pair for member in members], request.cache_size)
    config = (
        None if isinstance(request.recipe, NamedExperts) else Experts.read(request.recipe).config
    )
    base = members[0].pair.base.interface()
    differs = {
        member.pair.expert.name: found
        for member in members
        if (found := differences(member.pair.expert.interface(), base))
    }
    if line := note_of(members[0].pair.base.name, differs, config):
        progress.note(line)
    return members


def refuse_contrary(members: Sequence[Member], guards: Sequence[PromptSet]) -> None:
    """Refuse a guard whose every prompt is one of an expert's.

    Raises:
        UserError: names both.
    """
    for member in members:
        asked = {(_text(p), r) for p in member.prompts.prompts for r in (p.response, None)}
        for guard in guards:
            if all((_text(p), p.response) in asked for p in guard.prompts):
                raise UserError(
                    f"guard {guard.source} has no prompt but those of expert '{member.name}' "
                    f"({member.prompts.source}): the merge cannot answer them like the base and "
                    "like the expert; give a guard of other prompts"
                )


def _text(prompt: Prompt) -> str:
    return prompt.model_dump_json(include={"prompt"})


def measure(member: Member, journal: Journal, size: int, apart: Collection[int] = ()) -> References:
    """Base and expert on a member's prompts, by ``kl``.

    Args:
        member: the expert.
        journal: keeps its answers.
        size: prompts per batch.
        apart: which prompts are in batches of their own.

    Raises:
        UserError: base and expert do not differ on the prompts.
    """
    run, progress = member.run, member.run.progress
    resident = run.load()
    samples = run.samples(resident, journal, prefix=f"{member.name}.")
    progress.stage(f"base and {member.name} on the prompts", 1, "pair")
    references = AtOnce(size, progress.note).run(
        lambda at_once: measure_references(resident, samples, ("kl",), size, at_once, apart=apart)
    )
    progress.advance(1)
    resident.release()  # else it is held beside the next one until Python looks for cycles
    warn_of_references(references, progress, member.name)
    return references


def requests_of(request: MembersRequest, folder: Path | None) -> dict[str, ScoreRequest]:
    """One request per expert of the recipe, by its name; ``folder`` is where their files would be.

    Raises:
        UserError: prompts that fit no expert, or several; an expert without prompts; two experts
            of one name.
    """
    base, experts, where = named_experts(request)
    whole = "this fit" if isinstance(request.recipe, NamedExperts) else "the recipe"
    given: dict[str, PromptSource] = {}
    for key, prompts in request.prompts:
        key, prompts = _at_expert(experts, key, prompts)
        fitting = _called(experts, key)
        if len(fitting) != 1:
            known = ", ".join(
                experts if isinstance(request.recipe, NamedExperts) else experts.values()
            )
            what = "several experts" if fitting else "no expert"
            raise UserError(f"{_named(key, prompts)}: '{key}' is {what} of {whole}; it has {known}")
        if fitting[0] in given:
            raise UserError(f"{_named(key, prompts)}: '{key}' has prompts already")
        given[fitting[0]] = prompts
    found, behaviors = {}, _behavior_names(given)
    for name, model in experts.items():
        if name not in given:
            raise UserError(
                f"{where}: expert '{model}' has no prompts; add "
                f"{option('prompts', f'{name}=FILE.jsonl')}"
            )
        found[name] = ScoreRequest(
            base=base,
            expert=model,
            prompts=given[name],
            out=None if folder is None else folder / f"{name}.safetensors",
            behavior=behaviors[name],
            criterion=("kl",),
            max_prompts=request.max_prompts,
            dtype=request.dtype,
            device=request.device,
            device_map=request.device_map,
            max_memory=request.max_memory,
            ray=request.ray,
            seed=request.seed,
            verify=0,
            share_steps=1,
            max_new_tokens=request.max_new_tokens,
        )
    return found


def _behavior_names(prompts: Mapping[str, PromptSource]) -> dict[str, str]:
    """What each expert's behaviour is called: after its prompts, or itself where others share them.

    Experts of one task, such as runs of one trainer, are asked the same file.
    """
    names = {expert: source_name(source, expert) for expert, source in prompts.items()}
    often = Counter(names.values())
    return {expert: name if often[name] == 1 else expert for expert, name in names.items()}


def named_experts(request: MembersRequest) -> tuple[str, dict[str, str], str]:
    """The base, the experts by name, and what errors call the place that names them.

    Raises:
        UserError: two experts of one name.
    """
    if isinstance(request.recipe, NamedExperts):
        return request.recipe.base, dict(request.recipe.experts), "the experts"
    read, where = Experts.read(request.recipe), f"recipe {request.recipe}"
    found: dict[str, str] = {}
    for name, model in zip(file_names(read.models), read.models, strict=True):
        if name in found:
            raise UserError(
                f"{where}: the score files of '{found[name]}' and '{model}' would both be called "
                f"'{name}'; give one as a folder of another name"
            )
        found[name] = model
    return read.base, found, where


def _called(experts: Mapping[str, str], key: str) -> list[str]:
    return [key] if key in experts else [n for n, m in experts.items() if is_called(m, key)]


def _at_expert(
    experts: Mapping[str, str], key: str, prompts: PromptSource
) -> tuple[str, PromptSource]:
    """EXPERT=SOURCE parted at the last ``=`` that an expert stands before: names may have some."""
    if isinstance(prompts, Path):
        parts = f"{key}={prompts}".split("=")
        for end in range(len(parts) - 1, 0, -1):
            if _called(experts, name := "=".join(parts[:end])):
                return name, Path("=".join(parts[end:]))
    return key, prompts


def _named(key: str, prompts: PromptSource) -> str:
    if isinstance(prompts, Path):
        return option("prompts", f"{key}={prompts}")
    return f"prompts of '{key}'"


def _open(name: str, request: ScoreRequest, progress: Progress, date: str) -> Member:
    prompts = read_prompts(request.prompts, request.max_prompts, name, distinct=True)
    run = Run.open(request, request.base, request.expert, prompts, progress, date)
    run.pair.partition.dims.require_map("fitting gates")
    return Member(name, request, run)


def _check_alike(members: Sequence[Member]) -> None:
    seen: dict[str, Member] = {}
    for member in members:
        if (other := seen.setdefault(member.weights_sha256, member)) is not member:
            raise UserError(
                f"experts {other.name} ({other.request.expert}) and {member.name} "
                f"({member.request.expert}) have the same weights; experts that are fitted "
                "together have to differ, so leave one out"
            )
