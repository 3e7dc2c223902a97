"""Adapters against peft's own merge, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mergekit_wp.checkpoints import Checkpoint, open_pair
from mergekit_wp.commands.merge import merge
from mergekit_wp.errors import UserError
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from tests.models import make_model, save, save_tokenizer, write_prompts
from tests.test_scoring import Quiet

torch.set_num_threads(1)


def make_adapter(base: Path, folder: Path, **options: Any) -> tuple[Path, Path]:
    """An adapter with random weights, and the model peft merges it into."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = options.pop("target_modules", ["q_proj", "v_proj", "down_proj"])
    config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, **options)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    save_tokenizer(folder / "merged")
    return folder / "adapter", folder / "merged"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(make_model("llama-tied"), tmp_path / "base", torch.float32)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 4}}], ids=str
)
def test_every_tensor_is_the_one_peft_merges(base: Path, tmp_path: Path, options) -> None:
    adapter, merged = make_adapter(base, tmp_path, **options)
    ours, theirs = Checkpoint(f"{base}+{adapter}"), Checkpoint(str(merged))
    start, differ = Checkpoint(str(base)), 0
    for name in theirs.headers:
        want = theirs.tensor(name, torch.float32)
        torch.testing.assert_close(ours.tensor(name, torch.float32), want, rtol=1e-6, atol=1e-6)
        differ += not torch.equal(want, start.tensor(name, torch.float32))
    assert differ == 6  # two layers


def test_transposed_weights(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "base")
    adapter, merged = make_adapter(
        tmp_path / "base", tmp_path, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    )
    ours, theirs = Checkpoint(f"{tmp_path / 'base'}+{adapter}"), Checkpoint(str(merged))
    for name, _ in model.named_parameters():
        want = theirs.tensor(name, torch.float32)
        torch.testing.assert_close(ours.tensor(name, torch.float32), want, rtol=1e-6, atol=1e-6)


def scored(base: Path, expert: str, out: Path) -> Any:
    prompts = write_prompts(out.with_suffix(".jsonl"), 3)
    request = ScoreRequest(
        base=str(base), expert=expert, prompts=prompts, out=out, dtype="float64", max_new_tokens=3
    )
    return score(request, Quiet())


def test_scores_are_those_of_the_merged_model_and_merge_it(base: Path, tmp_path: Path) -> None:
    adapter, merged = make_adapter(base, tmp_path)
    reference = f"{base}+{adapter}"
    one = scored(base, reference, tmp_path / "one.safetensors")
    two = scored(base, str(merged), tmp_path / "two.safetensors")
    assert one.manifest.expert.reference == reference
    for key, tensor in one.tensors.items():
        torch.testing.assert_close(tensor, two.tensors[key], rtol=1e-3, atol=1e-5)
    recipe = tmp_path / "recipe.yml"
    parameters = {"scores": str(tmp_path / "one.safetensors")}
    recipe.write_text(
        yaml.safe_dump(
            {
                "merge_method": "weight_patching",
                "base_model": str(base),
                "models": [{"model": reference, "parameters": parameters}],
                "parameters": {"fusion": "gate"},
                "dtype": "float32",
            }
        )
    )
    options = ["--lora-merge-cache", str(tmp_path / "cache")]
    done = CliRunner().invoke(merge, [str(recipe), str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    found, start = load_file(tmp_path / "out" / "model.safetensors"), Checkpoint(str(base))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(found[name], start.tensor(name, torch.float32))


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def change_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(adapter: Path) -> None:
        weights = load_file(adapter / "adapter_model.safetensors")
        change(weights)
        save_file(weights, adapter / "adapter_model.safetensors")

    return apply


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_config(use_dora=True), "use_dora = true, which is more than plain LoRA"),
        (change_config(modules_to_save=["lm_head"]), r"modules_to_save = \[\"lm_head\"\]"),
        (change_config(bias="all"), "bias = \"all\""),
        (change_config(alpha_pattern={"q_proj": 4}), "alpha_pattern"),
        (change_config(init_lora_weights="pissa"), "init_lora_weights = \"pissa\""),
        (change_config(peft_type="IA3"), "is of type IA3; only LORA"),
        (change_config(lora_alpha=None), "adapter_config.json cannot be read"),
        (lambda a: (a / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
        (lambda a: (a / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (
            lambda a: (a / "adapter_model.safetensors").write_bytes(b"no"),
            "adapter_model.safetensors is damaged",
        ),
        (
            change_weights(lambda w: w.pop(f"{Q}.lora_B.weight")),
            "only lora_A of model.layers.0.self_attn.q_proj.weight",
        ),
        (
            change_weights(lambda w: w.update({f"{Q}.lora_A.weight": torch.zeros(2, 5)})),
            r"does not fit: lora_A is \[2, 5\]",
        ),
        (
            change_weights(lambda w: w.update({"base_model.model.lm_head.lora_A.weight": 
                torch.zeros(2, 16), "base_model.model.lm_head.lora_B.weight": torch.zeros(40, 2)})),
            "changes lm_head.weight, of which its model has no weight of its own",
        ),
        (
            change_weights(lambda w: w.update({f"{Q}.lora_magnitude_vector": torch.zeros(3)})),
            "lora_magnitude_vector .* no plain LoRA matrix",
        ),
        (change_weights(lambda w: w.clear()), "holds no weights"),
    ],
)  # fmt: skip
def test_refused(base: Path, tmp_path: Path, change, message) -> None:
    adapter, _ = make_adapter(base, tmp_path)
    change(adapter)
    with pytest.raises(UserError, match=message):
        Checkpoint(f"{base}+{adapter}")


def test_a_missing_adapter_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model folder '.*nowhere' not found"):
        Checkpoint(f"{base}+{tmp_path}/nowhere")


def test_nan_in_an_adapter_is_named(base: Path, tmp_path: Path) -> None:
    adapter, _ = make_adapter(base, tmp_path)
    change_weights(lambda w: w[f"{Q}.lora_A.weight"].fill_(torch.nan))(adapter)
    with pytest.raises(UserError, match=r"q_proj.weight holds NaN"):
        open_pair(str(base), f"{base}+{adapter}", lambda *_: None)


def test_commands_that_need_whole_models_say_so(base: Path, tmp_path: Path) -> None:
    adapter, _ = make_adapter(base, tmp_path)
    with pytest.raises(UserError, match="compare needs whole models"):
        Checkpoint(f"{base}+{adapter}").require_whole("compare")
