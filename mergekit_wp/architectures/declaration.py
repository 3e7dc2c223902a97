"""What has to be said of an architecture so that its components can be scored and merged.

Everything the engine knows of a model's inside stands in one `Architecture`: the paths of its
modules and which slices of which tensor belong to heads, K/V groups and neurons. What the modules
compute is never written anew: the model's own run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_wp.components import FineKind


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
LLAMA_CUTS: Mapping[str, Cut] = {
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
        norm: path of the norm after the last layer.
        head: path of the unembedding.
        attention: path of the attention block within a layer.
        mlp: path of the MLP block within a layer.
        attention_out: path within a layer of the projection that reads what heads write.
        mlp_out: the same for neurons.
        cuts: by tensor name within a layer; tensors that are not in it are components as a whole.
        n_neurons: neurons of one layer, from the config.
    """

    model_type: str
    class_name: str
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    positions: str | None = None
    norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_out: str = "self_attn.o_proj"
    mlp_out: str = "mlp.down_proj"
    cuts: Mapping[str, Cut] = field(default_factory=lambda: LLAMA_CUTS, hash=False)
    n_neurons: Callable[[Any], int] = lambda config: int(config.intermediate_size)

    def within_layer(self, name: str) -> tuple[int, str] | None:
        """Take a tensor's name apart: its layer and its name there; None outside the layers."""
        prefix = re.escape(f"{self.layers}.") if self.layers else r"\D*?\."
        match = re.match(rf"{prefix}([0-9]{{1,6}})\.(.+)$", name)
        return (int(match[1]), match[2]) if match else None


def without_map(class_name: str) -> Architecture:
    """What is known of any other model: layers are numbered, and every tensor is a component."""
    return Architecture("", class_name, layers="", cuts={})
