"""Weights that are fetched for a call: the same numbers, and nothing of them is left behind."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

from mergekit_wp.models.offloaded import Offloaded, fetch_when_called, here

torch.set_num_threads(1)


class Store:
    """Numbers of weights, with what was fetched of them."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def fetch(self, name: str, numbers: torch.Tensor) -> torch.Tensor:
        self.fetched.append(name)
        found = numbers.clone()
        self.alive.add(found)
        return found


class Twice(nn.Module):
    """Uses one weight as it is and a view of it, and has a module of its own inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))
        self.inner = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight[2:5].T) * self.inner(x) + x @ self.weight[:3]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), Twice(), nn.Linear(3, 4, bias=False))
    return model.double().requires_grad_(False)


def away() -> tuple[nn.Sequential, Store]:
    """The same network with all weights elsewhere."""
    model, store = network(), Store()
    weights = {
        name: Offloaded.of(p.shape, p.dtype, partial(store.fetch, name, p.detach()), "cpu")
        for name, p in model.named_parameters()
    }
    model.load_state_dict(weights, assign=True)
    fetch_when_called(model)
    return model, store


def all_away(model: nn.Module) -> bool:
    return all(isinstance(p, Offloaded) and p.is_meta for p in model.parameters())


def test_calls_give_the_same_numbers_and_leave_nothing() -> None:
    model, store = away()
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(model(x), network()(x))
    assert sorted(store.fetched) == sorted(name for name, _ in model.named_parameters())
    assert all_away(model) and not store.alive


def test_exchanged_weights_stay_and_are_not_fetched() -> None:
    model, store = away()
    x = torch.randn(5, 3, dtype=torch.float64)
    swapped = {"0.weight": torch.randn(3, 3).double(), "2.inner.bias": torch.ones(3).double()}
    assert torch.equal(
        functional_call(model, swapped, (x,)), functional_call(network(), swapped, x)
    )
    assert not set(swapped) & set(store.fetched) and "0.bias" in store.fetched
    assert all_away(model)


def test_gradients_are_the_same_and_the_graph_holds_no_weights() -> None:
    model, store = away()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    out = model(x)
    assert not store.alive and all_away(model)
    forward = len(store.fetched)
    (found,) = torch.autograd.grad(out.sin().sum(), x, retain_graph=True)
    (want,) = torch.autograd.grad(network()(x).sin().sum(), x)
    assert torch.equal(found, want) and found.abs().min() > 0
    assert len(store.fetched) > forward and not store.alive
    (again,) = torch.autograd.grad(out.sin().sum(), x)
    assert torch.equal(again, want)


@pytest.mark.parametrize("grad", [False, True])
def test_a_call_that_fails_leaves_nothing(grad: bool) -> None:
    model, store = away()
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="shape"):
        model[0](torch.randn(2, 5, dtype=torch.float64))
    assert all_away(model)
    y = torch.randn(3, requires_grad=True)  # no hooks of the failed call are in force
    saved = (y * y).grad_fn._saved_self  # type: ignore[union-attr]
    assert saved is y
    store.alive.clear()
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(model(x), network()(x))


def test_a_weight_that_cannot_be_fetched_leaves_the_others_away() -> None:
    model, _ = away()

    def fail() -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    bias = model[0].bias
    assert isinstance(bias, Offloaded)
    bias.fetch = fail
    with pytest.raises(torch.OutOfMemoryError):
        model(torch.randn(5, 3, dtype=torch.float64))
    assert all_away(model)


def test_here() -> None:
    model, store = away()
    assert torch.equal(here(model[3].weight), network()[3].weight) and store.fetched == ["3.weight"]
    own = network()[3].weight
    assert here(own) is own
