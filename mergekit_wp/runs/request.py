"""How models are run: what every command that measures them is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from mergekit_wp.errors import UserError, option
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
Seed = Annotated[int, Field(ge=0, lt=2**32, description="Of random draws.")]
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
Ray = Annotated[
    bool,
    Option(stored=False),
    Field(
        description="Compute on a Ray cluster: that of RAY_ADDRESS, a running one of this machine, "
        "or a new one. pip install 'mergekit-wp[ray]'",
    ),
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
    """How to run: what every command that measures models is asked for.

    ``max_memory``: of weights on each device, see `placement`; None for all of them on `device`,
    empty for what is free.
    """

    max_prompts: MaxPrompts = None
    batch_size: BatchSize = None
    dtype: Annotated[DTypeName, Option(aliases=DTYPE_ALIASES)] = Field(
        default="float32",
        description="Of weights and activations; criteria are always computed in float32 or finer.",
    )
    device: Device = Field(default="auto", validate_default=True)
    device_map: Annotated[Literal["auto"] | None, Option(stored=False)] = Field(
        default=None,
        description="For models larger than the device: spread the weights over it, other GPUs, "
        "main memory and, where they do not fit there either, leave them in the checkpoints. All "
        f"computing is on {option('device')}, where weights come for the moment that they are "
        "used.",
    )
    max_memory: Annotated[
        dict[str, int] | None,
        Option(
            metavar="DEVICE=SIZE",
            default=f"half of what is free on {option('device')}, nine tenths on the others",
            repeated=True,
            stored=False,
        ),
    ] = Field(
        default=None,
        description=f"With {option('device_map')}, most memory for weights on a GPU, by its "
        "number, or on cpu, as in 0=20GiB; once per device, others are not used.",
    )
    ray: Ray = False
    seed: Seed = 0
    max_new_tokens: MaxNewTokens = 64

    @model_validator(mode="before")
    @classmethod
    def _places(cls, given: Any) -> Any:
        """A device map without limits goes by free memory, limits without one by nothing."""
        if isinstance(given, dict):
            if given.get("device_map") is not None:
                return given | {"max_memory": given.get("max_memory") or {}}
            if given.get("max_memory"):
                needed = option("device_map", "auto")
                raise UserError(f"{option('max_memory')} says where weights go with {needed}")
            return given | {"max_memory": None}
        return given

    @field_validator("max_memory", mode="before")
    @classmethod
    def _limits(cls, given: Any, info: ValidationInfo) -> Any:
        if given is None or "device" not in info.data:
            return given
        from mergekit_wp.models.placement import check_places, parse_max_memory

        check_places(info.data["device"])
        if isinstance(given, str):
            given = [given]
        if isinstance(given, dict) or not isinstance(given, Iterable):
            return given
        return parse_max_memory(given, info.data["device"])


class PairRequest(RunRequest):
    """What is asked about one expert and its base."""

    base: Annotated[str, Argument()] = Field(description=f"The base model: {REFERENCE}.")
    expert: Annotated[str, Argument()] = Field(
        description=f"The expert: {REFERENCE}, or MODEL+ADAPTER."
    )


class ReproduceRequest(Request):
    """Everything `mergekit-wp reproduce` is asked for."""

    file: Annotated[Path, Argument()] = Field(description="A score or trace file.")
