"""Merges for the comparison, by mergekit itself: in memory, or in a folder that is cleared away."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import get_architecture_info
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_wp.architectures import Dims
from mergekit_wp.comparison.results import MERGE
from mergekit_wp.errors import UserError
from mergekit_wp.files.atomic import naming_disk
from mergekit_wp.merging.model_references import yaml_of
from mergekit_wp.merging.open_models import with_snapshots
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.load import parameter_names, skeleton

#: parameter bytes up to which a merge is kept in memory
IN_MEMORY = 2 * 2**30


def merge_in_memory(config: MergeConfiguration, options: MergeOptions) -> dict[str, torch.Tensor]:
    """The tensors that mergekit would write.

    Args:
        config: the recipe.
        options: mergekit's; a ``random_seed`` seeds methods that draw.

    Raises:
        RuntimeError, ValueError: whatever mergekit raises for a bad recipe.
    """
    LoaderCache().setup(options)
    config = with_snapshots(config, options)  # a copy: planning rewrites it
    shape_of = config.base_model or config.referenced_models()[0]
    planned = MergePlanner(
        config,
        get_architecture_info(config, options),
        options,
        shape_of.config(trust_remote_code=options.trust_remote_code),
    ).plan_to_disk("")  # plans only: nothing is written until a task runs
    saves = {task.tensor_task: task for task in planned if isinstance(task, SaveTensor)}
    torch.manual_seed(options.random_seed or 0)
    found: dict[str, torch.Tensor] = {}
    for task, tensor in Executor(list(saves), math_device=options.device or "cpu").run(quiet=True):
        save = saves[task]
        if tensor is None:
            if not save.optional:
                raise RuntimeError(f"no value for tensor {save.tensor_name}")
            continue
        if save.dtype:
            tensor = tensor.to(dtype=dtype_from_name(save.dtype))
        found[save.tensor_name] = tensor
    return found


def keeps_shapes(config: MergeConfiguration) -> bool:
    """Whether a merge has the base's tensors in the base's shapes, so that its model can hold it.

    A tokenizer of its own may change the vocabulary, and slices the layers.
    """
    settings = (config.tokenizer, config.tokenizer_source, config.slices, config.modules)
    return not any(settings)


class EvaluationModel:
    """One model in memory whose weights are replaced by those of each merge.

    Args:
        base: gives config and tokenizer.
        dtype: of weights and activations while evaluating.
        device: torch device name.
    """

    def __init__(self, base: Checkpoint, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.model: Any = skeleton(base.config)
        self.architecture = Dims.from_config(base.config).architecture
        self.stored = {self.architecture.parameter(name) for name in base.headers}
        self.names = parameter_names(self.model)
        tied = set(self.model.state_dict()) - set(self.names)
        self.allowed = set(self.names) | tied
        weights = {
            name: torch.empty(parameter.shape, dtype=dtype, device=device)
            for name, parameter in self.model.named_parameters()
        }
        self.model.load_state_dict(weights, strict=False, assign=True)
        self.model.tie_weights()
        self.model.requires_grad_(False)
        torch.nn.Module.to(self.model, device)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """The model with these weights; a tied head stored a second time is the embedding's.

        Raises:
            UserError: a weight is missing, unknown or misshapen.
        """
        tensors = {self.architecture.parameter(name): t for name, t in tensors.items()}
        if missing := [name for name in self.names if name not in tensors]:
            raise UserError(f"the merge has no tensor {missing[0]}; mergekit did not write it")
        beside = self.allowed | self.stored  # buffers, or the rest of a larger model
        if extra := [name for name in tensors if name not in beside]:
            raise UserError(f"the merge has a tensor {extra[0]}, which the model does not have")
        for name, parameter in self.model.named_parameters():
            if parameter.shape != tensors[name].shape:
                raise UserError(
                    f"the merge's tensor {name} has shape {list(tensors[name].shape)}, the model's "
                    f"{list(parameter.shape)}"
                )
            parameter.copy_(tensors[name])
        return self.model

    @torch.no_grad()
    def fill(self, write: Callable[[str, torch.Tensor], object]) -> None:
        """Have every weight overwritten, by its name."""
        for name, parameter in self.model.named_parameters():
            write(name, parameter)

    @property
    def matrices(self) -> frozenset[str]:
        """Weights of linear layers, as far as they are two-dimensional; the head is none of them.

        A convolution of GPT-2, which is a linear layer too, has its weight the other way round.
        """
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        left_out = {id(end.weight) for end in ends if end is not None}
        embedded = (m for m in self.model.modules() if isinstance(m, torch.nn.Embedding))
        left_out |= {id(module.weight) for module in embedded}
        return frozenset(
            name
            for name, parameter in self.model.named_parameters()
            if parameter.dim() == 2 and id(parameter) not in left_out
        )

    def load_checkpoint(self, checkpoint: Checkpoint) -> Any:
        """The model with the weights of a checkpoint."""
        tensors = {n: checkpoint.tensor(n, self.dtype, self.device) for n in self.names}
        return self.load(tensors)


@contextmanager
def merged_on_disk(
    config: MergeConfiguration, options: MergeOptions, parent: Path
) -> Iterator[Path]:
    """A folder with the merged checkpoint, removed afterwards whatever happens.

    It has no model card: mergekit's asks the network about local paths.
    """
    folder = Path(tempfile.mkdtemp(prefix=MERGE, dir=parent))
    try:
        with naming_disk(folder):
            bare = options.model_copy(update={"write_model_card": False})
            run_merge(
                config.model_copy(deep=True), str(folder), bare, config_source=yaml_of(config)
            )
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
