"""Every command goes on with fewer sequences at once where memory runs out, to the same result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mergekit_wp.comparison.merging import EvaluationModel
from mergekit_wp.comparison.methods import methods_of
from mergekit_wp.comparison.plan import Plan
from mergekit_wp.comparison.results import Results
from mergekit_wp.comparison.run import Runner
from mergekit_wp.errors import OutOfMemory, UserError
from mergekit_wp.joint.fit import fit
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.mechanism.anchors import find_anchors
from mergekit_wp.mechanism.circuit import trace
from mergekit_wp.mechanism.request import AnchorRequest, TraceRequest, VerifyRequest
from mergekit_wp.mechanism.set_values import BEHAVIOR
from mergekit_wp.mechanism.verify import verify
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.prompts import Prompt
from mergekit_wp.runs.progress import Progress
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask, answers
from tests.joint_world import NAMES, make_world
from tests.models import make_model, perturbed, save
from tests.test_memory import SmallMemory
from tests.test_scoring import Quiet

torch.set_num_threads(1)
OOM = torch.OutOfMemoryError("CUDA out of memory")
PROMPTS = [("abcd", "ab"), ("bcd", "cd"), ("cab", "ba"), ("dcab", "dd")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts, a pair with a file of scores by activations, and prompts with contrasts."""
    root = make_world("llama-tied", tmp_path_factory.mktemp("backoff"))
    lines = [{"prompt": p, "contrast": p[:-1], "response": r} for p, r in PROMPTS]
    (root / "prompts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    save(perturbed(make_model("llama-tied"), 0.2), root / "expert")
    score(
        ScoreRequest(
            **pair(root),
            out=root / "scores.safetensors",
            estimand=("gain", "activation_gain"),
            criterion=("kl",),
            dtype="float64",
            verify=0,
        ),
        Quiet(),
    )
    return root


def pair(world: Path) -> dict[str, Any]:
    sides = {name: str(world / name) for name in ("base", "expert")}
    return sides | {"prompts": world / "prompts.jsonl"}


def members(world: Path) -> dict[str, Any]:
    prompts = tuple((name, world / f"{name}.jsonl") for name in NAMES)
    return {"recipe": world / "recipe.yml", "prompts": prompts, "dtype": "float64"}


def task(world: Path, *budgets: int) -> JsonlTask:
    """What the expert answers, and the base does not: the same prompts once a budget."""
    found = []
    for name in ("base", "expert"):
        model = AutoModelForCausalLM.from_pretrained(world / name, dtype=torch.float64)
        asked = TextInterface.read(world / name, name)
        found.append(answers(model, asked, [p for p, _ in PROMPTS], [3] * len(PROMPTS)))
    assert [text for text, _ in found[0]] != [text for text, _ in found[1]]
    lines = [
        {"prompt": p, "answer": text, "checker": "contains", "split": "test", "max_new_tokens": n}
        for n in budgets or (3,)
        for (p, _), (text, _) in zip(PROMPTS, found[1], strict=True)
    ]
    path = world / "task.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return JsonlTask.read(path, Checkers.load(None))


Numbers = dict[str, torch.Tensor]


def fitted(world: Path, out: Path, said: Quiet) -> Numbers:
    options = {"steps": 3, "prompts_a_step": 2, "held_out": 0.5}
    guard = world / "prompts.jsonl"
    request = FitRequest(**members(world), out=out, guards=(guard,), **options)
    found = list(fit(request, said).values())
    numbers = {f"{i}/{k}": v for i, file in enumerate(found) for k, v in file.tensors.items()}
    how = found[0].manifest.fit
    assert how is not None
    moments = [*(m.fitted for m in how.history), *(m.judged for m in how.history)]
    seen = [(v.kl, v.answers, v.tokens) for moment in moments if moment for v in moment.values()]
    return numbers | {"seen": torch.tensor(seen)}


def traced(world: Path, out: Path, said: Quiet) -> Numbers:
    request = TraceRequest(
        file=world / "scores.safetensors",
        prompts=world / "prompts.jsonl",
        out=out / "trace.json",
        targets=3,
        suppliers=3,
        dtype="float64",
        batch_size=4,
    )
    (out).mkdir(exist_ok=True)
    file = trace(request, said)
    supplies = [(edge.supply.value, edge.screened) for edge in file.edges]
    nodes = [(n.gain.value, n.activation.value, n.direct.value) for n in file.nodes]
    return {"supplies": torch.tensor(supplies), "nodes": torch.tensor(nodes)}


def verified(world: Path, out: Path, said: Quiet) -> Numbers:
    out.mkdir()
    file = out / "scores.safetensors"
    file.write_bytes((world / "scores.safetensors").read_bytes())
    request = VerifyRequest(
        file=file,
        prompts=world / "prompts.jsonl",
        top=("25%",),
        draws=2,
        dtype="float64",
        batch_size=4,
    )
    found = verify(request, task(world), said)
    assert {p.measure for p in found.points} == {"kl", BEHAVIOR}
    return {"points": torch.tensor([(p.value, p.low, p.high) for p in found.points])}


def anchored(world: Path, out: Path, said: Quiet) -> Numbers:
    request = AnchorRequest(**pair(world), dtype="float64", batch_size=4)
    found = find_anchors(request, said)
    rows = [(x.separation, x.stability.value, x.steering.value) for x in found]
    return {"layers": torch.tensor(rows)}


@dataclass
class Command:
    run: Callable[[Path, Path, Quiet], Numbers]
    stages: tuple[str, ...]  # in each of which memory is to run out for the first time


COMMANDS = {
    "fit": Command(fitted, ("base and east", "base on guard", "fitting gates")),
    "trace": Command(traced, ("screening", "measuring supplies", "measuring c")),
    "verify": Command(verified, ("sets",)),
    "anchor": Command(anchored, ("layers",)),
}
CASES = [(name, stage) for name, command in COMMANDS.items() for stage in command.stages]


@pytest.mark.parametrize(("name", "stage"), [*CASES, *((name, "") for name in COMMANDS)])
def test_results_are_those_of_a_run_with_memory(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stage: str
) -> None:
    command = COMMANDS[name]
    whole = command.run(world, tmp_path / "whole", Quiet())
    memory = SmallMemory(monkeypatch, OOM, 10**6 if stage else 9)

    class Tightening(Quiet):
        def stage(self, said: str, total: float, unit: str) -> None:
            if said.startswith(stage):
                memory.tokens = 9  # one sequence of a prompt with its response
            super().stage(said, total, unit)

    said = Tightening()
    small = command.run(world, tmp_path / "small", said)
    assert memory.refused >= 1
    assert "out of memory; going on with one sequence per forward pass" in said.notes
    assert list(small) == list(whole)
    for key, tensor in whole.items():
        torch.testing.assert_close(small[key], tensor, rtol=1e-5, atol=1e-7)


def test_answers_of_the_expert_tell_of_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": p}) for p, _ in PROMPTS))

    def run(name: str, said: Quiet) -> Numbers:
        request = ScoreRequest(
            **pair(world) | {"prompts": prompts},
            out=tmp_path / f"{name}.safetensors",
            estimand=("share",),
            share_steps=1,
            dtype="float64",
            max_new_tokens=2,
        )
        return score(request, said).tensors

    whole, said = run("whole", Quiet()), Quiet()
    SmallMemory(monkeypatch, OOM, 8)
    small = run("small", said)
    assert said.notes[0] == "out of memory; going on with 2 sequences per forward pass"
    for key, tensor in whole.items():
        torch.testing.assert_close(small[key], tensor, rtol=1e-5, atol=1e-7)


def compared(world: Path, out: Path, progress: Progress) -> list[str]:
    """Rows and items of a comparison, with what was answered."""
    plan = Plan(
        base=str(world / "base"),
        experts=(str(world / "expert"),),
        names=("expert",),
        recipe=None,
        extra={},
        methods=methods_of(("linear", "task_arithmetic+aim"), 1, None),
        tasks=(task(world, 3, 2),),
        tuned=False,
        calibration=tuple(Prompt(prompt=p) for p, _ in PROMPTS),
        dtype="float32",
        device="cpu",
        eval_dtype=torch.float64,
    )
    with Results(out, {}) as results:
        Runner(plan, results, progress).run()
    return (out / "results.jsonl").read_text().splitlines()


@pytest.mark.parametrize("error", [OOM, MemoryError()], ids=["cuda", "python"])
def test_a_comparison_is_that_of_a_run_with_memory(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    whole, said = compared(world, tmp_path / "whole", Quiet()), Quiet()
    memory = SmallMemory(monkeypatch, error, 9, EvaluationModel)
    small = compared(world, tmp_path / "small", said)
    assert small == whole
    # once for the answers, whose next chunks and models begin with what fitted; once for AIM
    assert said.notes == ["out of memory; going on with 2 sequences per forward pass"] * 2
    assert memory.refused == 2
    memory.tokens = 2
    with pytest.raises(OutOfMemory, match="with one sequence at a time"):
        compared(world, tmp_path / "none", said)
    assert not (tmp_path / "none" / "results.jsonl").exists(), "no merge is blamed for it"


def test_halving_ends_with_one_clear_error() -> None:
    tried, told = [], []

    def run(size: int) -> None:
        tried.append(size)
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes")

    with pytest.raises(UserError, match="out of memory with one sequence at a time .*8 bytes"):
        AtOnce(5, told.append).run(run)
    assert tried == [5, 3, 2, 1] and len(told) == 3
    with pytest.raises(RuntimeError, match="size mismatch"):
        AtOnce(5, told.append).run(_mismatch)


def _mismatch(_size: int) -> None:
    raise RuntimeError("size mismatch")
