"""What has to be said of an architecture so that its components can be scored and merged.

Everything the engine knows of a model's inside stands in one `Architecture`: the paths of its
modules and which slices of which tensor belong to heads, K/V groups and neurons. What the modules
compute is never written anew: the model's own run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_wp.terms import FineKind


@dataclass(frozen=True)
class Cut:
    """How one tensor is cut into blocks of equal size that belong to components.

    Attributes:
        kinds: the kinds whose blocks follow each other along the cut dimension, every kind with
            one block for each of its components. ``("head", "kv_group", "kv_group")`` is Q, K and
            V in one tensor; a kind may come twice.
        dims: the cut dimension. Two of them where a tensor stacks the experts of a mixture: the
            first counts experts, every one of which is cut as ``kinds`` say along the second.
        interleaved: the blocks of the first component of all kinds come first, then those of the
            second, and so on (so all kinds have equally many).
    """

    kinds: tuple[FineKind, ...]
    dims: tuple[int, ...] = (0,)
    interleaved: bool = False


def rows(*kinds: FineKind) -> Cut:
    """A tensor whose output rows belong to components."""
    return Cut(kinds)


def columns(kind: FineKind) -> Cut:
    """A tensor whose input columns belong to components."""
    return Cut((kind,), (1,))


#: the four projections of attention and the three of a gated MLP, as Llama names them
LLAMA_CUTS: dict[str, Cut] = {
    "self_attn.q_proj.weight": rows("head"),
    "self_attn.q_proj.bias": rows("head"),
    "self_attn.o_proj.weight": columns("head"),
    "self_attn.k_proj.weight": rows("kv_group"),
    "self_attn.k_proj.bias": rows("kv_group"),
    "self_attn.v_proj.weight": rows("kv_group"),
    "self_attn.v_proj.bias": rows("kv_group"),
    "mlp.gate_proj.weight": rows("neuron"),
    "mlp.gate_proj.bias": rows("neuron"),
    "mlp.up_proj.weight": rows("neuron"),
    "mlp.up_proj.bias": rows("neuron"),
    "mlp.down_proj.weight": columns("neuron"),
}


@dataclass(frozen=True)
class Architecture:
    """One family of decoders as transformers builds it. Defaults are Llama's.

    Attributes:
        model_type: of its transformers config.
        class_name: of its causal language model, as a config's ``architectures`` has it.
        layers: path of the list of decoder layers; "" where it is not known, and the first number
            in a tensor's name is taken for its layer.
        embedding: path of the token embedding.
        positions: path of an embedding of positions, where there is one.
        norm: path of the norm after the last layer, where there is one.
        head: path of the unembedding.
        attention: path of the attention block within a layer.
        mlp: path of the MLP block within a layer.
        attention_out: name within a layer of the weight that reads what heads write.
        mlp_out: the same for neurons.
        cuts: by tensor name within a layer; tensors that are not in it are components as a whole.
        n_neurons: neurons of one layer, from the config.
        attention_implementation: which of transformers' computes all that the model does.
        parallel: whether attention and MLP read the same input, from the config.
        coupled: kinds of which one component's weights change what others write (a norm over all
            heads' queries): each is then computed by a pass of its own.
        stored_as: names of parameters in checkpoints, where mergekit knows no alias for them.
        stored_prefix: what all of their names begin with there.
        text_type: ``model_type`` of the text model within a larger one: that is what is scored.
        mixed_layers: whether layers differ in their components, so that there is no map of them,
            from the config.
    """

    model_type: str
    class_name: str
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    positions: str | None = None
    norm: str | None = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_out: str = "self_attn.o_proj.weight"
    mlp_out: str = "mlp.down_proj.weight"
    cuts: Mapping[str, Cut] = field(default_factory=lambda: LLAMA_CUTS, hash=False)
    n_neurons: Callable[[Any], int] = lambda config: int(config.intermediate_size)
    attention_implementation: str = "sdpa"
    parallel: Callable[[Any], bool] = lambda config: False
    coupled: frozenset[FineKind] = frozenset()
    stored_as: Mapping[str, str] = field(default_factory=dict, hash=False)
    stored_prefix: str = ""
    text_type: str | None = None
    mixed_layers: Callable[[Any], bool] = lambda config: False

    def out(self, kind: FineKind) -> str:
        """Name within a layer of the weight that reads what a kind writes."""
        return self.mlp_out if kind == "neuron" else self.attention_out

    def read_by(self, kind: FineKind, names: Iterable[str]) -> tuple[str, ...]:
        """Of names within a layer, those whose blocks a kind computes with before it writes."""
        return tuple(
            name
            for name in names
            if name in self.cuts and kind in self.cuts[name].kinds and name != self.out(kind)
        )

    def parameter(self, stored: str) -> str:
        """The parameter that a checkpoint stores under a name."""
        stored = stored.removeprefix(self.stored_prefix)
        return next((name for name, other in self.stored_as.items() if other == stored), stored)

    def enters(self, name: str) -> bool:
        """Whether a tensor makes what enters the first layer."""
        return module_of(name) in (self.embedding, self.positions)

    @property
    def mapped(self) -> bool:
        """Whether there is a map at all."""
        return bool(self.layers)

    def within_layer(self, name: str) -> tuple[int, str] | None:
        """Take a tensor's name apart: its layer and its name there; None outside the layers."""
        prefix = re.escape(f"{self.layers}.") if self.layers else r".*?\."
        match = re.match(rf"{prefix}([0-9]{{1,6}})\.(.+)$", name)
        return (int(match[1]), match[2]) if match else None


def module_of(name: str) -> str:
    """Path of the module that a parameter belongs to."""
    return name.rpartition(".")[0]


def without_map(class_name: str) -> Architecture:
    """What is known of any other model: layers are numbered, and every tensor is a component."""
    return Architecture("", class_name, layers="", cuts={})
