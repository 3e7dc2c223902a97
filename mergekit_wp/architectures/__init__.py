"""Architectures with a component map, one declaration each (docs/new-architecture.md).

`register` takes the declaration of another package's decoder, for scoring and merging alike.
"""

from mergekit_wp.architectures.declaration import Architecture
from mergekit_wp.architectures.dims import Dims
from mergekit_wp.architectures.families import FAMILIES
from mergekit_wp.architectures.known import of_type, register, text_config

__all__ = ["FAMILIES", "Architecture", "Dims", "of_type", "register", "text_config"]
