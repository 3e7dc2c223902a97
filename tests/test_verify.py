"""Sets of components swapped together: against naive swapping in float64, and planted truth."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, PreTrainedModel

import mergekit_wp as wp
from benchmarks.components import Component, fine_components, slices
from mergekit_wp.cli import cli
from mergekit_wp.components import Partition
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.files.manifest import SetPoint, Verification
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.mechanism.request import VerifyRequest
from mergekit_wp.mechanism.sets import extreme, matched
from mergekit_wp.mechanism.verify import estimate, sizes_of, verify
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.models.pair import open_pair
from mergekit_wp.report import verification
from mergekit_wp.report.verification import area
from mergekit_wp.runs.journal import Journal
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from mergekit_wp.tasks.behaviors import behavior
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask
from tests.models import (
    DEVICE,
    EOS,
    EXACT,
    LETTERS,
    count_fetched,
    make_model,
    perturbed,
    save,
    write_prompts,
)
from tests.test_scoring import Quiet

torch.set_num_threads(1)


@pytest.fixture(
    scope="module", params=["llama-tied", pytest.param("qwen2", marks=pytest.mark.slow)]
)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an expert, prompts with responses, a score file and items."""
    root = tmp_path_factory.mktemp("verify")
    base = make_model(request.param)
    save(base, root / "base")
    save(perturbed(base, 0.2), root / "expert")
    prompts = write_prompts(root / "prompts.jsonl", 5)
    lines = [json.loads(line) | {"response": "ab"} for line in prompts.read_text().splitlines()]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    score(
        ScoreRequest(
            base=str(root / "base"),
            expert=str(root / "expert"),
            prompts=prompts,
            out=root / "scores.safetensors",
            estimand=("share",),
            criterion=("kl", "logprob", "anchor"),
            dtype="float64",
            verify=0,
        ),
        Quiet(),
    )
    items = [
        {"prompt": "abc", "answer": "z", "split": "test", "checker": "contains"},
        {"prompt": "cab", "answer": "", "split": "test", "checker": "regex", "pattern": "."},
    ]
    (root / "items.jsonl").write_text("".join(json.dumps(x) + "\n" for x in items))
    return root


@pytest.fixture
def file(world: Path, tmp_path: Path) -> Path:
    """A copy that may be written to."""
    path = tmp_path / "scores.safetensors"
    path.write_bytes((world / "scores.safetensors").read_bytes())
    return path


def request_for(world: Path, file: Path, **options: Any) -> VerifyRequest:
    settings: dict[str, Any] = {
        "file": file,
        "prompts": world / "prompts.jsonl",
        "top": ("3", "25%", "100%"),
        "draws": 2,
        "dtype": "float64",
        "device": DEVICE,
        "batch_size": 2,
        **options,
    }
    return VerifyRequest(**settings)


def point(found: Verification, direction: str, name: str, size: int, measure: str) -> SetPoint:
    [only] = [
        p
        for p in found.points
        if (p.direction, p.set, p.size, p.measure) == (direction, name, size, measure)
    ]
    return only


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def kl_and_logprob(
    world: Path, model: PreTrainedModel, expert: PreTrainedModel
) -> tuple[float, float]:
    """Mean -KL from the expert and mean log-probability of the responses, one text at a time."""
    kl, logprob = [], []
    for line in (world / "prompts.jsonl").read_text().splitlines():
        item = json.loads(line)
        prompt = [LETTERS.index(c) for c in item["prompt"]]
        answer = [*(LETTERS.index(c) for c in item["response"]), EOS]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            target = expert(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            ours = model(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        kl.append(-(target.exp() * (target - ours)).sum(-1).mean())
        logprob.append(ours.gather(-1, torch.tensor(answer)[:, None]).mean())
    return float(torch.stack(kl).mean()), float(torch.stack(logprob).mean())


def swap(
    onto: PreTrainedModel, other: PreTrainedModel, partition: Partition, parts: list[Component]
) -> None:
    """One component after the other."""
    weights, theirs = dict(onto.named_parameters()), dict(other.named_parameters())
    with torch.no_grad():
        for part in parts:
            for name, index in slices(partition, part).items():
                weights[name][index] = theirs[name][index]


def ranked(world: Path, file: ScoreFile) -> tuple[Partition, list[Component]]:
    """Fine components, highest share first."""
    pair = open_pair(str(world / "base"), str(world / "expert"), lambda *_: None)
    parts = list(fine_components(pair.partition))

    def value(part: Component) -> float:
        values = file.tensors[f"share/kl/{part.kind}"]
        return float(
            values[part.index] if part.kind == "tensor" else values[part.layer, part.index]
        )

    return pair.partition, sorted(parts, key=value, reverse=True)


def test_sets_equal_naive_swapping(world: Path, file: Path) -> None:
    found = verify(request_for(world, file), None, Quiet())
    scored = scorefile.read(file)
    assert scored.manifest.verification == found, "the curve is in the manifest"
    partition, parts = ranked(world, scored)
    base, expert = load(world / "base"), load(world / "expert")
    at_base, at_expert = (kl_and_logprob(world, m, expert) for m in (base, expert))
    quarter = -(-len(parts) // 4)
    for size in (3, quarter, len(parts)):
        for name, chosen in (("top", parts[:size]), ("bottom", parts[-size:])):
            for direction in ("restoration", "knockout"):
                start, end = (base, expert) if direction == "restoration" else (expert, base)
                model = load(world / ("base" if direction == "restoration" else "expert"))
                swap(model, end, partition, chosen)
                assert start is not model
                values = kl_and_logprob(world, model, expert)
                for m, measure in enumerate(("kl", "logprob")):
                    want = (values[m] - at_base[m]) / (at_expert[m] - at_base[m])
                    want = want if direction == "restoration" else 1 - want
                    got = point(found, direction, name, size, measure)
                    assert got.value == pytest.approx(want, abs=EXACT), (size, name, direction)
    for direction in ("restoration", "knockout"):
        for measure in ("kl", "logprob", "anchor"):
            every = point(found, direction, "random", len(parts), measure)
            assert (every.value, every.low, every.high) == pytest.approx((1, 1, 1), abs=1e-9)


def test_planted_components_are_the_whole_difference(world: Path, tmp_path: Path) -> None:
    base = load(world / "base")
    expert, other = load(world / "base"), load(world / "expert")
    pair = open_pair(str(world / "base"), str(world / "expert"), lambda *_: None)
    heads = [c for c in fine_components(pair.partition) if c.kind == "head"]
    neurons = [c for c in fine_components(pair.partition) if c.kind == "neuron"]
    planted = [heads[1], neurons[4], neurons[7]]
    swap(expert, other, pair.partition, planted)
    assert base is not expert
    save(expert, tmp_path / "expert")
    out = tmp_path / "s.safetensors"
    request = ScoreRequest(
        base=str(world / "base"),
        expert=str(tmp_path / "expert"),
        prompts=world / "prompts.jsonl",
        out=out,
        estimand=("gain",),
        criterion=("logprob",),
        dtype="float64",
        verify=0,
    )
    score(request, Quiet())
    file = scorefile.read(out)
    # a component that works against the behaviour is part of the difference as well
    tensors = {
        k: t.abs() if k.startswith("gain/") and ".se" not in k else t
        for k, t in file.tensors.items()
    }
    scorefile.write(ScoreFile(file.manifest, tensors), out)
    found = verify(request_for(world, out, top=("3",)), None, Quiet())
    for direction in ("restoration", "knockout"):
        assert point(found, direction, "top", 3, "kl").value == pytest.approx(1, abs=1e-9)
        assert point(found, direction, "bottom", 3, "kl").value == pytest.approx(0, abs=1e-9)


def test_weights_left_in_the_checkpoints_restore_the_same(
    world: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = JsonlTask.read(world / "items.jsonl", Checkers.load(None))
    sets: dict[str, Any] = {"top": ("3",), "draws": 2}
    held = verify(request_for(world, file, **sets), task, Quiet())
    fetched = count_fetched(monkeypatch)
    spread = request_for(world, file, device_map="auto", max_memory={"cpu": 0}, **sets)
    assert verify(spread, task, Quiet()).points == held.points and fetched


def test_sets() -> None:
    scores = {
        "head": torch.tensor([[0.5, 0.1], [0.5, -1.0]]),
        "neuron": torch.tensor([[0.2, 0.9, 0.0]]),
        "tensor": torch.tensor([0.3]),
    }
    top = extreme(scores, 3)  # type: ignore[arg-type]
    assert top["head"].tolist() == [[True, False], [True, False]]
    assert top["neuron"].tolist() == [[False, True, False]] and not top["tensor"].any()
    bottom = extreme(scores, 2, largest=False)  # type: ignore[arg-type]
    assert bottom["head"].tolist() == [[False, False], [False, True]]
    assert bottom["neuron"].tolist() == [[False, False, True]]
    drawn = [matched(top, torch.Generator().manual_seed(s)) for s in range(40)]
    assert all(int(d["head"].sum()) == 2 and int(d["neuron"].sum()) == 1 for d in drawn)
    assert len({str(d["head"].tolist()) for d in drawn}) > 3


def test_behaviour_is_the_rate_of_right_answers(world: Path, file: Path) -> None:
    task = JsonlTask.read(world / "items.jsonl", Checkers.load(None), max_new_tokens=3)
    quiet = Quiet()
    found = verify(request_for(world, file, top=("100%",)), task, quiet)
    assert found.n_items == 2
    measured = {p.measure for p in found.points}
    ends = []
    for folder in ("base", "expert"):
        model = load(world / folder)
        asked = TextInterface.read(world / folder, folder)
        ends.append(np.mean([x.score for x in task.evaluate(model, asked, "test")]))
    assert ("behavior" in measured) == (ends[0] != ends[1]), "no scale where both are alike"
    assert any("'behavior' is alike" in n for n in quiet.notes) == (ends[0] == ends[1])


def test_intervals_of_a_ratio_of_means() -> None:
    rng = np.random.default_rng(0)
    base, expert = rng.normal(0, 1, 400), rng.normal(3, 1, 400)
    middle = base + 0.4 * (expert - base) + rng.normal(0, 0.3, 400)
    counts = rng.multinomial(400, np.full(400, 1 / 400), size=2000) / 400
    found = estimate(middle[None], base, expert, counts, "restoration", rng)
    assert found is not None
    value, low, high = found
    assert value == pytest.approx(0.4, abs=0.02)
    spread = 0.3 / 3 / 20  # noise over distance over sqrt(n)
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.15)
    knocked = estimate(middle[None], base, expert, counts, "knockout", rng)
    assert knocked is not None and knocked[0] == pytest.approx(1 - value)
    assert estimate(base[None], base, base, counts, "restoration", rng) is None
    apart = np.stack([base, expert])
    wide = estimate(apart, base, expert, counts, "restoration", rng)
    assert wide is not None and wide[1] < 0.05 and wide[2] > 0.95, "draws count, not only prompts"


def test_area_over_the_logarithm_of_the_size() -> None:
    def at(size: int, value: float) -> SetPoint:
        return SetPoint(
            direction="restoration", set="top", size=size, measure="kl", value=value, low=0, high=1
        )

    assert area([at(10, 0.3)]) == 0.3
    assert area([at(100, 1.0), at(1, 0.0), at(10, 0.5)]) == pytest.approx(0.5)
    assert area([at(1, 0.0), at(10, 1.0), at(100, 1.0)]) == pytest.approx(0.75)


def test_mib_areas_by_its_own_loop(world: Path, file: Path) -> None:
    found = verify(request_for(world, file, top=("mib",), draws=2), None, Quiet())
    total = found.n_components
    assert total is not None
    parts = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
    for direction in ("restoration", "knockout"):
        curve = verification.curve(found, direction, "kl", "top")
        values = {p.size: p.value for p in curve} | {total: 1.0}
        f = [values[math.ceil(part * total)] for part in parts]
        under = distance = 0.0
        for i in range(9):
            width = parts[i + 1] - parts[i]
            under += width * (f[i] + f[i + 1]) / 2
            distance += width * (abs(1 - f[i]) + abs(1 - f[i + 1])) / 2
        areas = verification.faithfulness(found, curve)
        assert areas is not None
        assert (areas.cpr, areas.cmd) == pytest.approx((under, distance))
        assert areas.cmd > 0
    assert verification.table(found).count("\nCPR") == len(verification.measures(found)) * 2
    assert verification.faithfulness(found, curve[:-1]) is None
    old = found.model_copy(update={"n_components": None})
    assert "CPR" not in verification.table(old)
    assert "n_components" not in old.model_dump()


def test_a_killed_run_goes_on(world: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = verify(request_for(world, file), None, Quiet())
    again = file.with_name("again.safetensors")
    again.write_bytes((world / "scores.safetensors").read_bytes())
    saved = 0
    keep = Journal.save

    def killed(self: Journal, key: str, tensors: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 6:
            raise KeyboardInterrupt
        keep(self, key, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "save", killed)
        verify(request_for(world, again), None, Quiet())
    assert again.read_bytes() == (world / "scores.safetensors").read_bytes()
    assert verify(request_for(world, again), None, Quiet()) == whole
    assert not list(again.parent.glob("*.partial"))
    assert again.read_bytes() == file.read_bytes()


def test_the_command(world: Path, file: Path) -> None:
    options = ["--top", "3,50%", "--prompts", str(world / "prompts.jsonl"), "--draws", "2"]
    done = CliRunner().invoke(cli, ["verify", str(file), *options, "--dtype", "float64"])
    assert done.exception is None, done.exception
    assert "restoration, kl" in done.output and "knockout, anchor" in done.output
    assert "area" in done.output and "written into" in done.output
    shown = CliRunner().invoke(cli, ["inspect", str(file), "--json"])
    assert json.loads(shown.output)["manifest"]["verification"]["estimand"] == "share"
    shown = CliRunner().invoke(cli, ["inspect", str(file)])
    assert "together    restore kl: top 3 " in shown.output
    page = file.with_suffix(".html")
    drawn = CliRunner().invoke(cli, ["plot", str(file), "--out", str(page)])
    assert drawn.exception is None, drawn.exception
    assert "Knockout of logprob by sets of components" in page.read_text()


def test_a_built_in_behaviour(world: Path, file: Path) -> None:
    options = ["--top", "3", "--draws", "2", "--max-prompts", "3", "--max-new-tokens", "2"]
    both = ["--builtin", "capitals", "--prompts", str(world / "prompts.jsonl")]
    for given in ([], both):
        done = CliRunner().invoke(cli, ["verify", str(file), *options, *given])
        assert "give either --prompts FILE.jsonl or --builtin NAME" in str(done.exception)
    done = CliRunner().invoke(cli, ["verify", str(file), *options, "--builtin", "capitals"])
    assert done.exception is None, done.exception
    found = scorefile.read(file).manifest.verification
    assert found is not None and found.n_prompts == 3
    assert found.n_items == sum(i["split"] == "test" for i in behavior("capitals").items())


def test_answers_are_checked_from_python_as_by_the_command(world: Path, file: Path) -> None:
    """A task is no word in the file alone: its answers are looked at."""
    prompts = world / "prompts.jsonl"
    items = [{"prompt": "ab", "answer": "b", "split": s, "checker": "contains"} for s in ("test",)]
    task, options = world / "asked.jsonl", {"draws": 2, "max_new_tokens": 2, "device": DEVICE}
    task.write_text("".join(json.dumps(item) + "\n" for item in items))
    found = wp.verify(file, prompts=prompts, top="3", task=task, progress=False, **options)
    assert found.n_items == 1 and "--task" in found.command
    given = JsonlTask.read(task, Checkers.load(None))
    with pytest.raises(UserError, match="are two tasks; give one"):
        wp.verify(file, prompts=prompts, top="3", task=task, items=given, progress=False)
    with pytest.raises(UserError, match="checkers goes with task"):
        wp.verify(file, prompts=prompts, top="3", checkers=world / "c.py", progress=False)
    for source in (prompts, world / "none.jsonl", world, file, ["a"]):
        with pytest.raises(
            UserError, match="builtin=title is of the command line; from Python give"
        ):
            wp.verify(file, prompts=source, top="3", builtin="title", progress=False)


@pytest.mark.parametrize(
    ("text", "total", "size"), [("7%", 100, 7), ("28%", 100, 28), ("55%", 200, 110), ("0.5%", 3, 1)]
)
def test_parts_of_all_components_are_rounded_up_by_no_noise(
    text: str, total: int, size: int
) -> None:
    assert sizes_of((text,), total) == [size]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top": ("many",)}, "'many' is no size"),
        ({"top": ("0",)}, "top=0: the file scores"),
        ({"top": ("inf%",)}, "'inf%' is no size"),
        ({"top": ("101%",)}, "top=101%: the file scores"),
        ({"estimand": "gain"}, "has no 'gain/kl' scores; it has share/kl"),
        ({"expert": "BASE"}, "nothing to score"),
        ({"base": "EXPERT", "expert": "OTHER"}, "give the right ones as base and expert"),
    ],
)
def test_bad_input(world: Path, file: Path, change: dict[str, Any], message: str) -> None:
    names = {"BASE": world / "base", "EXPERT": world / "expert", "OTHER": file.parent / "other"}
    if "OTHER" in change.values():
        save(perturbed(load(world / "expert"), 0.01), names["OTHER"])
    change = {k: str(names[v]) if v in names else v for k, v in change.items()}  # type: ignore[index]
    before = file.read_bytes()
    with pytest.raises(UserError, match=message):
        verify(request_for(world, file, **change), None, Quiet())
    assert file.read_bytes() == before
    assert not list(file.parent.glob("*.partial"))
