"""Activation-Informed Merging (Nobari et al., arXiv 2502.02421), which post-processes a merge.

With s the mean absolute input of each input channel of a linear layer, measured in the base over
calibration prompts and scaled to a maximum of 1, and δ the merge's difference from the base,

    δ' = δ (1 − s (1 − ω))

so that channels the base uses most keep most of the base's weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from mergekit_wp.architectures.computation import RopeBorders
from mergekit_wp.engine.decoder import hooked
from mergekit_wp.errors import UserError
from mergekit_wp.files.atomic import refuse_existing, staged_folder
from mergekit_wp.merging.merge import check_target
from mergekit_wp.merging.request import AimRequest
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.encoding import encode_pair, encode_prompt
from mergekit_wp.models.load import load_folder
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.prompts import Prompt, read_prompts, together
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.texts import find_tokenizer

#: texts in a forward pass, where nobody says how many
AT_ONCE = 16

_LEFT_OUT = ("mergekit_config.yml",)  # it describes another model than the one written here
_NOTE = """
## Activation-Informed Merging

Afterwards the weights of input channels that the base uses most were drawn back to the base by
[AIM](https://arxiv.org/abs/2502.02421) with omega {omega:g}, calibrated on {count} prompts
(`mergekit-wp aim`). What a fit or a comparison above reached is of the merge before that.
"""


def aim(request: AimRequest, progress: Progress) -> None:
    """Apply AIM to a checkpoint, into a folder that appears only when it is complete.

    Args:
        request: names the checkpoints, and says how; without a batch size, `AT_ONCE` texts go
            together.
        progress: told of files, and of every step back.

    Raises:
        UserError: the checkpoints do not belong together, there is no prompt or no tokenizer, the
            folder is a file or an input, or not even one text fits into memory.
        DiskError: the disk is full.
    """
    omega, calibration = request.omega, read_prompts(request.calibration, None)
    if not calibration.plain:
        progress.note(calibration.said)
    prompts = calibration.prompts
    start, end = Checkpoint(request.base), Checkpoint(request.merged)
    for checkpoint in (start, end):
        checkpoint.require_whole("aim")
    target = request.out.absolute()
    check_target(target, (start.path, end.path))
    refuse_existing(target, request.overwrite, ["config.json"])
    if start.architecture != end.architecture:
        raise UserError(
            f"'{end.name}' is {end.architecture}, but its base '{start.name}' {start.architecture}"
        )
    tokenizer = find_tokenizer((start, end), progress.note)
    model = load_folder(start.path, "auto", request.device)
    importance = AtOnce(request.batch_size or AT_ONCE, progress.note).run(
        partial(activation_importance, model, tokenizer, prompts), max(1, len(prompts))
    )
    if line := untouched(model, importance):
        progress.note(line)
    del model
    with staged_folder(target, overwrite=request.overwrite) as folder:
        _write(start, end, importance, omega, folder, progress)
        readme = folder / "README.md"
        if readme.exists():
            note = _NOTE.format(omega=omega, count=len(prompts))
            text = readme.read_text(encoding="utf-8").rstrip()
            readme.write_text(f"{text}\n{note}", encoding="utf-8")


@torch.no_grad()
def activation_importance(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], batch_size: int
) -> dict[str, torch.Tensor]:
    """Mean |input| per input channel of every linear layer, scaled to a maximum of 1.

    Args:
        model: the base, a causal LM of transformers.
        tokenizer: its tokenizer.
        prompts: calibration texts: each prompt, and its response where one is given.
        batch_size: prompts at once.

    Returns:
        ``[in_features]`` by weight name, or ``[in_features, 1]`` where the matrix lies the other
        way round (GPT-2's). A head that is tied to the embedding is not listed: its weight is the
        embedding's, which has no input channels. Nor are matrices that no linear layer has, as of
        the experts in a mixture; see `untouched`.

    Raises:
        UserError: no prompts, or no linear layer.
    """
    if not prompts:
        raise UserError("AIM needs calibration prompts, and the file holds none")
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    sums: dict[str, torch.Tensor] = {}
    real = torch.zeros(0, dtype=torch.bool)  # which positions are no padding

    def hook(name: str) -> Any:
        def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found = args[0][real].abs().double().sum(0).cpu()
            found = found[:, None] if isinstance(module, Conv1D) else found
            sums[name] = sums[name] + found if name in sums else found

        return before

    handles = [
        module.register_forward_pre_hook(hook(f"{path}.weight"))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in tied
    ]
    if not handles:
        raise UserError("AIM draws the matrices of linear layers back, and this model has none")
    encoded = [_encoded(tokenizer, prompt) for prompt in prompts]
    side = RopeBorders.of(model.config).side
    with hooked(handles):
        for members in together([len(ids) for ids in encoded], batch_size, side):
            rows = [encoded[i] for i in members]
            width = max(map(len, rows))
            # padding is on the right, where causal attention never looks from a real position
            ids = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=model.device)
            lengths = torch.tensor([len(r) for r in rows], device=model.device)
            real = torch.arange(width, device=model.device) < lengths[:, None]
            model(input_ids=ids, use_cache=False)
    return {
        name: (total / total.max()).float() if total.max() > 0 else total.float()
        for name, total in sums.items()
    }


def untouched(model: Any, importance: Mapping[str, torch.Tensor]) -> str | None:
    """Which matrices AIM leaves as they are in the merge, in words; None where there are none."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    left = [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name not in importance and id(parameter) not in tables
    ]
    if not left:
        return None
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    return f"warning: AIM leaves {left[0]}{more} as merged: no linear layer has them"


def _encoded(tokenizer: Any, prompt: Prompt) -> list[int]:
    if prompt.response is None:
        return encode_prompt(tokenizer, prompt.prompt)
    parts = encode_pair(tokenizer, prompt.prompt, prompt.response)
    return parts.prompt + parts.response


def apply_aim(
    base: Mapping[str, torch.Tensor],
    merged: Mapping[str, torch.Tensor],
    importance: Mapping[str, torch.Tensor],
    omega: float,
) -> dict[str, torch.Tensor]:
    """The merge with the weights of important input channels drawn back to the base.

    Args:
        base: weights of the base by name.
        merged: weights of the merge; those without importance (embeddings, norms, biases) stay.
        importance: from `activation_importance`.
        omega: 1 changes nothing, 0 keeps the base in the most important channel.

    Returns:
        New tensors in the merge's dtypes, computed in float32.

    Raises:
        UserError: omega outside [0, 1], or weights that do not fit each other.
    """
    if not 0 <= omega <= 1:
        raise UserError(f"omega must be from 0 to 1, not {omega}")
    if missing := [name for name in importance if name not in merged or name not in base]:
        raise UserError(f"the merge and its base do not both have {missing[0]}; is it their base?")
    result = dict(merged)
    for name, s in importance.items():
        ours, theirs = base[name], merged[name]
        channels = ours.shape[-1] if s.ndim == 1 else ours.shape[0]
        if ours.shape != theirs.shape or channels != len(s):
            raise UserError(
                f"{name} is {list(theirs.shape)} in the merge and {list(ours.shape)} in the base"
            )
        start = ours.to(theirs.device, torch.float32)
        delta = theirs.float() - start
        kept = 1 - s.to(theirs.device) * (1 - omega)
        result[name] = (start + delta * kept).to(theirs.dtype)
    return result


def _write(
    base: Checkpoint,
    merged: Checkpoint,
    importance: Mapping[str, torch.Tensor],
    omega: float,
    folder: Path,
    progress: Progress,
) -> None:
    """The merge's files with other weights: one weight file in memory at a time."""
    stored = set(merged.headers)
    if missing := sorted(set(importance) - stored):
        raise UserError(f"'{merged.name}' has no tensor {missing[0]}; is '{base.name}' its base?")
    names = {path.name for path in merged.weight_files}
    folder.mkdir(parents=True)
    for path in Path(merged.path).iterdir():
        if path.is_file() and path.name not in (*names, *_LEFT_OUT):
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and path.name == "scores":
            shutil.copytree(path, folder / path.name)
    progress.stage("AIM", len(merged.weight_files), "file")
    for file in merged.weight_files:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        here = {name: importance[name] for name in tensors if name in importance}
        start = {name: base.tensor(name, torch.float32) for name in here}
        changed = apply_aim(start, tensors, here, omega)
        save_file(changed, folder / file.name, metadata=metadata or {"format": "pt"})
        progress.advance(1)
