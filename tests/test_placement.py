"""Where weights go: accelerate's device map, with the device that computes first."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mergekit_wp.errors import UserError
from mergekit_wp.models import placement as module
from mergekit_wp.models.load import skeleton
from mergekit_wp.models.placement import (
    DISK,
    check_places,
    free_places,
    parse_max_memory,
    placement,
)

KIB = 2**10


def llama(layers: int = 4) -> torch.nn.Module:
    """Layers of 48 KiB, an embedding of 16 KiB that is also the head, in float32."""
    return skeleton(
        LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=85,
            num_hidden_layers=layers,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
    )


def placed(device: str, limits: dict[str, int], dtype: torch.dtype = torch.float32) -> list[str]:
    """Places of the embedding, of the layers in order, and of the last norm."""
    found = placement(llama(), LlamaDecoderLayer, dtype, device, limits)
    by_layer = [
        {place for name, place in found.items() if name.startswith(f"model.layers.{i}.")}
        for i in range(4)
    ]
    assert all(len(places) == 1 for places in by_layer)
    layers = [place for (place,) in by_layer]
    assert set(found) == {name for name, _ in llama().named_parameters()}
    return [found["model.embed_tokens.weight"], *layers, found["model.norm.weight"]]


def test_the_device_is_filled_first_and_keeps_room_for_a_layer() -> None:
    size = sum(p.nbytes for p in llama().model.layers[0].parameters())
    assert size == pytest.approx(48 * KIB, rel=0.02)
    assert placed("cpu", {"cpu": 10**6}) == ["cpu"] * 6
    assert placed("cpu", {"cpu": 16 * KIB + 3 * size}) == ["cpu"] * 3 + [DISK] * 3
    assert placed("cpu", {"cpu": 0}) == [DISK] * 6


def test_twice_the_bytes_a_number_take_twice_the_room() -> None:
    limits = {"cpu": 180 * KIB}
    assert placed("cpu", limits).count("cpu") > placed("cpu", limits, torch.float64).count("cpu")
    assert placed("cpu", {"cpu": 360 * KIB}, torch.float64) == placed("cpu", limits)


def test_other_gpus_then_main_memory_then_the_checkpoints() -> None:
    limits = {"0": 110 * KIB, "1": 130 * KIB, "cpu": 110 * KIB}
    # cuda:1 computes: it comes first and keeps its name
    assert placed("cuda:1", limits) == ["cuda:1", "cuda:1", "cuda:0", "cuda:0", "cpu", "cpu"]
    assert placed("cuda:1", {"1": 130 * KIB}) == ["cuda:1", "cuda:1"] + [DISK] * 4


def test_free_memory_is_the_limit_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda:0": 1000, "cuda:1": 2000, "cpu": 3000}
    monkeypatch.setattr(module, "free_memory", free.__getitem__)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert free_places("cuda:1") == {"0": 900, "1": 1000, "cpu": 2700}
    assert free_places("cpu") == {"cpu": 1500}
    assert placed("cpu", {}) == [DISK] * 6


def test_limits_as_a_user_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "check_device", lambda _: None)
    found = parse_max_memory(["0=1.5GiB", "12=2MB", "cpu=3KiB"], "cuda")
    assert found == {"0": 3 * 2**29, "12": 2 * 10**6, "cpu": 3 * KIB}
    assert parse_max_memory([], "cpu") == {}


@pytest.mark.parametrize(
    ("texts", "device", "message"),
    [
        (["cpu"], "cpu", "max_memory=cpu: expected DEVICE=SIZE"),
        (["cpu=20"], "cpu", "as in 0=20GiB or cpu=60GiB"),
        (["cpu=20gb"], "cpu", "expected DEVICE=SIZE"),  # to accelerate, gigabits
        (["cuda:0=20GiB"], "cuda", "'cpu' or the number of a GPU"),
        (["disk=20GiB"], "cuda", "expected DEVICE=SIZE"),
        (["cpu=1GiB", "cpu=2GiB"], "cpu", "'cpu' is given twice"),
        (["0=1GiB"], "cpu", "max_memory=0=1GiB: with device=cpu"),
        (["99=1GiB"], "cuda", "device 'cuda:99' cannot be used here"),
    ],
)
def test_limits_that_are_none(texts: list[str], device: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_max_memory(texts, device)


def test_devices_without_a_map() -> None:
    check_places("cuda:1")
    with pytest.raises(UserError, match="device_map works with device=cpu and cuda, not with"):
        check_places("mps")
