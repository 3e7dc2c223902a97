"""Compiled programs, without the compiler: a handful of pairs is kept with what tracr computed."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mergekit_wp as wp
from benchmarks.compiled.bench import measured
from benchmarks.compiled.decoys import with_decoys
from benchmarks.compiled.graph import compiled_edges, compiled_roles
from benchmarks.compiled.methods import METHODS, gradient_times_difference, scores, sizes
from benchmarks.compiled.pairs import Pair
from benchmarks.compiled.rates import auroc, average_precision, interval, precision_at
from benchmarks.compiled.tables import everything
from benchmarks.compiled.truth import difference, swapped, truth
from benchmarks.components import slices

torch.set_num_threads(1)
KEPT = Path("benchmarks/compiled/kept")
FILES = sorted(KEPT.glob("*.safetensors"))


def pair(name: str) -> Pair:
    return Pair.read(KEPT / f"{name}.safetensors")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_converted_model_computes_what_tracr_does(file: Path) -> None:
    """Logits are up to 5, and tracr's own are float32."""
    one = Pair.read(file)
    for who in ("base", "expert"):
        found = one.model(one.states[who])(one.ids).logits
        torch.testing.assert_close(found, one.logits[who].double(), rtol=0, atol=2e-5)
    answers = [one.logits[who][:, 1:].argmax(-1) for who in ("base", "expert")]
    assert not torch.equal(*answers)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("histogram-predicate", lambda row: [row.count(x) for x in row]),
        ("shift-offset", lambda row: [None, *row[:-1]]),
        ("previous_class-vowel", lambda row: [None, *(x in "ac" for x in row[:-1])]),
    ],
)
def test_a_base_computes_its_program(name: str, answer) -> None:
    one = pair(name)
    found = one.model(one.states["base"])(one.ids).logits[:, 1:].argmax(-1)
    for row, outputs in zip(one.about["inputs"], found.tolist(), strict=True):
        said = [one.about["output"][i].rpartition(":")[2] for i in outputs]
        for wanted, value in zip(answer(row), said, strict=True):
            assert wanted is None or str(wanted) == value


@pytest.mark.parametrize(
    ("name", "changed", "of_kind"),
    [
        ("shift-offset", {"layer 0 head 0"}, 0),
        ("histogram-predicate", {"layer 0 head 0"}, 11),
        ("count_less_frequent-first", {"layer 0 head 0"}, 21),
    ],
)
def test_what_carries_a_change_is_the_head_of_the_changed_selector(
    name: str, changed: set[str], of_kind: int
) -> None:
    found = truth(pair(name))
    assert found.changed == found.active == changed
    neurons = {c.name for c in found.live if c.kind == "neuron"} & found.passing
    assert len(neurons) >= of_kind // 2
    assert not found.passing & found.changed
    assert "layer 0 kv_group 0" not in found.passing  # it reads what the tokens are


def test_decoys_change_every_component_and_no_function() -> None:
    for name in ("count_less_frequent-first", "induction-offset", "previous_class-vowel"):
        one = pair(name)
        known = truth(one)
        decoyed = with_decoys(one, known, 0)
        base, expert = one.states["base"], one.states["expert"]
        delta = difference(base, decoyed.states["expert"])
        moved = [
            c
            for c in known.live
            if any(delta[n][i].any() for n, i in slices(one.partition, c).items())
        ]
        assert len(moved) > len(known.changed)
        generator = torch.Generator().manual_seed(0)
        for state, receiver in ((base, base), (expert, expert)):
            some = receiver
            for component in known.live:
                if component.name in known.changed or torch.rand(1, generator=generator) < 0.5:
                    continue
                some = swapped(one, some, component, decoyed.states["expert"])
            found = one.model(some)(one.ids).logits
            torch.testing.assert_close(found, one.model(state)(one.ids).logits, rtol=0, atol=1e-9)


def test_weights_name_the_carrier_and_activations_what_passes_it_on(tmp_path) -> None:
    one = pair("count_less_frequent-first")
    known = truth(one)
    found, sums = scores(with_decoys(one, known, 0), known.live, tmp_path)
    assert set(found) == set(METHODS)
    for method in ("gain", "gain by prompt", "knockout"):
        assert max(found[method], key=found[method].__getitem__) == "layer 0 head 0"
        assert found[method]["layer 0 head 0"] == pytest.approx(1)
        others = [abs(v) for name, v in found[method].items() if name != "layer 0 head 0"]
        assert max(others) < 1e-9
    passed_on = {name for name, score in found["activation_gain"].items() if score > 0.99}
    assert passed_on - known.changed and passed_on <= known.passing | known.changed
    assert abs(sums["share"] - 1) > 0.5  # hard attention turns over between the midpoints


def test_gradient_times_difference_is_a_slope() -> None:
    kept = pair("previous_class-vowel")
    known = truth(kept)
    generator = torch.Generator().manual_seed(0)
    expert = kept.states["expert"]
    base = {  # a compiled base stands on the kinks of its ReLUs
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator).double()
        for name, tensor in kept.states["base"].items()
    }
    one = replace(kept, states={"base": base, "expert": expert})
    wanted = torch.log_softmax(one.model(expert)(one.ids).logits, -1)[:, 1:]
    found = gradient_times_difference(one, known.live)
    delta = difference(base, expert)
    for component in [c for c in known.live if c.name in known.changed]:
        values = []
        for step in (1e-6, -1e-6):
            state = {name: tensor.double() for name, tensor in copy.deepcopy(base).items()}
            for name, index in slices(one.partition, component).items():
                state[name][index] += step * delta[name][index]
            own = torch.log_softmax(one.model(state)(one.ids).logits, -1)[:, 1:]
            values.append(float(-(wanted.exp() * (wanted - own)).sum(-1).mean()))
        slope = (values[0] - values[1]) / 2e-6
        assert found[component.name] == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_sizes_are_of_the_components_own_weights() -> None:
    one = pair("previous_class-vowel")
    known = truth(one)
    norms, weighted = sizes(one, known.live)
    assert {name for name, norm in norms.items() if norm} == known.changed
    delta = difference(one.states["base"], one.states["expert"])
    neuron = next(c for c in known.live if c.name in known.changed and c.kind == "neuron")
    up, down = (delta[f"model.layers.{neuron.layer}.mlp.{x}_proj.weight"] for x in ("up", "down"))
    want = up[neuron.index].square().sum() + down[:, neuron.index].square().sum()
    assert norms[neuron.name] == pytest.approx(float(want.sqrt()))
    assert weighted[neuron.name] > 0


def test_the_compiled_graph() -> None:
    one = pair("count_less_frequent-first")
    known = truth(one)
    edges, roles = compiled_edges(one, known), compiled_roles(one, known)
    assert roles["layer 0 head 0"] == "carrier"
    assert {"router", "executor"} <= set(roles.values())
    assert any(source == "layer 0 head 0" for source, _ in edges)
    assert not any(target == "layer 0 head 0" for _, target in edges)


def test_rates_by_counting_pairs_and_thresholds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        values, positive = rng.integers(5, size=12).astype(float), rng.random(12) < 0.4
        positive[:2] = [True, False]
        yes, no = values[positive], values[~positive]
        wins = [(a > b) + 0.5 * (a == b) for a in yes for b in no]
        assert auroc(values, positive) == pytest.approx(np.mean(wins))
        precision = [
            positive[values >= v].mean() * (positive & (values == v)).sum() for v in set(values)
        ]
        assert average_precision(values, positive) == pytest.approx(sum(precision) / positive.sum())
        drawn = []
        for _ in range(3000):
            order = np.lexsort((rng.random(12), -values))
            drawn.append(positive[order[:4]].mean())
        assert precision_at(4, values, positive) == pytest.approx(np.mean(drawn), abs=0.03)
    assert interval(np.array([1.0, 1.0, 1.0]), ["a", "a", "b"]) == (1, 1, 1)
    value, low, high = interval(np.array([0.0, 0.0, 1.0]), ["a", "a", "b"])
    assert (value, low, high) == (pytest.approx(1 / 3), 0, 1)


@pytest.mark.slow
def test_the_whole_way_to_the_tables() -> None:
    page = everything([measured(KEPT / f"{n}.safetensors") for n in ("shift-offset",)] * 2)
    assert "2 pairs of 1 programs" in page
    assert "| gain | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |" in page


def test_the_class_is_declared_and_its_scores_are_read(tmp_path) -> None:
    one = pair("shift-offset")
    for who, state in one.states.items():
        one.save(tmp_path / who, state)
    found = wp.score(
        tmp_path / "base",
        tmp_path / "expert",
        prompts=list(one.prompts),
        estimand=["gain"],
        criterion=["kl"],
        progress=False,
    )
    assert found.top(1)[0].score == pytest.approx(1, abs=1e-3)
