"""How models are run: what every command that measures them is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator, Field

from mergekit_wp.options import Argument, Option, Request
from mergekit_wp.prompts.request import PROMPTS, MaxPrompts
from mergekit_wp.terms import DTYPE_ALIASES, DTypeName

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def _usable(device: str) -> str:
    from mergekit_wp.models.placement import choose_device

    return choose_device(device)


# fields that requests of several rooms have
Device = Annotated[
    str,
    AfterValidator(_usable),
    Field(description="cpu, cuda, cuda:1, ...; auto takes the GPU, where there is one."),
]
BatchSize = Annotated[
    int | None,
    Option(auto=True),
    Field(
        ge=1,
        description="Sequences per forward pass; auto takes what should fit. Halved when memory "
        "runs out.",
    ),
]
MaxNewTokens = Annotated[
    int,
    Field(ge=1, description="Most tokens of an answer that a model gives itself."),
]
Seed = Annotated[int, Field(description="Of random draws.")]
Restart = Annotated[
    bool,
    Option(stored=False),
    Field(description="Throw away what an earlier run left, begin anew."),
]
Overwrite = Annotated[
    bool,
    Option(stored=False),
    Field(description="Replace a finished score file or merged model that is there already."),
]
CheckersFile = Annotated[
    Path | None,
    Field(description="Python file with checkers of your own: f(item, output) -> bool or score."),
]
PROMPTS_OF_EACH = (
    f"{PROMPTS} For several experts once each, as EXPERT=SOURCE, where EXPERT is its folder's or "
    "repository's last name."
)
CALIBRATION = "Prompts on whose texts AIM measures the base's activations on."
REFERENCE = "a folder or a Hub id (owner/name@revision)"


class RunRequest(Request):
    """How to run: what every command that measures models is asked for."""

    max_prompts: MaxPrompts = None
    batch_size: BatchSize = None
    dtype: Annotated[DTypeName, Option(aliases=DTYPE_ALIASES)] = Field(
        default="float32",
        description="Of weights and activations; criteria are always computed in float32 or finer.",
    )
    device: Device = Field(default="auto", validate_default=True)
    seed: Seed = 0
    max_new_tokens: MaxNewTokens = 64


class PairRequest(RunRequest):
    """What is asked about one expert and its base."""

    base: Annotated[str, Argument()] = Field(description=f"The base model: {REFERENCE}.")
    expert: Annotated[str, Argument()] = Field(
        description=f"The expert: {REFERENCE}, or MODEL+ADAPTER."
    )


class ReproduceRequest(Request):
    """Everything `mergekit-wp reproduce` is asked for."""

    file: Annotated[Path, Argument()] = Field(description="A score or trace file.")
