"""How large a model is, as far as costs follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_wp.architectures import Dims, text_config
from mergekit_wp.architectures.declaration import module_of
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.load import skeleton
from mergekit_wp.models.pair import Pair
from mergekit_wp.models.refusals import width


@dataclass(frozen=True)
class ModelSize:
    """A decoder, by the numbers (weights) that it has.

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream.
        heads: width of all heads' queries together.
        attention: numbers in a layer's attention matrices, its mean over layers as all below.
        mlp: numbers in its other matrices that a token is multiplied with; of a mixture's experts
            only so many as a token goes to.
        layer: numbers of a layer in all.
        largest: of its largest tensor.
        inner: neurons that a token goes to.
        vocabulary: rows of the unembedding.
        parameters: numbers in all; a tied head counts once.
        tied: whether the unembedding is the embedding.
    """

    layers: int
    hidden: int
    heads: int
    attention: float
    mlp: float
    layer: float
    largest: int
    inner: int
    vocabulary: int
    parameters: int
    tied: bool

    @property
    def active(self) -> float:
        """Numbers of a layer that a token is multiplied with."""
        return self.attention + self.mlp

    @property
    def head(self) -> int:
        """Numbers of the unembedding."""
        return self.vocabulary * self.hidden

    @classmethod
    def of(cls, dims: Dims, shapes: Mapping[str, tuple[int, ...]], config: Any) -> ModelSize:
        """Of a model.

        Args:
            dims: its components.
            shapes: of its parameters by name.
            config: of transformers.
        """
        config, architecture = text_config(config), dims.architecture
        inside: dict[str, list[float]] = {"attention": [], "mlp": [], "layer": [0]}
        routed, largest = _routed(config), 0
        for name, shape in shapes.items():
            if (place := architecture.within_layer(name)) is None:
                continue
            numbers = math.prod(shape)
            inside["layer"].append(numbers)
            largest = max(largest, numbers)
            if len(shape) > 1:
                of_mlp = architecture.mapped and place[1].startswith(f"{architecture.mlp}.")
                part = routed if len(shape) > 2 else 1.0
                inside["mlp" if of_mlp else "attention"].append(part * numbers)
        head_dim = getattr(config, "head_dim", None)
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
        embedding, head = f"{architecture.embedding}.weight", f"{architecture.head}.weight"
        vocabulary = shapes.get(head, shapes.get(embedding, (int(config.vocab_size),)))[0]
        return cls(
            layers=dims.n_layers,
            hidden=hidden,
            heads=heads * int(head_dim or hidden // heads),
            attention=sum(inside["attention"]) / dims.n_layers,
            mlp=sum(inside["mlp"]) / dims.n_layers,
            layer=sum(inside["layer"]) / dims.n_layers,
            largest=largest,
            inner=round(dims.n_neurons * routed) or 4 * hidden,
            vocabulary=vocabulary,
            parameters=sum(map(math.prod, shapes.values())),
            tied=head not in shapes,
        )

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> ModelSize:
        """Of a checkpoint, by its config."""
        model = skeleton(checkpoint.config, checkpoint.name)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        return cls.of(Dims.from_config(checkpoint.config), shapes, checkpoint.config)


def _routed(config: Any) -> float:
    """Part of a mixture's experts that a token goes to; 1 where there are none."""
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("num_experts", "num_local_experts")
    every = next((n for name in names if (n := getattr(config, name, None))), None)
    return int(chosen) / int(every) if chosen and every else 1.0


@dataclass(frozen=True)
class PairSize:
    """A base and an expert, by what is read of them and what differs.

    Attributes:
        size: of the model.
        base, expert: bytes of all parameters, as they are stored.
        files: bytes of each one's weight files.
        changed: numbers that may differ.
        difference: bytes of these in both checkpoints.
        matrices: numbers among them that a token is multiplied with, in all layers.
        factored: numbers among these whose differences are products of factors.
        factors: numbers of the factors.
        streamed: bytes, in both checkpoints, of differences that are not.
        head: whether the unembedding is among them.
        entrance: whether the embedding is.
    """

    size: ModelSize
    base: float
    expert: float
    files: tuple[float, float]
    changed: float
    difference: float
    matrices: float
    factored: float
    factors: float
    streamed: float
    head: bool
    entrance: bool

    @classmethod
    def of(cls, pair: Pair) -> PairSize:
        """Of a pair that is open."""
        shapes, architecture = pair.partition.shapes, pair.partition.dims.architecture
        size = ModelSize.of(pair.partition.dims, shapes, pair.base.config)
        sides = pair.base, pair.expert

        def stored(names: Iterable[str]) -> list[float]:
            return [
                float(sum(math.prod(shapes[n]) * width(side.header(n)[1]) for n in names))
                for side in sides
            ]

        changed = [name for name in shapes if name in pair.changed]
        low_rank = {name: found for name in changed if (found := pair.factors(name)) is not None}
        matrices = 0.0
        routed = _routed(text_config(pair.base.config))
        for name in changed:
            if architecture.within_layer(name) is not None and len(shapes[name]) > 1:
                matrices += math.prod(shapes[name]) * (routed if len(shapes[name]) > 2 else 1.0)
        head = f"{architecture.embedding if size.tied else architecture.head}.weight"
        base, expert = stored(list(shapes))
        files = tuple(float(sum(f.stat().st_size for f in s.weight_files)) for s in sides)
        return cls(
            size=size,
            base=base,
            expert=expert,
            files=(files[0], files[1]),
            changed=float(sum(math.prod(shapes[name]) for name in changed)),
            difference=sum(stored(changed)),
            matrices=matrices,
            factored=float(sum(math.prod(shapes[name]) for name in low_rank)),
            factors=float(sum(a.numel() + b.numel() for a, b, _ in low_rank.values())),
            streamed=sum(stored([name for name in changed if name not in low_rank])),
            head=head in pair.changed,
            entrance=any(module_of(name) == architecture.embedding for name in changed),
        )
