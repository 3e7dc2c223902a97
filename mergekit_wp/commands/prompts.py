"""`mergekit-wp prompts`."""

from __future__ import annotations

from typing import Any

import click

from mergekit_wp.commands.derive import OnceEach, given, options_of
from mergekit_wp.prompts.request import PromptsRequest


@click.command(cls=OnceEach, short_help="Look at what would be read of a source of prompts.")
@options_of(PromptsRequest)
def prompts(**options: Any) -> None:
    """Show which prompts a SOURCE gives, and write them as a prompt file.

    Every command reads prompts, and `compare` its items, from

    \b
      FILE             JSONL, a JSON array, CSV, TSV, Parquet, text with a prompt a line; .gz too
      FOLDER           of `datasets`, as save_to_disk writes it
      hf:OWNER/NAME    a dataset on the Hub
      lm-eval:TASK     or its YAML file: documents that the task is not evaluated on

    What the fields mean is recognised: prompt/contrast/response, question/answer,
    instruction/input/output (Alpaca), messages, conversations (ShareGPT). Where two fit, or none,
    name the fields. What is not said by the place stands behind a question mark, in quotes for
    the shell:

    \b
      prompt=FIELD response=FIELD contrast=FIELD    fields; an empty response leaves answers out
      config=NAME split=NAME revision=NAME          of a dataset; split=train[:1000] is its start
      sample=N seed=S                               N rows drawn at random (seed 0)
      distinct=yes                                  without repetitions
      checker=NAME                                  of items that name none

    \b
      mergekit-wp prompts alpaca.json
      mergekit-wp prompts "my.csv?prompt=text" --out my.jsonl
      mergekit-wp prompts "hf:openai/gsm8k?config=main&split=train&sample=128" --out gsm8k.jsonl
    """
    from mergekit_wp.prompts.preview import described, look

    request = PromptsRequest.of(**given(PromptsRequest, options))
    click.echo(described(look(request)))
    if request.out is not None:
        click.echo(f"\n{request.out} written")
