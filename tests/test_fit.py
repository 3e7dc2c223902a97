"""Fitting gates: planted truth, guards, starting points, resuming, merges by the files."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from mergekit_wp.cli import cli
from mergekit_wp.comparison.making import cost_of
from mergekit_wp.errors import UserError, option
from mergekit_wp.files import scorefile
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.joint import judging
from mergekit_wp.joint.fit import a_step, warnings
from mergekit_wp.joint.judging import PromptSplit
from mergekit_wp.merging.recipe import read as read_recipe
from mergekit_wp.runs.journal import Journal
from mergekit_wp.runs.texts import encode_texts
from mergekit_wp.tasks.behaviors import plain_text
from mergekit_wp.terms import FINE_KINDS, SLICED_KINDS
from tests.circuit import CONSTANT, build
from tests.fitting import divergence, fitted, layout_of, load, merge, merged
from tests.gating import Gates
from tests.joint_world import NAMES, make_world, write_recipe, write_task
from tests.models import EOS, LETTERS, save
from tests.test_scoring import Quiet

torch.set_num_threads(1)


@pytest.fixture(
    scope="module", params=["llama-tied", pytest.param("qwen2", marks=pytest.mark.slow)]
)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(request.param, tmp_path_factory.mktemp("fit"))


def test_the_cost_of_a_fit_is_what_went_through_a_model(world: Path, tmp_path: Path) -> None:
    """Every sequence that comes to an MLP while a fit runs, as `compare` tells it of the files."""
    passed = 0

    def count(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal passed
        if type(module).__name__.endswith("MLP"):
            passed += len(inputs[0])

    guard = tmp_path / "guard.jsonl"
    told = [{"prompt": text, "response": "ab"} for text in ("cc", "dd", "ee", "fa")]
    guard.write_text("".join(json.dumps(line) + "\n" for line in told))
    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        fitted(world, tmp_path / "gates", guards=(guard,))
    finally:
        hook.remove()
    recipe = read_recipe(tmp_path / "gates" / "recipe.yml").config
    assert cost_of(recipe, None).gradient_steps == 6
    layers = scorefile.read(tmp_path / "gates" / "east.safetensors").manifest.n_layers
    causal = 2  # sequences of no prompt, by which attention is looked at once
    assert cost_of(recipe, None).forward_passes == passed / layers - causal


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


def write_skills(root: Path) -> None:
    """Prompts of west ('a' is answered by 'y') and east ('b' by 'z'), and a recipe of both."""
    for name, letter, answer in (("west", "a", "y"), ("east", "b", "z")):
        texts = ["cd", "de", "fc", "gg", "hi", "k", "lm", "nop"]
        lines = [{"prompt": text + letter, "response": answer} for text in texts]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    write_recipe(root, ("west", "east"))


def test_planted_poison_is_found(tmp_path: Path) -> None:
    """West's own neuron answers to 'a'; two others of it do nothing there, and undo east at 'b'."""
    own, poison = (1, 2, 1, 1.0), [(1, 7, IS_B, -1.5), (2, 4, IS_B, -1.5)]
    east = (1, 9, IS_B, 1.0)
    save(skills(), tmp_path / "base")
    save(skills(own=own, one=poison[0], two=poison[1]), tmp_path / "west")
    save(skills(own=east), tmp_path / "east")
    write_skills(tmp_path)
    out = tmp_path / "gates"
    file = fitted(tmp_path, out, ("west", "east"), steps=200)
    west, theirs = (file.gates(e)["neuron"] for e in (0, 1))
    assert max(float(west[layer, j]) for layer, j, _, _ in poison) < 0.2
    assert min(float(west[own[0], own[1]]), float(theirs[east[0], east[1]])) > 0.7
    first = file.fit.history[0].judged
    assert first is not None and first["east"].kl > 20 * file.fit.reached["east"].kl
    assert all(seen.answers == 1 for seen in file.fit.reached.values())


#: a head that changes only in what it writes: two columns of one slice of one component
HEAD, HELPS, HARMS = 1, 8, 9


def with_head(model: PreTrainedModel, helps: float, harms: float) -> PreTrainedModel:
    """One column says 'y' where 'a' was read, the next undoes 'z' where 'b' was."""
    attention = model.model.layers[2].self_attn
    with torch.no_grad():
        attention.v_proj.weight[0, 1] += 1
        attention.v_proj.weight[1, IS_B] += 1
        attention.o_proj.weight[4, HELPS] += helps
        attention.o_proj.weight[OTHER, HARMS] -= harms
    return model


@pytest.mark.parametrize("granularity", ["component", "slice", "channel"])
def test_only_channels_tell_apart_what_one_slice_does(tmp_path: Path, granularity: str) -> None:
    """West's head holds its skill in one column and ruins east's in the next."""
    save(with_head(skills(), 0, 0), tmp_path / "base")
    save(with_head(skills(), 1, 24), tmp_path / "west")
    save(with_head(skills(own=(1, 9, IS_B, 1.0)), 0, 0), tmp_path / "east")
    write_skills(tmp_path)
    out = tmp_path / "gates"
    file = fitted(tmp_path, out, ("west", "east"), steps=60, granularity=granularity)
    kept = {name: seen.answers for name, seen in file.fit.reached.items()}
    column = merge(out / "recipe.yml", tmp_path / "merged")
    written = column["model.layers.2.self_attn.o_proj.weight"]
    if granularity == "channel":
        assert kept == {"west": 1, "east": 1}
        assert written[4, HELPS] > 0.7 and written[OTHER, HARMS] > -2.4
    else:
        assert min(kept.values()) == 0, "one of the two is given up"
        helps, harms = float(written[4, HELPS]), -float(written[OTHER, HARMS]) / 24
        assert helps == pytest.approx(harms, abs=0.02), "one gate for both"


@pytest.mark.parametrize("a_step", [5, 400])
def test_what_is_held_out_is_a_part_of_the_prompts(tmp_path: Path, a_step: int) -> None:
    """Of east's, which are many; west's are few, and less than a step takes."""
    world = make_world("llama-tied", tmp_path)
    words = product(LETTERS[:16], repeat=2)
    lines = [json.dumps({"prompt": "".join(word), "response": "abca"}) + "\n" for word in words]
    (world / "east.jsonl").write_text("".join(lines))
    out = tmp_path / "gates"
    file = fitted(world, out, steps=2, prompts_a_step=a_step, held_out=0.25, seed=3)
    assert file.fit.held_out == {"east": 64, "west": 0} and not file.fit.done
    aside = sorted(PromptSplit.of(256, 0.25, 3).judged)
    (tmp_path / "aside.jsonl").write_text("".join(lines[i] for i in aside))
    _, layout = layout_of(world)
    flat = torch.cat([file.gates(e)[k].double().flatten() for e in (0, 1) for k in FINE_KINDS])
    base, expert = load(world / "base"), load(world / "east")
    naive = divergence(merged(world, layout, flat), expert, tmp_path / "aside.jsonl")
    assert file.fit.reached["east"].kl == pytest.approx(naive, rel=1e-5)
    recovery = 1 - naive / divergence(base, expert, tmp_path / "aside.jsonl")
    (own, _) = file.files[0].manifest.company or ()
    assert own.recovery == pytest.approx(recovery, rel=1e-4)
    shown = CliRunner().invoke(cli, ["inspect", str(out / "east.safetensors")]).output
    assert "on held-out prompts of east, of the others those" in " ".join(shown.split())


def test_merging_by_the_file(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "gates"
    file = fitted(world, out)
    fit = file.fit
    assert fit.best_step in (0, 6)
    assert len(fit.history) == 7 and fit.start == "0.5"
    assert [m.judged is not None for m in fit.history] == [True, *[False] * 5, True]
    assert [m.fitted is not None for m in fit.history] == [*[True] * 6, False]
    assert fit.held_out == dict.fromkeys(NAMES, 0) and fit.limit is None
    _, layout = layout_of(world)
    flat = torch.cat([file.gates(e)[k].double().flatten() for e in (0, 1) for k in FINE_KINDS])
    want = dict(merged(world, layout, flat).named_parameters())
    found = merge(tmp_path / "gates" / "recipe.yml", tmp_path / "by-mergekit")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, want[name].detach(), rtol=1e-9, atol=1e-9)
    done = CliRunner().invoke(
        cli, ["merge", str(tmp_path / "gates" / "recipe.yml"), str(tmp_path / "by-command")]
    )
    assert done.exception is None, done.exception
    again = load_file(tmp_path / "by-command" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())
    copied = yaml.safe_load((tmp_path / "by-command" / "mergekit_config.yml").read_text())
    for name, model in zip(NAMES, copied["models"], strict=True):
        assert model["parameters"]["scores"] == f"scores/{name}.safetensors"
        assert (tmp_path / "by-command" / "scores" / f"{name}.safetensors").is_file()
    card = (tmp_path / "by-command" / "README.md").read_text()
    assert "gates fitted by gradient" in card and "## What each expert contributed" in card


def test_inspect_and_plot(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "gates" / f"{NAMES[0]}.safetensors"
    file = fitted(world, tmp_path / "gates")

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli, list(arguments))
        assert done.exception is None, done.exception
        return done.output

    shown = " ".join(run("inspect", str(out), "--top", "3").split())
    for step in (0, file.fit.best_step):
        values = file.fit.history[step].judged
        assert values is not None
        said = ", ".join(
            f"{name} {values[name].answers:.2f} (tokens {values[name].tokens:.2f})"
            for name in NAMES
        )
        assert f"after {step} steps, reproduced on the prompts it was fitted on: {said}" in shown
    assert "fitted together: " in shown and "gates fitted by gradient" in shown
    whole = json.loads(run("inspect", str(out), "--json"))
    assert whole["manifest"]["fit"] == file.fit.model_dump(mode="json")
    sliced = [x for x in whole["components"] if x["kind"] in SLICED_KINDS]
    assert len(sliced) == sum(file.gates(0)[kind].numel() for kind in SLICED_KINDS)
    for entry in sliced:
        gates = file.gates(0)[entry["kind"]]
        assert entry["score"] == pytest.approx(float(gates[entry["layer"], entry["index"]]))
    run("plot", str(out), "--out", str(tmp_path / "g.png"))
    run("plot", str(out), "--out", str(tmp_path / "g.html"))
    assert (tmp_path / "g.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "g.html").read_text()
    assert "How the fit went" in page and "Answers reproduced by step" in page
    assert "fusion: path" in page


def test_all_ones_is_task_arithmetic(world: Path, tmp_path: Path) -> None:
    file = fitted(world, tmp_path / "gates", steps=1)
    for name, own in zip(NAMES, file.files, strict=True):
        tensors = {
            key: torch.ones_like(t) if key.startswith("path/") else t
            for key, t in own.tensors.items()
        }
        path = tmp_path / "gates" / f"{name}.safetensors"
        scorefile.write(ScoreFile(own.manifest, tensors), path)
    ours = merge(tmp_path / "gates" / "recipe.yml", tmp_path / "ours")
    recipe = yaml.safe_load((world / "recipe.yml").read_text())
    recipe |= {"merge_method": "task_arithmetic", "dtype": "float64"}
    for model in recipe["models"]:
        model["parameters"] = {"weight": 1.0}
    (tmp_path / "plain.yml").write_text(yaml.safe_dump(recipe))
    plain = merge(tmp_path / "plain.yml", tmp_path / "plain")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-9, atol=1e-9)


#: of what one family shows as well as two
ONE_FAMILY = pytest.mark.parametrize(
    "world", ["llama-tied", pytest.param("qwen2", marks=pytest.mark.slow)], indirect=True
)


@ONE_FAMILY
def test_a_limit_is_kept_or_said_to_be_out_of_reach(world: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "plain.jsonl", "zz")
    lines = (tmp_path / "plain.jsonl").read_text().splitlines()
    kept = [json.dumps({"prompt": json.loads(line)["prompt"][::-1] + "q"}) for line in lines]
    (tmp_path / "plain.jsonl").write_text("\n".join(kept) + "\n")
    options: dict[str, Any] = {"steps": 20, "rate": 0.1, "max_new_tokens": 3}
    free = fitted(world, tmp_path / "free", **options)
    options |= {"guards": (tmp_path / "plain.jsonl",)}
    wide = fitted(world, tmp_path / "wide", limit=100.0, **options)
    for key, tensor in free.tensors.items():  # a limit that is never met costs next to nothing
        torch.testing.assert_close(wide.tensors[key], tensor, rtol=0, atol=5e-3)
    assert wide.fit.guards[0].price == 0 and wide.fit.held("plain")
    base: Any = load(world / "base")
    _, layout = layout_of(world)

    def away(file: Gates) -> float:
        """From the base, on its own answers."""
        flat = torch.cat([file.gates(e)[k].double().flatten() for e in (0, 1) for k in FINE_KINDS])
        model, found = merged(world, layout, flat), []
        for line in kept:
            ids = [LETTERS.index(c) for c in json.loads(line)["prompt"]]
            with torch.no_grad():
                whole = base.generate(
                    torch.tensor([ids]), do_sample=False, max_new_tokens=3, eos_token_id=EOS
                )
                want, have = (m(whole).logits[0].log_softmax(-1) for m in (base, model))
            at = slice(len(ids) - 1, -1)
            found.append((want[at].exp() * (want - have)[at]).sum(-1).mean())
        return float(torch.stack(found).mean())

    loose = away(free)
    assert wide.fit.reached["plain"].kl == pytest.approx(loose, rel=5e-3)
    limit = math.exp(loose / 4)
    held = fitted(world, tmp_path / "held", limit=limit, **(options | {"steps": 60}))
    assert held.fit.held("plain") and held.fit.reached["plain"].kl <= 1.1 * loose / 4
    assert away(held) == pytest.approx(held.fit.reached["plain"].kl, rel=1e-4)
    assert held.fit.guards[0].price > 0
    said = Quiet()
    options |= {"steps": 1, "rate": 1e-3, "limit": 1 + 1e-6}
    beyond = fitted(world, tmp_path / "beyond", said=said, **options)
    assert not beyond.fit.held("plain")
    (warning,) = [note for note in said.notes if "warning: plain is at" in note]
    assert "which was not held yet; the fit was not done: give more" in warning
    (ended,) = [
        line
        for line in warnings(beyond.fit.model_copy(update={"done": True}))
        if "plain is" in line
    ]
    assert "which was out of reach; give a larger" in ended
    assert "warning: plain is at" in warning and warning.endswith(f"a larger {option('limit')}")
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "beyond" / "east.safetensors")])
    assert "limit 1, not held yet; answers" in " ".join(shown.output.split())


def test_a_behaviour_that_falls_short_is_a_warning(world: Path, tmp_path: Path) -> None:
    said = Quiet()
    file = fitted(world, tmp_path / "short", said=said, steps=1, start="0", rate=1e-3)
    short = {name for name, seen in file.fit.reached.items() if seen.answers < 0.9}
    few, *warned = [note for note in said.notes if note.startswith("warning")]
    assert few.startswith(f"warning: of {', '.join(NAMES)} no prompts are held out (fewer than 64")
    assert short and len(warned) == len(short)
    assert warned[0].startswith(
        "warning: of east only 0.00 of the expert's answers are reproduced whole, and "
        f"{file.fit.reached['east'].tokens:.2f} of their tokens; the fit was not done: give more "
        f"{option('steps')}, and go on from its recipe by `mergekit-wp fit RECIPE` with "
        f"{option('start', 'scores')}. Other words may be right"
    )


def test_where_nothing_more_is_to_gain_no_steps_are_asked_for(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "PATIENCE", (10, 10))
    said = Quiet()
    file = fitted(world, tmp_path / "stuck", said=said, steps=60, start="0", rate=1e-9)
    assert len(file.fit.history) < 60
    warned = [note for note in said.notes if "answers are reproduced whole" in note]
    assert warned and all("give more prompts" in note for note in warned)


@pytest.mark.parametrize(("prompts", "size"), [(2, 4), (16, 4), (32, 8), (64, 16), (2048, 16)])
def test_few_prompts_go_through_in_small_steps(prompts: int, size: int) -> None:
    assert a_step(prompts) == size


def test_nobody_goes_unguarded(world: Path, tmp_path: Path) -> None:
    """Without a guard's file the package's own text is one, read as it stands."""
    file = fitted(world, tmp_path / "gates", unguarded=False, steps=2)
    (guard,) = file.fit.guards
    text = plain_text()
    assert (guard.behavior, guard.n_prompts) == (text.name, len(text.prompts))
    assert guard.prompts_sha256 == text.sha256 and text.name in file.fit.reached
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    tokenizer.chat_template = "{{ messages[0].content }}!"
    encoded = encode_texts(tokenizer, text, Quiet())
    whole = tokenizer(str(text.prompts[0].prompt)).input_ids
    assert encoded.prompts[0] + encoded.responses[0] == whole[: len(encoded.prompts[0]) + 44]


@pytest.fixture
def killed(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a fit was killed in its fourth step."""
    folder, keep, saved = tmp_path / "again", Journal.save, 0

    def save(self: Journal, key: str, tensors: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 4:
            raise KeyboardInterrupt
        keep(self, key, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "save", save)
        fitted(world, folder)
    return folder


def test_a_killed_run_ends_where_it_is_told_to(world: Path, tmp_path: Path, killed: Path) -> None:
    """Three steps were kept: with fewer or as many, what they reached is written."""
    file = fitted(world, killed, steps=2)
    fitted(world, tmp_path / "whole", steps=3)
    assert len(file.fit.history) == 4
    for name in NAMES:  # with the command that repeats it
        one, two = (folder / f"{name}.safetensors" for folder in (killed, tmp_path / "whole"))
        assert one.read_bytes() == two.read_bytes()


def test_a_killed_run_goes_on(world: Path, tmp_path: Path, killed: Path) -> None:
    fitted(world, tmp_path / "whole")
    again = killed
    assert not list(again.glob("*.safetensors"))
    with pytest.raises(UserError, match=r"changed: rate \(0.05 -> 0.1\)"):
        fitted(world, again, rate=0.1)
    fitted(world, again)
    for name in NAMES:
        one, two = (folder / f"{name}.safetensors" for folder in (again, tmp_path / "whole"))
        assert one.read_bytes() == two.read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_starting_points(world: Path, tmp_path: Path) -> None:
    first = fitted(world, tmp_path / "first", steps=2)
    more = fitted(
        world,
        tmp_path / "more",
        steps=1,
        rate=1e-9,
        start="scores",
        recipe=tmp_path / "first" / "recipe.yml",
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
    options: dict[str, Any] = {"steps": 1, "rate": 1e-9, "recipe": tmp_path / "recipe.yml"}
    fitted(world, tmp_path / "scores", start="scores", **options)
    by_gates = merge(tmp_path / "scores" / "recipe.yml", tmp_path / "by-gates")
    by_scores = merge(tmp_path / "recipe.yml", tmp_path / "by-scores")
    for name, tensor in by_scores.items():
        torch.testing.assert_close(by_gates[name], tensor, rtol=1e-6, atol=1e-6)
