"""What a run says of its machine and its results: what is slow or none, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mergekit_wp.errors import option
from mergekit_wp.files.manifest import Manifest
from mergekit_wp.models.memory import in_gib, peak_memory, peak_on_gpus
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import Sample
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.references import References
from mergekit_wp.runs.request import DTYPES, RunRequest
from mergekit_wp.runs.texts import Footprint
from mergekit_wp.terms import SLICED_KINDS

#: nats a token below which two answers are taken for the same: what rounding to 8 bits changes
SAME_ANSWER = 0.01
#: part of the prompts that may be answered like the base before somebody is told
HALF = 0.5
#: how far a sum of shares may be from 1
CLOSE = 0.1


def emulated(dtype: torch.dtype, device: str) -> str | None:
    """What to say of a dtype that the CPU has no instructions for; None where all is well.

    With AVX2 alone torch has no kernel for such products but a plain loop; with AVX512 oneDNN has
    one, even where it converts, which is why that is not warned of.
    """
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if dtype not in supported or supported[dtype]():
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"warning: this CPU has no instructions for {name}, which takes many times as long here as "
        f"float32; give {option('dtype', 'float32')} if memory allows"
    )


def warn_of_dtype(request: RunRequest, progress: Progress) -> None:
    """Say where this machine's CPU emulates the dtype; what workers have is theirs to know."""
    line = None if request.ray else emulated(DTYPES[request.dtype], request.device)
    if line is not None:
        progress.note(line)


def warn_of_references(references: References, progress: Progress, expert: str = "") -> None:
    """Say where the expert does not show the behaviour better than the base.

    ``kl`` has no direction, for it is measured from whichever model is called the expert. What can
    be known: a criterion that is lower for the expert; a given response that is less likely;
    prompts that both answer alike.

    Args:
        references: base and expert on the prompts.
        progress: told.
        expert: its name, where there are several.
    """
    of = f" of {expert}" if expert else ""
    for name, reference in references.values.items():
        if float(reference.distance.mean()) < 0:
            progress.note(
                f"warning: criterion '{name}'{of} is lower for the expert than for the base "
                f"({float(reference.expert.mean()):.3g} against {float(reference.base.mean()):.3g})"
                "; its scores say what lowers it. If that was not meant, base and expert may be "
                "swapped, or the prompts those of another expert"
            )
    likely = references.likelihood
    if likely is not None and "logprob" not in references.values and likely.distance.mean() < 0:
        progress.note(
            f"warning: the responses{of} are less likely at the expert than at the base "
            f"({float(likely.expert.mean()):.3g} against {float(likely.base.mean()):.3g} nats a "
            "token): base and expert may be swapped, or the prompts those of another expert"
        )
    if "kl" in references.values:
        distance = references.values["kl"].distance
        alike = int((distance < SAME_ANSWER).sum())
        if alike >= HALF * distance.numel():
            progress.note(
                f"warning: {alike} of {distance.numel()} prompts{of} are answered by the expert as "
                f"by the base (less than {SAME_ANSWER:g} nats a token apart), so they say nothing "
                "about it; give prompts on which the expert behaves differently"
            )


def warn_of_completeness(completeness: Mapping[str, float], progress: Progress) -> None:
    """Say where shares do not sum to 1: too few steps for a path as curved as this.

    Args:
        completeness: sums, by scores.
        progress: told.
    """
    for scores, total in completeness.items():
        if abs(total - 1) > CLOSE:
            progress.note(
                f"warning: {scores} sums to {total:.2f}, where exact scores sum to 1; give more "
                f"{option('share_steps')}"
            )


def tell_prompts_needed(manifest: Manifest, progress: Progress) -> None:
    """Say how many prompts leaders need that other prompts would name, too."""
    said = [
        f"{found.estimand}/{found.criterion}/{found.kind} "
        f"{'too many to tell' if found.needed is None else f'about {found.needed}'}"
        for found in manifest.stability
        if found.kind in SLICED_KINDS
    ]
    if said:
        progress.note(
            "a stable top 1% (two scorings on different prompts share four fifths of it) needs, in "
            f"prompts: {', '.join(said)}; these were {manifest.n_prompts}"
        )


def memory_used(
    before: int,
    resident: ResidentModel,
    footprint: Footprint,
    samples: Sequence[Sample],
    sequences: int,
) -> str:
    """What this process has taken at most, beside what it was meant to take.

    Args:
        before: bytes that Python and its libraries had taken when the run began.
        resident: the model that was run.
        footprint: of the model.
        samples: that it ran on.
        sequences: per forward pass.
    """
    found = f"peak memory {in_gib(peak_memory())}"
    if (on_gpus := peak_on_gpus()) > 0:
        found += f", on GPUs {in_gib(on_gpus)}"
    budget = footprint.of_sequences(samples, sequences)
    fetched = f"; {in_gib(resident.fetched)} of weights were fetched" if resident.fetched else ""
    return (
        f"{found} (weights {resident.where}, activation budget {in_gib(budget)}, "
        f"Python and its libraries {in_gib(before)}){fetched}"
    )
