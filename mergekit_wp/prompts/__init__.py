"""Prompts: read from what people have, and their tokens in batches.

A source (a file, a folder of `datasets`, a dataset on the Hub, a task of lm-eval, or objects in
memory) becomes rows, the shape of the rows is recognised by their fields, and rows become prompts.
"""

from mergekit_wp.prompts.batching import PromptBatch, Sample, batches, together
from mergekit_wp.prompts.prompt import Message, Prompt, PromptSet, PromptSource, Text, text_digest
from mergekit_wp.prompts.read import is_frame, prompt_source, read_prompts, source_name

__all__ = [
    "Message",
    "Prompt",
    "PromptBatch",
    "PromptSet",
    "PromptSource",
    "Sample",
    "Text",
    "batches",
    "is_frame",
    "prompt_source",
    "read_prompts",
    "source_name",
    "text_digest",
    "together",
]
