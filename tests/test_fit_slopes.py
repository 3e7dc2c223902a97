"""Slopes of gates: against finite differences, and prompt by prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergekit_wp.criteria import Targets
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.integrated_gradients import TaskVector, contributions
from mergekit_wp.engine.replay import Receiver, record
from mergekit_wp.engine.slopes import Term, slopes
from mergekit_wp.joint.ascent import Fitting
from mergekit_wp.joint.merged_model import MergedModel
from mergekit_wp.joint.objective import Objective
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.models.pair import open_pair
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import batches
from mergekit_wp.runs.references import logprobs
from mergekit_wp.terms import FINE_KINDS
from tests.fitting import divergence, fitted, layout_of, load, merged, sequences
from tests.models import FAMILIES, make_model, perturbed, save
from tests.test_company import NAMES, make_world, write_task
from tests.test_scoring import Quiet

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["llama-tied", "qwen2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(request.param, tmp_path_factory.mktemp("fit"))


def test_slopes_equal_finite_differences(world: Path) -> None:
    pairs, layout = layout_of(world)
    base, experts = load(world / "base"), [load(world / name) for name in NAMES]
    objectives = []
    for name, expert in zip(NAMES, experts, strict=True):
        every = list(batches(sequences(world / f"{name}.jsonl"), 4, "cpu"))
        targets = [Targets(logprobs(Decoder(expert), batch)) for batch in every]
        apart = divergence(base, expert, world / f"{name}.jsonl")
        objectives.append(Objective(name, every, targets, apart))

    request = FitRequest(recipe=world, prompts=(), out=world, dtype="float64", held_out=0)
    model = MergedModel(
        ResidentModel(pairs[0], torch.float64, "cpu"), pairs, layout, AtOnce(16, print), 2
    )
    fitting = Fitting(request, model, objectives, [], layout, None, Quiet())  # type: ignore[arg-type]
    torch.manual_seed(0)
    flat = 0.2 + torch.rand(layout.size, dtype=torch.float64)
    model.move_to(flat)
    slope, seen = fitting._slope(0, torch.tensor([0.3, 0.7]))

    def objective(at: torch.Tensor) -> list[float]:
        model = merged(world, layout, at)
        found = []
        for name, expert, objective in zip(NAMES, experts, objectives, strict=True):
            found.append(1 - divergence(model, expert, world / f"{name}.jsonl") / objective.span)
        return found

    assert (1 - seen[0] / fitting.spans).tolist() == pytest.approx(objective(flat), abs=1e-6)
    places = []
    for e, own in enumerate(layout.unflat(torch.arange(layout.size))):
        gates = layout.by_kind(own)
        for kind in FINE_KINDS:
            every = gates[kind].flatten()
            places += [(e, kind, int(i)) for i in every[torch.tensor([0, -1])]]
    for e, kind, i in places:
        step = torch.zeros_like(flat)
        step[i] = 1e-3
        up, down = (
            sum(w * o for w, o in zip((0.3, 0.7), objective(flat + sign * step), strict=True))
            for sign in (1, -1)
        )
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
    [values, _], every = slopes(decoder, terms, pair.partition.layouts, [vector])
    for term, [found] in zip(terms, every, strict=True):
        assert found.keys() == apart.keys() and len(found) > 12
        for name, each in apart.items():
            want = term.weight * each.sum(0)
            torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-7)
        _, [[alone]] = slopes(decoder, [term], pair.partition.layouts, [vector])
        assert all(torch.equal(alone[name], found[name]) for name in found)
    assert not any(p.requires_grad for p in resident.model.parameters())
    own = Receiver(decoder, record(decoder, batch), ("kl",), targets).own["kl"]
    torch.testing.assert_close(values[0], own.double())
    same = decoder.logits(record(decoder, batch).residual(len(decoder.layers) - 1)).argmax(-1)
    wrong = same[batch.rows, batch.cols] != targets.expert_logprobs.argmax(-1)  # type: ignore[union-attr]
    whole = [not wrong[batch.owners == i].any() for i in range(batch.size)]
    assert values[1].tolist() == [float(each) for each in whole]


def test_pieces_of_a_tensor_get_the_gates_of_their_rows(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fitted(world, tmp_path / "whole.safetensors", steps=2)
    monkeypatch.setattr("mergekit_wp.models.checkpoint._PIECE", 40)
    pieces = fitted(world, tmp_path / "pieces.safetensors", steps=2)
    for e in range(len(NAMES)):
        for kind, gates in whole.gates(e).items():
            assert torch.equal(pieces.gates(e)[kind], gates)
