"""What is asked of prompts, and how a source of them is described in help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from mergekit_wp.options import Argument, Option, Request
from mergekit_wp.prompts.prompt import PromptSource

PROMPTS = (
    "A file (JSONL, JSON, CSV, TSV, Parquet or a text with a prompt a line; .gz too), a folder of "
    "save_to_disk, hf:OWNER/DATASET or lm-eval:TASK. Fields: 'prompt' (text or chat messages), "
    "optional 'contrast' (the same request without the instruction), optional 'response' (else the "
    "expert's own greedy answer); other common ones are known. Yours, a split and more are named "
    "as in 'SOURCE?prompt=FIELD&split=train', see `prompts`."
)
#: an option that takes a source
SOURCE = Option(metavar="SOURCE", path="any")
Prompts = Annotated[PromptSource, SOURCE, Field(description=PROMPTS)]
MaxPrompts = Annotated[
    int | None,
    Option(metavar="N", default="all"),
    Field(ge=1, description="Use the first N."),
]


class PromptsRequest(Request):
    """Everything `mergekit-wp prompts` is asked for."""

    command: ClassVar[str] = "prompts"

    source: Annotated[Path, Argument(path="any")] = Field(description=PROMPTS)
    out: Path | None = Field(default=None, description="New prompt file to write (JSONL).")
    max_prompts: MaxPrompts = None
