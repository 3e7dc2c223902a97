"""What a step of a fit weighs: the worst behaviour most, guards as much as their limits need.

Worst first: a mean over behaviours lets one starve whose gates others want elsewhere. So each is
weighed by a power of what is left of its divergence.

A guard has no weight but a limit, kept by an augmented Lagrangian (Hestenes 1969; Nocedal and
Wright, Numerical Optimization, section 17.3): its price rises by every step above the limit and
falls below it, down to 0, where the guard costs nothing. The excess is measured on a scale on which
far beyond the limit is not a thousand times as urgent as just beyond. Just beyond, the pull does
not fall with the distance, or price and guard would swing around each other.
Pure maths: no models.
"""

from __future__ import annotations

import torch

#: worst first: weight (left + FLOOR) ** POWER
FLOOR, POWER = 0.02, 0.5
#: of the augmented Lagrangian: pull per excess, and how fast prices follow it
STIFFNESS, PACE = 0.2, 0.005
#: limits used so many times over pull no more than these
FAR = 4.0
#: the least force: a guard within its limit still counts a little, which costs no skill
LEAST = 0.005
#: of running means over steps: part that each step keeps of what was
KEPT = 0.8
#: of the gates' running mean
AVERAGED = 0.95


def worst_first(left: torch.Tensor) -> torch.Tensor:
    """Weight of every behaviour; they sum to 1.

    Args:
        left: of each behaviour's divergence, 1 at the base, 0 at its expert, ``[behaviours]``.
    """
    weights = (left.clamp_min(0.0) + FLOOR) ** POWER
    return weights / weights.sum()


def excess(used: torch.Tensor) -> torch.Tensor:
    """How far beyond their limits guards are: 0 at the limit, -1 at the base.

    Beyond the limit it grows like the distance that the weights have moved, of which a divergence
    is about the square; far beyond, like its logarithm.

    Args:
        used: of what the limits allow, ``[guards]``; 1 at the limit.
    """
    near, edge = 2.0 * (used.clamp(1.0, FAR).sqrt() - 1.0), 2.0 * (FAR**0.5 - 1.0)
    beyond = torch.where(used > FAR, edge + FAR**0.5 * (used.clamp_min(FAR) / FAR).log(), near)
    return torch.where(used > 1.0, beyond, used - 1.0)


def pull(price: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Weight of what guards use of their limits, beside 1 for all behaviours: ``[guards]``.

    It is the derivative, by what is used, of the augmented Lagrangian's part for a limit; a little
    remains where the limit is held.
    """
    edge = 2.0 * (FAR**0.5 - 1.0)
    force = (price + STIFFNESS * excess(used).clamp_max(edge)).clamp_min(LEAST)
    slope = torch.where(used > FAR, FAR**0.5 / used, used.clamp_min(1.0) ** -0.5)
    return force * slope


def followed(price: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Prices after one more step, ``[guards]``."""
    return (price + PACE * excess(used).clamp_max(1.0)).clamp_min(0.0)


def running(mean: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A running mean after one more value; NaN where there was none."""
    return torch.where(mean.isnan(), value, KEPT * mean + (1.0 - KEPT) * value)


def averaged(mean: torch.Tensor, gates: torch.Tensor, steps: int) -> torch.Tensor:
    """Running mean of gates after so many steps: of all at first, of the last ones later."""
    kept = min(AVERAGED, (steps - 1) / steps)
    return kept * mean + (1.0 - kept) * gates
