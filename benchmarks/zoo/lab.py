"""Ideas that were tried and left out of the package.

Written with whole-model gradients, which only a toy can afford; results are in README.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.zoo.bench import N_PROMPTS, checkpoints, prompts, task
from mergekit_wp.architectures import Dims
from mergekit_wp.comparison.rows import Comparison
from mergekit_wp.components import Partition
from mergekit_wp.joint.gates import Layout
from mergekit_wp.models.generation import TextInterface

State = dict[str, torch.Tensor]
EXPERTS = ("inst", "math", "sort")


class Lab:
    """One seed's base, experts and behaviours, in float32."""

    def __init__(self, folder: Path, seed: int, n_prompts: int = N_PROMPTS) -> None:
        def load(name: str) -> State:
            model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
            return {n: p.detach().clone() for n, p in model.named_parameters()}

        self.tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        self.asked = TextInterface.of(folder / "base", self.tokenizer)
        self.model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        self.base = load("base")
        self.experts = {e: load(e) for e in EXPERTS}
        self.deltas = {
            e: {n: state[n] - self.base[n] for n in self.base} for e, state in self.experts.items()
        }
        shapes = {n: tuple(t.shape) for n, t in self.base.items()}
        self.partition = Partition(Dims.from_config(self.model.config), shapes)
        self.batches = {e: self._batch(prompts(folder, seed, e, n_prompts)) for e in EXPERTS}
        self.targets = {e: self._logprobs(self.experts[e], e).detach() for e in EXPERTS}
        self.distance = {e: float(self.divergence(self.base, e)) for e in EXPERTS}

    def _batch(self, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        rows = []
        for line in path.read_text().splitlines():
            item = json.loads(line)
            prompt = self.tokenizer(item["prompt"]).input_ids
            answer = self.tokenizer(item["response"], add_special_tokens=False).input_ids
            rows.append((prompt, answer))
        width = max(len(p) + len(a) for p, a in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        weights = torch.zeros(len(rows), width)
        for i, (prompt, answer) in enumerate(rows):
            ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            weights[i, len(prompt) - 1 : len(prompt) + len(answer)] = 1 / (len(answer) + 1)
        return ids, weights

    def _logprobs(self, state: State, e: str) -> torch.Tensor:
        self.model.load_state_dict(state, strict=False)
        found: torch.Tensor = self.model(input_ids=self.batches[e][0]).logits.log_softmax(-1)
        return found

    def divergence(self, state: State, e: str) -> torch.Tensor:
        """Mean KL divergence from expert e on its prompts."""
        logprobs, weights = self._logprobs(state, e), self.batches[e][1]
        target = self.targets[e]
        return ((target.exp() * (target - logprobs)).sum(-1) * weights).sum(1).mean()

    def slopes(self, state: State) -> State:
        """Gradient of the sum of recoveries."""
        self.model.zero_grad()
        for e in EXPERTS:
            (-self.divergence(state, e) / self.distance[e]).backward()
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}

    def merge(self, gates: Mapping[str, State]) -> State:
        """B + Σ gate Δ; gates broadcast to the tensors."""
        return {
            n: start + sum(gates[e][n] * self.deltas[e][n] for e in EXPERTS)
            for n, start in self.base.items()
        }

    def components(self, products: State) -> State:
        """Summed by component, spread over each tensor."""
        partition, sums = self.partition, {}
        for n, product in products.items():
            layout = partition.layouts[n]
            other = [d for d in range(product.dim()) if d not in layout.dims]
            kept = product.flatten() if layout.whole else product.sum(other) if other else product
            sums[n] = layout.reduce(kept)
        gates = Layout(partition, (frozenset(products),))
        flat = gates.collect([sums]).float()
        return {
            n: partition.layouts[n].expand(gates.of_tensor(flat, n), product.shape)
            for n, product in products.items()
        }

    def entropies(self, start: float, steps: int, rate: float, n: int) -> State:
        """AdaMerging (arXiv 2310.02575): one gate a tensor, fitted to the entropy of the answers.

        Args:
            start: of every gate.
            steps: of Adam; its rate falls evenly to 0.
            rate: of the first step.
            n: prompts of every behaviour in a step.
        """
        gates = {
            e: {m: torch.full((), start, requires_grad=True) for m in self.base} for e in EXPERTS
        }
        adam = torch.optim.Adam([g for by in gates.values() for g in by.values()], lr=rate)
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            adam.param_groups[0]["lr"] = rate * (1 - step / steps)
            adam.zero_grad()
            state = self.merge(gates)
            total = torch.zeros(())
            for ids, weights in self.batches.values():
                chosen = torch.randperm(len(ids), generator=generator)[:n]
                inputs = {"input_ids": ids[chosen]}
                logits = functional_call(self.model, state, (), inputs).logits
                logprobs = logits.log_softmax(-1)
                entropy = -(logprobs.exp() * logprobs).sum(-1)
                total = total + (entropy * weights[chosen]).sum(1).mean()
            total.backward()
            adam.step()
            with torch.no_grad():
                for by in gates.values():
                    for gate in by.values():
                        gate.clamp_(0.0, 1.5)
        return {m: t.detach() for m, t in self.merge(gates).items()}

    def straight(self, steps: int = 5) -> dict[str, State]:
        """Joint shares along the straight path B + a ΣΔ, by component."""
        total: dict[str, State] = {}
        ones = {n: torch.ones(()) for n in self.base}
        for i in range(steps):
            a = (i + 0.5) / steps
            slopes = self.slopes(
                self.merge({e: {n: a * t for n, t in ones.items()} for e in EXPERTS})
            )
            for e in EXPERTS:
                part = self.components({n: slopes[n] * self.deltas[e][n] for n in slopes})
                known = total.get(e)
                total[e] = part if known is None else {n: known[n] + part[n] for n in part}
        return total

    def shared(self, scores: dict[str, State], power: float = 0.5) -> State:
        """Share fusion."""
        raised = {e: {n: t.clamp(min=0) ** power for n, t in s.items()} for e, s in scores.items()}
        total = {n: sum(raised[e][n] for e in EXPERTS).clamp(min=1e-30) for n in self.base}
        return self.merge({e: {n: raised[e][n] / total[n] for n in self.base} for e in EXPERTS})

    def gated(self, scores: dict[str, State], scale: float) -> State:
        """Every expert where its score is positive."""
        return self.merge(
            {e: {n: scale * (t > 0).float() for n, t in s.items()} for e, s in scores.items()}
        )

    def trimmed(self, scores: dict[str, State], density: float = 0.5) -> State:
        """Share fusion of task vectors trimmed and sign-elected as in TIES."""
        raised = {e: {n: t.clamp(min=0) ** 0.5 for n, t in s.items()} for e, s in scores.items()}
        merged = {}
        for n, start in self.base.items():
            kept = []
            for e in EXPERTS:
                d = self.deltas[e][n]
                k = max(1, int(density * d.numel()))
                least = d.abs().flatten().kthvalue(d.numel() - k + 1).values
                kept.append(torch.where(d.abs() >= least, d, 0.0))
            votes = torch.stack(kept)
            weights = torch.stack([raised[e][n].expand(start.shape) for e in EXPERTS])
            agree = (votes.sign() == votes.sum(0).sign()) & (votes != 0)
            weights = weights * agree
            merged[n] = start + (votes * weights).sum(0) / weights.sum(0).clamp(min=1e-30)
        return merged


def naive_rows(seed: int, comparison: Comparison) -> dict[str, float]:
    """Mean over skills, relative to each skill's own expert, on the test items."""
    folder = checkpoints(seed)
    lab = Lab(folder, seed)
    straight = lab.straight()
    merges = {
        "straight joint path: share fusion": lab.shared(straight),
        "straight joint path: positive shares, lambda 0.7": lab.gated(straight, 0.7),
        "straight joint path: positive shares, lambda 0.5": lab.gated(straight, 0.5),
        "straight joint path: share fusion of TIES-trimmed task vectors": lab.trimmed(straight),
    }
    rows = {row.name: row for row in comparison.rows}
    found = {}
    for name, state in merges.items():
        lab.model.load_state_dict(state, strict=False)
        parts = []
        for e in EXPERTS:
            scores = task(folder, seed, e).evaluate(lab.model.eval(), lab.asked, "test")
            own = rows[f"expert {e}"].scores[e][0]
            parts.append(sum(x.score for x in scores) / sum(own))
        found[name] = sum(parts) / len(parts)
    return found
