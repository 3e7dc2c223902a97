"""The partition: every weight belongs to exactly one fine component."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    CLIPConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import mergekit_wp.components as gate_layouts
from benchmarks.components import components, fine_components, part_of, slices
from mergekit_wp.architectures import Dims
from mergekit_wp.architectures.families import LLAMA
from mergekit_wp.components import Partition, layout_of
from mergekit_wp.engine.products import products
from mergekit_wp.errors import UserError
from mergekit_wp.models.load import parameter_names, skeleton
from mergekit_wp.terms import KINDS


@st.composite
def configs(draw: st.DrawFn) -> object:
    groups = draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    family = draw(st.sampled_from([LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config]))
    options = {
        "vocab_size": draw(st.integers(2, 9)),
        "hidden_size": 4 * heads,
        "intermediate_size": draw(st.integers(1, 7)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": draw(st.sampled_from([2, 4, 6])),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": None,
    }
    if family in (LlamaConfig, Qwen3Config):
        options["attention_bias"] = draw(st.booleans())
    if family is LlamaConfig:
        options["mlp_bias"] = draw(st.booleans())
    if family is Qwen2Config:
        del options["head_dim"]
    return family(**options)


def partition_of(config: object) -> Partition:
    model = skeleton(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert list(shapes) == parameter_names(model)
    return Partition(Dims.from_config(config), shapes)


@settings(max_examples=25, deadline=None)
@given(configs())
def test_every_weight_belongs_to_exactly_one_fine_component(config: object) -> None:
    partition = partition_of(config)
    owners = {name: torch.zeros(shape) for name, shape in partition.shapes.items()}
    for component in fine_components(partition):
        for name, index in slices(partition, component).items():
            owners[name][index] += 1
    assert all((count == 1).all() for count in owners.values())


@settings(max_examples=10, deadline=None)
@given(configs())
def test_coarse_views_cover_what_they_say(config: object) -> None:
    partition = partition_of(config)
    named = [c.name for c in components(partition, "tensor")]
    assert named == list(partition.shapes)
    inside = {n for layer in components(partition, "layer") for n in slices(partition, layer)}
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert inside == set(partition.shapes) - outside


@settings(max_examples=25, deadline=None)
@given(configs(), st.randoms(use_true_random=False))
def test_expand_and_reduce_agree_with_slices(config: object, random: object) -> None:
    partition = partition_of(config)
    for name, layout in partition.layouts.items():
        shape = partition.shapes[name]
        values = torch.arange(1.0, layout.count + 1)
        spread = layout.expand(values[0] if layout.whole else values, shape)
        full = spread.expand(shape)
        for i in range(layout.count):
            assert (full[part_of(layout, i, shape)] == values[i]).all()
        if not layout.whole:
            ones = torch.ones([shape[d] for d in layout.dims])
            owned = torch.bincount(layout.places(shape).flatten(), minlength=layout.count)
            assert layout.reduce(ones).tolist() == owned.tolist()


def test_heads_own_query_rows_bias_and_output_columns() -> None:
    config = Qwen2Config(
        vocab_size=9, hidden_size=8, intermediate_size=5, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    partition = partition_of(config)
    head = list(components(partition, "head"))[5]
    assert (head.layer, head.index) == (1, 1)
    assert slices(partition, head) == {
        "model.layers.1.self_attn.q_proj.weight": (slice(2, 4), slice(None)),
        "model.layers.1.self_attn.q_proj.bias": (slice(2, 4),),
        "model.layers.1.self_attn.o_proj.weight": (slice(None), slice(2, 4)),
    }
    neuron = list(components(partition, "neuron"))[3]
    assert slices(partition, neuron) == {
        "model.layers.0.mlp.gate_proj.weight": (slice(3, 4), slice(None)),
        "model.layers.0.mlp.up_proj.weight": (slice(3, 4), slice(None)),
        "model.layers.0.mlp.down_proj.weight": (slice(None), slice(3, 4)),
    }
    assert {c.kind for kind in KINDS for c in components(partition, kind)} == set(KINDS)


def test_an_architecture_without_a_map_has_layers_and_tensors() -> None:
    dims = Dims.from_config(BertConfig(num_hidden_layers=3))
    assert (dims.n_layers, dims.n_heads, dims.n_kv_groups, dims.n_neurons) == (3, 0, 0, 0)
    assert layout_of("encoder.layer.2.attention.query.weight", dims).layer == 2
    assert layout_of("h2o.layer.2.experts.0.up", dims).layer == 2
    assert layout_of("encoder.layer.3.attention.query.weight", dims).layer is None
    assert layout_of("model.layers.0.self_attn.q_proj.weight", dims).whole


def test_dimensions_without_an_architecture_are_nobodys() -> None:
    """There is no map to fall back to: whoever forgets it would get another family's."""
    with pytest.raises(TypeError, match="architecture"):
        Dims(n_layers=1, n_heads=3, n_kv_groups=3, n_neurons=2)  # type: ignore[call-arg]


def test_a_config_that_is_no_decoders_is_refused() -> None:
    with pytest.raises(UserError, match="'clip' is no text decoder: its config has no num_hidden"):
        Dims.from_config(CLIPConfig())


def test_a_size_that_does_not_fit_is_refused() -> None:
    dims = Dims(n_layers=1, n_heads=3, n_kv_groups=3, n_neurons=2, architecture=LLAMA)
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(UserError, match=r"q_proj.weight: dimension 0 has 8 entries, not a mult"):
        layout_of(name, dims).block((8, 4))


@pytest.mark.parametrize("dims", [(), (0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
def test_products_in_pieces_are_those_of_the_whole(
    dims: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_wp.engine.products._IN_CACHE", 30)  # two of five rows at a time
    torch.manual_seed(0)
    gradient, delta = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    letters = "abc"
    want = torch.einsum(f"abc,abc->{''.join(letters[d] for d in dims)}", gradient, delta)
    layout = gate_layouts.OwnGates("w", (5, 4, 6), (dims,))
    found = layout.collect(products(gradient, delta, layout.parts))
    assert found.tolist() == pytest.approx(want.flatten().tolist())
