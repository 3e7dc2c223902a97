"""An option left out means the same in a shell and in Python."""

from __future__ import annotations

import click
import pytest
from pydantic import BaseModel

from mergekit_wp.commands.fit import fit
from mergekit_wp.commands.score import score
from mergekit_wp.commands.trace import trace
from mergekit_wp.commands.verify import verify
from mergekit_wp.files.circuitfile import Rules
from mergekit_wp.joint.request import CompanyRequest, FitRequest
from mergekit_wp.mechanism.request import TraceRequest, VerifyRequest
from mergekit_wp.scoring.request import ScoreRequest

#: the command makes these of what it is given
MADE = {"device", "max_memory", "share_steps"}
RENAMED = {(Rules, "suppliers"): "min_suppliers"}


@pytest.mark.parametrize(
    ("command", "model", "at_least"),
    [
        (fit, FitRequest, 12),
        (score, ScoreRequest, 10),
        (score, CompanyRequest, 4),
        (verify, VerifyRequest, 6),
        (trace, TraceRequest, 6),
        (trace, Rules, 4),
    ],
    ids=lambda value: getattr(value, "__name__", getattr(value, "name", "")),
)
def test_options_and_requests_have_the_same_defaults(
    command: click.Command, model: type[BaseModel], at_least: int
) -> None:
    parsed = command.make_context("", [], resilient_parsing=True).params
    compared = 0
    for field, info in model.model_fields.items():
        option = RENAMED.get((model, field), field)
        if option in parsed and option not in MADE and not info.is_required():
            assert parsed[option] == info.default, option
            compared += 1
    assert compared >= at_least
