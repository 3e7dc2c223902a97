"""The words of this package: kinds of component, estimands, criteria, fusions, roles.

Each `Literal` has its only home here; docs/mechanism.md and the README say what they mean.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import StringConstraints

# what is patched
Kind = Literal["layer", "tensor", "head", "kv_group", "neuron"]
FineKind = Literal["tensor", "head", "kv_group", "neuron"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SLICED_KINDS: tuple[FineKind, ...] = ("head", "kv_group", "neuron")
#: the fine partition, in the order in which gates are laid out flat
FINE_KINDS: tuple[FineKind, ...] = (*SLICED_KINDS, "tensor")

# what is measured, and how
Estimand = Literal["share", "gain", "knockout", "path", "activation_gain", "activation_knockout"]
#: what one expert alone can be scored for; ``path`` is fitted to all experts of a merge
LoneEstimand = Literal["share", "gain", "knockout", "activation_gain", "activation_knockout"]
ESTIMANDS: tuple[Estimand, ...] = get_args(Estimand)
LONE_ESTIMANDS: tuple[LoneEstimand, ...] = get_args(LoneEstimand)
#: what a merge can go by: what weights do, not what passes through them
WEIGHT_ESTIMANDS: tuple[Estimand, ...] = ("share", "gain", "knockout")
BuiltInCriterion = Literal["kl", "anchor", "logprob"]
CRITERIA: tuple[BuiltInCriterion, ...] = get_args(BuiltInCriterion)
#: a built-in one, or a caller's function by its name: files hold either
CriterionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
ScoringMethod = Literal["exact", "first-order", "second-order", "integrated-gradients", "fitted"]
#: how changes become scores: means over prompts before the division, or each prompt's own quotient
Normalisation = Literal["mean", "prompt"]
SweepName = Literal["share", "first-order", "exact", "verify", "noise"]
DTypeName = Literal["float32", "float64", "bfloat16", "float16"]
#: short spellings of dtypes
DTYPE_ALIASES: dict[str, DTypeName] = {
    "fp32": "float32",
    "fp64": "float64",
    "bf16": "bfloat16",
    "fp16": "float16",
}

# how scores are merged
Fusion = Literal["share", "winner", "gate", "topk", "path"]
FUSIONS: tuple[Fusion, ...] = get_args(Fusion)
Granularity = Literal["component", "tensor"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)

#: what one gate of a fit covers, from coarse to fine
GateGranularity = Literal["component", "slice", "channel", "row_column"]

# sets and circuits
Direction = Literal["restoration", "knockout"]
SetName = Literal["top", "bottom", "random"]
Role = Literal["carrier", "router", "executor"]
ROLES: tuple[Role, ...] = get_args(Role)
Via = Literal["weights", "activations"]

# comparisons
Split = Literal["valid", "test"]
RowRole = Literal["base", "expert", "peer", "ours"]


def of_activations(estimand: Estimand) -> bool:
    """Whether it exchanges what components write, not their weights."""
    return estimand in ("activation_gain", "activation_knockout")


def of_knockout(estimand: Estimand) -> bool:
    """Whether it is measured from the expert (what it loses), not from the base."""
    return estimand in ("knockout", "activation_knockout")
