"""Kills, Ctrl-C, SIGTERM and a full disk: no run is lost, and nothing half-written is left.

50 kills over all commands are slow; one of each kind is in the quick tests.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from tests.killing import Run, contents
from tests.models import make_model, perturbed, save, write_prompts

torch.set_num_threads(1)
NAMES = ("east", "west")
COMMANDS = ("score", "fit", "verify", "trace", "compare", "merge", "merge over")
#: what happens to every command in turn: 9 x 7 = 63
BLOWS = ("kill", "kill", "full", "kill", "int", "kill", "term", "twice", "kill")


class World:
    """A base, two experts and their prompts; every command writes into ``out`` alone."""

    def __init__(self, root: Path) -> None:
        self.root, self.out = root, root / "out"
        base = make_model("llama-tied")
        save(base, root / "base", torch.float32)
        for seed, name in enumerate(NAMES, start=1):
            save(perturbed(base, seed=seed), root / name, torch.float32)
            prompts = write_prompts(root / f"{name}.jsonl", 6, contrast=True)
            items = [json.loads(line) | {"response": "ab"} for line in prompts.open()]
            text = "".join(json.dumps(item) + "\n" for item in items)
            (root / f"{name}-answered.jsonl").write_text(text)
            items = [
                {"prompt": item["prompt"], "answer": "a", "checker": "contains", "split": split}
                for item in items
                for split in ("valid", "test")
            ]
            text = "".join(json.dumps(item) + "\n" for item in items)
            (root / f"{name}-items.jsonl").write_text(text)
        models = [{"model": str(root / name)} for name in NAMES]
        recipe = {"merge_method": "ties", "base_model": str(root / "base"), "models": models}
        (root / "recipe.yml").write_text(yaml.safe_dump(recipe))

    def command(self, name: str) -> list[str]:
        root, out = self.root, self.out
        pair = [str(root / "base"), str(root / "east")]
        both = [f"--prompts={n}={root / n}-answered.jsonl" for n in NAMES]
        answered = [f"--prompts={root / 'east-answered.jsonl'}", "--batch-size=1"]
        return {
            "score": [
                *("score", *pair, f"--prompts={root / 'east.jsonl'}", "--batch-size=2"),
                *("--estimand=share,gain,knockout,activation_gain", "--verify=3"),
                *("--max-new-tokens=3", f"--out={out / 'scores.safetensors'}"),
            ],
            "fit": [
                *("fit", str(root / "recipe.yml"), *both, "--prompts-a-step=2", "--steps=25"),
                f"--out={out / 'fitted'}",
            ],
            "verify": ["verify", str(out / "scores.safetensors"), *answered, "--top=2,9%,50%"],
            "trace": [
                *("trace", str(root / "kept" / "score" / "scores.safetensors"), *answered),
                f"--out={out / 'trace.json'}",
            ],
            "compare": [
                *("compare", str(root / "kept" / "recipe.yml"), "--methods=weight_patching,ties"),
                *(f"--task={root / n}-items.jsonl" for n in NAMES),
                *("--max-new-tokens=3", f"--out={out / 'comparison'}"),
            ],
            "merge": ["merge", str(root / "kept" / "recipe.yml"), str(out / "merged"), "--quiet"],
            "merge over": [
                *("merge", str(root / "kept" / "recipe.yml"), str(out / "merged")),
                *("--quiet", "--overwrite"),
            ],
        }[name]

    def begin(self, name: str) -> None:
        """Empty the folder of outputs, but for what a command works on."""
        scored = self.made("score") if name in ("verify", "trace") else None
        if name.startswith(("merge", "compare")):
            recipe = yaml.safe_load((self.root / "recipe.yml").read_text())
            recipe |= {"merge_method": "weight_patching", "parameters": {"fusion": "path"}}
            for model, expert in zip(recipe["models"], NAMES, strict=True):
                scores = self.made("fit") / "fitted" / f"{expert}.safetensors"
                model["parameters"] = {"scores": str(scores)}
            (self.root / "kept" / "recipe.yml").write_text(yaml.safe_dump(recipe))
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        if scored and name == "verify":
            shutil.copy(scored / "scores.safetensors", self.out)
        if name == "merge over":
            shutil.copytree(self.root / "west", self.out / "merged")

    def made(self, name: str) -> Path:
        """What an unbroken run leaves, kept aside."""
        kept = self.root / "kept" / name
        if not kept.exists():
            self.begin(name)
            finished(Run(self.command(name)))
            shutil.copytree(self.out, kept)
        return kept


def finished(run: Run) -> Run:
    assert run.ended() == 0, run.said()
    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        yield World(tmp_path_factory.mktemp("durable"))


def in_view(folder: Path) -> dict[str, bytes]:
    """Outputs that look finished: neither hidden nor in a folder of what is partial."""
    return {
        name: content
        for name, content in contents(folder).items()
        if not any(part.startswith(".") or part.endswith(".partial") for part in Path(name).parts)
    }


def whole_or_absent(name: str, world: World, before: dict[str, bytes]) -> None:
    """Every output in view is as before the run, or as an unbroken run leaves it.

    A comparison's results and costs come line by line, so of them it has the beginning.
    """
    whole, seen = contents(world.made(name)), in_view(world.out)
    for file, content in seen.items():
        grows = file in ("comparison/results.jsonl", "comparison/costs.jsonl")
        begun = grows and whole[file].startswith(content)
        assert begun or content == whole[file] or content == before.get(file), file
    if name.startswith("merge") and "merged/model.safetensors" in seen:
        assert seen in (before, whole), "neither a half nor a mixture looks like a model"


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_fifty_kills(name: str, world: World) -> None:
    generator = random.Random(name)
    whole, done = contents(world.made(name)), in_view(world.made(name))
    world.begin(name)
    before = contents(world.out)
    begun = time.monotonic()
    n_blocks = finished(Run(world.command(name))).blocks()
    seconds = time.monotonic() - begun
    assert contents(world.out) == whole
    largest = max(len(content) for content in whole.values())

    world.begin(name)
    struck = kills = blocks = 0
    while struck < len(BLOWS):
        blow = BLOWS[struck]
        limit = generator.randrange(largest) if blow == "full" else None
        run = Run(world.command(name), limit)
        if blow != "full":
            run.ended(generator.uniform(0, seconds))
            first = {"kill": signal.SIGKILL, "term": signal.SIGTERM}.get(blow, signal.SIGINT)
            run.send(first)
            if blow == "twice":
                time.sleep(0.01)
                run.send(signal.SIGINT)
        status, said = run.ended(), run.said()
        blocks += run.blocks()
        complete = in_view(world.out) == done and not list(world.out.rglob("*.partial"))
        assert complete or status != 0
        if complete:  # it was faster
            assert blocks <= n_blocks + kills
            world.begin(name)
            kills = blocks = 0
            continue
        struck, kills = struck + 1, kills + 1
        whole_or_absent(name, world, before)
        # twice: the second may come when it is leaving already, and end it as shells call 130, too
        want = {"kill": [-9], "full": [1], "int": [130], "term": [143], "twice": [130, -2]}[blow]
        assert status in want, (blow, said)
        if status > 0:
            last = said.strip().splitlines()[-1]
            start = "interrupted; " if blow != "full" else ""
            assert last.startswith(f"mergekit-wp: {start}") and "Traceback" not in said, said
            assert ("cannot be written: File too large" in last) == (blow == "full")
            assert "the same command again" in last or "nothing half-written is left" in last
    blocks += finished(Run(world.command(name))).blocks()
    assert contents(world.out) == whole, "an interrupted run ends in the same bytes"
    assert blocks <= n_blocks + kills, "a kill costs no more than the block it hits"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if not name.startswith("merge")])
def test_a_second_run_on_one_path_is_refused(name: str, world: World) -> None:
    whole = contents(world.made(name))
    world.begin(name)
    first = Run(world.command(name))
    first.await_blocks(1)
    first.send(signal.SIGSTOP)
    second = Run(world.command(name))
    assert second.ended() == 2
    last = second.said().strip().splitlines()[-1]
    assert re.match("mergekit-wp: another (run|comparison) is writing .*; wait for it", last)
    first.send(signal.SIGCONT)
    finished(first)
    assert contents(world.out) == whole, "the second has not touched what the first writes"


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """A disk of few bytes, mounted at the folder; the function given frees space on it.

    Raises:
        PermissionError: only root can mount.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise PermissionError
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", [16 << 10, 64 << 10, 128 << 10])
def test_a_small_disk(world: World, tmp_path: Path, size: int) -> None:
    whole = (world.made("score") / "scores.safetensors").read_bytes()
    out = tmp_path / "disk" / "scores.safetensors"
    arguments = [*world.command("score")[:-1], f"--out={out}"]
    try:
        with small_disk(out.parent, size) as free_space:
            run = Run(arguments)
            status, said = run.ended(), run.said()
            assert status == 1, said
            last = said.strip().splitlines()[-1]
            assert "cannot be written: No space left on device; what is done is kept in" in last
            assert last.endswith("make room and start the same command again")
            assert [p.name for p in out.parent.iterdir()] == ["scores.safetensors.partial"]
            assert not list(out.parent.rglob("*.tmp")), "the block that did not fit is gone"
            free_space()
            finished(Run(arguments))
            assert contents(out.parent) == {"scores.safetensors": whole}
    except PermissionError:
        warnings.warn(
            "only root can mount a small disk; the full disk of test_fifty_kills is RLIMIT_FSIZE",
            stacklevel=1,
        )
