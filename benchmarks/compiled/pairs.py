"""A compiled pair as its file has it: two models, inputs, jobs, and what tracr computed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.compiled.model import (
    CompiledConfig,
    CompiledForCausalLM,
    declare,
    save_tokenizer,
)
from mergekit_wp.architectures import Dims
from mergekit_wp.components import Partition
from mergekit_wp.prompts import Prompt

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Pair:
    """A base and an expert that differ in one sub-program.

    Attributes:
        name: of the program and its change.
        about: what `compiling` said of them.
        states: weights of ``base`` and ``expert``.
        ids: ``[inputs, 1 + length]`` tokens, the compiler's own first.
        logits: ``[inputs, 1 + length, outputs]`` of both by tracr's forward pass.
    """

    name: str
    about: dict[str, Any]
    states: dict[str, State]
    ids: torch.Tensor
    logits: dict[str, torch.Tensor]

    @classmethod
    def read(cls, file: Path) -> Pair:
        """Read a file that `compiling` wrote."""
        declare()
        with safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()["compiled"])
        arrays = load_file(file)

        def under(prefix: str) -> State:
            return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

        states = {who: under(f"{who}/") for who in ("base", "expert")}
        return cls(file.stem, about, states, arrays["ids"], under("logits/"))

    @cached_property
    def config(self) -> CompiledConfig:
        """Of both models."""
        return CompiledConfig(**self.about["config"], architectures=["CompiledForCausalLM"])

    @cached_property
    def partition(self) -> Partition:
        """The components of both models."""
        shapes = {name: tensor.shape for name, tensor in self.states["base"].items()}
        return Partition(Dims.from_config(self.config), shapes)

    def model(self, state: State) -> CompiledForCausalLM:
        """A model with these weights, in float64."""
        model = CompiledForCausalLM(self.config).double()
        model.load_state_dict(state)
        return model.eval().requires_grad_(False)

    def save(self, folder: Path, state: State) -> None:
        """Write a model with these weights as transformers would."""
        model = CompiledForCausalLM(self.config)
        model.load_state_dict(state)
        model.save_pretrained(folder)
        save_tokenizer(self.about["vocabulary"], folder)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The inputs so that the output is read at every token but the compiler's own."""
        return tuple(
            Prompt(prompt=row[0], response=f" {' '.join(row[1:])}") for row in self.about["inputs"]
        )
