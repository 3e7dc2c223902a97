"""The documentation runs: commands, recipes, the file format and the quoted messages."""

from __future__ import annotations

import ast
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration

from mergekit_wp import gatesfile, scorefile
from mergekit_wp.autoload import ensure_registered
from tests.factory import make_gates_file, make_score_file
from tests.models import make_model, perturbed, save

ensure_registered()
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(match[1], match[2]) for match in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """An environment with our command as this checkout has it, and programs that only take note."""
    programs = tmp_path / "bin"
    programs.mkdir()
    ours = f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m mergekit_wp.cli "$@"\n'
    noted = f'#!/bin/sh\necho "$0 $@" >> {tmp_path}/noted\n'
    for name, text in (("mergekit-wp", ours), ("hf", noted), ("pip", noted)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow  # a dozen processes
def test_the_tutorial_runs_as_it_stands(tmp_path: Path, stand_ins: dict[str, str]) -> None:
    """Folders stand in for Hub ids of the same name; `pip` and `hf` only note their arguments."""
    world = tmp_path / "world"
    base = make_model("llama-tied")
    save(base, world / "owner" / "base", torch.float32)
    for seed, name in enumerate(("writer", "counter"), start=1):
        save(perturbed(base, seed=seed), world / "owner" / name, torch.float32)
    for language, code in blocks(ROOT / "docs" / "tutorial.md"):
        assert language == ""
        done = subprocess.run(
            ["sh", "-e", "-c", code], cwd=world, env=stand_ins, capture_output=True, text=True
        )
        assert done.returncode == 0, (code, done.stdout[-2000:], done.stderr[-2000:])
    noted = (tmp_path / "noted").read_text()
    assert "hf upload owner/merged merged/" in noted and "pip install mergekit-wp" in noted
    assert (world / "merged" / "scores" / "writer.safetensors").is_file()
    assert done.stdout.startswith("SOURCE_DATE_EPOCH=")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_and_json_are_what_they_say(page: Path) -> None:
    for language, code in blocks(page):
        if language == "yaml":
            config = MergeConfiguration.model_validate(yaml.safe_load(code))
            assert config.base_model is not None
        if language == "json":
            for line in code.splitlines():
                json.loads(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_their_options(page: Path) -> None:
    """Every `mergekit-wp` line of every page parses; only files and models are missing here."""
    from mergekit_wp.cli import cli

    for language, code in blocks(page):
        if language:
            continue
        for line in code.replace("\\\n", " ").splitlines():
            words = line.split("#")[0].split(" > ")[0].split()
            if words[:1] != ["mergekit-wp"]:
                continue
            command = cli.get_command(
                cli.make_context("x", ["--help"], resilient_parsing=True), words[1]
            )
            assert command is not None, line
            known = {name for option in command.params for name in option.opts}
            assert {word for word in words if word.startswith("--")} <= known, line


# --- the file format, by a reader that knows only docs/file-format.md ----------------------------


def independent_reader(path: Path, key: str) -> tuple[dict, dict[str, np.ndarray]]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    manifest = json.loads(header.pop("__metadata__")[key])
    assert manifest["format_version"] == 1
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F32"
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(content[begin:end], "<f4").reshape(entry["shape"])
        assert np.isfinite(tensors[name]).all()
    return manifest, tensors


def test_a_score_file_by_the_specification(tmp_path: Path) -> None:
    file = make_score_file(criteria=("kl", "anchor"))
    scorefile.write(file, tmp_path / "s.safetensors")
    manifest, tensors = independent_reader(tmp_path / "s.safetensors", "mergekit_wp")
    layers, names = manifest["n_layers"], manifest["tensor_names"]
    shapes = {
        "layer": [layers],
        "tensor": [len(names)],
        "head": [layers, manifest["n_heads"]],
        "kv_group": [layers, manifest["n_kv_groups"]],
        "neuron": [layers, manifest["n_neurons"]],
    }
    promised = {
        f"{e}/{c}/{k}": shapes[k]
        for e in manifest["estimands"]
        for c in manifest["criteria"]
        for k in manifest["kinds"]
    }
    promised |= {"delta_norm": [len(names)], "anchor/vector": [manifest["hidden_size"]]}
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == promised
    assert all((tensors[name] == file.tensors[name].numpy()).all() for name in tensors)


def test_a_gates_file_by_the_specification(tmp_path: Path) -> None:
    file = make_gates_file()
    gatesfile.write(file, tmp_path / "g.safetensors")
    manifest, tensors = independent_reader(tmp_path / "g.safetensors", "mergekit_wp_gates")
    for e in range(len(manifest["experts"])):
        for kind, gates in file.gates(e).items():
            found = tensors.pop(f"gate/{e}/{kind}")
            assert (found == gates.numpy()).all() and (found <= manifest["upper"]).all()
        assert len(tensors.pop(f"delta_norm/{e}")) == len(manifest["tensor_names"])
    assert not tensors


@pytest.mark.parametrize("model", [scorefile.Manifest, gatesfile.GatesManifest])
def test_the_specification_names_every_key(model: type) -> None:
    page = (ROOT / "docs" / "file-format.md").read_text()
    for key in model.model_fields:
        assert f"`{key}`" in page, key


# --- messages ------------------------------------------------------------------------------------


def messages() -> list[str]:
    """Every text in the code, with … for what is filled in."""
    found = []
    for file in (ROOT / "mergekit_wp").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_quoted_messages_are_raised_word_for_word() -> None:
    page = (ROOT / "docs" / "faq.md").read_text()
    quoted = re.findall(r"^\*\*`(.+)`\*\*$", page, re.MULTILINE)
    assert len(quoted) >= 15
    raised = messages()
    for message in quoted:
        assert any(message in text for text in raised), message
