"""The anchor against a plain loop."""

from __future__ import annotations

import pytest
import torch

from mergekit_wp.errors import UserError
from mergekit_wp.runs.references import Contrast, choose_anchor, held_out_separation


def contrast(n: int = 8, layer: int = 2) -> Contrast:
    """Noise everywhere; in one layer the sets differ along a direction.

    In the layer before, instruction and none differ more, but the base is as far as the expert.
    """
    torch.manual_seed(0)
    towards, away, base = torch.randn(3, n, 4, 16)
    towards[:, layer, 3] += 6
    towards[:, layer - 1, 5] += 12
    base[:, layer - 1, 5] += 13
    return Contrast(towards, away, base, True)


def test_the_layer_that_separates_is_found_and_its_direction() -> None:
    anchor, info = choose_anchor(contrast(), None)
    assert (anchor.layer, info.layer, info.contrast, info.n_contrasts) == (2, 2, "instruction", 8)
    assert float(anchor.vector.norm()) == pytest.approx(1)
    assert int(anchor.vector.abs().argmax()) == 3 and anchor.vector[3] > 0
    assert info.separation > 2


def test_held_out_separation_against_a_plain_loop() -> None:
    given = contrast(5)
    found = held_out_separation(given)
    for layer in range(4):
        pairs = []
        for i in range(5):
            others = [j for j in range(5) if j != i]
            u = (given.towards[others, layer] - given.away[others, layer]).mean(0)
            u = u / u.norm()
            sides = (given.towards, given.away, given.base)
            pairs.append([side[i, layer] @ u for side in sides])
        a, *others = (torch.stack(side) for side in zip(*pairs, strict=True))
        want = min((a.mean() - b.mean()) / ((a.var() + b.var()) / 2).sqrt() for b in others)
        assert float(found[layer]) == pytest.approx(float(want), rel=1e-3)


def test_noise_alone_does_not_separate() -> None:
    torch.manual_seed(1)
    noise = Contrast(*torch.randn(3, 200, 3, 8), False)
    assert float(held_out_separation(noise).abs().max()) < 0.5


def test_refusals() -> None:
    with pytest.raises(UserError, match="anchor_layer=4 is out of range: .* layers 0 to 3"):
        choose_anchor(contrast(), 4)
    with pytest.raises(UserError, match="needs at least 2 prompts"):
        choose_anchor(contrast(1), None)
    _, info = choose_anchor(contrast(1), 1)
    assert info.separation is None
    same = torch.randn(4, 4, 16)
    with pytest.raises(UserError, match="does not separate: .* at layer 1 is 0"):
        choose_anchor(Contrast(same, same, same, True), 1)
