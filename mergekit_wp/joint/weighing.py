"""What a step of a fit weighs: the worst behaviour most, guards as much as their limits need.

Worst first: a mean over behaviours lets one starve whose gates others want elsewhere. So each is
weighed by a power of what is left of its divergence.

A guard has no weight but a limit, a constraint. Of all steps, the nearest to the optimiser's own is
taken after which guards would, to first order, be on their way back to their limits, or within them
(sequential quadratic programming; Nocedal and Wright, Numerical Optimization, chapter 18). The
multipliers of that problem are the guards' weights: each step finds them anew. Prices that were
followed from step to step instead, as an augmented Lagrangian does, swung: skills fell with them.
Pure maths: no models.
"""

from __future__ import annotations

import torch
from scipy.optimize import lsq_linear

#: worst first: weight (left + FLOOR) ** POWER
FLOOR, POWER = 0.02, 0.5
#: steps in which a guard is to be back at its limit
BACK = 5
#: limits used so many times over are taken for no more than these
FAR = 4.0
#: the least weight: a guard within its limit still counts a little, which costs no skill; the most
LEAST, MOST = 0.005, 2.0
#: a price below which a limit has cost nothing
NOTHING = 1e-4
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


def prices(
    used: torch.Tensor, behaviors: torch.Tensor, guards: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """What guards weigh in the next step, beside 1 for all behaviours: ``[guards]``.

    The step is ``scale * (behaviors + prices @ guards)``. Prices are the least, from 0 on, by which
    every guard that is beyond its limit loses a part of what it is beyond, one in `BACK`, and every
    other takes no larger part of the room that it has; to first order, and as far as `FAR`, `MOST`
    and other guards allow. A guard that the behaviours serve themselves has price 0.

    Args:
        used: of what the limits allow, ``[guards]``; 1 at the limit.
        behaviors: slope of what behaviours weigh together, ``[gates]``.
        guards: slope of minus what each uses, ``[guards, gates]``.
        scale: how far the optimiser goes for a slope, ``[gates]``; 0 for gates that cannot move.
    """
    if not len(used):
        return used
    wanted = (used.clamp_max(FAR) - 1.0) / BACK - guards @ (scale * behaviors)
    gained = guards @ (scale * guards).T
    # guards that pull alike share a price
    gained.diagonal().add_(1e-9 * gained.diagonal().max() + 1e-30)
    root = torch.linalg.cholesky(gained)
    right = torch.linalg.solve_triangular(root, wanted.unsqueeze(1), upper=False).squeeze(1)
    found = lsq_linear(root.T.numpy(), right.numpy(), bounds=(0.0, MOST), method="bvls").x
    return torch.from_numpy(found).clamp(0.0, MOST)


def running(mean: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A running mean after one more value; NaN where there was none."""
    return torch.where(mean.isnan(), value, KEPT * mean + (1.0 - KEPT) * value)


def averaged(mean: torch.Tensor, gates: torch.Tensor, steps: int) -> torch.Tensor:
    """Running mean of gates after so many steps: of all at first, of the last ones later."""
    kept = min(AVERAGED, (steps - 1) / steps)
    return kept * mean + (1.0 - kept) * gates
