"""What every peer is given: prompts, criterion, heads, and the arithmetic of what heads write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.engine.inputs import Case, Inputs
from benchmarks.engine.measure import Spent
from mergekit_wp.architectures import Dims
from mergekit_wp.criteria import Targets, kl_values
from mergekit_wp.prompts import PromptBatch

Model = Literal["base", "expert"]
#: a head by its layer and its number there
Head = tuple[int, int]
#: what a projection reads ``[rows, T, width]``, and its weight ``[hidden, width]``
Written = tuple[torch.Tensor, torch.Tensor]
#: of a pass that is over in seconds; the best one counts
REPEATS = 3


@dataclass(frozen=True)
class Task:
    """What a peer measures, on models that it opens as its users do.

    Attributes:
        case: where the models are.
        batch: the prompts in rows, padded on the right.
        targets: the expert's log-probabilities.
        base: the criterion's mean value at the base.
        distance: of the expert from it.
        dims: component counts.
        heads: that are patched.
        times: so many times more there are in all, for exact sweeps cost the same for every head.
    """

    case: Case
    batch: PromptBatch
    targets: Targets
    base: float
    distance: float
    dims: Dims
    heads: Sequence[Head]
    times: float

    @classmethod
    def of(cls, inputs: Inputs, sample: int | None) -> Task:
        """The task of an opened case.

        Args:
            inputs: the case.
            sample: patch only so many heads, evenly spaced; all where None.

        Raises:
            SystemExit: the prompts do not fit into one batch.
        """
        references, dims = inputs.references, inputs.partition.dims
        if len(references.batches) > 1:
            raise SystemExit(
                f"--n-prompts: {len(references.batches)} batches, and peers are given one; "
                "ask for fewer prompts"
            )
        every = [(layer, head) for layer in range(dims.n_layers) for head in range(dims.n_heads)]
        some = every[:: max(1, len(every) // (sample or len(every)))]
        kl = references.values["kl"]
        return cls(
            inputs.case,
            references.batches[0],
            references.targets[0],
            float(kl.base.double().mean()),
            float(kl.distance.double().mean()),
            dims,
            some,
            len(every) / len(some),
        )

    def model(self, which: Model) -> PreTrainedModel:
        """A model of Hugging Face's, in fp32."""
        folder = self.case.base if which == "base" else self.case.expert
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.eval()  # type: ignore[no-any-return]

    def gain(self, logits: torch.Tensor) -> torch.Tensor:
        """What a model has recovered by ``kl``, from its logits ``[rows, T, vocabulary]``."""
        read = logits[self.batch.rows, self.batch.cols]
        values = kl_values(read, self.batch, self.targets)
        return (values.mean() - self.base) / self.distance

    def each(self, patch: Callable[[int, int], torch.Tensor], spent: Spent) -> torch.Tensor:
        """The gain of every head's patch, by layer and head; the time is that of all heads."""
        return spent.on(lambda: torch.stack([patch(*head) for head in self.heads]), self.times)

    def rows(self, weight: torch.Tensor, head: int) -> torch.Tensor:
        """A view of a head's rows in a weight ``[heads * width, hidden]``."""
        return weight.unflatten(0, (self.dims.n_heads, -1))[head]

    def written(self, handed: torch.Tensor, out: torch.Tensor, head: int) -> torch.Tensor:
        """What a head writes into the residual stream, ``[rows, T, hidden]``.

        Args:
            handed: what the output projection reads, ``[rows, T, heads * width]``.
            out: its weight.
            head: which head.
        """
        return handed.unflatten(-1, (self.dims.n_heads, -1))[..., head, :] @ self.rows(out.T, head)

    def scores(self, gradient: torch.Tensor, own: Written, their: Written) -> torch.Tensor:
        """Attribution of everything that writes through a projection, ``[width]``.

        Args:
            gradient: of the gain by the projection's output, ``[rows, T, hidden]``.
            own: what the base's projection reads, and its weight.
            their: the expert's.
        """
        products = (gradient @ their[1]) * their[0] - (gradient @ own[1]) * own[0]
        return products.sum((0, 1))

    def by_head(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores of what a layer's output projection reads, summed to heads."""
        return scores.unflatten(-1, (self.dims.n_heads, -1)).sum(-1)


def outs(model: PreTrainedModel) -> list[nn.Linear]:
    """The projections that heads write through, by layer."""
    return [layer.self_attn.o_proj for layer in model.model.layers]
