"""Slopes of gates: against finite differences, and prompt by prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_wp.components import gate_layouts
from mergekit_wp.criteria import Targets
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.integrated_gradients import TaskVector, contributions
from mergekit_wp.engine.products import products
from mergekit_wp.engine.replay import Receiver, record
from mergekit_wp.engine.slopes import Term, slopes
from mergekit_wp.joint.ascent import Fitting
from mergekit_wp.joint.gates import Layout
from mergekit_wp.joint.judging import PromptSplit
from mergekit_wp.joint.merged_model import MergedModel, fitting, slopes_of
from mergekit_wp.joint.objective import Objective
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.joint.weighing import worst_first
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.models.pair import open_pair
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import Sample, batches
from mergekit_wp.runs.references import logprobs
from mergekit_wp.terms import FINE_KINDS
from tests.fitting import divergence, fitted, layout_of, load, merged, sequences
from tests.joint_world import NAMES, make_world, write_task
from tests.models import FAMILIES, make_model, perturbed, save
from tests.test_fit_granularity import FINER
from tests.test_lora import make_adapter
from tests.test_scoring import Quiet

torch.set_num_threads(1)


@pytest.fixture(
    scope="module", params=["llama-tied", pytest.param("qwen2", marks=pytest.mark.slow)]
)
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
        split = PromptSplit.of(sum(batch.size for batch in every), 0, 0)
        objectives.append(Objective(name, every, targets, apart, split))

    request = FitRequest(recipe=world, prompts=(), out=world, dtype="float64", held_out=0)
    model = MergedModel(
        ResidentModel(pairs[0], torch.float64, "cpu"), pairs, layout, AtOnce(16, print), 2
    )
    guard = Objective("guard", objectives[0].batches, objectives[0].targets, 0.25, split)
    fitting = Fitting(request, model, objectives, [guard], layout, None, Quiet())  # type: ignore[arg-type]
    torch.manual_seed(0)
    flat = 0.2 + torch.rand(layout.size, dtype=torch.float64)
    model.move_to(flat)
    left = torch.tensor([0.3, 0.7], dtype=torch.float64)
    (slope, of_guard), seen = fitting._slopes(0, left)
    weights = worst_first(left).tolist()

    def objective(at: torch.Tensor) -> list[float]:
        model = merged(world, layout, at)
        found = []
        for name, expert, objective in zip(NAMES, experts, objectives, strict=True):
            found.append(1 - divergence(model, expert, world / f"{name}.jsonl") / objective.span)
        return found

    here = objective(flat)
    assert (1 - seen[0] / fitting.spans)[:2].tolist() == pytest.approx(here, abs=1e-6)
    # the guard has the first behaviour's teacher and prompts, and uses so much of its limit
    per_limit = objectives[0].span / guard.span
    assert float(seen[0, 2] / guard.span) == pytest.approx((1 - here[0]) * per_limit, abs=1e-6)
    places = []
    for e, own in enumerate(layout.unflat(torch.arange(layout.size))):
        gates = layout.by_kind(own)
        for kind in FINE_KINDS:
            every = gates[kind].flatten()
            places += [(e, kind, int(i)) for i in every[torch.tensor([0, -1])]]
    for e, kind, i in places:
        step = torch.zeros_like(flat)
        step[i] = 1e-3
        up, down = (objective(flat + sign * step) for sign in (1, -1))
        each = [(u - d) / 2e-3 for u, d in zip(up, down, strict=True)]
        want = sum(w * change for w, change in zip(weights, each, strict=True))
        assert float(slope[i]) == pytest.approx(want, rel=2e-3, abs=2e-5), (e, kind)
        want = each[0] * per_limit
        assert float(of_guard[i]) == pytest.approx(want, rel=2e-3, abs=5e-5 * per_limit), (e, kind)
    assert len({kind for _, kind, _ in places}) == 4 and float(slope.abs().max()) > 1e-2


def test_a_sparse_gradient_has_the_sums_of_a_dense_one() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[3, 1, 3], [0, 3, 5]])
    table = torch.nn.Embedding(9, 4, sparse=True, dtype=torch.float64)
    (table(ids) * torch.rand(2, 3, 4)).sum().backward()
    sparse, delta = table.weight.grad, torch.rand(9, 4, dtype=torch.float64)
    assert sparse is not None and sparse.is_sparse
    parts = [(0,), (1,), (0, 1), ()]
    every = zip(
        products(sparse, delta, parts), products(sparse.to_dense(), delta, parts), strict=True
    )
    for found, want in every:
        torch.testing.assert_close(found, want)


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
    [keeping, _], same = slopes(decoder, terms, pair.partition.layouts, [vector], kept=[1])
    assert torch.equal(keeping, values)
    for term, [found], [kept] in zip(terms, every, same, strict=True):
        assert found.keys() == apart.keys() and len(found) > 12
        assert all(torch.equal(kept[name], found[name]) for name in found)
        for name, each in apart.items():
            want = term.weight * each.sum(0)
            torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-7)
        _, [[alone]] = slopes(decoder, [term], pair.partition.layouts, [vector])
        assert all(torch.equal(alone[name], found[name]) for name in found)
    assert not any(p.requires_grad for p in resident.model.parameters())
    assert not any(getattr(m, "sparse", False) for m in resident.model.modules())
    own = Receiver(decoder, record(decoder, batch), ("kl",), targets).own["kl"]
    torch.testing.assert_close(values[0], own.double())
    same = decoder.logits(record(decoder, batch).residual(len(decoder.layers) - 1)).argmax(-1)
    wrong = same[batch.rows, batch.cols] != targets.expert_logprobs.argmax(-1)  # type: ignore[union-attr]
    whole = [not wrong[batch.owners == i].any() for i in range(batch.size)]
    assert values[1].tolist() == [float(each) for each in whole]
    shares = [1 - wrong[batch.owners == i].double().mean() for i in range(batch.size)]
    assert values[2].tolist() == pytest.approx([float(share) for share in shares])


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_factors_of_adapters_are_as_good_as_whole_differences(tmp_path: Path, family: str) -> None:
    """One expert is an adapter, which is asked for its factors alone; one is whole.

    The difference of a whole adapter is rounded to float32, as the merge method has it.
    """
    conv = family == "gpt2"
    targets = ["c_attn", "c_proj", "c_fc"] if conv else ["q_proj", "v_proj", "o_proj", "up_proj"]
    base = make_model(family)
    save(base, tmp_path / "base", torch.float32)
    save(perturbed(base), tmp_path / "whole", torch.float32)
    make_adapter(tmp_path / "base", tmp_path, target_modules=targets, fan_in_fan_out=conv)
    experts = (tmp_path / "whole", f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    pairs = [open_pair(str(tmp_path / "base"), str(expert), lambda *_: None) for expert in experts]
    resident = ResidentModel(pairs[1], torch.float64, "cpu")
    resident.move_to(0.4)
    decoder, expert = Decoder(resident.model), Decoder(load(tmp_path / "merged"))
    write_task(tmp_path / "task.jsonl", "abc")
    [batch] = batches(sequences(tmp_path / "task.jsonl"), 9, "cpu")
    terms = [Term(batch, Targets(logprobs(expert, batch)), weight) for weight in (1.0, 0.5)]
    vectors = [TaskVector.of(pair, torch.float64, "cpu") for pair in pairs]
    without = [replace(vector, factors_of=lambda _name: None) for vector in vectors]
    partition, asked = pairs[0].partition, []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return vectors[1].delta_of(name)

    with_factors = [vectors[0], replace(vectors[1], delta_of=read)]
    for granularity in ("component", *FINER):
        layouts = gate_layouts(partition.dims, partition.shapes, granularity)
        _, want = slopes(decoder, terms, layouts, without)
        for kept in ((), (0, 1)):
            _, found = slopes(decoder, terms, layouts, with_factors, kept=kept)
            for ours, theirs in zip(found, want, strict=True):
                for own, other in zip(ours, theirs, strict=True):
                    assert own.keys() == other.keys()
                    for name in own:
                        torch.testing.assert_close(own[name], other[name], rtol=1e-5, atol=1e-7)
    assert not asked and len(want[0][1]) > 3
    alone = [replace(vectors[1], delta_of=read)]  # no weight gradient of anything at all
    _, [[found], _] = slopes(decoder, terms, layouts, alone)
    for name, own in found.items():
        torch.testing.assert_close(own, want[0][1][name], rtol=1e-5, atol=1e-7)
    elsewhere = ResidentModel(pairs[1], torch.float64, "cpu", {"cpu": 0})
    elsewhere.move_to(0.4)
    assert elsewhere.offloaded
    _, fetched = slopes(Decoder(elsewhere.model), terms, layouts, with_factors)
    for ours, theirs in zip(fetched, want, strict=True):
        for own, other in zip(ours, theirs, strict=True):
            for name in own:
                torch.testing.assert_close(own[name], other[name], rtol=1e-5, atol=1e-7)


def test_the_merge_of_an_adapter_and_a_whole_expert_is_the_sum_of_their_parts(
    tmp_path: Path,
) -> None:
    base = make_model("llama-tied")
    save(base, tmp_path / "base", torch.float32)
    save(perturbed(base), tmp_path / "whole", torch.float32)
    make_adapter(tmp_path / "base", tmp_path)
    experts = (f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", tmp_path / "whole")
    pairs = [open_pair(str(tmp_path / "base"), str(expert), lambda *_: None) for expert in experts]
    layout = Layout(pairs[0].partition, tuple(pair.changed for pair in pairs), "row_column")
    torch.manual_seed(0)
    flat = torch.rand(layout.size, dtype=torch.float64)
    states = [load(tmp_path / name).state_dict() for name in ("base", "merged", "whole")]
    resident = ResidentModel(pairs[0], torch.float64, "cpu")
    MergedModel(resident, pairs, layout, AtOnce(16, print), 2).move_to(flat)
    for name, weight in resident.model.named_parameters():
        start, *ends = (state[name] for state in states)
        want = start.clone()
        for own, end in zip(layout.unflat(flat), ends, strict=True):
            gates = layout.of_tensor(own, name)
            want += sum(layout.layouts[name].spread(gates[None], start.shape))[0] * (end - start)
        torch.testing.assert_close(weight.data, want, rtol=1e-6, atol=1e-7)
    elsewhere = ResidentModel(pairs[0], torch.float64, "cpu", {"cpu": 0})
    [batch] = batches([Sample((1, 2), (3,))], 1, "cpu")
    for held, kept in ((resident, [0]), (elsewhere, [])):
        assert MergedModel(held, pairs, layout, AtOnce(16, print), 2)._kept([batch]) == kept


def test_a_vocabulary_gives_gradients_of_its_few_tokens_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model("llama")
    save(base, tmp_path / "base")
    save(perturbed(base), tmp_path / "expert")
    pair = open_pair(str(tmp_path / "base"), str(tmp_path / "expert"), lambda *_: None)
    decoder = Decoder(ResidentModel(pair, torch.float64, "cpu").model)
    write_task(tmp_path / "task.jsonl", "abc")
    [batch] = batches(sequences(tmp_path / "task.jsonl"), 9, "cpu")
    targets = Targets(logprobs(decoder, batch))
    vector = TaskVector(lambda name: pair.delta(name, torch.float64, "cpu"), pair.changed)
    rows = []

    def watched(gradient: torch.Tensor, *others: Any) -> list[torch.Tensor]:
        rows.append(gradient._nnz() if gradient.is_sparse else None)
        return products(gradient, *others)

    monkeypatch.setattr("mergekit_wp.engine.slopes.products", watched)
    slopes(decoder, [Term(batch, targets, 1.0)], pair.partition.layouts, [vector])
    assert len(rows) > 1 and rows == [None] * (len(rows) - 1) + [batch.ids.numel()]


def test_packed_prompts_have_the_same_slopes(world: Path) -> None:
    pairs, layout = layout_of(world)
    resident = ResidentModel(pairs[0], torch.float64, "cpu")
    resident.move_to(0.4)
    decoder, expert = Decoder(resident.model), Decoder(load(world / NAMES[0]))
    samples = [
        Sample((1, 2, 3, 4, 5, *s.prompt_ids), s.response_ids)
        for s in sequences(world / f"{NAMES[0]}.jsonl")
    ]
    [batch] = batches(samples, 16, "cpu")
    term = Term(batch, Targets(logprobs(expert, batch)), 1.0)
    model = MergedModel(resident, pairs, layout, AtOnce(16, print), 2)
    assert model.packing.of(batch).n_rows < batch.n_rows
    vectors = [TaskVector.of(pair, torch.float64, "cpu") for pair in pairs]
    [values], [want] = slopes(decoder, [term], layout.layouts, vectors)
    [[result]] = model.each([[term]])
    torch.testing.assert_close(result["values"], values, rtol=1e-6, atol=1e-8)
    for found, own in zip(slopes_of(result, len(pairs)), want, strict=True):
        for name in own:
            torch.testing.assert_close(found[name], own[name], rtol=1e-5, atol=1e-7)
    [[looked]] = model.each([[replace(term, weight=0.0)]])
    torch.testing.assert_close(looked["values"], values, rtol=1e-6, atol=1e-8)


def test_activations_are_kept_as_far_as_memory_goes() -> None:
    assert fitting([30, 60, 20], 200) == [0, 2]
    assert fitting([30, 60], 100) == []


def test_pieces_of_a_tensor_get_the_gates_of_their_rows(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fitted(world, tmp_path / "whole.safetensors", steps=2)
    monkeypatch.setattr("mergekit_wp.models.checkpoint._PIECE", 40)
    pieces = fitted(world, tmp_path / "pieces.safetensors", steps=2)
    for e in range(len(NAMES)):
        for kind, gates in whole.gates(e).items():
            assert torch.equal(pieces.gates(e)[kind], gates)
