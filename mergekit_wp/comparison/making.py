"""Models for the comparison, ready to be asked: checkpoints, merges by mergekit or by a peer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias

import torch
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_wp.comparison.merging import (
    IN_MEMORY,
    EvaluationModel,
    keeps_shapes,
    merge_in_memory,
    merged_on_disk,
)
from mergekit_wp.comparison.methods import (
    OMEGA,
    OURS,
    TASK_ARITHMETIC,
    Method,
    configuration,
    peers,
)
from mergekit_wp.comparison.peers.merging import PeerMerges
from mergekit_wp.comparison.peers.prompted import PromptedExperts
from mergekit_wp.comparison.peers.sources import Sources
from mergekit_wp.comparison.plan import Plan
from mergekit_wp.comparison.results import Job
from mergekit_wp.comparison.rows import Cost, Setting, since
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.files.fit_section import Fit
from mergekit_wp.joint.judging import MOST
from mergekit_wp.joint.members import open_members
from mergekit_wp.joint.request import MembersRequest, NamedExperts
from mergekit_wp.merging.aim import activation_importance, apply_aim, untouched
from mergekit_wp.merging.interface import write_beside
from mergekit_wp.merging.model_references import data_of
from mergekit_wp.merging.recipe import score_texts
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.generation import TextInterface, read_tokenizer
from mergekit_wp.models.hub import local_path
from mergekit_wp.models.load import load_folder
from mergekit_wp.models.memory import AtOnce, is_out_of_memory
from mergekit_wp.runs.progress import NotesOnly, Progress
from mergekit_wp.runs.texts import find_tokenizer


class Made(NamedTuple):
    """A model in memory, how it is asked, and what its merge took; None for a checkpoint."""

    model: Any
    asked: TextInterface
    cost: Cost | None


#: a model while the context lasts
Ready: TypeAlias = AbstractContextManager[Made]


@dataclass
class Making:
    """Makes the models of a comparison, one at a time, all in the same memory where they fit.

    Attributes:
        plan: what is compared.
        folder: of the results; merges that are too large for memory come and go there.
        scratch: folder for what peers have learned, until the comparison ends.
        date: on which the comparison began.
        progress: told of what takes long.
        options: of mergekit, for all merges.
    """

    plan: Plan
    folder: Path
    scratch: Path
    date: str
    progress: Progress
    options: MergeOptions = field(default_factory=lambda: MergeOptions(quiet=True))

    def __post_init__(self) -> None:
        plan = self.plan
        self.base = Checkpoint(plan.base)
        self.evaluation = EvaluationModel(self.base, plan.eval_dtype, plan.device)
        self.tokenizer = find_tokenizer(
            map(Checkpoint, (plan.base, *plan.experts)), self.progress.note
        )
        self.in_memory = plan.in_memory
        if self.in_memory is None:
            parameters = sum(p.numel() for p in self.evaluation.model.parameters())
            self.in_memory = 4 * parameters <= IN_MEMORY
        self.peers = PeerMerges(self._sources(), self.scratch, dtype_from_name(plan.dtype))
        if any(method.needs_prompts for method in plan.methods):
            _ = self.peers.sources.prompted  # prompts that fit no expert are refused first

    def _sources(self) -> Sources:
        plan = self.plan
        experts = tuple(zip(plan.names, plan.experts, strict=True))

        def opened() -> PromptedExperts:
            request = MembersRequest.of(
                recipe=NamedExperts(base=plan.base, experts=experts),
                prompts=plan.prompts,
                device=plan.device,
                max_new_tokens=plan.max_new_tokens,
            )
            inside = NotesOnly(self.progress.note)  # the bar is that of the comparison's jobs
            return PromptedExperts(open_members(request, None, inside, self.date), inside.note)

        return Sources(
            base=self.base,
            experts=[Checkpoint(reference) for reference in plan.experts],
            names=self.evaluation.names,
            matrices=self.evaluation.matrices,
            device=plan.device,
            open_prompts=opened,
        )

    def of_job(self, job: Job) -> Ready:
        """The model that a job measures."""
        plan, setting = self.plan, json.loads(job.setting)
        checkpoints = {"base": plan.base}
        checkpoints |= {f"expert {n}": e for n, e in zip(plan.names, plan.experts, strict=True)}
        if job.model in checkpoints:
            return self.checkpoint(Checkpoint(checkpoints[job.model]))
        known = peers(len(plan.experts)) | {method.name: method for method in plan.methods}
        method = known.get(job.model)
        if job.model in plan.extra and (method is None or setting != method.untuned):
            return self.by_recipe(plan.extra[job.model], job.seed)
        return self.by_method(known[job.model], setting, job.seed)

    @contextmanager
    def checkpoint(self, checkpoint: Checkpoint) -> Iterator[Made]:
        """A checkpoint as it is, with the tokenizer of the merges where it has none."""
        asked = TextInterface.of(checkpoint.path, checkpoint.tokenizer() or self.tokenizer)
        yield Made(self.evaluation.load_checkpoint(checkpoint), asked, None)

    def recipe(self, method: Method, setting: Setting) -> MergeConfiguration | None:
        """What mergekit merges by, None for a method that mergekit does not have."""
        plan = self.plan
        if method.peer is not None:
            return None
        return configuration(method, setting, plan.base, plan.experts, plan.dtype, plan.recipe)

    def by_method(self, method: Method, setting: Setting, seed: int) -> Ready:
        """A method's merge."""
        recipe = self.recipe(method, setting)
        if recipe is None:
            return self._by_peer(method, setting)
        return self.by_recipe(recipe, seed, setting.get(OMEGA))

    @contextmanager
    def by_recipe(
        self, recipe: MergeConfiguration, seed: int, omega: Any | None = None
    ) -> Iterator[Made]:
        """Mergekit's merge of a recipe, with AIM on top where there is an omega."""
        begun = perf_counter()
        if omega is None and not (self.in_memory and keeps_shapes(recipe)):
            with merged_on_disk(recipe, self._options(seed), self.folder) as folder:
                cost = cost_of(recipe, since(begun))
                yield Made(self._loaded(folder), self._interface_of(folder), cost)
            return
        tensors = merge_in_memory(recipe, self._options(seed))
        if omega is not None:
            tensors = apply_aim(self._base_tensors, tensors, self._importance, float(omega))
        cost = cost_of(recipe, since(begun))
        if omega is not None:
            prompts = len(self.plan.calibration)
            cost = cost.model_copy(update={"prompts": prompts, "forward_passes": prompts})
        asked = self._interface_by(recipe, seed)
        yield Made(self.evaluation.load(tensors), asked, cost)

    @contextmanager
    def _by_peer(self, method: Method, setting: Setting) -> Iterator[Made]:
        assert method.peer is not None
        usual = peers(len(self.plan.experts))[TASK_ARITHMETIC]
        recipe = self.recipe(usual, usual.untuned)  # as this merge is asked, so is every other
        assert recipe is not None
        if not keeps_shapes(recipe):
            raise UserError(
                f"{method.name} merges tensors as they stand, but the recipe gives the merge a "
                "tokenizer of its own; give all models one tokenizer first, as docs/faq.md shows"
            )
        cost = self.peers.merge(method.name, method.peer, setting, self.evaluation.fill)
        yield Made(self.evaluation.model, self._interface_by(recipe, 0), cost)

    def _options(self, seed: int) -> MergeOptions:
        return self.options.model_copy(update={"random_seed": seed, "device": self.plan.device})

    def _interface_by(self, recipe: MergeConfiguration, seed: int) -> TextInterface:
        """How mergekit's merge of a recipe is asked."""
        with TemporaryDirectory() as beside:
            write_beside(recipe, self._options(seed), Path(beside))
            return self._interface_of(Path(beside))

    def _interface_of(self, folder: Path) -> TextInterface:
        """How the merge in a folder is asked; where mergekit copied no tokenizer as the base is."""
        return TextInterface.of(folder, read_tokenizer([folder], "the merge") or self.tokenizer)

    def _loaded(self, folder: Path) -> Any:
        """The merge in a folder."""
        try:
            return load_folder(folder, self.plan.eval_dtype, self.plan.device)
        except (ValueError, RuntimeError) as error:  # by transformers
            if is_out_of_memory(error):
                raise
            raise UserError(f"the merge cannot be loaded: {error}") from error

    @cached_property
    def _base_tensors(self) -> dict[str, torch.Tensor]:
        """The base's weights, for AIM."""
        return {n: self.base.tensor(n, torch.float32) for n in self.evaluation.names}

    @cached_property
    def _importance(self) -> dict[str, torch.Tensor]:
        """How much the base uses each input channel on the calibration prompts, for AIM."""
        model, texts = self.evaluation.load_checkpoint(self.base), self.plan.calibration
        found = AtOnce(16, self.progress.note).run(
            lambda size: activation_importance(model, self.tokenizer, texts, size), len(texts)
        )
        if line := untouched(model, found):
            self.progress.note(line)
        return found


def cost_of(recipe: MergeConfiguration, seconds: float | None) -> Cost:
    """What a merge took.

    Args:
        recipe: of mergekit's methods, or of ours, whose score files say what they were made with.
        seconds: that mergekit took; None where nobody is to know.

    Raises:
        UserError: a score file that cannot be read.
    """
    if recipe.merge_method != OURS:
        return Cost(seconds=seconds)
    paths = dict.fromkeys(score_texts(data_of(recipe)))
    made = [scorefile.read(local_path(path)).manifest for path in paths]
    fit = made[0].fit  # the same in the files of all experts
    if fit is None:
        return Cost(prompts=sum(manifest.n_prompts for manifest in made))
    experts = {manifest.behavior: manifest.n_prompts for manifest in made}
    guards = {guard.behavior: guard.n_prompts for guard in fit.guards}
    return Cost(
        prompts=sum(experts.values()) + sum(guards.values()),
        gradient_steps=fit.history[-1].step,
        forward_passes=_passes(fit, experts, guards),
    )


def _passes(fit: Fit, experts: Mapping[str, int], guards: Mapping[str, int]) -> int:
    """Sequences that went through a model in a fit, if each of its batches was full.

    Args:
        fit: which.
        experts: how many prompts each behaviour has.
        guards: the same of the guards.
    """
    every = {**experts, **guards}
    held_out = {name: fit.held_out[name] for name in every}
    a_step = sum(min(fit.prompts_a_step, n - held_out[name]) for name, n in every.items())
    judged = sum(held_out[name] or min(n, MOST) for name, n in every.items())
    looks = sum(moment.judged is not None for moment in fit.history)
    # before the first step: what each expert says there, how far the base is from it and it from
    # itself; and what the base says to the guards
    references = 3 * sum(experts.values()) + sum(guards.values())
    return references + fit.history[-1].step * a_step + looks * judged
