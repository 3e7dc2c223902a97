"""AIM against its formula, written out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_wp.cli import cli
from mergekit_wp.errors import UserError
from mergekit_wp.merging.aim import activation_importance, apply_aim, untouched
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


def test_every_matrix_is_drawn_back_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's matrices lie the other way round; a mixture's experts are in no linear layer."""
    model = make_model("gpt2")
    save(model, tmp_path / "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    base, merged = dict(model.named_parameters()), dict(perturbed(model).named_parameters())
    importance = activation_importance(model, tokenizer, PROMPTS, 2)
    assert untouched(model, importance) is None and len(importance) == 8
    found = apply_aim(base, merged, importance, 0.4)
    for name, s in importance.items():
        want = merged[name].float().clone()
        for row, value in enumerate(s.flatten().tolist()):  # an input channel is a row
            start = base[name][row].float()
            want[row] = start + (want[row] - start) * (1 - value * 0.6)
        torch.testing.assert_close(found[name].float(), want, atol=1e-6, rtol=1e-5)
    wrong = {"w": torch.ones(3, 1)}
    with pytest.raises(UserError, match=r"w is \[2, 3\]"):
        apply_aim({"w": torch.ones(2, 3)}, {"w": torch.ones(2, 3)}, wrong, 0.5)
    mixture = make_model("mixtral")
    left = untouched(mixture, activation_importance(mixture, tokenizer, PROMPTS, 2))
    assert left is not None and ".mlp." in left and left.endswith("no linear layer has them")
    monkeypatch.setattr("mergekit_wp.merging.aim.untouched", lambda *_: left)
    save(perturbed(model), tmp_path / "merged")
    (tmp_path / "c.jsonl").write_text('{"prompt": "abc"}\n')
    given = ("--base", tmp_path / "gpt2", "--calibration", tmp_path / "c.jsonl")
    done = run_aim(tmp_path / "merged", tmp_path / "drawn", *given)
    assert done.exception is None and left in done.output, "the user is told"
    with pytest.raises(UserError, match="this model has none"):
        activation_importance(torch.nn.Embedding(2, 2), tokenizer, PROMPTS, 2)


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


# --- the command -----------------------------------------------------------------------------


def run_aim(merged: Path, out: Path, *arguments: object) -> Result:
    written = ["aim", str(merged), "--out", str(out), *map(str, arguments)]
    return CliRunner().invoke(cli, written)


@pytest.fixture
def files(world, tmp_path: Path) -> dict[str, Path]:
    """A base, a merge of it with a card, and calibration prompts."""
    model, _ = world
    merged = tmp_path / "merged"
    save(perturbed(model), merged)
    (merged / "README.md").write_text("# A merge\n")
    (merged / "mergekit_config.yml").write_text("merge_method: linear\n")
    (merged / "scores").mkdir()
    (merged / "scores" / "a.safetensors").write_text("scores")
    lines = [json.dumps(p.model_dump(exclude_none=True)) for p in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return {"base": tmp_path / "base", "merged": merged, "prompts": tmp_path / "prompts.jsonl"}


def options(files: dict[str, Path], **changed: object) -> list[object]:
    given = {"base": files["base"], "calibration": files["prompts"], "omega": 0.3} | changed
    return [part for key, value in given.items() for part in (f"--{key}", value)]


def test_the_command_writes_what_the_formula_says(world, files, tmp_path: Path) -> None:
    model, tokenizer = world
    out = tmp_path / "deep" / "out"
    result = run_aim(files["merged"], out, *options(files))
    assert result.exception is None, result.exception
    base, merged = (load_file(files[k] / "model.safetensors") for k in ("base", "merged"))
    want = apply_aim(base, merged, activation_importance(model, tokenizer, PROMPTS, 16), 0.3)
    found = load_file(out / "model.safetensors")
    assert found.keys() == merged.keys()
    for name in found:
        torch.testing.assert_close(found[name], want[name])
    assert any(not torch.equal(found[name], merged[name]) for name in found)
    assert (out / "config.json").read_text() == (files["merged"] / "config.json").read_text()
    assert "omega 0.3, calibrated on 3 prompts" in (out / "README.md").read_text()
    assert (out / "scores" / "a.safetensors").read_text() == "scores"
    assert not (out / "mergekit_config.yml").exists(), "`card` must not take it for the merge"
    AutoModelForCausalLM.from_pretrained(out)


def test_the_command_goes_on_with_little_memory(
    world, files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_aim(files["merged"], tmp_path / "whole", *options(files)).exception is None
    forward, asked, most = type(world[0]).forward, [], 1

    def small(model, input_ids, **options):
        asked.append(len(input_ids))
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, input_ids=input_ids, **options)

    monkeypatch.setattr(type(world[0]), "forward", small)
    result = run_aim(files["merged"], tmp_path / "small", *options(files))
    assert result.exception is None, result.exception
    assert asked == [3, 2, 1, 1, 1]
    assert "out of memory; going on with one sequence per forward pass" in result.stderr
    whole, small_one = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "small")
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(small_one[name], tensor)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (files["base"] / name).rename(files["merged"] / name)
    result = run_aim(files["merged"], tmp_path / "other", *options(files))
    assert f"has no tokenizer; that of '{files['merged']}' is used" in result.stderr
    most = 0
    result = run_aim(files["merged"], tmp_path / "none", *options(files))
    assert "out of memory with one sequence at a time" in str(result.exception)
    assert not (tmp_path / "none").exists()


def test_bad_input_leaves_nothing(world, files, tmp_path: Path) -> None:
    def refused(merged: Path, out: Path, *arguments: object) -> str:
        before = sorted(str(p) for p in tmp_path.rglob("*"))
        result = run_aim(merged, out, *arguments)
        assert result.exception is not None
        assert sorted(str(p) for p in tmp_path.rglob("*")) == before
        return str(result.exception) + result.output

    merged, out = files["merged"], tmp_path / "out"
    assert "is an input" in refused(merged, merged, *options(files))
    assert "is a file" in refused(merged, files["prompts"], *options(files))
    assert "not found" in refused(tmp_path / "none", out, *options(files))
    none = tmp_path / "none.jsonl"
    assert "cannot be read" in refused(merged, out, *options(files, calibration=none))
    assert "0<=x<=1" in refused(merged, out, *options(files, omega=1.5))
    other = {"llama": "qwen2", "qwen2": "llama-tied"}[world[0].config.model_type]
    save(make_model(other), tmp_path / "other")
    assert "but its base" in refused(merged, out, *options(files, base=tmp_path / "other"))
    small = load_file(files["merged"] / "model.safetensors")
    small["model.layers.0.mlp.down_proj.weight"] = torch.zeros(2, 2)
    save_file(small, merged / "model.safetensors", metadata={"format": "pt"})
    assert "is [2, 2] in the merge" in refused(merged, out, *options(files))
