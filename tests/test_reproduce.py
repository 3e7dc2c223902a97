"""The same command gives the same bytes, and a file says which command that is."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from mergekit_wp.cli import cli
from mergekit_wp.files import scorefile
from tests.factory import make_score_file
from tests.joint_world import NAMES, write_task
from tests.models import finetuned, make_model, save, write_prompts

torch.set_num_threads(1)
ZOO = Path(__file__).parents[1] / "benchmarks" / "zoo" / "checkpoints"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reproduce")
    base = make_model("llama-tied")
    save(base, root / "base", torch.float32)
    for name, word in zip(NAMES, ("abca", "dd"), strict=True):
        save(finetuned(base, write_task(root / f"{name}.jsonl", word)), root / name, torch.float32)
    models = [{"model": name} for name in NAMES]
    recipe = {"merge_method": "ties", "base_model": "base", "models": models}
    (root / "recipe.yml").write_text(yaml.safe_dump(recipe))
    write_prompts(root / "open prompts.jsonl", 5, contrast=True)
    item = {"prompt": "abc", "answer": "a", "split": "test", "checker": "contains"}
    (root / "items.jsonl").write_text(json.dumps(item) + "\n")
    return root


def scoring(out: str, *estimands: str) -> list[str]:
    return [
        "score", "base", NAMES[0], "--prompts", "open prompts.jsonl?sample=3&seed=2", "--out", out,
        "--estimand", ",".join(estimands), "--verify", "2", "--max-new-tokens", "3",
        "--max-prompts", "2", "--seed", "7", "--behavior", "two words", "--share-steps", "2",
    ]  # fmt: skip


#: what is called to make a file, the file, and how many of the commands made it
COMMANDS = {
    "score": (
        [scoring("it's.safetensors", "share", "gain", "knockout")], "it's.safetensors", 1,
    ),
    "verify": (
        [scoring("verified.safetensors", "share"),
         ["verify", "verified.safetensors", "--top", "3,50%", "--prompts", f"{NAMES[0]}.jsonl",
          "--task", "items.jsonl", "--draws", "3", "--seed", "5", "--max-new-tokens", "2"]],
        "verified.safetensors", 2,
    ),
    "verify, built-in": (
        [scoring("built-in.safetensors", "gain"),
         ["verify", "built-in.safetensors", "--top", "3", "--builtin", "capitals", "--draws", "2",
          "--max-prompts", "2", "--max-new-tokens", "2", "--expert", NAMES[0]]],
        "built-in.safetensors", 2,
    ),
    "trace": (
        [scoring("traced.safetensors", "gain", "activation_gain"),
         ["trace", "traced.safetensors", "--prompts", f"{NAMES[0]}.jsonl", "--out", "t.json",
          "--targets", "2", "--suppliers", "2", "--seed", "3", "--edge", "0.01", "--least", "0.02",
          "--min-suppliers", "2"]],
        "t.json", 1,
    ),
    "fit": (
        [["fit", "recipe.yml", "--out", "fitted", "--steps", "2", "--held-out", "0",
          "--rate", "0.1", "--guard", "open prompts.jsonl", "--limit", "1.25",
          "--prompts-a-step", "2", "--start", "0.25",
          *(part for name in NAMES for part in ("--prompts", f"{name}={name}.jsonl"))]],
        f"fitted/{NAMES[0]}.safetensors", 1,
    ),
}  # fmt: skip
SLOW = {"score", "trace", "verify", "verify, built-in", "fit"}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in COMMANDS],
)
def test_the_printed_command_makes_the_same_bytes(
    world: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, name, count = COMMANDS[kind]
    monkeypatch.chdir(world)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    for arguments in calls:
        made = CliRunner().invoke(cli, arguments)
        assert made.exception is None, made.exception
    first = (world / name).read_bytes()
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    shown = CliRunner().invoke(cli, ["reproduce", name])
    assert shown.exception is None, shown.exception
    assert shown.stderr == ""
    if (folder := (world / name).parent) == world:
        (world / name).unlink()
    else:  # of the files of several experts none may be there
        shutil.rmtree(folder)
    assert shown.stdout.count("mergekit-wp ") == count
    # the shell's own reading of the lines, in processes of their own
    program = world / "bin" / "mergekit-wp"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m mergekit_wp.cli "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    repeated = subprocess.run(
        ["sh", "-c", shown.stdout], cwd=world, env=environment, capture_output=True, text=True
    )
    assert repeated.returncode == 0, repeated.stderr
    assert (world / name).read_bytes() == first


def test_what_is_missing_here_is_said(world: Path, tmp_path: Path) -> None:
    made = world / "said.safetensors"
    arguments = [
        "score", str(world / "base"), str(world / NAMES[0]), "--prompts",
        str(tmp_path / "p.jsonl"), "--out", str(made), "--estimand", "share",
        "--max-new-tokens", "2",
    ]  # fmt: skip
    write_prompts(tmp_path / "p.jsonl", 2)
    assert CliRunner().invoke(cli, arguments).exception is None
    (tmp_path / "p.jsonl").write_text('{"prompt": "other"}\n')
    file = scorefile.read(made)
    versions = file.manifest.versions | {"torch": "1.0"}
    hub = file.manifest.base.model_copy(update={"reference": "me/base", "revision": "abc123"})
    manifest = file.manifest.model_copy(update={"versions": versions, "base": hub})
    scorefile.write(scorefile.ScoreFile(manifest, file.tensors), made)
    shown = CliRunner().invoke(cli, ["reproduce", str(made)])
    assert shown.exception is None
    assert f"no prompts with sha256 {manifest.prompts_sha256} are here" in shown.stderr
    assert "me/base was read at commit abc123" in shown.stderr
    assert "made with torch 1.0; here it is" in shown.stderr
    assert len(shown.stdout.splitlines()) == 1


def test_a_file_that_does_not_say_is_refused(tmp_path: Path) -> None:
    scorefile.write(make_score_file(), tmp_path / "s.safetensors")
    shown = CliRunner().invoke(cli, ["reproduce", str(tmp_path / "s.safetensors")])
    assert "does not say by which command it was made" in str(shown.exception)


@pytest.mark.parametrize("change", ["--batch-size=1", "threads"])
def test_batches_and_threads_move_scores_by_a_few_noise_floors(tmp_path: Path, change: str) -> None:
    """The floor is what a file states for itself; on experts large enough to round at all."""
    common = [
        "score", str(ZOO / "base"), str(ZOO / "sort"), "--max-prompts", "4", "--criterion", "kl",
        "--prompts", str(ZOO / "prompts" / "sort.jsonl"), "--estimand", "share,gain",
        "--kinds", "head,kv_group", "--verify", "0", "--share-steps", "2",
    ]  # fmt: skip
    for name in ("one", "other"):
        changed = name == "other"
        torch.set_num_threads(2 if changed and change == "threads" else 1)
        more = [change] if changed and change.startswith("-") else []
        try:
            done = CliRunner().invoke(cli, [*common, "--out", str(tmp_path / name), *more])
        finally:
            torch.set_num_threads(1)
        assert done.exception is None, done.exception
    one, other = load_file(tmp_path / "one"), load_file(tmp_path / "other")
    floor = scorefile.read(tmp_path / "one").manifest.noise_floor["kl"]
    moved = [(one[key] - other[key]).abs().max() for key in one if not key.endswith(".se")]
    assert 0 < floor < 1e-6
    assert float(max(moved)) <= 10 * floor
    if change != "threads":
        assert float(max(moved)) > 0, "another batch size took another way"
