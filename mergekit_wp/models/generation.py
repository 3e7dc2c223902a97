"""Greedy answers of a model to a batch of prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mergekit_wp.errors import UserError
from mergekit_wp.files.untrusted import parse_json

# what a model calls the keys and values it keeps, where it takes and gives them: since
# transformers 5.24, and before
_CACHES = ("cache", "past_key_values")


def end_tokens(folder: str | Path, tokenizer: Any) -> list[int]:
    """Tokens that end a model's answers: its tokenizer's and its generation config's.

    Of the generation config nothing else is read: answers are greedy, whatever it says of sampling.

    Raises:
        UserError: a generation config that is no JSON, or whose eos_token_id is no token.
    """
    ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    file = Path(folder, "generation_config.json")
    if not str(folder) or not file.is_file():
        return sorted(ends)
    try:
        config = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is no JSON object; remove it, or copy it again from the model")
    stated = config.get("eos_token_id")
    tokens = stated if isinstance(stated, list) else [] if stated is None else [stated]
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool):
            raise UserError(
                f"{file} has eos_token_id = {json.dumps(stated)}; expected a token's number, a "
                "list of them, or null"
            )
    return sorted(ends.union(tokens))


@torch.no_grad()
def greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Sequence[int],
    device: str | torch.device,
    at_once: int | None = None,
) -> list[list[int]]:
    """Greedy continuations, each ending with its end token if it got there.

    A batch is padded on the left behind an attention mask; it stops when every row has ended.
    Where padding would make NaN, prompts of one length go together.

    Args:
        model: a causal LM of transformers.
        prompts: token ids.
        max_new_tokens: longest continuation.
        ends: tokens that end one.
        device: the model's.
        at_once: prompts in a batch; all where None.

    Raises:
        UserError: a model that keeps no keys and values.
    """
    if at_once is not None and at_once < len(prompts):
        starts = range(0, len(prompts), at_once)
        batches = [prompts[start : start + at_once] for start in starts]
        each = [greedy(model, batch, max_new_tokens, ends, device) for batch in batches]
        return [ids for answers in each for ids in answers]
    width = max(len(p) for p in prompts)
    # transformers' own attention takes its softmax in float32, where the float64 mask is infinite
    if model.dtype == torch.float64 and model.config._attn_implementation == "eager":
        lengths = sorted({len(p) for p in prompts})
        if len(lengths) > 1:
            found: dict[int, list[int]] = {}
            for length in lengths:
                same = [i for i, p in enumerate(prompts) if len(p) == length]
                parts = greedy(model, [prompts[i] for i in same], max_new_tokens, ends, device)
                found |= dict(zip(same, parts, strict=True))
            return [found[i] for i in range(len(prompts))]
    ids = torch.tensor([[*[0] * (width - len(p)), *p] for p in prompts], device=device)
    mask = torch.tensor([[*[0] * (width - len(p)), *[1] * len(p)] for p in prompts], device=device)
    stop = torch.tensor(list(ends), device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    rows: list[list[int]] = [[] for _ in prompts]
    cache: dict[str, Any] = {}
    step = ids
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for _ in range(max_new_tokens):
        output = model(
            input_ids=step,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **cache,
        )
        cache = {name: value for name, value in output.items() if name in _CACHES}
        if not cache:  # the next step would see its last token alone
            raise UserError(
                f"{type(model).__name__} gives no cache ({' or '.join(_CACHES)}) with its answer, "
                "so it cannot generate here"
            )
        chosen = output.logits[:, -1].argmax(-1)
        over = done.tolist()
        for row, token in enumerate(chosen.tolist()):
            if not over[row]:
                rows[row].append(token)
        done |= torch.isin(chosen, stop)
        if done.all():
            break
        step, positions = chosen.unsqueeze(-1), positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones((len(prompts), 1))], -1)
    return rows
