import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_wp.merging.fusion import (
    component_gates,
    delta_norm,
    fuse,
    n_best,
    normalise,
)
from mergekit_wp.terms import FUSIONS

SCORE = st.floats(-10, 10, allow_subnormal=False, width=32)
TABLE = (
    st.integers(1, 4)
    .flatmap(lambda n: st.lists(st.lists(SCORE, min_size=n, max_size=n), min_size=1, max_size=8))
    .map(lambda rows: torch.tensor(rows, dtype=torch.float64).T)
)
POWER = st.floats(0, 60)


def ones(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(scores))


@given(TABLE, POWER)
@settings(deadline=None)
def test_shares_sum_to_one_where_anyone_is_positive(scores: torch.Tensor, power: float) -> None:
    total = component_gates(scores, ones(scores), fusion="share", power=power).sum(0)
    expected = (scores > 0).any(0).double()
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=0)


@given(TABLE, POWER, st.sampled_from(FUSIONS))
@settings(deadline=None)
def test_no_score_above_zero_no_gate(scores: torch.Tensor, power: float, fusion: str) -> None:
    gates = component_gates(scores, ones(scores), fusion=fusion, power=power)
    assert torch.isfinite(gates).all()
    assert (gates[scores <= 0] == 0).all()


@given(TABLE, POWER, st.sampled_from(FUSIONS), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_experts_and_components_can_be_listed_in_any_order(
    scores: torch.Tensor, power: float, fusion: str, random: object
) -> None:
    if fusion == "winner":  # ties go to the first listed: make none
        scores = scores + torch.arange(scores.numel()).reshape(scores.shape) * 1e-3
    weights = torch.arange(1.0, len(scores) + 1)
    e = list(range(scores.shape[0]))
    c = list(range(scores.shape[1]))
    random.shuffle(e)
    random.shuffle(c)
    plain = component_gates(scores, weights, fusion=fusion, power=power)
    mixed = component_gates(scores[e][:, c], weights[e], fusion=fusion, power=power)
    torch.testing.assert_close(mixed, plain[e][:, c])


def test_gates_by_hand() -> None:
    scores = torch.tensor([[0.4, 0.1, -1.0, 0.0], [0.1, 0.1, 0.2, -0.5]])
    weights = torch.tensor([1.0, 3.0])

    def gates(fusion: str, **options: float) -> list[list[float]]:
        made = component_gates(scores, weights, fusion=fusion, **options)
        return [[round(x, 6) for x in row] for row in made.tolist()]

    assert gates("share") == [[0.666667, 0.5, 0, 0], [1, 1.5, 3, 0]]
    assert gates("share", power=1.0) == [[0.8, 0.5, 0, 0], [0.6, 1.5, 3, 0]]
    assert gates("share", power=0.0) == [[0.5, 0.5, 0, 0], [1.5, 1.5, 3, 0]]
    assert gates("winner") == [[1, 1, 0, 0], [0, 0, 3, 0]]
    assert gates("gate", scale=2.0) == [[2, 2, 0, 0], [6, 6, 6, 0]]


def test_tiny_scores_and_large_powers_do_not_vanish() -> None:
    scores = torch.tensor([[1e-30, 1e-300], [2e-30, 1e-300]], dtype=torch.float64)
    gates = component_gates(scores, torch.ones(2), fusion="share", power=60.0)
    torch.testing.assert_close(gates.sum(0), torch.ones(2, dtype=torch.float64))
    assert gates[:, 1].tolist() == [0.5, 0.5]


def test_scores_are_divided_by_the_positive_sum_of_all_kinds() -> None:
    made = normalise({"head": torch.tensor([[1.0, -2.0]]), "tensor": torch.tensor([3.0])})
    assert made.values["head"].tolist() == [[0.25, -0.5]]
    assert made.values["tensor"].tolist() == [0.75]
    assert made.ranks["head"].tolist() == [[1, 2]]
    assert made.ranks["tensor"].tolist() == [0]


def test_no_positive_score_normalises_to_nothing() -> None:
    made = normalise({"head": torch.tensor([[-1.0, 0.0]])})
    assert made.values["head"].tolist() == [[0, 0]]


@given(st.lists(SCORE, min_size=1, max_size=30), st.floats(0, 1))
@settings(deadline=None)
def test_density_keeps_the_best_and_only_so_many(values: list[float], density: float) -> None:
    made = normalise({"head": torch.tensor([values])})
    kept = made.cut("head", 0, density)
    k = n_best(len(values), density)
    assert (kept > 0).sum() == min(k, sum(v > 0 for v in values))
    if 0 < k < len(values):
        assert (made.ranks["head"][0] < k).sum() == k
        assert sorted(values)[-k] == min(
            v for v, rank in zip(values, made.ranks["head"][0].tolist(), strict=True) if rank < k
        )


def test_n_best() -> None:
    assert [n_best(10, d) for d in (0, 0.01, 0.25, 1)] == [0, 1, 2, 10]


def test_equal_scores_are_cut_in_order() -> None:
    made = normalise({"head": torch.ones(1, 4)})
    assert made.cut("head", 0, 0.5).tolist() == [0.25, 0.25, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fuse_equals_its_formula(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_wp.merging.fusion.CHUNK", 10)  # several blocks of rows
    torch.manual_seed(0)
    base, one, two = (torch.randn(6, 4).to(dtype) for _ in range(3))
    gates = torch.rand(2, 6, 1, dtype=torch.float64)
    b, x, y = base.double(), one.double(), two.double()
    expected = b + gates[0] * (x - b) + gates[1] * (y - b)
    merged = fuse(base, [one, two], gates)
    assert merged.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(merged.double(), expected, atol=4 * eps, rtol=eps)


def test_a_gate_of_one_gives_the_expert_exactly() -> None:
    base = torch.tensor([[1e8, 1.0], [1e8, 1.0]])
    one = torch.tensor([[1e-8, 1 / 3], [1e-8, 1 / 3]])
    two = torch.full((2, 2), 7.0)
    gates = torch.tensor([[[1.0], [0.0]], [[0.0], [0.5]]], dtype=torch.float64)
    merged = fuse(base, [one, two], gates)
    assert torch.equal(merged[0], one[0])
    torch.testing.assert_close(merged[1], (base[1] + two[1]) / 2)
    assert torch.equal(fuse(base, [one, two], torch.tensor([[[0.0]], [[1.0]]])), two)
    assert torch.equal(fuse(base, [one, two], torch.zeros(2, 1, 1)), base)
    half = torch.full((2, 1, 1), 0.3)
    assert torch.equal(fuse(base, [base, base], half), base)


def test_fuse_takes_scalars_columns_and_gradients() -> None:
    base, one = torch.tensor(1.0), torch.tensor(3.0)
    assert fuse(base, [one], torch.tensor([0.5])) == 2
    wide = torch.zeros(3, 2, requires_grad=True)
    merged = fuse(wide, [torch.ones(3, 2)], torch.tensor([[[0.25, 0.5]]]))
    assert merged.tolist() == [[0.25, 0.5]] * 3
    merged.sum().backward()
    assert wide.grad is not None and wide.grad.tolist() == [[0.75, 0.5]] * 3


@pytest.mark.parametrize("shape", [(), (5,), (7, 3), (2, 3, 4)])
def test_delta_norm(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_wp.merging.fusion.CHUNK", 4)
    base, expert = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    expected = float((expert.double() - base.double()).norm())
    assert delta_norm(base, expert) == pytest.approx(expected, rel=1e-5)


def test_path_scores_are_gates() -> None:
    scores = torch.tensor([[0.0, 0.3, 1.0], [0.5, -0.1, 1.0]])
    gates = component_gates(scores, torch.tensor([1.0, 2.0]), fusion="path", scale=0.5)
    want = [[0.0, 0.15, 0.5], [0.5, 0.0, 1.0]]
    torch.testing.assert_close(gates, torch.tensor(want).double())
