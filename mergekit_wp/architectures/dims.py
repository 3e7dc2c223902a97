"""What fixes a decoder's components: how many there are of each kind, and its map."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mergekit_wp.architectures.declaration import Architecture, without_map
from mergekit_wp.architectures.known import named, of_type, text_config
from mergekit_wp.errors import UserError
from mergekit_wp.terms import FineKind


@dataclass(frozen=True)
class Dims:
    """What fixes a decoder's components: their numbers, and its architecture's map."""

    n_layers: int
    n_heads: int
    n_kv_groups: int
    n_neurons: int
    architecture: Architecture = field(repr=False)

    def count(self, kind: FineKind) -> int:
        """Components of a sliced kind in one layer."""
        return {"head": self.n_heads, "kv_group": self.n_kv_groups, "neuron": self.n_neurons}[kind]

    def require_map(self, what: str) -> None:
        """Refuse an architecture without a component map.

        Raises:
            UserError: says what needs one.
        """
        if not self.architecture.mapped:
            raise UserError(
                f"{what} needs a component map, which '{self.architecture.class_name}' does not "
                "have (docs/new-architecture.md); it can be scored by layer and by tensor, and "
                "merged by these scores"
            )

    @property
    def numbers(self) -> dict[str, Any]:
        """The counts under the names that score files give them."""
        return {
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_groups": self.n_kv_groups,
            "n_neurons": self.n_neurons,
        }

    @classmethod
    def named(
        cls, class_name: str, n_layers: int, n_heads: int, n_kv_groups: int, n_neurons: int
    ) -> Dims:
        """The dimensions of a model class, as files name it; no heads where it has no map.

        Raises:
            UserError: heads, and no declaration of the class.
        """
        architecture = named(class_name) if n_heads else without_map(class_name)
        return cls(n_layers, n_heads, n_kv_groups, n_neurons, architecture)

    @classmethod
    def from_config(cls, config: Any) -> Dims:
        """Read the dimensions from a transformers config.

        Without a component map there are no heads, K/V groups and neurons, only whole tensors.

        Raises:
            UserError: not a decoder.
        """
        architecture, whole = of_type(config.model_type), config
        config = text_config(config)
        if architecture and architecture.text_type not in (None, config.model_type):
            raise UserError(
                f"'{whole.model_type}' with a '{config.model_type}' text model is not supported, "
                f"only with '{architecture.text_type}'"
            )
        if not hasattr(config, "num_hidden_layers"):
            raise UserError(
                f"'{config.model_type}' is no text decoder: its config has no num_hidden_layers"
            )
        if architecture is None or architecture.mixed_layers(config):
            names = config.architectures or [config.model_type]
            return cls.named(names[0], int(config.num_hidden_layers), 0, 0, 0)
        heads = int(config.num_attention_heads)
        return cls(
            n_layers=int(config.num_hidden_layers),
            n_heads=heads,
            n_kv_groups=int(getattr(config, "num_key_value_heads", None) or heads),
            n_neurons=architecture.n_neurons(config),
            architecture=architecture,
        )
