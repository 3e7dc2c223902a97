"""A killed run loses at most the block it was in, and ends in the same bytes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mergekit_wp.errors import UserError
from mergekit_wp.runs.journal import Journal
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from tests.models import make_model, perturbed, save, write_prompts
from tests.test_scoring import Quiet

torch.set_num_threads(1)


@pytest.fixture
def request_of(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    base = make_model("llama-tied")
    save(base, tmp_path / "base")
    save(perturbed(base), tmp_path / "expert")
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4, contrast=True)

    def make(out: str, **options) -> ScoreRequest:
        settings = {
            "base": str(tmp_path / "base"),
            "expert": str(tmp_path / "expert"),
            "prompts": prompts,
            "out": tmp_path / out,
            "estimand": ("share", "gain", "knockout"),
            "max_new_tokens": 3,
            "exact_budget": 8.0,  # some kinds exact, some first-order and verified
            "verify": 3,
            "batch_size": 2,
            **options,
        }
        return ScoreRequest(**settings)

    return make


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


def kill_after_one_block(request: ScoreRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Journal.save

    def die(self, key, tensors):
        original(self, key, tensors)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "save", die)
        with pytest.raises(Killed):
            score(request, Quiet())


def test_killed_at_random_points_and_resumed_gives_the_same_file(request_of, monkeypatch) -> None:
    whole = request_of("whole.safetensors")
    score(whole, Quiet())
    want = whole.out.read_bytes()
    assert not whole.out.with_name("whole.safetensors.partial").exists()
    original = Journal.save
    generator = random.Random(0)
    for attempt in range(3):
        request = request_of(f"killed{attempt}.safetensors")
        kills = 0
        while not request.out.exists():
            left = generator.randint(0, 12)

            def save_or_die(self, key, tensors):
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                original(self, key, tensors)

            monkeypatch.setattr(Journal, "save", save_or_die)
            try:
                score(request, Quiet())
            except Killed:
                kills += 1
                assert not request.out.exists()
        assert kills >= 2
        assert request.out.read_bytes() == want


def test_a_finished_block_is_not_computed_again(request_of, monkeypatch) -> None:
    request = request_of("out.safetensors", estimand=("gain",))
    original = Journal.save
    saved: list[str] = []

    def die_at_five(self, key, tensors):
        if len(saved) == 5:
            raise Killed
        saved.append(key)
        original(self, key, tensors)

    monkeypatch.setattr(Journal, "save", die_at_five)
    with pytest.raises(Killed):
        score(request, Quiet())
    first = list(saved)
    saved.clear()
    monkeypatch.setattr(
        Journal, "save", lambda self, key, t: (saved.append(key), original(self, key, t))
    )
    progress = Quiet()
    score(request, progress)
    assert not set(first) & set(saved)
    assert progress.notes[0] == f"continuing the run in {request.out}.partial"


def test_resuming_with_other_inputs_is_refused_by_name(request_of, monkeypatch) -> None:
    request = request_of("out.safetensors")
    kill_after_one_block(request, monkeypatch)
    with pytest.raises(
        UserError, match=r"holds a run with other inputs; changed: seed \(0 -> 1\); add"
    ):
        score(request_of("out.safetensors", seed=1), Quiet())
    save(perturbed(make_model("llama-tied"), seed=5), Path(request.expert))
    with pytest.raises(UserError, match="changed: expert weights"):
        score(request, Quiet())
    request.prompts.write_text('{"prompt": "another"}\n' + request.prompts.read_text())
    with pytest.raises(UserError, match="changed: expert weights .*prompts"):
        score(request, Quiet())
    (request.out.with_name("out.safetensors.partial") / "inputs.json").write_text("{")
    with pytest.raises(UserError, match=r"inputs.json is damaged .* add restart=True"):
        score(request, Quiet())
    assert not request.out.exists()
    score(request_of("out.safetensors", restart=True), Quiet())
    assert request.out.exists()


def test_another_tokenizer_is_another_input(request_of, monkeypatch) -> None:
    request = request_of("out.safetensors")
    kill_after_one_block(request, monkeypatch)
    path = Path(request.expert) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    letters = tokenizer["model"]["vocab"]
    used = {
        x for line in request.prompts.read_text().splitlines() for x in json.loads(line)["prompt"]
    }
    only_contrasts = {
        x for line in request.prompts.read_text().splitlines() for x in json.loads(line)["contrast"]
    } - used
    first, second = sorted(only_contrasts)[:2]
    letters[first], letters[second] = letters[second], letters[first]
    for folder in (request.base, request.expert):  # which have to agree
        Path(folder, "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="changed: tokens"):
        score(request, Quiet())


def test_two_runs_on_one_output_are_refused(tmp_path) -> None:
    with (
        Journal(tmp_path / "out", {}, False),
        pytest.raises(UserError, match="another run is writing"),
        Journal(tmp_path / "out", {}, False),
    ):
        pass


def test_a_failed_run_without_finished_blocks_leaves_nothing(tmp_path) -> None:
    with pytest.raises(ValueError), Journal(tmp_path / "out", {}, False):
        raise ValueError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sigkill_and_resume_through_the_command_line(request_of, tmp_path) -> None:
    whole = request_of("whole.safetensors")
    command = [
        *(sys.executable, "-m", "mergekit_wp.cli", "score", whole.base, whole.expert),
        *("--prompts", str(whole.prompts), "--estimand", "share,gain,knockout"),
        *("--max-new-tokens", "3", "--batch-size", "2", "--out"),
    ]
    subprocess.run([*command, str(whole.out)], check=True)
    killed = tmp_path / "killed.safetensors"
    partial = tmp_path / "killed.safetensors.partial"
    for blocks in (1, 4, 9):
        process = subprocess.Popen([*command, str(killed)])
        while process.poll() is None and len(list(partial.glob("*.safetensors"))) < blocks:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(killed)], check=True)
    assert killed.read_bytes() == whole.out.read_bytes()
