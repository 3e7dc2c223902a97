"""The field's way: write a component's weights into the model, run it, put them back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.components import Component, slices
from benchmarks.engine.inputs import Inputs
from mergekit_wp.criteria import kl_values
from mergekit_wp.terms import CriterionName

#: scores of components in the order they were given
Scores = dict[CriterionName, torch.Tensor]


class _Stop(Exception):
    """Nothing above the anchor is needed."""


@dataclass(frozen=True)
class NaiveSweep:
    """Gains by swapping and running the whole model, or only up to the anchor."""

    inputs: Inputs
    expert: dict[str, torch.Tensor]
    stop_at_anchor: bool

    @classmethod
    def of(cls, inputs: Inputs, *, stop_at_anchor: bool) -> NaiveSweep:
        """With the expert's weights in memory, as the field has them."""
        resident = inputs.resident
        expert = {
            name: resident.pair.expert.tensor(name, resident.dtype, resident.device).clone()
            for name in inputs.partition.tensor_names
        }
        return cls(inputs, expert, stop_at_anchor)

    @contextmanager
    def swapped(self, component: Component) -> Iterator[None]:
        """The base with one component of the expert."""
        parameters = dict(self.inputs.resident.model.named_parameters())
        cuts = slices(self.inputs.partition, component)
        kept = {name: parameters[name][cut].clone() for name, cut in cuts.items()}
        for name, cut in cuts.items():
            parameters[name][cut] = self.expert[name][cut]
        try:
            yield
        finally:
            for name, cut in cuts.items():
                parameters[name][cut] = kept[name]

    def forward(self) -> dict[CriterionName, torch.Tensor]:
        """Mean values of the model as it is."""
        totals: dict[CriterionName, torch.Tensor] = {}
        references, model = self.inputs.references, self.inputs.resident.model
        for batch, targets in zip(references.batches, references.targets, strict=True):
            anchor = targets.anchor
            assert anchor is not None
            at_anchor: list[torch.Tensor] = []

            def keep(_module: Any, _args: Any, output: Any, kept: Any = at_anchor) -> None:
                kept.append(output if isinstance(output, torch.Tensor) else output[0])
                if self.stop_at_anchor:
                    raise _Stop

            handle = model.model.layers[anchor.layer].register_forward_hook(keep)
            try:
                logits = model(input_ids=batch.ids, use_cache=False).logits
                values = kl_values(logits[batch.rows, batch.cols], batch, targets)
                totals["kl"] = totals.get("kl", 0) + values.sum()
            except _Stop:
                pass
            finally:
                handle.remove()
            last = at_anchor[0][torch.arange(batch.size), batch.last].float()
            totals["anchor"] = totals.get("anchor", 0) + (last @ anchor.vector).sum()
        n = sum(batch.size for batch in references.batches)
        return {name: total / n for name, total in totals.items()}

    @torch.no_grad()
    def run(self, components: Sequence[Component]) -> Scores:
        """Gains of the components, one forward each."""
        self.inputs.resident.move_to(0.0)
        own = self.forward()
        found: dict[CriterionName, list[torch.Tensor]] = {name: [] for name in own}
        for component in components:
            with self.swapped(component):
                for name, value in self.forward().items():
                    found[name].append(value - own[name])
        distances = {n: self.inputs.references.values[n].distance.mean() for n in found}
        return {name: torch.stack(values) / distances[name] for name, values in found.items()}
