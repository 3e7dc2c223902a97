"""Peers of our own, each against the lines of its authors' code written out naively."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_wp.comparison.methods import PER_EXPERT, peers
from mergekit_wp.comparison.peers import masks, regmean, spectral, wudi
from mergekit_wp.comparison.peers.peer import OneTensor
from mergekit_wp.comparison.peers.sources import Sources
from mergekit_wp.comparison.rows import Setting
from mergekit_wp.comparison.select import coordinate_search
from mergekit_wp.errors import UserError
from mergekit_wp.models import checkpoint as models
from tests.comparing import Distance, asked_family, is_end, make_plan, merged_by, planted, run
from tests.merging import Checkpoint, Family, llama_config, random_state

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return asked_family(tmp_path_factory.mktemp("peers"))


def vectors(*shape: int, n: int = 3) -> torch.Tensor:
    return torch.randn((n, *shape), generator=torch.Generator().manual_seed(1))


def one(found: torch.Tensor, matrix: bool = True, **learned: torch.Tensor) -> OneTensor:
    return OneTensor("w", torch.zeros(found.shape[1:]), found, matrix, learned)


@pytest.mark.parametrize("shape", [(7, 9), (12, 6)])
def test_tsv_merge(shape: tuple[int, int]) -> None:
    """``compute_and_sum_svd_mem_reduction`` of the authors' TSVM_utils.py, line by line."""
    tvs = vectors(*shape)
    for i, vec in enumerate(tvs):
        u, s, v = torch.linalg.svd(vec, full_matrices=False)
        if i == 0:
            sum_u, sum_s, sum_v = (torch.zeros_like(x) for x in (u, s, v))
        k = int(s.shape[0] * (1 / len(tvs)))
        sum_u[:, i * k : (i + 1) * k] = u[:, :k]
        sum_s[i * k : (i + 1) * k] = s[:k]
        sum_v[i * k : (i + 1) * k, :] = v[:k, :]
    u_u, _, v_u = torch.linalg.svd(sum_u, full_matrices=False)
    u_v, _, v_v = torch.linalg.svd(sum_v, full_matrices=False)
    want = torch.linalg.multi_dot((u_u, v_u, torch.diag(sum_s), u_v, v_v))
    found = spectral.tsv_merge(one(tvs), {"lambda": 0.5})
    torch.testing.assert_close(found, 0.5 * want, atol=1e-5, rtol=1e-4)
    found = spectral.tsv_merge(one(tvs, matrix=False), {"lambda": 1.0})
    torch.testing.assert_close(found, tvs.mean(0))


def test_iso_c() -> None:
    """``iso_c`` of the authors' iso.py."""
    tvs = vectors(7, 5)
    u, s, v = torch.linalg.svd(sum(tvs) / len(tvs) * len(tvs), full_matrices=False)
    want = torch.linalg.multi_dot((u, torch.diag(torch.ones_like(s) * s.mean()), v))
    torch.testing.assert_close(spectral.iso_c(one(tvs), {"lambda": 1.0}), want)
    spread = torch.linalg.svdvals(spectral.isotropic(tvs))
    torch.testing.assert_close(spread, spread.mean().expand(5))


def test_consensus() -> None:
    """Number by number: who claims a weight, and whether enough do."""
    tvs = vectors(4, 5)
    setting: Setting = {"mask_lambda": 0.4, "k": 2, "lambda": 0.7}
    found = masks.consensus(one(tvs), setting)
    kept = 0
    for i in range(4):
        for j in range(5):
            own = [float(t[i, j]) for t in tvs]
            claims = sum(abs(x) > 0.4 * abs(sum(own) - x) for x in own)
            kept += claims >= 2
            assert float(found[i, j]) == pytest.approx(0.7 * sum(own) * (claims >= 2), abs=1e-6)
    assert 0 < kept < 20


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_wudi(rate: float) -> None:
    """The loss of the authors' lamassu.py (and FusionBench's wudi.py) by autograd."""
    tvs = vectors(4, 6).double()
    merged = torch.nn.Parameter(tvs.sum(0))
    adam = torch.optim.Adam([merged], lr=rate)
    norms = tvs.flatten(1).norm(dim=1).square()
    for _ in range(30):
        product = (merged.unsqueeze(0) - tvs) @ tvs.transpose(1, 2)
        loss = torch.sum(product.square() / norms.view(-1, 1, 1))
        adam.zero_grad()
        loss.backward()
        adam.step()
    found = wudi.least_interference(tvs, 30, rate)
    torch.testing.assert_close(found, merged.detach(), atol=1e-8, rtol=1e-6)


def test_regression() -> None:
    """The merge's outputs on all experts' inputs are closest to theirs: least squares says so."""
    rng = torch.Generator().manual_seed(0)
    weights = torch.randn((2, 4, 6), generator=rng).double()
    inputs = torch.randn((2, 30, 6), generator=rng).double()
    grams = inputs.mT @ inputs / 30
    found = regmean.regression(weights, grams, 1.0)
    goal = torch.cat([x @ w.T for x, w in zip(inputs, weights, strict=True)])
    want = torch.linalg.lstsq(inputs.flatten(0, 1), goal).solution.T
    torch.testing.assert_close(found, want)
    diagonal = torch.stack([gram.diag() for gram in grams])  # alone: a mean of columns
    want = (weights * diagonal[:, None]).sum(0) / diagonal.sum(0)
    torch.testing.assert_close(regmean.regression(weights, grams, 0.0), want)


def test_regression_of_few_inputs_leaves_the_rest_at_the_mean() -> None:
    """Fewer inputs than dimensions, one far larger than all, in float32 as a model gives them."""
    rng = torch.Generator().manual_seed(0)
    shared = torch.randn((8, 64), generator=rng)
    weights = shared + 0.1 * torch.randn((3, 8, 64), generator=rng)
    inputs = torch.randn((3, 10, 64), generator=rng)
    inputs[..., 5] *= 300
    grams = inputs.mT @ inputs / 10
    found = regmean.regression(weights, grams, 1.0)
    # the oracle: the least change of their mean, in float64, that meets all 30 inputs at once
    seen, mean = inputs.flatten(0, 1).double(), weights.mean(0).double()
    size = seen.square().mean(0).sqrt()
    goal = torch.cat([x @ w.T for x, w in zip(inputs.double(), weights.double(), strict=True)])
    change = torch.linalg.lstsq(seen / size, goal - seen @ mean.T, driver="gelsd").solution
    want = mean + change.T / size
    torch.testing.assert_close(found.double(), want, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(seen @ found.double().T, goal, atol=1e-2, rtol=1e-3)


def test_regression_by_inputs_that_are_nearly_alike_is_still_least_squares() -> None:
    """What is small, but larger than the rounding of float32 sums, is kept."""
    rng = torch.Generator().manual_seed(0)
    weights = torch.randn((2, 4, 64), generator=rng)
    inputs = torch.randn((2, 400, 64), generator=rng)
    inputs[..., 1] = inputs[..., 0] + 3e-3 * inputs[..., 1]
    found = regmean.regression(weights, inputs.mT @ inputs / 400, 1.0)
    goal = torch.cat([x @ w.T for x, w in zip(inputs.double(), weights.double(), strict=True)])
    want = torch.linalg.lstsq(inputs.flatten(0, 1).double(), goal, driver="gelsd").solution.T
    apart, apart_mean = want[:, 1] - want[:, 0], weights.mean(0)[:, 1] - weights.mean(0)[:, 0]
    error = (found[:, 1] - found[:, 0] - apart).norm()
    assert error < 0.1 * (apart_mean - apart).norm()


def test_coordinate_search_climbs_from_where_it_begins() -> None:
    asked: list[Setting] = []

    def value(setting: Setting) -> float | None:
        asked.append(setting)
        a, b = float(setting["a"]), float(setting["b"])
        return None if a == 0.9 else -((a - 0.7) ** 2) - (b - 0.2) ** 2

    coordinate_search({"a": 0.5, "b": 0.5}, [0.2, 0.5, 0.7, 0.9], value)
    assert asked[0] == {"a": 0.5, "b": 0.5}
    assert len(asked) == 1 + 2 * 2 * 4  # both rounds through both
    assert asked[-1]["a"] == 0.7, "the second is searched at the first one's best"
    assert {"a": 0.7, "b": 0.2} in asked


def own_weights(family: Family, *weights: float) -> torch.Tensor:
    start = family.base.state["model.norm.weight"]
    pairs = zip(family.experts, weights, strict=True)
    return start + sum(w * (e.state["model.norm.weight"] - start) for e, w in pairs)


def test_a_weight_per_expert_is_searched_from_the_best_common_one(
    family: Family, tmp_path: Path
) -> None:
    task = Distance("near", own_weights(family, 0.2, 0.8))
    plan = make_plan(family, task, (PER_EXPERT, "task_arithmetic"))
    rows = {row.name: row for row in run(plan, tmp_path).rows}
    found = rows[PER_EXPERT]
    assert found.setting == {"weight 1": 0.2, "weight 2": 0.8}
    assert found.valid == pytest.approx(1, abs=1e-5)
    assert found.tried > 10 and found.cost is not None and found.cost.prompts == 0
    common = rows["task_arithmetic"]
    assert common.valid is not None and common.valid < 0.99
    assert run(plan, tmp_path).rows == run(plan, tmp_path).rows


@pytest.mark.parametrize("name", ["tsv_merge", "iso_c", "wudi"])
def test_matrices_by_the_formula_and_the_rest_by_the_mean(
    family: Family, tmp_path: Path, name: str
) -> None:
    formula = {
        "tsv_merge": spectral.task_singular_vectors,
        "iso_c": spectral.isotropic,
        "wudi": lambda tvs: wudi.least_interference(tvs, 300, 1e-5),
    }[name]
    found, row = merged_by(family, tmp_path, name)
    for tensor, start in family.base.state.items():
        tvs = torch.stack([e.state[tensor] - start for e in family.experts])
        matrix = start.dim() == 2 and not is_end(tensor)
        want = start + (formula(tvs) if matrix else tvs.mean(0))
        torch.testing.assert_close(found[tensor], want, atol=1e-5, rtol=1e-4)
    assert row.cost.prompts == row.cost.gradient_steps == 0 and row.cost.seconds > 0


def test_localize_and_stitch_without_data(family: Family, tmp_path: Path) -> None:
    """The largest tenth of each expert over all its tensors, by sorting."""
    found, _ = merged_by(family, tmp_path, "localize_and_stitch_dataless")
    base = family.base.state
    names = [name for name in base if not is_end(name)]
    deltas = [{n: e.state[n] - base[n] for n in names} for e in family.experts]
    kept = []
    for delta in deltas:
        flat = torch.cat([d.abs().flatten() for d in delta.values()])
        threshold = flat.sort(descending=True).values[int(0.1 * len(flat)) - 1]
        kept.append({n: d.abs() >= threshold for n, d in delta.items()})
    for name, start in base.items():
        want = start.clone()
        if name in names:
            for i in range(2):  # as ``get_average_masks`` of the authors' localize_utils.py
                both = kept[i][name].float() + (kept[0][name] & kept[1][name])
                share = torch.where(both == 0, 0, 1 / both)
                want += share * deltas[i][name]
        torch.testing.assert_close(found[name], want, atol=1e-6, rtol=1e-5)


def test_other_shapes_are_refused(family: Family, tmp_path: Path) -> None:
    config = llama_config(vocab_size=44)
    larger = Checkpoint.save(tmp_path / "larger", config, random_state(config, 7), torch.float32)
    base, other = (models.Checkpoint(str(x.path)) for x in (family.base, larger))
    sources = Sources(base, [other], [], frozenset(), "cpu")
    with pytest.raises(
        UserError,
        match=r"embed_tokens.weight is \[44, 16\] in '.*larger' and \[40, 16\] in the base; ",
    ):
        sources.vectors("model.embed_tokens.weight")


def test_the_docs_list_every_method_with_its_grid() -> None:
    page = (Path(__file__).parents[1] / "docs" / "peers.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for method in peers(3).values():
        if method.aim:
            continue
        (row,) = [line for line in rows if f"`{method.name}`" in line.split("|")[1]]
        *_, untuned, grid, _ = row.split("|")
        values: dict[str, list[Any]] = {}
        for setting in method.grid:
            for key, value in setting.items():
                if value not in values.setdefault(key, []):
                    values[key].append(value)
        tuned = {k: v for k, v in values.items() if len(v) > 1}
        assert "; ".join(f"{k} {', '.join(map(said, v))}" for k, v in tuned.items()) == grid.strip()
        own = {k: "1/n" if v == 0.3333 else said(v) for k, v in method.untuned.items()}
        assert ", ".join(f"{k} {v}" for k, v in own.items()) == untuned.strip()


def said(value: Any) -> str:
    return str(value) if isinstance(value, bool) else f"{value:g}"


def test_costs_are_kept_and_damage_is_refused(family: Family, tmp_path: Path) -> None:
    plan = make_plan(family, Distance("near", planted(family, 0.5)), ("iso_c",), tuned=False)
    before = run(plan, tmp_path).rows[-1].cost
    path = tmp_path / "costs.jsonl"
    with open(path, "a") as handle:
        handle.write('{"model": "torn')
    assert run(plan, tmp_path).rows[-1].cost == before is not None
    assert path.read_text().endswith("}\n")
    path.write_text('{"model": 3}\n')
    with pytest.raises(UserError, match=r"costs.jsonl, line 1 is damaged; add restart=True"):
        run(plan, tmp_path)
