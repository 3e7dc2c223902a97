"""Fitting gates: slopes against finite differences, planted truth, and merges by the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from mergekit_wp import gatesfile
from mergekit_wp.cli import cli
from mergekit_wp.criteria import Targets
from mergekit_wp.engine.gates import KINDS, Climb, Layout, penalty, penalty_slope, weights
from mergekit_wp.engine.share import TaskVector, contributions
from mergekit_wp.engine.slopes import Term, slopes
from mergekit_wp.engine.trace import Decoder, own_values, record
from mergekit_wp.errors import UserError
from mergekit_wp.gatesfile import GatesFile
from mergekit_wp.pair import open_pair
from mergekit_wp.prompts import Sample, batches
from mergekit_wp.resident import ResidentModel
from mergekit_wp.scoring.fit import fit
from mergekit_wp.scoring.fitting import Fitting
from mergekit_wp.scoring.journal import Journal
from mergekit_wp.scoring.lessons import Lesson
from mergekit_wp.scoring.references import logprobs
from mergekit_wp.scoring.request import FitRequest
from tests.circuit import CONSTANT, build
from tests.models import (
    EOS,
    FAMILIES,
    LETTERS,
    finetuned,
    make_model,
    perturbed,
    save,
    with_eager_experts,
)
from tests.test_company import NAMES, write_task
from tests.test_scoring import Quiet

torch.set_num_threads(1)


def write_recipe(root: Path, names: tuple[str, ...] = NAMES) -> Path:
    models = [{"model": str(root / name)} for name in names]
    recipe = {"merge_method": "ties", "base_model": str(root / "base"), "models": models}
    (root / "recipe.yml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(scope="module", params=["llama-tied", "qwen2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two experts that want different answers, prompts and a recipe."""
    root = tmp_path_factory.mktemp("fit")
    base = make_model(request.param)
    save(base, root / "base")
    for name, word in zip(NAMES, ("abca", "dd"), strict=True):
        task = write_task(root / f"{name}.jsonl", word)
        save(finetuned(base, task), root / name)
    return write_recipe(root)


def fitted(world: Path, out: Path, names: tuple[str, ...] = NAMES, **options: Any) -> GatesFile:
    settings: dict[str, Any] = {
        "recipe": world / "recipe.yml",
        "prompts": tuple((name, world / f"{name}.jsonl") for name in names),
        "out": out,
        "dtype": "float64",
        "prompts_a_step": 2,
        "steps": 6,
        **options,
    }
    fit(FitRequest(**settings), Quiet())
    return gatesfile.read(out)


def load(folder: Path) -> PreTrainedModel:
    return with_eager_experts(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    )


def sequences(path: Path) -> list[Sample]:
    found = []
    for line in path.read_text().splitlines():
        item = json.loads(line)
        answer = [*(LETTERS.index(c) for c in item["response"]), EOS]
        found.append(Sample(tuple(LETTERS.index(c) for c in item["prompt"]), tuple(answer)))
    return found


@torch.no_grad()
def divergence(model: PreTrainedModel, teacher: PreTrainedModel, path: Path) -> float:
    """Mean KL of the teacher's answers, one text at a time."""
    total = []
    for sample in sequences(path):
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        at = slice(len(sample.prompt_ids) - 1, -1)
        want, have = (m(ids).logits[0, at].log_softmax(-1) for m in (teacher, model))
        total.append((want.exp() * (want - have)).sum(-1).mean())
    return float(torch.stack(total).mean())


def merged(world: Path, layout: Layout, flat: torch.Tensor) -> PreTrainedModel:
    """B + sum of gate times difference, component by component."""
    model = load(world / "base")
    weights = dict(model.named_parameters())
    before = {name: w.clone() for name, w in weights.items()}
    with torch.no_grad():
        for name, gates in zip(NAMES, layout.unflat(flat), strict=True):
            theirs = dict(load(world / name).named_parameters())
            for component in layout.partition.fine_components():
                i = (
                    layout.partition.whole_tensors.index(component.name)
                    if component.kind == "tensor"
                    else (component.layer, component.index)
                )
                gate = float(gates[component.kind][i])
                for tensor, at in layout.partition.slices(component).items():
                    weights[tensor][at] += gate * (theirs[tensor][at] - before[tensor][at])
    return model


def test_slopes_equal_finite_differences(world: Path) -> None:
    pairs = [open_pair(str(world / "base"), str(world / n), lambda *_: None) for n in NAMES]
    layout = Layout(pairs[0].partition, tuple(pair.changed for pair in pairs))
    base, experts = load(world / "base"), [load(world / name) for name in NAMES]
    lessons = []
    for name, expert in zip(NAMES, experts, strict=True):
        every = list(batches(sequences(world / f"{name}.jsonl"), 4, "cpu"))
        targets = [Targets(logprobs(Decoder(expert), batch)) for batch in every]
        apart = divergence(base, expert, world / f"{name}.jsonl")
        zero = torch.full((4,), -apart, dtype=torch.float64)
        lessons.append(Lesson(name, every, targets, zero, -zero))

    class Member:
        def __init__(self, pair: Any) -> None:
            self.pair = pair

    request = FitRequest(recipe=world, prompts=(), out=world, dtype="float64", held_out=0)
    members: Any = [Member(pair) for pair in pairs]
    fitting = Fitting(request, members, lessons, layout, None, Quiet())  # type: ignore[arg-type]
    torch.manual_seed(0)
    flat = 0.2 + torch.rand(layout.size, dtype=torch.float64)
    fitting.move_to(flat)
    slope, recovered = fitting._slope(0)

    def objective(at: torch.Tensor) -> list[float]:
        model = merged(world, layout, at)
        found = []
        for name, expert, lesson in zip(NAMES, experts, lessons, strict=True):
            found.append(1 - divergence(model, expert, world / f"{name}.jsonl") / lesson.span)
        return found

    assert recovered == pytest.approx(objective(flat), abs=1e-6)
    places = []
    for e, gates in enumerate(layout.unflat(torch.arange(layout.size))):
        for kind in KINDS:
            every = gates[kind].flatten()
            places += [(e, kind, int(i)) for i in every[torch.tensor([0, -1])]]
    for e, kind, i in places:
        step = torch.zeros_like(flat)
        step[i] = 1e-3
        up, down = (sum(objective(flat + sign * step)) / 2 for sign in (1, -1))
        want = (up - down) / 2e-3
        assert float(slope[i]) == pytest.approx(want, rel=2e-3, abs=2e-5), (e, kind)
    assert len({kind for _, kind, _ in places}) == 4 and float(slope.abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["llama-tied", "qwen3", *FAMILIES])
def test_a_layer_at_a_time_is_the_same_as_prompt_by_prompt(tmp_path: Path, family: str) -> None:
    base = make_model(family)
    save(base, tmp_path / "base")
    save(perturbed(base), tmp_path / "expert")
    pair = open_pair(str(tmp_path / "base"), str(tmp_path / "expert"), lambda *_: None)
    resident = ResidentModel(pair, torch.float64, "cpu")
    resident.move_to(0.4)
    decoder, expert = Decoder(resident.model), Decoder(load(tmp_path / "expert"))
    write_task(tmp_path / "task.jsonl", "abc")
    [batch] = batches(sequences(tmp_path / "task.jsonl"), 9, "cpu")
    targets = Targets(logprobs(expert, batch))
    vector = TaskVector(lambda name: pair.delta(name, torch.float64, "cpu"), pair.changed)
    [apart] = contributions(decoder, batch, pair.partition, [vector], ("kl",), targets)["kl"]
    terms = [Term(batch, targets, 1.0), Term(batch, targets, 0.5)]
    [values, _], [together] = slopes(decoder, terms, pair.partition, [vector])
    assert together.keys() == apart.keys() and len(together) > 12
    for name, each in apart.items():
        torch.testing.assert_close(together[name], 1.5 * each.sum(0), rtol=1e-5, atol=1e-7)
    assert not any(p.requires_grad for p in resident.model.parameters())
    own = own_values(decoder, record(decoder, batch), ("kl",), targets)["kl"]
    torch.testing.assert_close(values, own)


def test_climbing_a_hill_whose_top_is_known() -> None:
    top = torch.tensor([0.3, 0.9, 1.4, 2.0, -0.5], dtype=torch.float64)
    climb, values = Climb.at(torch.full((5,), 0.5)), []
    for _ in range(200):
        values.append(-float((climb.gates - top).square().sum()))
        climb = climb.step(-2 * (climb.gates - top), 0.05, 1.5)
    assert climb.gates.tolist() == pytest.approx([0.3, 0.9, 1.4, 1.5, 0.0], abs=0.02)
    assert values[20] > values[5] > values[0] and climb.steps == 200


def test_penalty() -> None:
    gates = torch.tensor([0.0, 0.2, 0.9, 1.2, 1.5], dtype=torch.float64, requires_grad=True)
    value = penalty(gates)
    value.backward()
    assert gates.grad is not None
    assert penalty_slope(gates.detach()).tolist() == pytest.approx(gates.grad.tolist())
    assert float(penalty(torch.zeros(3))) == 0 and float(penalty(torch.ones(3))) == 1


IS_B, OTHER = 5, 6


def skills(**neurons: tuple[int, int, int, float]) -> PreTrainedModel:
    """A model that answers 'x', and neurons (layer, index, what it reads) that say otherwise."""
    model = build(("neuron", 0, 3), ("head", 1, 2), ("neuron", 3, 5), noise=0.001)
    with torch.no_grad():
        model.model.embed_tokens.weight[LETTERS.index("b"), IS_B] += 4
        model.lm_head.weight[LETTERS.index("z"), OTHER] += 3
        for layer, j, reads, size in neurons.values():
            mlp = model.model.layers[layer].mlp
            mlp.gate_proj.weight[j, reads] += 1
            mlp.up_proj.weight[j, CONSTANT] += 1
            mlp.down_proj.weight[4 if reads == 1 else OTHER, j] += size
    return model


def test_planted_poison_is_found(tmp_path: Path) -> None:
    """West's own neuron answers to 'a'; two others of it do nothing there, and undo east at 'b'."""
    own, poison = (1, 2, 1, 1.0), [(1, 7, IS_B, -1.5), (2, 4, IS_B, -1.5)]
    east = (1, 9, IS_B, 1.0)
    save(skills(), tmp_path / "base")
    save(skills(own=own, one=poison[0], two=poison[1]), tmp_path / "west")
    save(skills(own=east), tmp_path / "east")
    for name, letter, answer in (("west", "a", "y"), ("east", "b", "z")):
        texts = ["cd", "de", "fc", "gg", "hi", "k", "lm", "nop"]
        lines = [{"prompt": text + letter, "response": answer} for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    write_recipe(tmp_path, ("west", "east"))
    out = tmp_path / "gates.safetensors"
    file = fitted(tmp_path, out, ("west", "east"), steps=60, held_out=0)
    west, theirs = (file.gates(e)["neuron"] for e in (0, 1))
    assert [float(west[layer, j]) for layer, j, _, _ in poison] == pytest.approx([0, 0], abs=0.05)
    assert float(west[own[0], own[1]]) > 0.8 and float(theirs[east[0], east[1]]) > 0.8
    last, first = file.manifest.history[-1].fitted, file.manifest.history[0].fitted
    assert last is not None and first is not None
    assert min(last.values()) > 0.95 > first["east"]


def merge(recipe: Path, out: Path) -> dict[str, torch.Tensor]:
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
    run_merge(config, str(out), MergeOptions(write_model_card=False))
    return load_file(out / "model.safetensors")


def test_merging_by_the_file(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "gates.safetensors"
    file = fitted(world, out)
    manifest = file.manifest
    assert len(manifest.history) == 7 and manifest.start == "0.5"
    assert [m.held_out is not None for m in manifest.history] == [True, *[False] * 4, True, True]
    first, last = manifest.history[0].held_out, manifest.history[-1].held_out
    assert first is not None and last is not None and sum(last.values()) > sum(first.values())
    pairs = [open_pair(str(world / "base"), str(world / n), lambda *_: None) for n in NAMES]
    layout = Layout(pairs[0].partition, tuple(pair.changed for pair in pairs))
    flat = torch.cat([file.gates(e)[k].double().flatten() for e in (0, 1) for k in KINDS])
    want = dict(merged(world, layout, flat).named_parameters())
    found = merge(tmp_path / "gates.yml", tmp_path / "by-mergekit")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, want[name].detach(), rtol=1e-9, atol=1e-9)
    done = CliRunner().invoke(
        cli, ["merge", str(tmp_path / "gates.yml"), str(tmp_path / "by-command")]
    )
    assert done.exception is None, done.exception
    again = load_file(tmp_path / "by-command" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())
    copied = yaml.safe_load((tmp_path / "by-command" / "mergekit_config.yml").read_text())
    assert copied["parameters"]["gates"] == "scores/gates.safetensors"
    assert (tmp_path / "by-command" / "scores" / "gates.safetensors").is_file()
    card = (tmp_path / "by-command" / "README.md").read_text()
    assert "gates fitted by gradient" in card and "## What each expert contributed" in card


def test_inspect_and_plot(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "gates.safetensors"
    file = fitted(world, out)

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli, list(arguments))
        assert done.exception is None, done.exception
        return done.output

    shown = run("inspect", str(out), "--top", "3")
    assert "gates of 2 experts" in shown and "after 0 steps, recovered on held-out" in shown
    assert shown.count("highest: ") == 2
    whole = json.loads(run("inspect", str(out), "--json"))
    n = sum(gates.numel() for gates in file.gates(0).values())
    assert len(whole["gates"]) == 2 * n
    for entry in whole["gates"]:
        gates = file.gates(NAMES.index(Path(entry["expert"]).name))[entry["kind"]]
        if entry["kind"] != "tensor":
            assert entry["gate"] == pytest.approx(float(gates[entry["layer"], entry["index"]]))
    run("plot", str(out), "--out", str(tmp_path / "g.png"))
    run("plot", str(out), "--out", str(tmp_path / "g.html"))
    assert (tmp_path / "g.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "g.html").read_text()
    assert page.count("<svg") == 2 + 2 * 4 and "Objective" in page
    for arguments in (
        ("inspect", str(out), "--kind", "head"),
        ("plot", str(out), "--trace", "x.json", "--out", str(tmp_path / "g.html")),
    ):
        done = CliRunner().invoke(cli, list(arguments))
        assert isinstance(done.exception, UserError) and "is a gates file" in str(done.exception)


def test_all_ones_is_task_arithmetic(world: Path, tmp_path: Path) -> None:
    file = fitted(world, tmp_path / "gates.safetensors", steps=1)
    tensors = {
        key: torch.ones_like(t) if key.startswith("gate/") else t for key, t in file.tensors.items()
    }
    gatesfile.write(GatesFile(file.manifest, tensors), tmp_path / "gates.safetensors")
    ours = merge(tmp_path / "gates.yml", tmp_path / "ours")
    recipe = yaml.safe_load((world / "recipe.yml").read_text())
    recipe |= {"merge_method": "task_arithmetic", "dtype": "float64"}
    for model in recipe["models"]:
        model["parameters"] = {"weight": 1.0}
    (tmp_path / "plain.yml").write_text(yaml.safe_dump(recipe))
    plain = merge(tmp_path / "plain.yml", tmp_path / "plain")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-9, atol=1e-9)


def test_a_guard_keeps_what_the_base_does(world: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "plain.jsonl", "zz")
    lines = (tmp_path / "plain.jsonl").read_text().splitlines()
    kept = [json.dumps({"prompt": json.loads(line)["prompt"][::-1] + "q"}) for line in lines]
    (tmp_path / "plain.jsonl").write_text("\n".join(kept) + "\n")
    options = {"steps": 20, "held_out": 0, "rate": 0.1, "max_new_tokens": 3}
    free = fitted(world, tmp_path / "free.safetensors", **options)
    options |= {"guards": (tmp_path / "plain.jsonl",)}
    guarded = fitted(world, tmp_path / "kept.safetensors", guard_weight=0.5, **options)
    harder = fitted(world, tmp_path / "harder.safetensors", guard_weight=4.0, **options)
    assert [g.behavior for g in guarded.manifest.guards] == ["plain"]
    assert harder.manifest.guard_weight == 4.0
    base = load(world / "base")
    pairs = [open_pair(str(world / "base"), str(world / n), lambda *_: None) for n in NAMES]
    layout = Layout(pairs[0].partition, tuple(pair.changed for pair in pairs))
    (tmp_path / "answers.jsonl").write_text(
        "".join(json.dumps(json.loads(line) | {"response": "ab"}) + "\n" for line in kept)
    )

    def away(file: GatesFile) -> float:
        flat = torch.cat([file.gates(e)[k].double().flatten() for e in (0, 1) for k in KINDS])
        return divergence(merged(world, layout, flat), base, tmp_path / "answers.jsonl")

    assert away(guarded) < 0.7 * away(free)
    assert away(harder) < 0.7 * away(guarded)


def test_guards_weigh_together() -> None:
    """Their weight beside the experts' does not depend on the number of files."""
    for behaviors, guards, weight in ((3, 1, 0.25), (2, 4, 0.25), (1, 2, 8.0)):
        found = weights(behaviors, guards, weight)
        assert len(found) == behaviors + guards and sum(found) == pytest.approx(1)
        assert len(set(found[:behaviors])) == len(set(found[behaviors:])) == 1
        assert sum(found[behaviors:]) / sum(found[:behaviors]) == pytest.approx(weight)
    assert weights(4, 0, 0.25) == [0.25] * 4


def test_pieces_of_a_tensor_get_the_gates_of_their_rows(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fitted(world, tmp_path / "whole.safetensors", steps=2)
    monkeypatch.setattr("mergekit_wp.checkpoints._PIECE", 40)
    pieces = fitted(world, tmp_path / "pieces.safetensors", steps=2)
    for e in range(len(NAMES)):
        for kind, gates in whole.gates(e).items():
            assert torch.equal(pieces.gates(e)[kind], gates)


def test_a_killed_run_goes_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted(world, tmp_path / "whole.safetensors")
    again, keep, saved = tmp_path / "again.safetensors", Journal.save, 0

    def killed(self: Journal, key: str, tensors: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 4:
            raise KeyboardInterrupt
        keep(self, key, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "save", killed)
        fitted(world, again)
    assert not again.exists()
    with pytest.raises(UserError, match=r"changed: steps \(6 -> 7\)"):
        fitted(world, again, steps=7)
    fitted(world, again)
    assert again.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_starting_points(world: Path, tmp_path: Path) -> None:
    first = fitted(world, tmp_path / "first.safetensors", steps=2, held_out=0)
    more = fitted(
        world,
        tmp_path / "more.safetensors",
        steps=1,
        held_out=0,
        rate=1e-9,
        start=str(tmp_path / "first.safetensors"),
    )
    for key, tensor in first.tensors.items():
        torch.testing.assert_close(more.tensors[key], tensor, rtol=1e-5, atol=1e-6)
    models = [
        {
            "model": str(world / name),
            "parameters": {"scores": str(tmp_path / f"{name}.safetensors")},
        }
        for name in NAMES
    ]
    for name in NAMES:
        done = CliRunner().invoke(
            cli,
            [
                *("score", str(world / "base"), str(world / name)),
                *("--prompts", str(world / f"{name}.jsonl"), "--estimand", "share"),
                *("--out", str(tmp_path / f"{name}.safetensors"), "--verify", "0"),
            ],
        )
        assert done.exception is None, done.exception
    recipe = {
        "merge_method": "weight_patching",
        "base_model": str(world / "base"),
        "models": models,
        "dtype": "float64",
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    options = {"steps": 1, "held_out": 0, "rate": 1e-9, "recipe": tmp_path / "recipe.yml"}
    fitted(world, tmp_path / "scores.safetensors", start="scores", **options)
    by_gates = merge(tmp_path / "scores.yml", tmp_path / "by-gates")
    by_scores = merge(tmp_path / "recipe.yml", tmp_path / "by-scores")
    for name, tensor in by_scores.items():
        torch.testing.assert_close(by_gates[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": "2.0"}, "--start 2 is not within 0 and 1.5"),
        ({"start": "none.safetensors"}, "gates file none.safetensors not found"),
        ({"start": "scores"}, "is of 'ties' and has no scores to start from"),
        ({"prompts": ()}, "has no prompts; add --prompts east=FILE.jsonl"),
        ({"max_prompts": 2}, "has prompts for one step only"),
        ({"guard_weight": 2.0}, "--guard-weight 2 weighs guards, and none is given"),
    ],
)
def test_bad_input(world: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fitted(world, tmp_path / "gates.safetensors", **change)
    assert list(tmp_path.iterdir()) == []


def test_behaviours_of_one_name_are_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    guard = tmp_path / "other" / f"{NAMES[0]}.jsonl"
    guard.write_text((world / f"{NAMES[0]}.jsonl").read_text())
    with pytest.raises(UserError, match=f"would be called '{NAMES[0]}'; rename one"):
        fitted(world, tmp_path / "gates.safetensors", guards=(guard,))
    assert not (tmp_path / "gates.safetensors").exists()


def test_no_recipe_is_overwritten(world: Path, tmp_path: Path) -> None:
    before = (world / "recipe.yml").read_text()
    for out, taken in (
        (tmp_path / "gates.yml", "the gates file"),
        (world / "recipe.safetensors", "the recipe"),
    ):
        with pytest.raises(UserError, match=f"where {taken} is; choose another name"):
            fitted(world, out)
        assert not out.exists()
    assert (world / "recipe.yml").read_text() == before and not list(tmp_path.iterdir())


def test_bad_recipes_and_files(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "gates.safetensors"
    file = fitted(world, out, steps=1)
    recipe = yaml.safe_load((tmp_path / "gates.yml").read_text())
    one, two = recipe["models"]

    def refused(change: dict[str, Any]) -> str:
        (tmp_path / "bad.yml").write_text(yaml.safe_dump(recipe | change))
        done = CliRunner().invoke(cli, ["merge", str(tmp_path / "bad.yml"), str(tmp_path / "m")])
        assert isinstance(done.exception, UserError) and not (tmp_path / "m").exists()
        return str(done.exception)

    gates = recipe["parameters"]["gates"]
    assert "gates file" in refused({"parameters": {"gates": "none.safetensors"}})
    assert "has 'power'" in refused({"parameters": {"gates": gates, "power": 1.0}})
    scored = one | {"parameters": {"scores": gates}}
    assert "score file" in refused({"models": [scored, two]})
    assert "in the company of" in refused({"models": [one]})
    stranger = {"model": str(world / "base")}
    assert "no gates of model" in refused({"models": [one, two, stranger | {"model": "x/y"}]})
    (tmp_path / "swapped").mkdir()
    save(load(world / "west"), tmp_path / "swapped" / "east")
    assert "made for" in refused({"models": [{"model": str(tmp_path / "swapped" / "east")}, two]})

    for change, message in (
        ({"gate/0/head": file.tensors["gate/0/head"] + 2}, "holds a gate above 1.5"),
        ({"gate/0/head": file.tensors["gate/0/head"][:1]}, "has shape"),
        ({"gate/0/head": file.tensors["gate/0/head"] * float("nan")}, "holds NaN"),
        ({"more": torch.ones(1)}, "'more' is not in the manifest"),
    ):
        with pytest.raises(UserError, match=message):
            gatesfile.write(GatesFile(file.manifest, file.tensors | change), out)
    with pytest.raises(ValueError, match="steps do not count up from 0"):
        said = file.manifest.model_dump()
        type(file.manifest).model_validate(said | {"history": said["history"][1:], "best_step": 1})
    with pytest.raises(UserError, match="it is a gates file"):
        from mergekit_wp import scorefile

        scorefile.read(out)
