"""One run: what every measuring command opens first, and what its results depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from mergekit_wp.models.encoding import Clock, set_clock, today
from mergekit_wp.models.generation import TextInterface, greedy
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.models.pair import Pair, open_pair
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import PromptSet, Sample
from mergekit_wp.runs.cluster import (
    Assignment,
    Cluster,
    ClusterJob,
    SentModels,
    check_cluster,
    cluster,
)
from mergekit_wp.runs.journal import Journal, Unwritten, check_output
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.recordings import Result
from mergekit_wp.runs.request import DTYPES, RunRequest
from mergekit_wp.runs.texts import (
    Encoded,
    auto_batch_size,
    check_lengths,
    encode_texts,
    find_tokenizer,
    refuse_other_tokens,
)
from mergekit_wp.version import __version__

J = TypeVar("J", bound=ClusterJob)
#: fields of requests that results do not depend on, or whose content is named beside them
_BESIDE = frozenset(
    {"out", "restart", "file", "recipe", "prompts", "behavior", "builtin", "rules", "checkers"}
) | {"overwrite", "ray", "device_map", "max_memory", "cache", "steps"}


@dataclass(frozen=True)
class Jobs:
    """Where a run's jobs are computed, and kept as soon as they are.

    Attributes:
        journal: keeps them.
        progress: told of each.
        workers: compute them, if not this process.
    """

    journal: Journal
    progress: Progress
    workers: Cluster | None = None

    def finished(
        self,
        stage: str,
        unit: str,
        jobs: Iterable[J],
        work: Callable[[J], Result],
        cost: Callable[[J], float] = lambda _: 1.0,
    ) -> Iterator[tuple[J, Result]]:
        """Every job with its result, computed now or by an earlier run; in the order of the jobs.

        Args:
            stage: what they are together.
            unit: of their costs.
            jobs: whose keys are their names in the journal.
            work: computes one in this process.
            cost: of each.
        """
        listed = list(jobs)
        costs = {job: cost(job) for job in listed}
        if listed:
            self.progress.stage(stage, sum(costs.values()), unit)
        computed = set[J]()
        if self.workers is not None:
            missing = [job for job in listed if not self.journal.has(job.key)]
            computed = set(missing)

            def keep(job: J, result: Result) -> None:
                self.journal.save(job.key, result)
                self.progress.advance(costs[job])

            self.workers.run(missing, keep)
        for job in listed:
            result, resumed = self.journal.block(job.key, partial(work, job))
            yield job, result
            if job not in computed:
                self.progress.advance(costs[job], resumed=resumed)


@dataclass(frozen=True)
class Run:
    """A pair of checkpoints, and prompts as the expert's tokenizer reads them.

    Attributes:
        request: how models are run.
        prompts: from a file or from memory.
        pair: base and expert.
        tokenizer: the expert's.
        clock: that its chat template reads.
        texts: token ids of the prompts.
        progress: where the run reports how far it is.
    """

    request: RunRequest
    prompts: PromptSet
    pair: Pair
    tokenizer: Any
    clock: Clock
    texts: Encoded
    progress: Progress

    @classmethod
    def open(
        cls,
        request: RunRequest,
        base: str,
        expert: str,
        prompts: PromptSet,
        progress: Progress,
        date: str | None = None,
    ) -> Run:
        """Open and compare two checkpoints, and tokenise prompts.

        Args:
            request: how models are run.
            base: the one.
            expert: the other.
            prompts: from a file or from memory.
            progress: told how far it is.
            date: on which the run began, see `journal.begun`; None for today.

        Raises:
            UserError: checkpoints that cannot be scored, prompts that fit no tokens of theirs, or
                workers that cannot do what is asked.
        """
        if request.ray:
            check_cluster(request)

        def compared(done: int, total: int) -> None:
            if done == 1:
                progress.stage("comparing checkpoints", total, "tensor")
            progress.advance(1)

        pair = open_pair(base, expert, compared)
        tokenizer = find_tokenizer((pair.expert, pair.base), progress.note)
        refuse_other_tokens(pair, tokenizer, progress)
        clock = Clock(date or today())
        set_clock(tokenizer, clock)
        run = cls(request, prompts, pair, tokenizer, clock, Encoded([], {}, {}), progress)
        return run.asking(prompts)

    def asking(self, prompts: PromptSet) -> Run:
        """The same models on other prompts.

        Raises:
            UserError: prompts that fit no tokens of theirs.
        """
        if not prompts.plain:
            self.progress.note(prompts.said)
        texts = encode_texts(self.tokenizer, prompts, self.progress)
        texts.check_vocabulary(self.pair.vocabulary)
        check_lengths(texts, prompts, self.pair, self.request.max_new_tokens, self.progress)
        return replace(self, prompts=prompts, texts=texts)

    @cached_property
    def interface(self) -> TextInterface:
        """How the expert is asked."""
        return TextInterface.of(self.pair.expert.path, self.tokenizer)

    @property
    def template_date(self) -> str | None:
        """The date that the chat template wrote, None where it read none."""
        return self.clock.date if self.clock.was_read else None

    def load(self) -> ResidentModel:
        """The model that is run, as large as one of the checkpoints, where the request wants it."""
        dtype, device = DTYPES[self.request.dtype], self.request.device
        return ResidentModel(self.pair, dtype, device, self.request.max_memory)

    @contextmanager
    def jobs(
        self,
        journal: Journal,
        resident: ResidentModel,
        assignment: Callable[[SentModels], Assignment],
    ) -> Iterator[Jobs]:
        """Jobs on a cluster, where the request wants it, else in this process.

        Args:
            journal: keeps them.
            resident: the model in memory; it is the workers' from then on.
            assignment: makes theirs.

        Raises:
            UserError: there is no such cluster.
        """
        if not self.request.ray:
            yield Jobs(journal, self.progress)
            return
        sent = assignment(SentModels.of(self.request, self.pair))
        with cluster(sent, self.progress) as workers:
            resident.release()
            yield Jobs(journal, self.progress, workers)

    def samples(
        self, resident: ResidentModel, journal: Journal, prefix: str = "", position: float = 1.0
    ) -> list[Sample]:
        """Prompts with their responses: the given ones, else greedy continuations.

        Args:
            resident: the model in memory; moved where answers are missing.
            journal: keeps finished answers.
            prefix: sets one expert's journal entries apart from another's.
            position: who answers, the expert (1) or the base (0).
        """
        prompts, responses = self.texts.prompts, dict(self.texts.responses)
        missing = [i for i in range(len(prompts)) if i not in responses]
        size = self.request.batch_size or 32
        chunks = [missing[start : start + size] for start in range(0, len(missing), size)]
        at_once = AtOnce(min(size, max(1, len(missing))), self.progress.note)

        def answers(chunk: Sequence[int]) -> dict[str, torch.Tensor]:
            resident.move_to(position)
            some, length = [prompts[i] for i in chunk], self.request.max_new_tokens
            ends, device = self.interface.ends, resident.device
            found = at_once.run(partial(greedy, resident.model, some, length, ends, device))
            return {str(i): torch.tensor(ids) for i, ids in zip(chunk, found, strict=True)}

        if chunks:
            who = "expert" if position else "base"
            self.progress.stage(f"{who} answers", len(missing), "prompt")
        for number, chunk in enumerate(chunks):
            key = f"responses.{prefix}batch{number:04d}"
            saved, resumed = journal.block(key, partial(answers, chunk))
            responses |= {int(i): ids.tolist() for i, ids in saved.items()}
            self.progress.advance(len(chunk), resumed=resumed)
        return [Sample(tuple(ids), tuple(responses[i])) for i, ids in enumerate(prompts)]

    def batch_size(self, samples: Sequence[Sample]) -> int:
        """Sequences a forward: as asked, or what their length and the vocabulary let through."""
        auto = auto_batch_size(samples, self.pair.vocabulary, self.request.device)
        return self.request.batch_size or auto

    @cached_property
    def expert_sha256(self) -> str:
        """Hash of the expert's weights."""
        self.progress.stage("hashing weights", 1, "expert")
        found = self.pair.expert.weights_sha256()
        self.progress.advance(1)
        return found


@dataclass(frozen=True)
class Opened:
    """What a run has read and checked before it computes: all that its cost follows from.

    Attributes:
        request: what is asked for.
        runs: one for each expert.
        check: refuses an output that could not be written, as the journal will; writes nothing.
    """

    request: RunRequest
    runs: tuple[Run, ...]
    check: Callable[[], None]


def depends_on(
    request: RunRequest, runs: Run | Mapping[str, Run], contents: Mapping[str, Any]
) -> dict[str, Any]:
    """All that the results of a run depend on, by the names a user knows.

    Args:
        request: what is asked for.
        runs: one, or one for each expert by its name.
        contents: of whatever else it names: score files, tasks, the criteria that were chosen.
    """
    every = {"": runs} if isinstance(runs, Run) else runs
    base = next(iter(every.values())).pair.base
    by_expert = {
        "expert weights": {name: run.expert_sha256 for name, run in every.items()},
        "expert config": {name: run.pair.expert.config_hash for name, run in every.items()},
        "prompts": {name: run.prompts.sha256 for name, run in every.items()},
        "tokens": {name: run.texts.sha256() for name, run in every.items()},
    }
    return {
        **request.model_dump(mode="json", exclude={*_BESIDE, *contents}),
        "base weights": base.weights_sha256(),
        "base config": base.config_hash,
        **{what: of.get("", of) for what, of in by_expert.items()},
        **contents,
        "mergekit-wp": __version__,
    }


@contextmanager
def journal_of(
    request: RunRequest,
    runs: Run | Mapping[str, Run],
    out: Path | None,
    progress: Progress,
    *,
    restart: bool,
    **contents: Any,
) -> Iterator[Journal]:
    """The journal beside an output, of this run only; none is written where there is no output.

    Args:
        request: what is asked for.
        runs: one, or one for each expert by its name.
        out: the file that is written at the end, if any.
        progress: told where a run goes on.
        restart: throw away what an earlier run left.
        contents: see `depends_on`.

    Raises:
        UserError: an earlier run had other inputs (says which), or one is running now.
    """
    if out is None:
        with Unwritten() as journal:
            yield journal
        return
    some = runs if isinstance(runs, Run) else next(iter(runs.values()))
    inputs = depends_on(request, runs, contents)
    with Journal(out, inputs, restart, some.clock.date) as journal:
        if journal.resumed:
            progress.note(f"continuing the run in {journal.folder}")
        yield journal


def check_journal(
    request: RunRequest,
    runs: Run | Mapping[str, Run],
    out: Path | None,
    *,
    restart: bool,
    **contents: Any,
) -> None:
    """Refuse what `journal_of` would, without writing anything.

    Raises:
        UserError: the output cannot be written, an earlier run had other inputs, or one is running.
    """
    if out is not None:
        check_output(out, None if restart else partial(depends_on, request, runs, contents))
