"""Fit the component gates of several experts jointly (issue 5).

Every expert is the teacher of its own behaviour: the objective is the mean over behaviours of the
normalised ``kl`` recovery of the merge, on prompts without labels. A guard's teacher is the base.
Joint gates by gradient go back to AdaMerging (arXiv 2310.02575), which fits one coefficient per
layer or task to the entropy of the answers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import yaml

import mergekit_wp
from mergekit_wp import gatesfile
from mergekit_wp.checkpoints import ResidentModel
from mergekit_wp.criteria import Targets
from mergekit_wp.engine.gates import KINDS, Climb, Layout, penalty_slope
from mergekit_wp.engine.share import TaskVector
from mergekit_wp.engine.slopes import Term, slopes
from mergekit_wp.engine.trace import Decoder, own_values, record
from mergekit_wp.errors import UserError
from mergekit_wp.files import written_whole
from mergekit_wp.fusion import fuse
from mergekit_wp.gatesfile import GatedExpert, GatesFile, GatesManifest, Guard, Moment
from mergekit_wp.interrupts import finishing
from mergekit_wp.planned import recipe_gates
from mergekit_wp.prompts import PromptBatch, PromptFile, batches, read_prompts
from mergekit_wp.scoring.assemble import model_id
from mergekit_wp.scoring.journal import Journal
from mergekit_wp.scoring.members import Member, inputs_of, measure, open_members
from mergekit_wp.scoring.opening import check_norms
from mergekit_wp.scoring.references import logprobs
from mergekit_wp.scoring.request import DTYPES, FitRequest, Progress
from mergekit_wp.scoring.texts import encode_texts, with_responses

#: held-out prompts are looked at every so many steps; the fit ends after so many looks in vain
LOOK, PATIENCE, LEAST_GAIN = 5, 3, 1e-3


@dataclass(frozen=True)
class Lesson:
    """One behaviour in batches, with how its values become a recovery.

    Attributes:
        name: of the behaviour.
        batches: all of its prompts.
        targets: the teacher's distributions, one per batch.
        zero: value that counts as 0, by prompt, ``[prompts]``.
        distance: from there to the teacher, ``[prompts]``.
    """

    name: str
    batches: list[PromptBatch]
    targets: list[Targets]
    zero: torch.Tensor
    distance: torch.Tensor

    @property
    def span(self) -> float:
        """Mean distance over all prompts."""
        return float(self.distance.mean())

    def recovery(self, values: Mapping[int, torch.Tensor]) -> float:
        """0 at the base (of a guard: as far away as the experts are), 1 at the teacher.

        Args:
            values: of ``kl``, ``[prompts of the batch]`` by number of the batch.
        """
        change = distance = 0.0
        for b, of_batch in values.items():
            members = self.batches[b].members
            change += float((of_batch.double().cpu() - self.zero[members]).sum())
            distance += float(self.distance[members].sum())
        return change / distance


def fit(request: FitRequest, progress: Progress) -> Path:
    """Fit the gates and write the gates file.

    Returns:
        A recipe that merges by it, beside it.

    Raises:
        UserError: any mistake in the inputs, before anything is fitted.
    """
    members = open_members(request, request.out.parent, progress)
    guards = [(path, read_prompts(path, request.max_prompts)) for path in request.guards]
    first = members[0].pair
    layout = Layout(first.partition, tuple(member.pair.changed for member in members))
    inputs = inputs_of(request, members)
    inputs |= {"guards": [prompts.sha256 for _, prompts in guards]}
    start = _start(request, members, layout)
    inputs |= {"start": hashlib.sha256(start.numpy().tobytes()).hexdigest()}
    with Journal(request.out, inputs, request.restart) as journal:
        if journal.resumed:
            progress.note(f"continuing the run in {journal.folder}")
        size = request.prompts_a_step
        lessons = [_lesson(member, journal, progress, size) for member in members]
        lessons += [
            _guard(path, prompts, members, request, journal, progress) for path, prompts in guards
        ]
        fitting = Fitting(request, members, lessons, layout, journal, progress)
        state = fitting.run(start)
        names = [lesson.name for lesson in lessons]
        result = GatesFile(
            _manifest(request, members, guards, state, names, journal.created),
            _tensors(members, layout, state.best),
        )
        gatesfile.write(result, request.out)
        recipe = _write_recipe(request, members)
        journal.discard()
    return recipe


def _lesson(member: Member, journal: Journal, progress: Progress, size: int) -> Lesson:
    references = measure(member, journal, progress, size)
    reference = references.values["kl"]
    return Lesson(
        str(member.request.behavior),
        references.batches,
        references.targets,
        reference.base.double().cpu(),
        reference.distance.double().cpu(),
    )


@torch.no_grad()
def _guard(
    path: Path,
    prompts: PromptFile,
    members: Sequence[Member],
    request: FitRequest,
    journal: Journal,
    progress: Progress,
) -> Lesson:
    """What the base does on some prompts; 0 is as far from it as the experts are on average."""
    member = members[0]
    texts = encode_texts(member.tokenizer, prompts.prompts, path)
    texts.check_vocabulary(member.pair.vocabulary)
    resident = ResidentModel(member.pair, DTYPES[request.dtype], request.device)
    samples = with_responses(
        request,
        texts,
        member.tokenizer,
        resident,
        journal,
        progress,
        prefix=f"guard-{path.stem}.",
        position=0.0,
    )
    every = list(batches(samples, request.prompts_a_step, request.device))
    progress.stage(f"base and experts on guard {path.stem}", len(members) + 1, "model")
    resident.move_to(0.0)
    decoder = Decoder(resident.model)
    targets = [Targets(logprobs(decoder, batch)) for batch in every]
    progress.advance(1)
    total = torch.zeros(len(samples), dtype=torch.float64)
    for other in members:
        resident.fill(
            lambda name, other=other: other.pair.expert.tensor(  # type: ignore[misc]
                name, resident.dtype, resident.device
            )
        )
        for batch, target in zip(every, targets, strict=True):
            values = own_values(decoder, record(decoder, batch), ("kl",), target)["kl"]
            total[batch.members] += values.double().cpu()
        progress.advance(1)
    zero = total / len(members)
    if float(zero.mean()) > -1e-9:
        raise UserError(
            f"guard {path}: the experts answer like the base there, so there is nothing to guard"
        )
    return Lesson(path.stem, every, targets, zero, -zero)


@dataclass(frozen=True)
class State:
    """Where a fit stands.

    Attributes:
        climb: the present gates.
        seen: recoveries ``[steps so far, 2, lessons]`` of the gates before each step, on the
            prompts fitted on and on held-out ones; NaN where not looked at.
        best: the gates with the best held-out recovery.
        best_step: steps after which they were reached.
        best_value: their mean held-out recovery.
        vain: looks since then.
    """

    climb: Climb
    seen: torch.Tensor
    best: torch.Tensor
    best_step: int
    best_value: float
    vain: int

    @classmethod
    def fresh(cls, start: torch.Tensor, lessons: int) -> State:
        """Before anything was looked at."""
        empty = torch.empty((0, 2, lessons), dtype=torch.float64)
        return cls(Climb.at(start), empty, start.double(), 0, float("-inf"), 0)

    @classmethod
    def from_block(cls, block: Mapping[str, torch.Tensor]) -> State:
        """As `to_block` left it."""
        steps, best_step, best_value, vain = block["numbers"].tolist()
        climb = Climb(block["gates"], block["first"], block["second"], int(steps))
        return cls(climb, block["seen"], block["best"], int(best_step), best_value, int(vain))

    def to_block(self) -> dict[str, torch.Tensor]:
        """As tensors, for the journal."""
        climb = self.climb
        numbers = [climb.steps, self.best_step, self.best_value, self.vain]
        return {
            "gates": climb.gates,
            "first": climb.first,
            "second": climb.second,
            "seen": self.seen,
            "best": self.best,
            "numbers": torch.tensor(numbers, dtype=torch.float64),
        }

    def look(self, held_out: Sequence[float]) -> State:
        """Compare the present gates with the best ones so far."""
        value = sum(held_out) / len(held_out)
        if value > self.best_value + LEAST_GAIN:
            here = self.climb
            return replace(self, best=here.gates, best_step=here.steps, best_value=value, vain=0)
        return replace(self, vain=self.vain + 1)


class Fitting:
    """Steps uphill; the state is kept after each, so that a killed run goes on where it was."""

    def __init__(
        self,
        request: FitRequest,
        members: Sequence[Member],
        lessons: Sequence[Lesson],
        layout: Layout,
        journal: Journal,
        progress: Progress,
    ) -> None:
        self.request, self.members, self.lessons = request, members, lessons
        self.layout, self.journal, self.progress = layout, journal, progress
        first = members[0].pair
        self.base, self.partition = first.base, first.partition
        self.resident = ResidentModel(first, DTYPES[request.dtype], request.device)
        wide, device = torch.promote_types(self.resident.dtype, torch.float32), request.device
        self.vectors = [
            TaskVector(partial(member.pair.delta, dtype=wide, device=device), member.pair.changed)
            for member in members
        ]
        self.fitted = layout.fitted
        split = [self._split(lesson) for lesson in lessons]
        self.train = [train for train, _ in split]
        self.held_out = [held_out for _, held_out in split]

    def _split(self, lesson: Lesson) -> tuple[list[int], list[int]]:
        """Batches to fit on, and batches only to look at."""
        n = len(lesson.batches)
        if self.request.held_out == 0:
            return list(range(n)), []
        if n < 2:
            raise UserError(
                f"'{lesson.name}' has prompts for one step only, so none can be held out; give "
                "more prompts, a smaller --prompts-a-step, or --held-out 0 to fit without"
            )
        generator = torch.Generator().manual_seed(self.request.seed)
        order = torch.randperm(n, generator=generator).tolist()
        aside = min(n - 1, max(1, round(self.request.held_out * n)))
        return sorted(order[aside:]), sorted(order[:aside])

    def run(self, start: torch.Tensor) -> State:
        """Take the steps; stops early where held-out prompts gain nothing more."""
        request, looking = self.request, self.request.held_out > 0
        block = self.journal.load("state")
        state = State.fresh(start * self.fitted, len(self.lessons))
        self.progress.stage("fitting gates", request.steps, "step")
        if block is not None:
            state = State.from_block(block)
            self.progress.advance(state.climb.steps, resumed=True)
        while True:
            with finishing():
                step = state.climb.steps
                held_out = [float("nan")] * len(self.lessons)
                self._move_to(state.climb.gates)
                if looking and (step % LOOK == 0 or step == request.steps):
                    held_out = self._look()
                    state = state.look(held_out)
                    told = zip(self.lessons, held_out, strict=True)
                    self.progress.note(
                        f"after {step} steps, held-out prompts recover "
                        + ", ".join(f"{lesson.name} {value:.2f}" for lesson, value in told)
                    )
                done = step == request.steps or state.vain >= PATIENCE
                slope, fitted = self._slope(step)
                row = torch.tensor([[fitted, held_out]], dtype=torch.float64)
                state = replace(state, seen=torch.cat([state.seen, row]))
                if done:
                    break
                slope = (slope - request.penalty * penalty_slope(state.climb.gates)) * self.fitted
                climb = state.climb.step(slope, request.rate, request.upper)
                state = replace(state, climb=climb)
                self.journal.save("state", state.to_block())
                self.progress.advance(1)
        if not looking:
            state = replace(state, best=state.climb.gates, best_step=state.climb.steps)
        elif state.vain >= PATIENCE:
            self.progress.note(
                f"nothing more to gain: the gates of step {state.best_step} are kept"
            )
        return state

    def _slope(self, step: int) -> tuple[torch.Tensor, list[float]]:
        """Derivative of the mean recovery by every gate, and the recoveries, on one batch each."""
        terms, chosen = [], []
        for number, (lesson, train) in enumerate(zip(self.lessons, self.train, strict=True)):
            epoch, place = divmod(step, len(train))
            seed = (self.request.seed * 1_009 + number) * 1_000_003 + epoch
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
            chosen.append(b := train[int(order[place])])
            batch = lesson.batches[b]
            weight = 1 / (len(self.lessons) * batch.size * lesson.span)
            terms.append(Term(batch, lesson.targets[b], weight))
        decoder = Decoder(self.resident.model)
        values, found = slopes(decoder, terms, self.partition, self.vectors)
        recoveries = [
            lesson.recovery({b: value})
            for lesson, b, value in zip(self.lessons, chosen, values, strict=True)
        ]
        return self.layout.collect(found), recoveries

    def _look(self) -> list[float]:
        """Recovery of every behaviour on its held-out prompts."""
        pairs = zip(self.lessons, self.held_out, strict=True)
        return [self._recovery(lesson, held_out) for lesson, held_out in pairs]

    @torch.no_grad()
    def _recovery(self, lesson: Lesson, chosen: Sequence[int]) -> float:
        """Of some batches, at the present weights."""
        decoder = Decoder(self.resident.model)
        return lesson.recovery(
            {
                b: own_values(
                    decoder, record(decoder, lesson.batches[b]), ("kl",), lesson.targets[b]
                )["kl"]
                for b in chosen
            }
        )

    def _move_to(self, flat: torch.Tensor) -> None:
        """The merge as the method would write it with the present gates."""
        wide = torch.promote_types(self.resident.dtype, torch.float32)
        device, gates = self.resident.device, self.layout.unflat(flat)

        def weight_of(name: str) -> torch.Tensor:
            base = self.base.tensor(name, wide, device)
            layout = self.partition.layouts[name]
            moving = [
                (member.pair.expert.tensor(name, wide, device), self.partition.of_tensor(own, name))
                for member, own in zip(self.members, gates, strict=True)
                if name in member.pair.changed
            ]
            if not moving:
                return base
            spread = torch.stack([layout.expand(gate, base.shape) for _, gate in moving])
            return fuse(base, [expert for expert, _ in moving], spread)

        self.resident.fill(weight_of)


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
        for kind in KINDS:
            gates[kind].copy_(file.gates(e)[kind])
    return flat.clamp(0.0, request.upper)


def _write_recipe(request: FitRequest, members: Sequence[Member]) -> Path:
    """A recipe that merges by the gates, beside them."""
    recipe = {
        "merge_method": "weight_patching",
        "base_model": members[0].request.base,
        "models": [{"model": m.request.expert} for m in members],
        "parameters": {"gates": str(request.out)},
        "dtype": members[0].pair.base.weights_dtype,
    }
    path = request.out.with_suffix(".yml")
    with written_whole(path) as temporary:
        temporary.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def _tensors(
    members: Sequence[Member], layout: Layout, flat: torch.Tensor
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for e, (member, gates) in enumerate(zip(members, layout.unflat(flat), strict=True)):
        tensors |= {f"gate/{e}/{kind}": gates[kind].float() for kind in KINDS}
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
    state: State,
    names: Sequence[str],
    created: str,
) -> GatesManifest:
    pair = members[0].pair
    dims = pair.partition.dims
    packages = ("torch", "transformers", "mergekit", "safetensors")
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
        created=created,
        versions={
            "mergekit-wp": mergekit_wp.__version__,
            **{name: importlib.metadata.version(name) for name in packages},
        },
    )
