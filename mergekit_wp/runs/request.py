"""How models are run: what every command that measures them is asked for."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field

from mergekit_wp.terms import DTypeName

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class RunRequest(BaseModel):
    """How to run: what every command that measures models is asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_prompts: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=1)
    dtype: DTypeName = "float32"
    device: str = "cpu"
    seed: int = 0
    max_new_tokens: int = Field(64, ge=1)
