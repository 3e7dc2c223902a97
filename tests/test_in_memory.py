"""Prompts in memory, and runs that write nothing: the same numbers as with files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.joint.fit import fit
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.mechanism.circuit import trace
from mergekit_wp.mechanism.request import TraceRequest
from mergekit_wp.prompts import Message, Prompt, read_prompts
from mergekit_wp.runs.journal import Unwritten
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from tests.joint_world import NAMES, make_world
from tests.killing import contents
from tests.models import make_model, perturbed, save
from tests.test_scoring import Quiet

torch.set_num_threads(1)
ESTIMANDS = ("share", "gain", "activation_gain")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts, and a pair with prompts that have contrasts and no responses."""
    root = make_world("llama-tied", tmp_path_factory.mktemp("memory"))
    save(perturbed(make_model("llama-tied"), 0.2), root / "expert")
    lines = [{"prompt": p, "contrast": p[1:]} for p in ("abcd", "bcd", "cab")]
    (root / "p.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return root


def prompts_of(path: Path) -> tuple[Prompt, ...]:
    return tuple(Prompt(**json.loads(line)) for line in path.read_text().splitlines())


def request_for(world: Path, **options: Any) -> ScoreRequest:
    sides = {"base": str(world / "base"), "expert": str(world / "expert")}
    options = {"estimand": ESTIMANDS, "share_steps": 2, "max_new_tokens": 3, **options}
    return ScoreRequest(**sides, dtype="float64", **options)


def assert_alike(one: ScoreFile, other: ScoreFile, *but: str) -> None:
    assert one.digest() == other.digest()
    ours, theirs = (file.manifest.model_dump() for file in (one, other))
    assert {key for key in ours if ours[key] != theirs[key]} <= set(but)


def test_scores_are_those_of_files_and_nothing_is_written(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(world)
    alone = score(request_for(world, prompts=prompts_of(world / "p.jsonl")), Quiet())
    assert not list(tmp_path.iterdir()) and contents(world) == before
    file = tmp_path / "s.safetensors"
    written = score(request_for(world, prompts=world / "p.jsonl", out=file), Quiet())
    assert_alike(alone, written, "prompts_sha256", "behavior", "command")
    assert (alone.manifest.behavior, alone.manifest.command) == ("prompts", ())
    scorefile.write(alone, file)
    assert scorefile.read(file).manifest == alone.manifest
    named = score(request_for(world, prompts=world / "p.jsonl", behavior="letters"), Quiet())
    assert named.manifest.behavior == "letters"


def test_gates_are_fitted_without_files(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(world)
    options = {"recipe": world / "recipe.yml", "steps": 2, "prompts_a_step": 2}
    guard = world / "p.jsonl"
    given = tuple((name, prompts_of(world / f"{name}.jsonl")) for name in NAMES)
    alone = fit(FitRequest(prompts=given, guards=(prompts_of(guard),), **options), Quiet())
    assert not list(tmp_path.iterdir()) and contents(world) == before
    files = tuple((name, world / f"{name}.jsonl") for name in NAMES)
    out = tmp_path / "out"
    written = fit(FitRequest(prompts=files, guards=(guard,), out=out, **options), Quiet())
    assert list(alone) == list(written) == list(NAMES)
    for name in NAMES:
        assert_alike(alone[name], written[name], "prompts_sha256", "command", "fit")
        assert alone[name].manifest.behavior == name
    how = alone[NAMES[0]].manifest.fit
    assert how is not None and [one.behavior for one in how.guards] == ["guard 1"]


def test_a_circuit_is_traced_without_a_file(world: Path, tmp_path: Path) -> None:
    scores = tmp_path / "s.safetensors"
    score(request_for(world, prompts=world / "p.jsonl", out=scores), Quiet())
    before = contents(tmp_path)
    options = {"file": scores, "criterion": "kl", "targets": 2, "suppliers": 2}
    found = trace(TraceRequest(prompts=prompts_of(world / "p.jsonl"), **options), Quiet())
    assert contents(tmp_path) == before and found.command == ()
    out = tmp_path / "trace.json"
    written = trace(TraceRequest(prompts=world / "p.jsonl", out=out, **options), Quiet())
    assert (found.nodes, found.edges, found.screen) == (
        written.nodes,
        written.edges,
        written.screen,
    )


def test_the_hash_is_of_canonical_lines(tmp_path: Path) -> None:
    chat = [Message(role="user", content="é"), Message(role="system", content="b", name="x")]
    given = (Prompt(prompt="a", response="", contrast=None), Prompt(prompt=chat))
    lines = (
        '{"prompt": "a", "response": ""}\n'
        '{"prompt": [{"content": "é", "role": "user"}, '
        '{"content": "b", "name": "x", "role": "system"}]}\n'
    )
    found = read_prompts(given, None, "letters")
    assert found.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert (found.name, found.source, found.prompts) == ("letters", "'letters'", given)
    path = tmp_path / "p.jsonl"
    path.write_text(lines)
    assert read_prompts(path, None).sha256 == found.sha256
    assert read_prompts(given, 1).prompts == given[:1]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((), "'prompts' holds no prompts; expected at least one"),
        ((Prompt(prompt="a"), Prompt(prompt="")), "'prompts', prompt 2: 'prompt' is empty"),
    ],
)
def test_bad_prompts_are_told(world: Path, given: tuple[Prompt, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        score(request_for(world, prompts=given), Quiet())


def test_prompts_of_no_expert_are_told_by_its_name(world: Path) -> None:
    given = (("north", (Prompt(prompt="a"),)),)
    request = FitRequest(recipe=world / "recipe.yml", prompts=given)
    with pytest.raises(UserError, match="^prompts of 'north': 'north' is no expert"):
        fit(request, Quiet())


def test_blocks_are_held_until_they_are_used() -> None:
    with Unwritten() as journal:
        journal.save("a", {"x": torch.ones(1)})
        assert journal.has("a") and not journal.has("b") and not journal.resumed
        found, resumed = journal.block("a", lambda: {})
        assert found.keys() == {"x"} and not resumed and not journal.has("a")
        assert journal.block("b", lambda: {"y": torch.zeros(1)})[0].keys() == {"y"}
        assert not journal.has("b"), "what is computed when it is used is not held"
        journal.discard()
