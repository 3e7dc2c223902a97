"""One expert's score file, made ready for merging: found, loaded once, checked, looked up.

Everything that can be wrong with the pair (score file, checkpoints) is refused here by name.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mergekit_wp.architectures import Dims, text_config
from mergekit_wp.components import GateLayout, TensorLayout, layout_of
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.files.fingerprint import NORM_TOLERANCE, rounding
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.merging.fusion import Normalised, delta_norm, normalise, ranked

LOG = logging.getLogger(__name__)


_LOCK = threading.Lock()
#: under which gates finer than components are ranked
_FINER = "gates"


class Choice(NamedTuple):
    """Which of a file's scores a merge uses; its finest gates, unless components are asked for."""

    estimand: str
    criterion: str
    granularity: str
    by_component: bool = False


@dataclass(frozen=True, eq=False)
class ExpertScores:
    """A score file, and what a merge asks of it."""

    path: str
    file: ScoreFile
    _normalised: dict[Choice, Normalised] = field(default_factory=dict, repr=False)

    @property
    def called(self) -> str:
        """What errors call the file."""
        return f"score file {self.path}"

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Every tensor of the scored model."""
        return self.file.manifest.tensor_names

    def norm(self, name: str) -> float:
        """Frobenius norm of one tensor of the scored task vector."""
        return self.file.delta_norm[name]

    def scored_name(self, name: str, tied: bool | None) -> str:
        """The name under which a tensor was scored: that of the model's parameter.

        A tied model's lm_head is its embedding, so it must be merged with the embedding's gate
        even where a checkpoint stores it a second time. ``tied`` None means unknown: then a file
        that has an embedding and no lm_head was made from a tied model, as every tensor of the
        scored model is in it.
        """
        architecture = self.file.manifest.dims.architecture
        name = architecture.parameter(name)
        if name != f"{architecture.head}.weight" or self._tied is None:
            return name
        tied = self._tied if tied is None else tied
        return f"{architecture.embedding}.weight" if tied else name

    def stored_names(self, name: str, tied: bool | None) -> list[str]:
        """The parameters that may be what a merge reads as a tensor, the likeliest first."""
        architecture = self.file.manifest.dims.architecture
        own, embedding = architecture.parameter(name), f"{architecture.embedding}.weight"
        is_head = own == f"{architecture.head}.weight"
        found = [own, self.scored_name(name, tied), *([embedding] if is_head else [])]
        return list(dict.fromkeys(found))

    def layout(self, name: str, granularity: str) -> TensorLayout:
        """How a tensor is cut into the components whose scores are used."""
        layout = layout_of(name, self.file.manifest.dims)
        if granularity == "tensor":
            return TensorLayout(name, layout.layer)
        return layout

    def gate_layout(self, name: str, choice: Choice) -> GateLayout:
        """How the gates lie that a choice of scores gives a tensor: as finely as the file says."""
        if self._finer(choice):
            return self.file.gate_layouts[name]
        return self.layout(name, choice.granularity)

    def _finer(self, choice: Choice) -> bool:
        """Whether the gates are finer than components."""
        if choice.estimand != "path" or choice.granularity == "tensor" or choice.by_component:
            return False
        return self.file.manifest.granularity != "component"

    def covers(self, name: str, granularity: str) -> bool:
        """Whether the file scores a tensor (under its `scored_name`)."""
        if name not in self.file.delta_norm:
            return False
        kinds = self.layout(name, granularity).kinds
        return any(kind in self.file.manifest.kinds for kind in kinds)

    def require(self, choice: Choice) -> None:
        """Refuse a choice of scores that the file does not have.

        Raises:
            UserError: no such estimand or criterion, or no kind of that granularity.
        """
        manifest = self.file.manifest
        if choice.estimand not in manifest.estimands or choice.criterion not in manifest.criteria:
            if choice.estimand == "path":
                raise UserError(
                    f"{self.called} has no '{choice.estimand}/{choice.criterion}' scores, "
                    "which 'fusion: path' needs: fit the recipe's experts together with "
                    "'mergekit-wp fit RECIPE'"
                )
            have = ", ".join(f"{e}/{c}" for e in manifest.estimands for c in manifest.criteria)
            raise UserError(
                f"{self.called} has no '{choice.estimand}/{choice.criterion}' scores, "
                f"it has {have}: set the recipe's 'estimand' and 'criterion', or score again"
            )
        wanted = {"tensor"} if choice.granularity == "tensor" else set(manifest.kinds) - {"layer"}
        if not wanted & set(manifest.kinds):
            raise UserError(
                f"{self.called} has only kinds {', '.join(manifest.kinds)}: "
                f"nothing for 'granularity: {choice.granularity}'"
            )

    def require_base(self, config: Any) -> None:
        """Refuse a base model of another architecture than the scored one.

        Args:
            config: the base's transformers config.

        Raises:
            UserError: names every number that differs, or an output head that is tied on one
                side only.
        """
        manifest = self.file.manifest
        dims = Dims.from_config(config)
        scored = {
            "architecture": manifest.architecture,
            "hidden_size": manifest.hidden_size,
            **manifest.dims.numbers,
        }
        base = {
            "architecture": config.architectures[0] if config.architectures else None,
            "hidden_size": text_config(config).hidden_size,
            **dims.numbers,
        }
        if wrong := [f"{k} {base[k]}, not {scored[k]}" for k in scored if scored[k] != base[k]]:
            raise UserError(
                f"{self.called} is of another architecture than the base model, "
                f"which has {'; '.join(wrong)}"
            )
        if (tied := self._tied) not in (None, bool(text_config(config).tie_word_embeddings)):
            raise UserError(
                f"{self.called} is of models whose output head is {'' if tied else 'not '}tied to "
                f"the embedding; that of the base model is{' not' if tied else ''}. Merge the "
                "models that it was made from, or make it from these: docs/faq.md shows how to "
                "untie one"
            )

    @property
    def _tied(self) -> bool | None:
        """Whether the scored model's output head was its embedding; None where nothing tells."""
        architecture = self.file.manifest.dims.architecture
        if f"{architecture.embedding}.weight" not in self.tensor_names:
            return None
        return f"{architecture.head}.weight" not in self.tensor_names

    def scores(self, name: str, choice: Choice, density: float) -> torch.Tensor:
        """Normalised scores of one tensor's parts, zero outside the best ``density`` share of all.

        Args:
            name: a tensor the file covers.
            choice: which scores.
            density: in [0, 1].

        Returns:
            float64 ``[components of the tensor]``, or ``[gates of the tensor]`` where the file has
            finer ones.
        """
        partition = self._partition(choice)
        if self._finer(choice):
            return partition.cut(_FINER, self.file.gate_places[name], density)
        layout = self.layout(name, choice.granularity)
        if not layout.whole:
            row = layout.layer
            assert row is not None
            return torch.cat(
                [
                    partition.cut(kind, row, density)
                    if kind in partition.values
                    else torch.zeros(count, dtype=torch.float64)
                    for kind, count in layout.owners
                ]
            )
        fine = choice.granularity != "tensor"
        names = self.file.fine_tensor_names if fine else self.tensor_names
        return partition.cut("tensor", names.index(name), density)

    def _partition(self, choice: Choice) -> Normalised:
        if choice not in self._normalised:
            self.require(choice)
            scores = self._chosen(choice)
            if choice.estimand == "path":
                self._normalised[choice] = ranked({k: v.double() for k, v in scores.items()})
            else:
                self._normalised[choice] = normalise(scores)
            if not any((part > 0).any() for part in scores.values()):
                LOG.warning(
                    "%s has no positive %s/%s score: its expert adds nothing",
                    self.called,
                    choice.estimand,
                    choice.criterion,
                )
        return self._normalised[choice]

    def _chosen(self, choice: Choice) -> dict[str, torch.Tensor]:
        if self._finer(choice):
            return {_FINER: self.file.finer_gates(choice.criterion)}
        if choice.granularity == "tensor":
            return {"tensor": self.file.scores(choice.estimand, choice.criterion, "tensor")}
        fine = self.file.fine_scores(choice.estimand, choice.criterion)
        return {str(kind): scores for kind, scores in fine.items()}

    def check_delta(
        self,
        name: str,
        base: torch.Tensor,
        expert: torch.Tensor,
        *,
        shown_as: str,
        stored: Callable[[], tuple[torch.Tensor, torch.Tensor] | None] = lambda: None,
    ) -> None:
        """Refuse a task vector whose norm is not the scored one.

        Args:
            name: the tensor's `scored_name`.
            base: the tensor of the base, as the merge reads it.
            expert: the tensor of the expert.
            shown_as: what the error calls the tensor and the expert.
            stored: reads the two as their checkpoints store them, if it can. Asked only where
                the norms differ: rounding or another tokenizer may have changed them since.

        Raises:
            UserError: the norms differ by more than 2%, beyond what storing the weights in a
                coarser dtype than they were scored in can explain.
        """
        want, got = self.norm(name), delta_norm(base, expert)
        if abs(got - want) <= NORM_TOLERANCE * want:
            return
        if (pair := stored()) is not None:
            base, expert = pair
            got = delta_norm(base, expert)
        manifest = self.file.manifest
        allowed = (
            NORM_TOLERANCE * want
            + rounding(base, manifest.base.weights_dtype)
            + rounding(expert, manifest.expert.weights_dtype)
        )
        if not abs(got - want) <= allowed:
            raise UserError(
                f"{shown_as}: its difference from the base has norm {got:.6g}, but "
                f"{self.called} was made for {want:.6g}: these are scores "
                "of another expert, base, revision or shifted layers"
            )


def load(path: str) -> ExpertScores:
    """A score file, read once for all tensors and threads, and again when it was rewritten.

    Args:
        path: a `local_path`.

    Raises:
        UserError: missing, unreadable or inconsistent; the message names the file.
    """
    with _LOCK:
        return _load(path, os.path.realpath(path), _stamp(path))


def check_company(files: Sequence[ExpertScores]) -> None:
    """Refuse gates fitted in the company of other experts than those that are merged.

    Raises:
        UserError: names both companies.
    """
    here = sorted({file.file.manifest.expert.reference for file in files})
    for file in files:
        company = file.file.manifest.company
        if company is None:
            continue
        fitted = sorted(member.reference for member in company)
        strangers = [f.path for f in files if f.file.manifest.company != company]
        if fitted != here or strangers:
            raise UserError(
                f"{file.called} was fitted for a merge of {', '.join(fitted)}, but this recipe "
                f"merges {', '.join(here)}"
                + (f", with other scores for some ({strangers[0]})" if strangers else "")
                + "; fit these experts together: mergekit-wp fit RECIPE"
            )


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        stat = os.stat(os.path.realpath(path))
    except OSError:
        return None
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _load(path: str, real: str, stamp: tuple[int, int, int] | None) -> ExpertScores:
    return ExpertScores(path, scorefile.read(path))
