"""The checkpoint that patches come from: its weights, and what it does on the receiver's input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.func import functional_call

from mergekit_wp.engine.decoder import first
from mergekit_wp.engine.replay import Receiver
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import PromptBatch
from mergekit_wp.terms import FineKind

#: tensors by their names within a layer
LayerWeights = Mapping[str, torch.Tensor]


class Donor:
    """The other checkpoint of a pair.

    Args:
        resident: the receiving model; the donor's tensors come in its dtype to its device.
        position: of the receiver: at the base (0) the expert gives, at the expert (1) the base.
    """

    def __init__(self, resident: ResidentModel, position: float) -> None:
        self.resident, self.position = resident, position
        self.pair = resident.pair
        self._checkpoint = self.pair.expert if position == 0.0 else self.pair.base
        self._run: tuple[PromptBatch, list[torch.Tensor]] | None = None

    def tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tensors by name."""
        dtype, device = self.resident.dtype, self.resident.device
        return {name: self._checkpoint.tensor(name, dtype, device) for name in names}

    def layer(self, index: int, kinds: Sequence[FineKind] | None = None) -> LayerWeights:
        """Weights of a layer, by name within it: all, or those that some kinds compute with."""
        names = self.pair.partition.within_layer(index)
        if kinds is not None:
            architecture = self.pair.partition.dims.architecture
            used = {
                n for k in kinds for n in (*architecture.read_by(k, names), architecture.out(k))
            }
            names = {within: name for within, name in names.items() if within in used}
        found = self.tensors(list(names.values()))
        return {within: found[name] for within, name in names.items()}

    @torch.no_grad()
    def run(self, receiver: Receiver) -> list[torch.Tensor]:
        """Its residual stream on the receiver's input; that on the last batch is kept.

        The donor runs layer by layer through the receiver's modules; one layer is held at a time.

        Returns:
            ``hidden[l]`` enters layer l, the last one leaves the last layer; each
            ``[rows, T, hidden]``.
        """
        batch, decoder = receiver.batch, receiver.decoder
        if self._run is None or self._run[0] is not batch:
            self._run = None
            hidden = [decoder.entering(batch, self.tensors(self.pair.entrance))]
            for index, layer in enumerate(decoder.layers):
                state, kwargs = dict(self.layer(index)), receiver.recording.calls[index].kwargs
                hidden.append(first(functional_call(layer, state, (hidden[-1],), kwargs)))
            self._run = batch, hidden
        return self._run[1]
