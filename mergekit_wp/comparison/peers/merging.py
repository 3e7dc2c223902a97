"""Merges by peers: tensor by tensor into the model that is evaluated, with what they cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_wp.comparison.peers.peer import Learned, OneTensor, Peer
from mergekit_wp.comparison.peers.sources import Sources
from mergekit_wp.comparison.rows import Cost, Setting, since
from mergekit_wp.files.atomic import naming_disk


class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        file: Any = safe_open(path, framework="pt")
        self._file, self._names = file, frozenset(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        found: torch.Tensor = self._file.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass
class PeerMerges:
    """Merges by peers; what one has learned is kept in a file until the comparison ends.

    Attributes:
        sources: what is merged.
        scratch: folder for these files.
        dtype: of the merges.
    """

    sources: Sources
    scratch: Path
    dtype: torch.dtype
    _kept: dict[str, tuple[Path, Cost]] = field(default_factory=dict)

    def merge(
        self,
        name: str,
        peer: Peer,
        setting: Setting,
        fill: Callable[[Callable[[str, torch.Tensor], None]], None],
    ) -> Cost:
        """Merge, one tensor in memory at a time beside what the peer learns with.

        Args:
            name: of the peer.
            peer: how it merges.
            setting: its parameters.
            fill: has every weight of a model overwritten, by its name.

        Returns:
            What it took, learning included even where an earlier merge has done it.

        Raises:
            UserError: experts of other shapes, or prompts that cannot be used.
        """
        path, cost = self._learned(name, peer, setting)
        learned, begun = TensorFile(path), perf_counter()

        def write(tensor: str, out: torch.Tensor) -> None:
            out.copy_(self._merged(tensor, peer, setting, learned))

        fill(write)
        took = since(begun)
        seconds = None if took is None else took + (cost.seconds or 0.0)
        return cost.model_copy(update={"seconds": seconds})

    def _merged(self, name: str, peer: Peer, setting: Setting, learned: Learned) -> torch.Tensor:
        base, vectors = self.sources.vectors(name)
        matrix = name in self.sources.matrices
        change = peer.rule(OneTensor(name, base, vectors, matrix, learned), setting)
        return (base + change).to(self.dtype)

    def _learned(self, name: str, peer: Peer, setting: Setting) -> tuple[Path, Cost]:
        on = {key: setting[key] for key in peer.depends_on}
        key = f"{name} {json.dumps(on, sort_keys=True)}"
        if key not in self._kept:
            self.sources.cost, begun = Cost(), perf_counter()
            if peer.needs_prompts:
                _ = self.sources.prompted.samples  # answers are every such peer's alike
                begun = perf_counter()
            found = peer.learn(self.sources, setting)
            seconds = since(begun)
            path = self.scratch / f"{len(self._kept)}.safetensors"
            with naming_disk(path):
                save_file({n: t.detach().cpu().contiguous() for n, t in found.items()}, path)
            self._kept[key] = path, self.sources.cost.model_copy(update={"seconds": seconds})
        return self._kept[key]
