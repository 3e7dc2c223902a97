"""The merge of a recipe's experts in memory, at any gates, and what is measured of it there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from mergekit_wp.criteria import split
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.integrated_gradients import TaskVector
from mergekit_wp.engine.packing import Packing, TokenCost
from mergekit_wp.engine.slopes import Slopes, Term, slopes
from mergekit_wp.joint.gates import Layout
from mergekit_wp.joint.objective import closeness
from mergekit_wp.merging.fusion import fuse, take_rows
from mergekit_wp.models.memory import AtOnce, free_memory
from mergekit_wp.models.pair import Pair, adapter_of, common_pieces
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import PromptBatch
from mergekit_wp.runs.recordings import Result
from mergekit_wp.runs.texts import Footprint

#: the entry of a term's values, ``[3, n]``; see `slopes`
VALUES = "values"


def mix(resident: ResidentModel, pairs: Sequence[Pair], layout: Layout, flat: torch.Tensor) -> None:
    """Set the weights to the merge as the method would write it, a few rows at a time.

    Args:
        resident: overwritten.
        pairs: the base and each expert.
        layout: how the gates lie.
        flat: the gates.
    """
    first, gates = pairs[0], layout.unflat(flat)
    wide = torch.promote_types(resident.dtype, torch.float32)

    def write(name: str, out: torch.Tensor) -> None:
        moving = {
            pair.expert: gate
            for pair, own in zip(pairs, gates, strict=True)
            if name in pair.changed and bool((gate := layout.of_tensor(own, name)).any())
        }
        if not moving:
            first.base.read(name, out)
            return
        parts = layout.layouts[name].spread(torch.stack(list(moving.values())), out.shape)
        adapters = [adapter_of(first.base, expert) for expert in moving]
        others = [e for e, own in zip(moving, adapters, strict=True) if own is None]
        sides = (first.base, *others)
        pieces = common_pieces(name, *sides)
        for found in zip(*(s.on_device(name, out.device, pieces) for s in sides), strict=True):
            rows = found[0][0]
            stored, *read = (part for _, part in found)
            left = iter(read)
            experts = [
                next(left) if own is None else own.changed(name, stored, rows) for own in adapters
            ]
            base, *experts = (part.to(wide) for part in (stored, *experts))
            out[rows] = fuse(base, experts, *take_rows(parts, rows))

    resident.fill(write)


class MergedModel:
    """The merge at the gates it was last moved to.

    Args:
        resident: the model in memory.
        pairs: the base and each expert.
        layout: how the gates lie.
        at_once: how many prompts of a term go through together.
        together: how many terms go through layer by layer together.
    """

    def __init__(
        self,
        resident: ResidentModel,
        pairs: Sequence[Pair],
        layout: Layout,
        at_once: AtOnce,
        together: int,
    ) -> None:
        self.resident, self.pairs, self.layout = resident, pairs, layout
        self.at_once, self.together = at_once, together
        wide = torch.promote_types(resident.dtype, torch.float32)
        for pair in pairs:
            if pair.expert.adapter is not None:
                pair.expert.adapter.keep()
        self.vectors = [TaskVector.of(pair, wide, resident.device) for pair in pairs]
        self.decoder, first = Decoder(resident.model), pairs[0]
        hidden = int(first.base.text_config.hidden_size)
        self.packing = Packing(self.decoder, TokenCost.in_layer(first.partition, hidden))
        self.footprint = Footprint.of(first, resident.dtype)

    def move_to(self, flat: torch.Tensor) -> None:
        """The merge as the method would write it with some gates."""
        mix(self.resident, self.pairs, self.layout, flat)

    def each(self, groups: Sequence[Sequence[Term]]) -> Iterator[list[Result]]:
        """Terms at the present gates, one group of them after the other.

        Returns:
            By term its `VALUES`, and where it has a weight, slopes ``[gates of the tensor]`` by
            "expert/tensor". They do not depend on what else is in the group.
        """
        for terms in groups:
            yield self.at_once.run(partial(self._in_groups, terms))

    def _in_groups(self, terms: Sequence[Term], size: int) -> list[Result]:
        found: list[Result] = []
        for start in range(0, len(terms), self.together):
            found += self._in_parts(terms[start : start + self.together], size)
        return found

    def _in_parts(self, terms: Sequence[Term], size: int) -> list[Result]:
        """Slopes are sums over prompts: so many of every term go through at once."""
        pieces = [split(term.batch, term.targets, size) for term in terms]
        found: list[Result] = [{} for _ in terms]
        for turn in range(max(len(piece) for piece in pieces)):
            here = [i for i, piece in enumerate(pieces) if turn < len(piece)]
            some = [Term(*pieces[i][turn], terms[i].weight) for i in here]
            for i, part in zip(here, self._measured(some), strict=True):
                values = [found[i].pop(VALUES)] if VALUES in found[i] else []
                for name, slope in part.items():
                    if name != VALUES:
                        found[i][name] = found[i][name] + slope if name in found[i] else slope
                found[i][VALUES] = torch.cat([*values, part[VALUES]], 1)
        return found

    def _measured(self, terms: Sequence[Term]) -> list[Result]:
        terms = [replace(term, batch=self.packing.of(term.batch)) for term in terms]
        if not any(term.weight for term in terms):
            with torch.no_grad():
                return [
                    {VALUES: closeness(self.decoder, term.batch, term.targets)} for term in terms
                ]
        kept = self._kept([term.batch for term in terms])
        values, found = slopes(self.decoder, terms, self.layout.layouts, self.vectors, kept)
        return [
            {VALUES: own.cpu()}
            | {f"{e}/{name}": slope for e, of in enumerate(every) for name, slope in of.items()}
            for own, every in zip(values, found, strict=True)
        ]

    def _kept(self, batches: Sequence[PromptBatch]) -> list[int]:
        """Numbers of the batches whose activations fit into memory that can be spared."""
        if self.resident.offloaded:  # autograd would keep weights that are fetched
            return []
        sizes = [batch.ids.numel() * self.footprint.per_token for batch in batches]
        return fitting(sizes, free_memory(self.resident.device))


def fitting(sizes: Sequence[float], free: float) -> list[int]:
    """Numbers of those that fit into a quarter of the free memory together, in their order."""
    found, left = [], free / 4
    for number, size in enumerate(sizes):
        if size <= left:
            found.append(number)
            left -= size
    return found


def slopes_of(result: Result, experts: int) -> list[Slopes]:
    """The slopes of a term, of each expert by tensor name."""
    found: list[Slopes] = [{} for _ in range(experts)]
    for entry, slope in result.items():
        if entry != VALUES:
            expert, name = entry.split("/", 1)
            found[int(expert)][name] = slope
    return found
