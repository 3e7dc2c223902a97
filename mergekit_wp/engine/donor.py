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
    def run(self, receiver: Receiver, as_far_as: int | None = None) -> list[torch.Tensor]:
        """Its residual stream on the receiver's input; that on the last batch is kept.

        The donor runs layer by layer through the receiver's modules; one layer is held at a time.

        Args:
            receiver: the model with its recorded run.
            as_far_as: the layer that it has to enter at least; None for all of it.

        Returns:
            ``hidden[l]`` enters layer l, the last one leaves the last layer; each
            ``[rows, T, hidden]``.
        """
        batch, decoder = receiver.batch, receiver.decoder
        if self._run is None or self._run[0] is not batch:
            self._run = None
            self._run = batch, [decoder.entering(batch, self.tensors(self.pair.entrance))]
        hidden = self._run[1]
        while len(hidden) <= (len(decoder.layers) if as_far_as is None else as_far_as):
            self.pass_through(receiver, len(hidden) - 1, self.layer(len(hidden) - 1))
        return hidden

    @torch.no_grad()
    def pass_through(self, receiver: Receiver, index: int, state: LayerWeights) -> None:
        """Run one layer, for what happens in it: what leaves it is then known to `run`.

        Args:
            receiver: the model with its recorded run.
            index: which layer.
            state: its weights.
        """
        hidden, layer = self.run(receiver, index), receiver.decoder.layers[index]
        kwargs = receiver.recording.calls[index].kwargs
        output = first(functional_call(layer, dict(state), (hidden[index],), kwargs))
        if len(hidden) == index + 1:
            hidden.append(output)
