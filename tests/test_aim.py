"""AIM against its formula, written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from mergekit_wp.aim import activation_importance, apply_aim
from mergekit_wp.errors import UserError
from mergekit_wp.prompts import Prompt
from tests.models import EOS, LETTERS, make_model, perturbed, save

PROMPTS = [Prompt(prompt="abc"), Prompt(prompt="b", response="dd"), Prompt(prompt="aghkz")]


def ids_of(prompt: Prompt) -> list[int]:
    assert isinstance(prompt.prompt, str)
    tail = [] if prompt.response is None else [*map(LETTERS.index, prompt.response), EOS]
    return [*map(LETTERS.index, prompt.prompt), *tail]


@pytest.fixture(params=["llama-tied", "qwen2"])
def world(request: pytest.FixtureRequest, tmp_path: Path):
    model = make_model(request.param)
    save(model, tmp_path / "base")
    return model, AutoTokenizer.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_importance_is_the_mean_input_of_real_tokens(world, batch_size: int) -> None:
    model, tokenizer = world
    found = activation_importance(model, tokenizer, PROMPTS, batch_size)
    down = model.model.layers[1].mlp.down_proj
    seen: list[torch.Tensor] = []
    handle = down.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0].abs()))
    for prompt in PROMPTS:
        model(torch.tensor([ids_of(prompt)]))
    handle.remove()
    mean = torch.cat(seen).mean(0)
    want = (mean / mean.max()).float().detach()
    torch.testing.assert_close(found["model.layers.1.mlp.down_proj.weight"], want)
    assert all(float(s.max()) == pytest.approx(1) for s in found.values())
    assert ("lm_head.weight" in found) is not model.config.tie_word_embeddings


def test_the_formula(world) -> None:
    model, tokenizer = world
    base = dict(model.named_parameters())
    merged = dict(perturbed(model).named_parameters())
    importance = activation_importance(model, tokenizer, PROMPTS, 2)
    found = apply_aim(base, merged, importance, 0.4)
    for name, tensor in merged.items():
        want = tensor.float().clone()
        if name in importance:
            for j, s in enumerate(importance[name].tolist()):
                start = base[name][:, j].float()
                want[:, j] = start + (want[:, j] - start) * (1 - s * 0.6)
        torch.testing.assert_close(found[name].float(), want, atol=1e-6, rtol=1e-5)
        assert found[name].dtype == tensor.dtype


def test_omega_one_changes_nothing_and_zero_keeps_the_busiest_channel() -> None:
    base, merged = {"w": torch.zeros(2, 3)}, {"w": torch.ones(2, 3), "norm": torch.ones(3)}
    s = {"w": torch.tensor([1.0, 0.5, 0.0])}
    assert torch.equal(apply_aim(base, merged, s, 1.0)["w"], merged["w"])
    assert apply_aim(base, merged, s, 0.0)["w"].tolist() == [[0, 0.5, 1]] * 2
    assert apply_aim(base, merged, s, 0.0)["norm"] is merged["norm"]
    half = apply_aim(base, {"w": torch.ones(2, 3).bfloat16()}, s, 0.0)["w"]
    assert half.dtype == torch.bfloat16


def test_bad_input(world) -> None:
    model, tokenizer = world
    w = {"w": torch.ones(2, 3)}
    with pytest.raises(UserError, match="omega must be from 0 to 1, not 1.5"):
        apply_aim(w, w, {"w": torch.ones(3)}, 1.5)
    with pytest.raises(UserError, match=r"w is \[2, 3\] in the merge and \[2, 4\] in the base"):
        apply_aim({"w": torch.ones(2, 4)}, w, {"w": torch.ones(4)}, 0.5)
    with pytest.raises(UserError, match="do not both have v"):
        apply_aim(w, w, {"v": torch.ones(3)}, 0.5)
    with pytest.raises(UserError, match="holds none"):
        activation_importance(model, tokenizer, [], 2)
