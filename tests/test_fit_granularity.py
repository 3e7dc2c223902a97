"""Gates finer than components: against finite differences, masks and merges written out."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

import mergekit_wp as wp
from benchmarks.components import fine_components, slices
from mergekit_wp.cli import cli
from mergekit_wp.components import Partition, gate_layouts
from mergekit_wp.criteria import Targets
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.integrated_gradients import TaskVector
from mergekit_wp.engine.slopes import Term, slopes
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.joint.ascent import Fitting
from mergekit_wp.joint.gates import Layout
from mergekit_wp.joint.judging import PromptSplit
from mergekit_wp.joint.merged_model import MergedModel, mix
from mergekit_wp.joint.objective import Objective
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.models.pair import open_pair
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import batches
from mergekit_wp.runs.journal import Unwritten
from mergekit_wp.runs.references import logprobs
from mergekit_wp.terms import FINE_KINDS, GateGranularity
from tests.fitting import divergence, fitted, load, merge, sequences
from tests.gating import Gates
from tests.joint_world import NAMES, make_world, write_task
from tests.models import FAMILIES, make_model, perturbed, save
from tests.test_scoring import Quiet

torch.set_num_threads(1)
#: families that cut tensors each in a way of its own
CUTS = ("llama-tied", "phi3", "gpt_neox", "gpt2", "mixtral")
FINER: tuple[GateGranularity, ...] = get_args(GateGranularity)[1:]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world("qwen2", tmp_path_factory.mktemp("granularity"))


@pytest.fixture(scope="module", params=FINER)
def fit_of(request: pytest.FixtureRequest, world: Path) -> tuple[Path, Gates]:
    """A fit of every granularity."""
    folder = world / f"fit-{request.param}"
    return folder, fitted(world, folder, granularity=request.param, steps=3, held_out=0)


def axes_of(partition: Partition, name: str, granularity: str) -> list[tuple[int, ...]]:
    """Dimensions along which a tensor's gates lie, written out."""
    architecture, shape = partition.dims.architecture, partition.shapes[name]
    place = architecture.within_layer(name)
    cut = architecture.cuts.get(place[1]) if place else None
    channels = cut.dims if cut else (len(shape) - 1,)
    words = any(part in name for part in ("embed_tokens", "embed_in", "wte", "lm_head"))
    if granularity == "slice":
        return [cut.dims if cut else ()]
    if granularity == "channel" or len(shape) == 1 or words:
        return [channels]
    return [(0,), (1,)] if len(shape) == 2 else [(0, 1), (0, 2)]


def masks_of(partition: Partition, name: str, granularity: str) -> torch.Tensor:
    """Which weights each gate of a tensor covers, ``[gates, ...]``, entry by entry."""
    shape, found = partition.shapes[name], []
    for axes in axes_of(partition, name, granularity):
        entries = []
        for at in itertools.product(*(range(shape[d]) for d in axes)):
            mask = torch.zeros(shape, dtype=torch.float64)
            where = dict(zip(axes, at, strict=True))
            mask[tuple(where.get(d, slice(None)) for d in range(len(shape)))] = 1
            entries.append(mask)
        block = partition.layouts[name].block(shape) if granularity == "slice" else 1
        found += [sum(entries[i : i + block]) for i in range(0, len(entries), block)]
    return torch.stack(found)  # type: ignore[arg-type]


def gate_of_weights(partition: Partition, granularity: str, flat: torch.Tensor) -> dict[str, Any]:
    """The gate of every weight."""
    found, start = {}, 0
    for name in partition.tensor_names:
        masks = masks_of(partition, name, granularity)
        own = flat[start : start + len(masks)].double()
        found[name] = torch.tensordot(own, masks, 1)
        start += len(masks)
    assert start == len(flat)
    return found


@pytest.mark.parametrize(
    "family",
    [
        family if family in CUTS else pytest.param(family, marks=pytest.mark.slow)
        for family in ("llama-tied", "qwen3", *FAMILIES)
    ],
)
def test_slopes_equal_finite_differences(tmp_path: Path, family: str) -> None:
    base = make_model(family)
    save(base, tmp_path / "base")
    save(perturbed(base), tmp_path / "expert")
    write_task(tmp_path / "task.jsonl", "abc")
    pair = open_pair(str(tmp_path / "base"), str(tmp_path / "expert"), lambda *_: None)
    partition = pair.partition
    resident = ResidentModel(pair, torch.float64, "cpu")
    resident.move_to(0.4)
    decoder, expert = Decoder(resident.model), load(tmp_path / "expert")
    [batch] = batches(sequences(tmp_path / "task.jsonl"), 9, "cpu")
    term = Term(batch, Targets(logprobs(Decoder(expert), batch)), 1.0)
    vector = TaskVector(lambda name: pair.delta(name, torch.float64, "cpu"), pair.changed)
    _, [[by_component]] = slopes(decoder, [term], partition.layouts, [vector])
    model = load(tmp_path / "base")
    weights = dict(model.named_parameters())
    start = {name: w.detach().clone() for name, w in resident.model.named_parameters()}
    delta = {name: vector.delta_of(name) for name in partition.tensor_names}

    @torch.no_grad()
    def value(step: dict[str, torch.Tensor], sign: int) -> float:
        for name, w in weights.items():
            w.copy_(start[name] + sign * 3e-4 * step[name] * delta[name])
        return -batch.size * divergence(model, expert, tmp_path / "task.jsonl")

    torch.manual_seed(0)
    for granularity in FINER:
        layouts = gate_layouts(partition.dims, partition.shapes, granularity)
        _, [[found]] = slopes(decoder, [term], layouts, [vector])
        assert found.keys() == by_component.keys() and len(found) > 12
        steps = {name: torch.randn(layouts[name].count).double() for name in layouts}
        masks = {name: masks_of(partition, name, granularity) for name in layouts}
        assert {name: len(own) for name, own in masks.items()} == {
            name: layout.count for name, layout in layouts.items()
        }
        moved = {name: torch.tensordot(steps[name], masks[name], 1) for name in layouts}
        for name, own in layouts.items():
            shape = partition.shapes[name]
            spread = sum(own.spread(steps[name][None], shape), torch.zeros(()))
            torch.testing.assert_close(spread[0].expand(shape), moved[name])
        want = (value(moved, 1) - value(moved, -1)) / 6e-4
        have = sum(float(found[name] @ steps[name]) for name in found)
        assert have == pytest.approx(want, rel=3e-3, abs=1e-4) and abs(want) > 5e-4
        for name, own in by_component.items():
            twice = 2 if len(axes_of(partition, name, granularity)) == 2 else 1
            assert float(found[name].sum()) == pytest.approx(twice * float(own.sum()), abs=1e-9)
            if twice == 1:  # each gate lies within one component
                parts = [slices_in(partition, name, i) for i in range(len(own))]
                sums = torch.stack([found[name][inside(masks[name], p)].sum() for p in parts])
                torch.testing.assert_close(sums, own, rtol=1e-7, atol=1e-9)


def slices_in(partition: Partition, name: str, i: int) -> torch.Tensor:
    """The weights of a tensor's i-th component as a mask."""
    one = torch.eye(partition.layouts[name].count, dtype=torch.float64)[i]
    shape = partition.shapes[name]
    return partition.layouts[name].expand(one, shape).expand(shape)


def inside(masks: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Which gates lie within a part."""
    return (masks * part).flatten(1).sum(1) > 0


def reference(world: Path, files: Gates, names: tuple[str, ...] = NAMES) -> dict[str, torch.Tensor]:
    """The merge by its definition: base + sum of gate times difference, weight by weight."""
    granularity = files.fit.granularity
    base = load(world / "base").state_dict()
    partition = open_pair(str(world / "base"), str(world / names[0]), lambda *_: None).partition
    merged = {name: base[name].clone() for name in partition.tensor_names}
    for name, file in zip(names, files.files, strict=True):
        theirs = load(world / name).state_dict()
        gates = gate_of_weights(partition, granularity, file.tensors[f"path/kl/{granularity}"])
        for tensor, gate in gates.items():
            merged[tensor] += gate * (theirs[tensor] - base[tensor])
    return merged


def test_merging_by_the_file(world: Path, fit_of: tuple[Path, Gates], tmp_path: Path) -> None:
    folder, files = fit_of
    want = reference(world, files)
    found = merge(folder / "recipe.yml", tmp_path / "merged")
    assert found.keys() == want.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-9, atol=1e-9)
    states = {name: load_file(world / name / "model.safetensors") for name in ("base", *NAMES)}
    scores = {name: wp.load_scores(folder / f"{name}.safetensors") for name in NAMES}
    fused = wp.fuse(states.pop("base"), states, scores, fusion="path")
    assert all(torch.equal(fused[name], tensor) for name, tensor in found.items())


def test_lambda_and_weight_scale_the_gates(
    world: Path, fit_of: tuple[Path, Gates], tmp_path: Path
) -> None:
    folder, files = fit_of
    recipe = yaml.safe_load((folder / "recipe.yml").read_text())
    recipe["parameters"]["lambda"] = 0.5
    recipe["models"][1]["parameters"]["weight"] = 0.0
    (folder / "half.yml").write_text(yaml.safe_dump(recipe))
    base = load(world / "base").state_dict()
    alone = reference(world, Gates(files.files[:1]), NAMES[:1])
    for name, tensor in merge(folder / "half.yml", tmp_path / "merged").items():
        want = base[name] + (alone[name] - base[name]) / 2
        torch.testing.assert_close(tensor, want, rtol=1e-9, atol=1e-9)


def test_the_model_in_memory_is_the_merge(
    world: Path, fit_of: tuple[Path, Gates], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, files = fit_of
    want = reference(world, files)
    monkeypatch.setattr("mergekit_wp.models.checkpoint._PIECE", 40)
    pairs = [open_pair(str(world / "base"), str(world / n), lambda *_: None) for n in NAMES]
    layout = Layout(pairs[0].partition, tuple(p.changed for p in pairs), files.fit.granularity)
    resident = ResidentModel(pairs[0], torch.float64, "cpu")
    gates = [f.tensors[f"path/kl/{layout.granularity}"].double() for f in files.files]
    mix(resident, pairs, layout, torch.cat(gates))
    for name, weight in resident.model.named_parameters():
        torch.testing.assert_close(weight.detach(), want[name], rtol=1e-9, atol=1e-9)


def test_components_have_the_mean_of_their_gates(world: Path, fit_of: tuple[Path, Gates]) -> None:
    _, files = fit_of
    pair = open_pair(str(world / "base"), str(world / NAMES[0]), lambda *_: None)
    partition, file = pair.partition, files.files[0]
    flat = file.tensors[f"path/kl/{files.fit.granularity}"]
    gates = gate_of_weights(partition, files.fit.granularity, flat)
    for component in fine_components(partition):
        parts = [
            gates[name][at].flatten()
            for name, at in slices(partition, component).items()
            if name in pair.changed
        ]
        want = float(torch.cat(parts).mean()) if parts else 0.0
        of_kind = files.gates(0)[component.kind]
        i: Any = (component.layer, component.index)
        if component.kind == "tensor":
            i = partition.whole_tensors.index(component.name)
        assert float(of_kind[i]) == pytest.approx(want, abs=1e-6), component
    tensors = file.scores("path", "kl", "tensor")
    for name, found in zip(partition.tensor_names, tensors, strict=True):
        assert float(found) == pytest.approx(float(gates[name].mean()), abs=1e-6)


def test_tensors_and_layers_have_the_mean_of_their_components(world: Path, tmp_path: Path) -> None:
    files = fitted(world, tmp_path / "fit", steps=3)
    partition = open_pair(str(world / "base"), str(world / NAMES[0]), lambda *_: None).partition
    parts: dict[str | int | None, list[float]] = defaultdict(list)
    for component in fine_components(partition):
        i: Any = (component.layer, component.index)
        if component.kind == "tensor":
            i = partition.whole_tensors.index(component.name)
        gate = float(files.gates(0)[component.kind][i])
        for place in (*slices(partition, component), component.layer):
            parts[place].append(gate)
    assert len(set(parts[0])) > 3
    for kind, places in (
        ("tensor", partition.tensor_names),
        ("layer", range(partition.dims.n_layers)),
    ):
        found = files.files[0].scores("path", "kl", kind).tolist()
        assert found == pytest.approx([mean(parts[place]) for place in places], abs=1e-6)


@pytest.mark.parametrize(
    "granularity",
    ["component", "slice", "channel", pytest.param("row_column", marks=pytest.mark.slow)],
)
def test_half_of_a_neuron_helps_and_half_harms(
    world: Path, tmp_path: Path, granularity: GateGranularity
) -> None:
    """The expert changed one neuron's input and output; the behaviour wants only the output."""
    base, want, expert = (load(world / "base") for _ in range(3))
    up, down = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    torch.manual_seed(3)
    change_in, change_out = torch.randn(16).double(), torch.randn(16).double()
    with torch.no_grad():
        for model in (want, expert):
            model.get_parameter(down)[:, 1] += 2 * change_out
        expert.get_parameter(up)[1] += 2 * change_in
    save(expert, tmp_path / "expert")
    pair = open_pair(str(world / "base"), str(tmp_path / "expert"), lambda *_: None)
    assert pair.changed == {up, down}
    task = world / f"{NAMES[0]}.jsonl"
    every = list(batches(sequences(task), 9, "cpu"))
    targets = [Targets(logprobs(Decoder(want), batch)) for batch in every]
    apart = divergence(base, want, task)
    options: dict[str, Any] = {"granularity": granularity, "held_out": 0, "shrinkage": 0}
    request = FitRequest(recipe=world, prompts=(), dtype="float64", prompts_a_step=9, **options)
    layout = Layout(pair.partition, (pair.changed,), granularity)
    resident = ResidentModel(pair, torch.float64, "cpu")
    model = MergedModel(resident, [pair], layout, AtOnce(9, print), 1)
    objective = Objective("east", every, targets, apart, PromptSplit.of(9, 0, 0))
    with Unwritten() as journal:
        fitting = Fitting(request, model, [objective], [], layout, journal, Quiet())
        state = fitting.run(0.5 * layout.share)
    recovered = 1 - float(state.seen[state.judge.step, 1, 0, 0]) / apart
    assert recovered < 0.8 if granularity == "component" else recovered > 0.97


def test_gates_of_one_granularity_start_a_fit_of_another(world: Path) -> None:
    pairs = [open_pair(str(world / "base"), str(world / n), lambda *_: None) for n in NAMES]
    partition, changed = pairs[0].partition, tuple(pair.changed for pair in pairs)
    every = {g: Layout(partition, changed, g) for g in get_args(GateGranularity)}
    torch.manual_seed(0)

    def given(layout: Layout, flat: torch.Tensor) -> list[dict[str, Any]]:
        return [
            {name: (own, layout.of_tensor(gates, name)) for name, own in layout.layouts.items()}
            for gates in layout.unflat(flat)
        ]

    def weights(layout: Layout, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        [gates, _] = layout.unflat(flat)
        return {
            name: sum(own.spread(layout.of_tensor(gates, name)[None], partition.shapes[name]))[
                0
            ].expand(partition.shapes[name])  # type: ignore[index]
            for name, own in layout.layouts.items()
        }

    for layout in every.values():  # a start of 1 is the experts' sum
        assert all(torch.all(part == 1) for part in weights(layout, layout.share).values())
    for coarse, finer in itertools.combinations(get_args(GateGranularity), 2):
        flat = torch.rand(every[coarse].size, dtype=torch.float64)
        spread = every[finer].taking(given(every[coarse], flat))
        assert spread.min() >= 0
        one, two = weights(every[coarse], flat), weights(every[finer], spread)
        for name in partition.tensor_names:
            torch.testing.assert_close(one[name], two[name], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(every[coarse].taking(given(every[finer], spread)), flat)
    same = every["row_column"].taking(given(every["row_column"], spread))
    assert torch.equal(same, spread)


def test_a_fit_goes_on_from_a_file(world: Path, tmp_path: Path) -> None:
    first = fitted(world, tmp_path / "one", granularity="channel", steps=3, held_out=0)
    options: dict[str, Any] = {
        "recipe": tmp_path / "one" / "recipe.yml",
        "start": "scores",
        "rate": 1e-12,
    }
    options |= {"steps": 1, "held_out": 0, "shrinkage": 0}
    for granularity in ("channel", "row_column"):
        again = fitted(world, tmp_path / granularity, granularity=granularity, **options)
        one, two = reference(world, first), reference(world, again)
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_fit_goes_on_where_files_name_tensors_otherwise(tmp_path: Path) -> None:
    """GPT-NeoX's head is `embed_out.weight` in its files, and `lm_head.weight` in the model."""
    world = make_world("gpt_neox", tmp_path)
    options: dict[str, Any] = {"granularity": "channel", "held_out": 0, "shrinkage": 0}
    first = fitted(world, tmp_path / "one", steps=3, **options)
    options |= {"recipe": tmp_path / "one" / "recipe.yml", "start": "scores", "rate": 1e-12}
    again = fitted(world, tmp_path / "two", steps=1, **options)
    for key, tensor in first.tensors.items():
        torch.testing.assert_close(again.tensors[key], tensor, rtol=1e-5, atol=1e-6)


def test_a_recipe_may_ask_for_tensors(world: Path, fit_of: tuple[Path, Gates]) -> None:
    folder, files = fit_of
    states = {name: load_file(world / name / "model.safetensors") for name in ("base", *NAMES)}
    base = states.pop("base")
    scores = {name: wp.load_scores(folder / f"{name}.safetensors") for name in NAMES}
    fused = wp.fuse(base, states, scores, fusion="path", granularity="tensor")
    for i, name in enumerate(files.manifest.tensor_names):
        want = base[name].clone()
        for state, file in zip(states.values(), files.files, strict=True):
            want += float(file.scores("path", "kl", "tensor")[i]) * (state[name] - base[name])
        torch.testing.assert_close(fused[name], want, rtol=1e-9, atol=1e-9)
    with pytest.raises(UserError, match="has no 'share/kl' scores"):
        wp.fuse(base, states, scores, fusion="share")
    half = wp.fuse(base, states, scores, fusion="path", density=0.5)
    assert any(not torch.equal(half[n], fused[n]) for n in half)


def test_files_that_do_not_fit(fit_of: tuple[Path, Gates], tmp_path: Path) -> None:
    _, files = fit_of
    file, key = files.files[0], f"path/kl/{files.fit.granularity}"
    shapes = file.manifest.tensor_shapes
    assert shapes is not None
    again = scorefile.read(tmp_path / write(file, tmp_path))
    assert again.manifest == file.manifest
    assert all(torch.equal(again.tensors[k], t) for k, t in file.tensors.items())

    def refused(match: str, gates: torch.Tensor | None = None, **said: Any) -> None:
        tensors = file.tensors | ({} if gates is None else {key: gates})
        with pytest.raises((UserError, ValueError), match=match):
            manifest = type(file.manifest).model_validate(file.manifest.model_dump() | said)
            scorefile.check(ScoreFile(manifest, tensors))

    own = file.tensors[key]
    refused("has shape", own[:-1])
    refused("NaN", torch.full_like(own, math.nan))
    refused("not within 0 and 1.5", own + 2)
    refused("not within 0 and 1.5", own - 2)
    refused("belong together", tensor_shapes=None)
    refused("not as long", tensor_shapes=shapes[1:])
    q = file.manifest.tensor_names.index("model.layers.0.self_attn.q_proj.weight")
    refused("not a multiple", tensor_shapes=(*shapes[:q], (7, 16), *shapes[q + 1 :]))
    refused("no dimension", tensor_shapes=(*shapes[:q], (), *shapes[q + 1 :]))
    assert file.manifest.fit is not None
    coarse = file.manifest.fit.model_copy(update={"granularity": "component"})
    refused("belong together", fit=coarse.model_dump())
    missing = {k: t for k, t in file.tensors.items() if k != key}
    with pytest.raises(UserError, match=f"'{key}' is missing"):
        scorefile.check(replace(file, tensors=missing))


def write(file: ScoreFile, folder: Path) -> str:
    scorefile.write(file, folder / "again.safetensors")
    return "again.safetensors"


def test_gates_of_other_shapes_and_granularities_are_refused(world: Path, tmp_path: Path) -> None:
    fits = {
        g: fitted(world, tmp_path / g, granularity=g, steps=1, held_out=0)
        for g in ("slice", "channel")
    }
    states = {name: load_file(world / name / "model.safetensors") for name in ("base", *NAMES)}
    base = states.pop("base")
    company = fits["channel"].manifest.company
    other = fits["slice"].files[1]
    mixed = {
        NAMES[0]: wp.load_scores(tmp_path / "channel" / f"{NAMES[0]}.safetensors"),
        NAMES[1]: type(wp.load_scores(tmp_path / "slice" / f"{NAMES[1]}.safetensors"))(
            replace(other, manifest=other.manifest.model_copy(update={"company": company}))
        ),
    }
    with pytest.raises(UserError, match="granularities"):
        wp.fuse(base, states, mixed, fusion="path")
    layout = fits["channel"].files[0].gate_layouts["model.embed_tokens.weight"]
    with pytest.raises(UserError, match="its gates were fitted for"):
        layout.spread(torch.zeros(1, layout.count), (5, 3))


def test_finer_gates_are_shown_by_component(fit_of: tuple[Path, Gates]) -> None:
    folder, files = fit_of
    scores = wp.load_scores(folder / f"{NAMES[0]}.safetensors")
    assert {row.kind for row in scores.top(1000)} == set(FINE_KINDS)
    assert set(scores.frame().kind) <= {"layer", *FINE_KINDS}
    assert files.manifest.kinds == ("layer", "tensor", *FINE_KINDS[:3])
    assert scores.plot().png.startswith(b"\x89PNG")
    done = CliRunner().invoke(cli, ["inspect", str(folder / f"{NAMES[0]}.safetensors")])
    called = files.fit.granularity.replace("_", " and ")
    assert done.exception is None and f"gates by {called}, from 0.5" in done.output
