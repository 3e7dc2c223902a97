"""Peers that learn from the experts' prompts, each against its authors' lines, naively."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from mergekit_wp.comparison.making import Making
from mergekit_wp.comparison.methods import as_long_as, peers
from mergekit_wp.errors import UserError
from mergekit_wp.prompts import Prompt
from mergekit_wp.runs.progress import NoProgress
from tests.comparing import Distance, asked_family, is_end, make_plan, merged_by, planted, run
from tests.factory import make_fit
from tests.merging import Family

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return asked_family(tmp_path_factory.mktemp("peers"))


def prompts_of(family: Family) -> Any:
    first = tuple(Prompt(prompt=text) for text in ("abc", "a b", "hello there", "x"))
    second = tuple(Prompt(prompt=text, response="no") for text in ("who", "what is it", "y"))
    return (("expert0", first), ("expert1", second))


def test_what_learns_needs_prompts(family: Family) -> None:
    plan = make_plan(family, Distance("near", planted(family, 0.5)), ("tsv_merge", "regmean"))
    with pytest.raises(
        UserError, match="'regmean' learns from the experts' prompts; .* prompts=expert0=FILE"
    ):
        plan.check()


def test_peers_that_learn_step_by_step_take_as_many_as_the_fit() -> None:
    known = peers(2)
    fit, _ = make_fit("one", "two")
    for name in ("adamerging", "expert_merging", "joint_finetuning"):
        method = as_long_as(known[name], fit)
        assert method.untuned == known[name].untuned | {"steps": 1, "prompts_a_step": 2}
        assert [s["rate"] for s in method.grid] == [s["rate"] for s in known[name].grid]
        assert all((s["steps"], s["prompts_a_step"]) == (1, 2) for s in method.grid)
        assert as_long_as(known[name], None) == known[name]
    for name in ("ties", "wudi", "localize_and_stitch", "regmean"):
        assert as_long_as(known[name], fit) == known[name]


def test_prompts_of_nobody_are_refused_before_anything_is_measured(
    family: Family, tmp_path: Path
) -> None:
    task = Distance("near", planted(family, 0.5))
    plan = make_plan(family, task, ("regmean",), prompts=(("nobody", (Prompt(prompt="a"),)),))
    with pytest.raises(UserError, match="'nobody' is no expert"):
        run(plan, tmp_path)
    assert not task.asked


class Experts:
    """Models of a family by transformers alone, and their prompts with answers."""

    def __init__(self, family: Family, samples: list[list[Any]]) -> None:
        load = AutoModelForCausalLM.from_pretrained
        self.models = [load(e.path, dtype=torch.float32) for e in family.experts]
        self.samples = samples

    def inputs(self, expert: int) -> list[tuple[torch.Tensor, int]]:
        """Token ids ``[1, T]`` with the answer, and how many of them are the prompt."""
        return [
            (torch.tensor([[*s.prompt_ids, *s.response_ids]]), len(s.prompt_ids))
            for s in self.samples[expert]
        ]


@pytest.fixture(scope="module")
def experts(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Experts:
    task = Distance("near", planted(family, 0.5))
    plan = make_plan(family, task, ("regmean",), prompts=prompts_of(family), max_new_tokens=4)
    scratch = tmp_path_factory.mktemp("scratch")
    making = Making(plan, scratch, scratch, "2026-01-01", NoProgress())
    return Experts(family, making.peers.sources.prompted.samples)


def grams_of(model: Any, inputs: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    """XᵀX/n of every linear layer by hooks, one prompt at a time; the last token is not read."""
    sums: dict[str, Any] = {}
    count = 0
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:

            def hook(_m: Any, args: Any, name: str = name) -> None:
                x = args[0].flatten(0, 1).double()
                sums[name] = sums.get(name, 0) + x.T @ x

            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for ids, _ in inputs:
            model(ids[:, :-1])
            count += ids.shape[1] - 1
    for handle in handles:
        handle.remove()
    return {f"{name}.weight": total / count for name, total in sums.items()}


def solved(weights: list[torch.Tensor], grams: list[torch.Tensor], a: float) -> torch.Tensor:
    """As ``RegMean.merge`` of MergeBench, in float64."""
    total: Any = 0
    goal: Any = 0
    for weight, gram in zip(weights, grams, strict=True):
        damped = gram * (torch.eye(len(gram)) * (1 - a) + a)
        total, goal = total + damped, goal + damped @ weight.double().T
    return (torch.linalg.pinv(total) @ goal).T.float()


def test_regmean(family: Family, experts: Experts, tmp_path: Path) -> None:
    found, row = merged_by(family, tmp_path, "regmean", prompts_of(family))
    grams = [grams_of(model, experts.inputs(e)) for e, model in enumerate(experts.models)]
    for name in family.base.state:
        own = [e.state[name] for e in family.experts]
        mean = sum(own) / 2
        want = solved(own, [g[name] for g in grams], 0.5) if name in grams[0] else mean
        torch.testing.assert_close(found[name], want, atol=2e-4, rtol=1e-3)
    assert row.cost.prompts == 7 and row.cost.gradient_steps == 0 and row.cost.forward_passes


def test_regmean_goes_on_by_the_merge(family: Family, experts: Experts, tmp_path: Path) -> None:
    """RegMean++: the inputs of a layer are those that the merged layers before it make."""
    found, _ = merged_by(family, tmp_path, "regmean++", prompts_of(family), off_diagonal=0.3)
    merged = AutoModelForCausalLM.from_pretrained(family.base.path, dtype=torch.float32)
    mean = {n: sum(e.state[n] for e in family.experts) / 2 for n in family.base.state}
    merged.load_state_dict(mean, strict=False)
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        grams = []
        for e, expert in enumerate(family.experts):
            here = merged.state_dict()
            own = {n: t for n, t in expert.state.items() if n.startswith(prefix)}
            merged.load_state_dict(own, strict=False)  # this layer is the expert's
            grams.append(grams_of(merged, experts.inputs(e)))
            merged.load_state_dict({n: here[n] for n in own}, strict=False)
        for name in [n for n in mean if n.startswith(prefix)]:
            if name in grams[0]:
                own_weights = [e.state[name] for e in family.experts]
                mean[name] = solved(own_weights, [g[name] for g in grams], 0.3)
        merged.load_state_dict(mean, strict=False)
    for name, want in mean.items():
        torch.testing.assert_close(found[name], want, atol=1e-3, rtol=1e-2)


def log_likelihood(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    logp = model(ids[:, :-1]).logits.log_softmax(-1)[0, prompt - 1 :]
    return logp.gather(-1, ids[0, prompt:, None]).sum()


@pytest.mark.parametrize("normalize", [False, True])
def test_fisher(family: Family, experts: Experts, tmp_path: Path, normalize: bool) -> None:
    found, row = merged_by(family, tmp_path, "fisher", prompts_of(family), normalize=normalize)
    information = []
    for e, model in enumerate(experts.models):
        own = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for ids, prompt in experts.inputs(e):
            model.zero_grad()
            log_likelihood(model, ids, prompt).backward()
            for name, p in model.named_parameters():
                own[name] += p.grad**2 / len(experts.inputs(e))
        information.append(own)
    scale = [1.0, 1.0]
    if normalize:
        scale = [
            1 / float(sum(f.double().square().sum() for f in own.values()) ** 0.5 + 1e-10)
            for own in information
        ]
    for name in family.base.state:
        weights = [s * (own[name] + 1e-10) for s, own in zip(scale, information, strict=True)]
        own = [e.state[name] for e in family.experts]
        want = sum(w * x for w, x in zip(weights, own, strict=True)) / sum(weights)
        torch.testing.assert_close(found[name], want, atol=1e-3, rtol=1e-3)
    assert row.cost.forward_passes == 7


Answer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def descended(
    family: Family,
    experts: Experts,
    weights: Callable[[], dict[str, torch.Tensor]],
    optimiser: torch.optim.Optimizer,
    losses: list[Answer],
    steps: int,
    scheduler: Any = None,
) -> dict[str, torch.Tensor]:
    """Autograd's own way down the sum over experts of the mean over prompts of a loss."""
    model = AutoModelForCausalLM.from_pretrained(family.base.path, dtype=torch.float32)
    for _ in range(steps):
        total: Any = 0
        for e, loss in enumerate(losses):
            for ids, prompt in experts.inputs(e):
                logits = functional_call(model, weights(), (ids[:, :-1],)).logits[0, prompt - 1 :]
                total = total + loss(logits, ids[0, prompt:]) / len(experts.inputs(e))
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        if scheduler is not None:
            scheduler.step()
    return {name: tensor.detach() for name, tensor in weights().items()}


def entropy(logits: torch.Tensor, _answer: torch.Tensor) -> torch.Tensor:
    """``entropy_loss`` of FusionBench, for the logits of one answer."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def with_coefficients(
    family: Family,
    start: float,
    into: Callable[[Any], Any] = lambda c: c,
    out_of: Callable[[Any], Any] = lambda x: x,
) -> tuple[dict[str, Any], Any]:
    base = family.base.state
    deltas = {n: [e.state[n] - base[n] for e in family.experts] for n in base}
    found = {n: torch.nn.Parameter(into(torch.full((2,), start))) for n in base}

    def weights() -> dict[str, torch.Tensor]:
        return {
            n: t + sum(c * d for c, d in zip(out_of(found[n]), deltas[n], strict=True))
            for n, t in base.items()
        }

    return found, weights


def test_ada_merging(family: Family, experts: Experts, tmp_path: Path) -> None:
    own, weights = with_coefficients(family, 0.3)
    adam = torch.optim.Adam(own.values(), lr=0.02)
    want = descended(family, experts, weights, adam, [entropy] * 2, 5)
    changed = {"steps": 5, "rate": 0.02}
    found, row = merged_by(family, tmp_path, "adamerging", prompts_of(family), **changed)
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-3)
    moved = torch.stack([c.detach() for c in own.values()]) - 0.3
    assert moved.abs().max() > 0.05
    assert (row.cost.gradient_steps, row.cost.forward_passes) == (5, 5 * 7)


def test_joint_fine_tuning(family: Family, experts: Experts, tmp_path: Path) -> None:
    base = family.base.state
    own = {n: torch.nn.Parameter(t.clone()) for n, t in base.items()}
    adam = torch.optim.AdamW(own.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1, (6 - step) / 5))
    want = descended(
        family,
        experts,
        lambda: own,
        adam,
        [torch.nn.functional.cross_entropy] * 2,
        6,
        schedule,
    )
    changed = {"steps": 6, "rate": 0.01}
    found, row = merged_by(family, tmp_path, "joint_finetuning", prompts_of(family), **changed)
    for name, tensor in want.items():
        # where a gradient is nearly 0 Adam takes its sign
        assert (found[name] - tensor).abs().mean() < 0.02 * (tensor - base[name]).abs().mean()
    assert row.cost.gradient_steps == 6 and row.cost.prompts == 7


def test_expert_merging(family: Family, experts: Experts, tmp_path: Path) -> None:
    """Temperature, hidden states and the pull as in the authors' expert_merging_base.py."""
    own, weights = with_coefficients(family, 0.1, torch.logit, torch.sigmoid)
    matrices = [n for n, t in family.base.state.items() if t.dim() == 2 and not is_end(n)]
    model = AutoModelForCausalLM.from_pretrained(family.base.path, dtype=torch.float32)
    adam = torch.optim.Adam([own[n] for n in matrices], lr=0.02)

    def merged() -> dict[str, torch.Tensor]:
        found = weights()
        return {n: found[n] if n in matrices else t for n, t in family.base.state.items()}

    def states(at: Callable[..., Any], ids: torch.Tensor, prompt: int) -> tuple[Any, Any]:
        layers: list[torch.Tensor] = []
        blocks = model.model.layers if at is student else experts.models[e].model.layers
        handles = [b.register_forward_hook(lambda _m, _a, out: layers.append(out)) for b in blocks]
        logits = at(ids[:, :-1]).logits[0, prompt - 1 :]
        for handle in handles:
            handle.remove()
        return logits, torch.stack([hidden[0, prompt - 1 :] for hidden in layers])

    def student(ids: torch.Tensor) -> Any:
        return functional_call(model, merged(), (ids,))

    for _ in range(4):
        total: Any = 0
        for e in range(2):
            for ids, prompt in experts.inputs(e):
                with torch.no_grad():
                    theirs, deep = states(experts.models[e], ids, prompt)
                ours, shallow = states(student, ids, prompt)
                kl = torch.nn.functional.kl_div(
                    (ours / 3).log_softmax(-1), (theirs / 3).softmax(-1), reduction="batchmean"
                )
                mse = torch.nn.functional.mse_loss(shallow, deep)
                total = total + (9 * kl + 0.1 * mse) / len(experts.inputs(e))
        away = sum((own[n].sigmoid() - 0.1).abs().sum() for n in matrices) / len(matrices)
        adam.zero_grad()
        (total + 0.1 * away).backward()
        assert torch.nn.utils.clip_grad_norm_([own[n] for n in matrices], 1.0) > 1
        adam.step()
    changed = {"steps": 4, "rate": 0.02}
    found, row = merged_by(family, tmp_path, "expert_merging", prompts_of(family), **changed)
    for name, tensor in merged().items():
        torch.testing.assert_close(found[name], tensor.detach(), atol=2e-4, rtol=1e-3)
    assert (row.cost.gradient_steps, row.cost.forward_passes) == (4, 7 + 4 * 7)


def test_localize_and_stitch(family: Family, experts: Experts, tmp_path: Path) -> None:
    """One epoch of ``train_graft`` of the authors' localize_utils.py, by autograd on the mask."""
    changed = {"rate": 2e3, "bias": 1.0}
    found, row = merged_by(family, tmp_path, "localize_and_stitch", prompts_of(family), **changed)
    base, kept, began = family.base.state, [], []
    names = [name for name in base if not is_end(name)]
    model = AutoModelForCausalLM.from_pretrained(family.base.path, dtype=torch.float32)
    for e, expert in enumerate(family.experts):
        delta = {n: expert.state[n] - base[n] for n in names}
        flat = torch.cat([d.abs().flatten() for d in delta.values()])
        threshold = flat.sort(descending=True).values[int(0.1 * len(flat)) - 1]
        began.append({n: d.abs() >= threshold for n, d in delta.items()})
        masks = {n: (2.0 * k - 1).requires_grad_() for n, k in began[e].items()}
        for ids, prompt in experts.inputs(e):
            grafted = {n: base[n] + torch.sigmoid(m) * delta[n] for n, m in masks.items()}
            logits = functional_call(model, base | grafted, (ids[:, :-1],)).logits[0, prompt - 1 :]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, prompt:])
            (loss / len(experts.inputs(e))).backward()
        kept.append({n: (m - 2e3 * m.grad).detach() > 0 for n, m in masks.items()})
    moved = sum(int((a[n] != b[n]).sum()) for a, b in zip(kept, began, strict=True) for n in names)
    assert moved > 20
    wrong = 0
    for name, start in base.items():
        want = start.clone()
        if name in names:
            both = torch.stack([k[name] for k in kept])
            deltas = torch.stack([e.state[name] - start for e in family.experts])
            want += (deltas * both).sum(0) / both.sum(0).clamp_min(1)
        wrong += int(((found[name] - want).abs() > 1e-5).sum())
    assert wrong <= 2  # a mask at 0 to rounding
    assert row.cost.gradient_steps == 2 and row.cost.forward_passes == 7


def test_prompts_may_come_later_but_not_change(family: Family, tmp_path: Path) -> None:
    plan = make_plan(family, Distance("near", planted(family, 0.5)), ("iso_c",), tuned=False)
    run(plan, tmp_path, {"prompts of experts": {}})
    run(plan, tmp_path, {"prompts of experts": {"inst": "1"}})
    with pytest.raises(UserError, match="changed: prompts of experts: inst"):
        run(plan, tmp_path, {"prompts of experts": {"inst": "2"}})
