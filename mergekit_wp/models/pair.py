"""A base and an expert held against each other: what differs between them, and what must not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mergekit_wp.architectures import Dims
from mergekit_wp.architectures.computation import Mismatch, difference
from mergekit_wp.components import Partition
from mergekit_wp.errors import UserError
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.load import parameter_names, skeleton
from mergekit_wp.models.lora import Adapter
from mergekit_wp.models.refusals import FLOATS
from mergekit_wp.models.streaming import WHOLE, Pieces, Rows
from mergekit_wp.terms import SLICED_KINDS, Kind


@dataclass(frozen=True)
class Pair:
    """A base, an expert of the same architecture, and what differs between them."""

    base: Checkpoint
    expert: Checkpoint
    partition: Partition
    delta_norm: dict[str, float]

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding; without a map, what the config says."""
        architecture = self.partition.dims.architecture
        if architecture.mapped:
            return self.partition.shapes[f"{architecture.embedding}.weight"][0]
        return int(self.base.text_config.vocab_size)

    @property
    def changed(self) -> frozenset[str]:
        """Tensors in which the two differ at all."""
        return frozenset(name for name, norm in self.delta_norm.items() if norm > 0)

    @property
    def entrance(self) -> list[str]:
        """Tensors that make what enters the first layer."""
        enters = self.partition.dims.architecture.enters
        return [name for name in self.partition.tensor_names if enters(name)]

    def differs(self, kind: Kind, layer: int) -> bool:
        """Whether base and expert differ in any tensor of a kind in a layer."""
        if kind in SLICED_KINDS:
            return any(t.name in self.changed for t in self.partition.owned_by(kind, layer))
        return any(name in self.changed for name in self.partition.layer_tensors(layer))

    def diverges(self, layer: int) -> bool:
        """Whether they differ in anything that computes what leaves a layer."""
        if self.changed.intersection(self.entrance):
            return True
        return any(self.differs("layer", below) for below in range(layer + 1))

    def delta(self, name: str, dtype: torch.dtype, device: str) -> torch.Tensor:
        """One tensor of the task vector, subtracted in `dtype` or fp32 if that is finer."""
        wide = torch.promote_types(dtype, torch.float32)
        difference = self.expert.tensor(name, wide, device)
        for rows, part in self.base.on_device(name, device):
            difference[rows] -= part.to(wide)
        return difference.to(dtype)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """One matrix of the task vector as ``scale * left @ right``.

        None where the expert is no LoRA adapter of the base itself, or has no such change.
        """
        adapter = adapter_of(self.base, self.expert)
        return None if adapter is None else adapter.factors(name)

    def between(self, name: str, position: float, out: torch.Tensor) -> None:
        """Write base + position * (expert - base) into a tensor, computed at least in fp32."""
        wide = torch.promote_types(out.dtype, torch.float32)
        pieces = common_pieces(name, self.base, self.expert)
        sides = (side.on_device(name, out.device, pieces) for side in (self.base, self.expert))
        for (rows, base), (_, expert) in zip(*sides, strict=True):
            out[rows] = torch.lerp(base.to(wide), expert.to(wide), position)


def adapter_of(base: Checkpoint, expert: Checkpoint) -> Adapter | None:
    """The adapter with which the base itself is an expert; None where it is another model."""
    return expert.adapter if base.adapter is None and expert.path == base.path else None


def common_pieces(name: str, *sides: Checkpoint) -> Pieces:
    """Pieces in which a parameter can be read from all of some checkpoints."""
    found = [side.pieces(name) for side in sides]
    return WHOLE if WHOLE in found else found[0]


def open_pair(base_name: str, expert_name: str, on_tensor: Callable[[int, int], None]) -> Pair:
    """Open two checkpoints, compare every tensor and measure the task vector.

    Args:
        base_name: the base.
        expert_name: the expert.
        on_tensor: called after each tensor with how many are done and how many there are.

    Raises:
        UserError: another architecture or shape (names the first differing tensor and both
            shapes), NaN in the weights, or identical models.
    """
    base, expert = Checkpoint(base_name), Checkpoint(expert_name)
    if base.architecture != expert.architecture:
        raise UserError(
            f"different architectures: base '{base_name}' is {base.architecture}, "
            f"expert '{expert_name}' is {expert.architecture}"
        )
    _check_tying(base, expert)
    dims = Dims.from_config(base.config)
    models = skeleton(base.config, base.name), skeleton(expert.config, expert.name)
    for checkpoint, model in zip((base, expert), models, strict=True):
        _check_shapes(checkpoint, model)
    names = parameter_names(models[0])
    ours_too = set(names)
    theirs_only = [n for n in parameter_names(models[1]) if n not in ours_too]
    if theirs_only and base.text_config.num_hidden_layers != expert.text_config.num_hidden_layers:
        name = theirs_only[0]
        raise UserError(
            f"shapes differ at tensor {name}: base has none, expert {list(expert.header(name)[0])}"
        )
    vocabulary = (dims.architecture.embedding, dims.architecture.head)
    for name in names:
        shapes = []
        for side, checkpoint in (("base", base), ("expert", expert)):
            if (header := checkpoint.stored.header(name)) is None:
                found = checkpoint.named_otherwise(name)
                raise UserError(f"{side} '{checkpoint.name}' has no tensor {name}{found}")
            shapes.append(header[0])
        ours, theirs = shapes
        by_token = name in [f"{path}.weight" for path in vocabulary if dims.architecture.mapped]
        if by_token and ours[1:] == theirs[1:] and ours != theirs:
            raise UserError(
                f"base '{base.name}' has {ours[0]} rows for tokens, expert '{expert.name}' "
                f"{theirs[0]} ({name}): their vocabularies differ; write both with one "
                "vocabulary, as docs/faq.md shows, and score these"
            )
        if ours != theirs:
            raise UserError(
                f"shapes differ at tensor {name}: base {list(ours)}, expert {list(theirs)}"
            )
    _check_configs(base, expert, models)
    partition = Partition(dims, {name: base.header(name)[0] for name in names})
    assert partition.layouts  # refuses sizes that do not fit heads, groups or neurons
    norms = {}
    for done, name in enumerate(names, start=1):
        norms[name] = _compare(base, expert, name)
        on_tensor(done, len(names))
    if not any(norms.values()):
        raise UserError(
            f"nothing to score: base '{base_name}' and expert '{expert_name}' "
            "have identical weights"
        )
    return Pair(base, expert, partition, norms)


def _check_tying(base: Checkpoint, expert: Checkpoint) -> None:
    """Refuse a tied model beside an untied one, and one that is not what its config says.

    transformers unties a model whose checkpoint holds another head than the embedding.
    """
    architecture = Dims.from_config(base.config).architecture
    names = [f"{path}.weight" for path in (architecture.embedding, architecture.head)]
    sides = (base, expert)
    tied = [bool(side.text_config.tie_word_embeddings) for side in sides]
    if tied[0] != tied[1]:
        one, other = sides if tied[0] else sides[::-1]
        raise UserError(
            f"the output head of '{one.name}' is tied to its embedding, that of '{other.name}' is "
            "not; untie the first, as docs/faq.md shows, or score another pair"
        )
    for side in sides if tied[0] and architecture.mapped else ():
        if all(side.stored.name(name) for name in names):
            for rows in side.pieces(names[0]):
                embedding, head = (side.piece(name, rows).float() for name in names)
                if torch.equal(embedding, head):
                    continue
                raise UserError(
                    f"model '{side.name}': its config says that the output head is tied to the "
                    f"embedding, but {names[1]} and {names[0]} differ; set tie_word_embeddings to "
                    "false in config.json, or save it anew"
                )


def _check_shapes(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Refuse weights that are not of the sizes that their own config states."""
    config = checkpoint.text_config.to_dict()
    for name, parameter in model.named_parameters():
        wanted, header = tuple(parameter.shape), checkpoint.stored.header(name)
        if header is None or header[0] == wanted:
            continue
        sizes = {w for w, h in itertools.zip_longest(wanted, header[0]) if w != h}
        keys = [f"{key} = {value}" for key, value in config.items() if _is_size(value, sizes)]
        raise UserError(
            f"model '{checkpoint.name}': its config.json"
            + (f" has {', '.join(keys)}, which" if keys else "")
            + f" makes tensor {name} {list(wanted)}, but its weights hold {list(header[0])}; "
            "copy config.json and weights of one model"
        )


def _is_size(value: object, sizes: Collection[int | None]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in sizes


def _check_configs(
    base: Checkpoint, expert: Checkpoint, models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    """Refuse experts whose config makes other computations of the same weights.

    The expert is run, and merged, under the base's config: with another one its scores would be
    those of a model that is not the expert.
    """
    found: Mismatch | None = None
    counts = [Dims.from_config(side.config).numbers for side in (base, expert)]
    for key, number in counts[0].items():
        if number != counts[1][key]:
            found = key, number, counts[1][key]
            break
    else:
        found = difference(base.config, expert.config, *models)
    if found is not None:
        key, ours, theirs = found
        raise UserError(
            f"configs differ in {key}: base '{base.name}' has {ours}, expert '{expert.name}' has "
            f"{theirs}; both have to compute alike"
        )


def _compare(base: Checkpoint, expert: Checkpoint, name: str) -> float:
    sides = (("base", base), ("expert", expert))
    for side, checkpoint in sides:
        if (dtype := checkpoint.header(name)[1]) not in FLOATS:
            raise UserError(
                f"{side} '{checkpoint.name}': tensor {name} is stored as {dtype} (quantised?); "
                "give the unquantised checkpoint"
            )
    squares = []
    for rows in common_pieces(name, base, expert):
        x, y = (_finite(side, checkpoint, name, rows) for side, checkpoint in sides)
        squares.append(float((y.double() - x).square_().sum()))
    norm = math.sqrt(math.fsum(squares))
    assert math.isfinite(norm)
    return norm


def _finite(side: str, checkpoint: Checkpoint, name: str, rows: Rows) -> torch.Tensor:
    part = checkpoint.piece(name, rows)
    if not bool(torch.isfinite(part).all()):
        raise UserError(
            f"{side} '{checkpoint.name}': tensor {name} holds NaN or infinity; "
            "its weights are broken"
        )
    return part
