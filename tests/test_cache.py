"""Base and experts in main memory: the same bytes, and no file read twice that is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergekit_wp.cli import main
from mergekit_wp.errors import UserError
from mergekit_wp.joint import cache
from mergekit_wp.joint.cache import CachePlan
from mergekit_wp.joint.request import NamedExperts
from mergekit_wp.models import lora
from mergekit_wp.models.memory import in_gib
from mergekit_wp.models.pair import Pair, open_pair
from mergekit_wp.models.streaming import Span
from tests.joint_runs import files, line, run
from tests.joint_world import NAMES, load, make_world
from tests.local_ray import LocalRay, on
from tests.models import make_model, save, write_prompts
from tests.test_lora import change_weights, make_adapter
from tests.test_scoring import Quiet

torch.set_num_threads(1)
QUICK = ("llama-tied", "gpt2")
SLOW = ("qwen2", "olmo2", "qwen3_moe", "gemma3")
ROOM = "1GiB"


@pytest.fixture(autouse=True)
def same_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world("llama-tied", tmp_path_factory.mktemp("cache"))


class Reads(Quiet):
    """What is read of weight files after the cache was filled: path and first byte."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []
        read, adapter_file = Span.read, lora.safe_open

        def reading(span: Span, *args: Any, **options: Any) -> torch.Tensor:
            self.found.append((str(span.path), span.start))
            return read(span, *args, **options)

        def opening(path: Path, **options: Any) -> Any:
            self.found.append((str(path), 0))
            return adapter_file(path, **options)

        monkeypatch.setattr(Span, "read", reading)
        monkeypatch.setattr(lora, "safe_open", opening)

    def note(self, text: str) -> None:
        super().note(text)
        if text.startswith("cache: "):
            self.found.clear()

    @property
    def kept(self) -> str:
        [found] = [note for note in self.notes if note.startswith("cache: ")]
        return found


def pairs_of(world: Path, names: tuple[str, ...] = NAMES) -> list[Pair]:
    return [open_pair(str(world / "base"), str(world / name), lambda *_: None) for name in names]


def everything(world: Path) -> int:
    return CachePlan.of(pairs_of(world), 2**30).total


@pytest.mark.parametrize(
    "family", [*QUICK, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]
)
def test_files_are_those_without_a_cache_and_nothing_is_read_again(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, reads = make_world(family, tmp_path), Reads(monkeypatch)
    options = {"unguarded": family == "gpt2"}
    run(world, tmp_path / "read", reads, **options)
    assert reads.found
    run(world, tmp_path / "kept", reads, cache=ROOM, **options)
    assert files(tmp_path / "kept") == files(tmp_path / "read")
    assert not reads.found, "each step had all it needs"
    stored = [sum(p.stat().st_size for p in (world / n).glob("*.safetensors")) for n in NAMES]
    assert everything(world) == pytest.approx(stored[0] + sum(stored), rel=0.2)


@pytest.mark.parametrize("limits", [{}, {"device_map": "auto", "max_memory": {"cpu": 0}}])
def test_what_does_not_fit_is_read(
    limits: dict[str, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(world, tmp_path / "read")
    total = everything(world)
    plan = CachePlan.of(pairs_of(world), total * 3 // 4)
    reads = Reads(monkeypatch)
    run(world, tmp_path / "kept", reads, cache=f"{total * 3 // 4 / 1000}KB", **limits)
    assert files(tmp_path / "kept") == files(tmp_path / "read")
    assert total / 2 < plan.size <= total * 3 // 4
    assert reads.kept == (
        f"cache: {in_gib(plan.size)} of {in_gib(plan.total)} of weights are kept in main memory"
    )
    spans = {
        (str(model._spans[name].path), model._spans[name].start): (path, name)
        for path, model in plan.models.items()
        for name in model.headers
    }
    again = {spans[read] for read in reads.found}
    assert again and again.isdisjoint(plan.chosen)


def test_every_worker_of_a_cluster_has_its_own(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(world, tmp_path / "read")
    kept: list[int] = []
    keep = cache.Checkpoint.keep

    def counted(checkpoint: Any, name: str, **options: Any) -> None:
        kept.append(1)
        keep(checkpoint, name, **options)

    monkeypatch.setattr(cache.Checkpoint, "keep", counted)
    on(monkeypatch, LocalRay(2))
    run(world, tmp_path / "kept", ray=True, cache=ROOM)
    assert files(tmp_path / "kept") == files(tmp_path / "read")
    assert len(kept) == 2 * len(CachePlan.of(pairs_of(world), 2**30).chosen)


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[Path, NamedExperts, tuple[tuple[str, Path], ...]]:
    """A base, two of its adapters, and prompts of each."""
    base = save(make_model("llama-tied"), tmp_path / "base", torch.float32)
    references = []
    for number, name in enumerate(NAMES):
        (tmp_path / name).mkdir()
        adapter, _ = make_adapter(base, tmp_path / name)
        change_weights(_times(1 + number))(adapter)
        references.append((name, f"{base}+{adapter}"))
    experts = NamedExperts(base=str(base), experts=tuple(references))
    prompts = tuple((name, write_prompts(tmp_path / f"{name}.jsonl", 3)) for name in NAMES)
    return base, experts, prompts


def _times(factor: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for weight in weights.values():
            weight.mul_(factor)

    return change


def test_of_adapters_the_factors_are_kept_and_their_model_once(
    adapters: tuple[Path, NamedExperts, tuple[tuple[str, Path], ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, experts, prompts = adapters
    given = {"recipe": experts, "prompts": prompts, "max_new_tokens": 2, "unguarded": True}
    reads = Reads(monkeypatch)
    run(tmp_path, tmp_path / "read", reads, **given)
    assert any("adapter" in path for path, _ in reads.found)
    run(tmp_path, tmp_path / "kept", reads, cache=ROOM, **given)
    assert files(tmp_path / "kept") == files(tmp_path / "read")
    assert not reads.found
    pairs = [open_pair(str(base), name, lambda *_: None) for _, name in experts.experts]
    plan = CachePlan.of(pairs, 2**30)
    assert list(plan.models) == [str(base)]
    factors = [tmp_path / name / "adapter" / lora.WEIGHTS for name in NAMES]
    model = sum(t.nbytes for path in base.glob("*.safetensors") for t in load_file(path).values())
    assert plan.size == plan.total == model + sum(path.stat().st_size for path in factors)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("20", "--cache 20: expected a size in KiB, MiB, GiB, KB, MB or GB, as in 20GiB"),
        ("1KB", "takes 0.00 GiB; give at least so much, or leave it out"),
    ],
)
def test_bad_input(
    size: str, message: str, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(line(world, tmp_path / "out", f"--cache={size}"))
    assert stop.value.code == 2
    assert message in capfd.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_budget_is_refused_before_anything_is_measured(world: Path, tmp_path: Path) -> None:
    said = Quiet()
    with pytest.raises(UserError, match="one layer of the base and all experts takes"):
        run(world, tmp_path / "out", said, cache="1KB")
    assert {name for name, _ in said.stages} <= {"comparing checkpoints", "hashing weights"}


def test_less_memory_than_the_budget(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = pairs_of(world)
    monkeypatch.setattr(cache, "free_memory", lambda _: 1000)
    with pytest.raises(UserError, match="fit into it, but only 0.00 GiB of main memory are free"):
        CachePlan.of(pairs, 2**30)


def test_of_an_expert_only_what_differs_is_kept(world: Path, tmp_path: Path) -> None:
    expert, changed = load(world / "base"), "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        expert.get_parameter(changed).add_(1)
    save(expert, tmp_path / "one")
    pairs = [open_pair(str(world / "base"), str(tmp_path / "one"), lambda *_: None)]
    plan = CachePlan.of(pairs, 2**30)
    assert [name for path, name in plan.chosen if path == str(tmp_path / "one")] == [changed]


def test_one_layer_is_the_least(world: Path) -> None:
    pairs = pairs_of(world)
    partition = pairs[0].partition
    layer = sum(
        side.tensor(name, torch.float32).numel() * 4
        for name in partition.layer_tensors(0)
        for side in (pairs[0].base, *(pair.expert for pair in pairs))
        if side is pairs[0].base or name in pairs[0].changed
    )
    stored = pairs[0].base.weights_dtype
    least = layer // 4 * getattr(torch, stored).itemsize
    assert CachePlan.of(pairs, least).size <= least
    with pytest.raises(UserError, match="one layer of the base and all experts takes"):
        CachePlan.of(pairs, least - 1)
