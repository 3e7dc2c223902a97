"""First-order scores: exact-local change times linear downstream.

The block's own output change is exact (`block_changes`); what the rest of the model makes of it is
linearised at the receiving model. Log-probabilities bend: a change of the logits adds to one its
first order, less half the variance of the change under the model's own distribution. This second
order is estimated with random probes (the Fisher / Gauss-Newton form), for all components at once.
Where the first order vanishes — ``kl`` at the expert, its own minimum — it is all there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mergekit_wp.criteria import wide
from mergekit_wp.engine.block_changes import Changes
from mergekit_wp.engine.decoder import Decoder, hooked
from mergekit_wp.engine.replay import Receiver, Recording, record
from mergekit_wp.prompts import PromptBatch
from mergekit_wp.terms import CriterionName, FineKind

#: random probes of the second order, fewer where it only corrects a first order; its relative
#: error is sqrt(2 / (probes * prompts))
PROBES, CORRECTING_PROBES = 16, 4
#: of these are held at once; every such group reads the donor's layers anew
PROBES_AT_ONCE = 4


@dataclass(frozen=True)
class BlockGradients:
    """Gradients of a scalar with respect to every block output, ``[n, T, hidden]`` per layer."""

    attention: list[torch.Tensor | None]
    mlp: list[torch.Tensor | None]

    def of(self, kind: FineKind, layer: int) -> torch.Tensor | None:
        """The gradient a kind's change is dotted with; None where nothing depends on it."""
        return (self.mlp if kind == "neuron" else self.attention)[layer]


@contextmanager
def cut_embedding(decoder: Decoder) -> Iterator[None]:
    """Let gradients begin at the embeddings' outputs while the context lasts.

    An embedding of positions gives one output for all prompts: here every prompt gets its own.
    """
    entrances = decoder.entrances
    n = 1

    def cut(module: torch.nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        nonlocal n
        if module is entrances[0]:
            n = len(output)
        return output.detach().expand(n, *output.shape[1:]).clone().requires_grad_()

    # first of the embeddings' hooks, so that the others see the output that has gradients
    with hooked([module.register_forward_hook(cut, prepend=True) for module in entrances]):
        yield


def record_with_gradients(
    decoder: Decoder, batch: PromptBatch, kinds: Sequence[FineKind] = ()
) -> Recording:
    """A recorded run whose block outputs can be differentiated with respect to; see `record`."""
    with torch.enable_grad(), cut_embedding(decoder):
        return record(decoder, batch, kinds)


def _gradients(scalar: torch.Tensor, recording: Recording) -> BlockGradients:
    blocks = [c.attention for c in recording.calls] + [c.mlp for c in recording.calls]
    found = torch.autograd.grad(scalar, blocks, retain_graph=True, allow_unused=True)
    half = len(recording.calls)
    return BlockGradients(list(found[:half]), list(found[half:]))


def criterion_gradients(receiver: Receiver) -> dict[CriterionName, BlockGradients]:
    """Gradients of every prompt's value; prompts do not mix, so one backward serves them all.

    Args:
        receiver: whose run was recorded by `record_with_gradients`.
    """
    with torch.enable_grad():
        values = receiver.own
        return {name: _gradients(v.sum(), receiver.recording) for name, v in values.items()}


def probe_gradients(receiver: Receiver, seed: int, probes: int) -> Iterator[BlockGradients]:
    """Gradients of random probes whose squared directional derivative averages to 2 KL.

    With p the model's own distribution at the m positions of a prompt and xi standard normal, the
    probe is ``sum_t sum_v xi_tv sqrt(p_tv / m) log p_tv``; the expected square of its change is
    ``sum_t sum_v p_tv (d log p_tv)^2 / m``, twice the mean KL to second order.
    """
    batch, recording = receiver.batch, receiver.recording
    with torch.enable_grad():
        final = recording.residual(len(recording.calls) - 1)[batch.rows, batch.cols]
        logprobs = torch.log_softmax(wide(receiver.decoder.logits(final)), -1)
        counts = torch.bincount(batch.rows, minlength=batch.size)[batch.rows]
        scale = (logprobs.detach().exp() / counts.unsqueeze(-1)).sqrt()
        for probe in range(probes):
            weights = _noise(batch, logprobs, seed, probe) * scale
            yield _gradients((weights * logprobs).sum(), recording)


def _noise(batch: PromptBatch, like: torch.Tensor, seed: int, probe: int) -> torch.Tensor:
    """Standard normal ``[P, vocabulary]``, drawn per prompt so that batching does not matter."""
    parts = []
    for row, member in enumerate(batch.members.tolist()):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + member) * PROBES + probe)
        positions = int((batch.rows == row).sum())
        parts.append(torch.randn((positions, like.shape[-1]), generator=generator))
    return torch.cat(parts).to(like)  # rows of a batch are in order


def project(
    gradients: BlockGradients, inputs: dict[FineKind, Changes], layer: int, n: int
) -> dict[FineKind, torch.Tensor]:
    """Predicted change of every prompt's scalar, ``[n, count]`` per kind in one layer."""
    found: dict[FineKind, torch.Tensor] = {}
    for kind, block in inputs.items():
        gradient = gradients.of(kind, layer)
        nothing = torch.zeros((n, block.count))
        found[kind] = nothing if gradient is None else block.project(gradient)
    return found
