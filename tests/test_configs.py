"""Configs are compared by what they compute; files of which no model can be made are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    StableLmConfig,
)

from mergekit_wp.errors import UserError
from mergekit_wp.merging import preflight, recipe
from mergekit_wp.models.generation import end_tokens
from mergekit_wp.models.load import load_folder
from mergekit_wp.models.pair import Pair, open_pair
from mergekit_wp.models.refusals import refuse_adapter_alone
from tests.models import make_model, perturbed, save

torch.set_num_threads(1)

_SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 39,
    "pad_token_id": None,
}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
Changes = dict[str, Any]


def rope(**stated: Any) -> Changes:
    return {"rope_parameters": {"rope_theta": 10000.0, **stated}}


def opened(folder: Path, base: PreTrainedConfig, expert: PreTrainedConfig) -> Pair:
    """A pair with these configs and different weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(base)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "expert")
    expert.architectures = [type(model).__name__]
    expert.save_pretrained(folder / "expert")
    return open_pair(str(folder / "base"), str(folder / "expert"), lambda *_: None)


def furthest(base: PreTrainedConfig, expert: PreTrainedConfig) -> float:
    """How far the logits of the same weights are apart, at lengths short and long."""
    torch.manual_seed(0)
    one = AutoModelForCausalLM.from_config(base, attn_implementation="eager").double().eval()
    other = AutoModelForCausalLM.from_config(expert, attn_implementation="eager").double().eval()
    other.load_state_dict(one.state_dict())
    apart = 0.0
    for length in (5, 17, 40, 70, 140):
        ids = torch.randint(0, 39, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            apart = max(apart, float((one(ids).logits - other(ids).logits).abs().max()))
    return apart


@pytest.mark.parametrize(
    ("kind", "base", "expert", "differing"),
    [
        (LlamaConfig, {}, {"max_position_embeddings": 128}, None),
        (LlamaConfig, {}, {"attention_dropout": 0.1, "pad_token_id": 3}, None),
        (
            LlamaConfig,
            rope(rope_type="linear", factor=2.0),
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            None,
        ),
        (LlamaConfig, rope(rope_type="linear", factor=1.0), {}, None),
        (
            LlamaConfig,
            rope(**_YARN),
            rope(**_YARN, beta_fast=32, beta_slow=1, attention_factor=1.138629436),
            None,
        ),
        (LlamaConfig, {"hidden_act": "silu"}, {"hidden_act": "swish"}, None),
        (LlamaConfig, {"hidden_act": "gelu_new"}, {"hidden_act": "gelu_pytorch_tanh"}, None),
        (Qwen2Config, {"sliding_window": 8}, {"sliding_window": 16}, None),
        (StableLmConfig, {}, {"max_position_embeddings": 128, "attention_dropout": 0.1}, None),
        (LlamaConfig, rope(**_YARN), rope(**_YARN, beta_slow=3), "rope_parameters"),
        (
            LlamaConfig,
            rope(rope_type="yarn", factor=4.0),
            rope(rope_type="yarn", factor=4.0) | {"max_position_embeddings": 128},
            "(rope_parameters|max_position_embeddings)",
        ),
        (
            LlamaConfig,
            rope(rope_type="dynamic", factor=2.0),
            rope(rope_type="dynamic", factor=2.0) | {"max_position_embeddings": 128},
            "max_position_embeddings: base .* has 64, expert .* has 128",
        ),
        (
            LlamaConfig,
            rope(**_LONGROPE),
            rope(**_LONGROPE) | {"max_position_embeddings": 128},
            "max_position_embeddings: base .* has 64, expert .* has 128",
        ),
        (
            LlamaConfig,
            rope(**_LONGROPE, factor=4.0),
            rope(**_LONGROPE, factor=4.0) | {"max_position_embeddings": 128},
            None,
        ),
        (
            LlamaConfig,
            rope(**_LONGROPE, factor=4.0),
            rope(**{**_LONGROPE, "long_factor": [3.0] * 16}, factor=4.0),
            "rope_parameters",
        ),
        (
            LlamaConfig,
            rope(**_LONGROPE, factor=4.0),
            rope(**{**_LONGROPE, "original_max_position_embeddings": 32}, factor=4.0),
            "rope_parameters",
        ),
        (LlamaConfig, {}, {"hidden_act": "gelu"}, "hidden_act: base .* has silu, expert .* gelu"),
        (LlamaConfig, {}, {"rms_norm_eps": 1e-2}, "rms_norm_eps: base .* 1e-06, expert .* 0.01"),
        (MistralConfig, {"sliding_window": None}, {"sliding_window": 8}, "sliding_window"),
        (StableLmConfig, {}, {"layer_norm_eps": 1e-2}, "layer_norm_eps"),
        (StableLmConfig, {}, {"rope_parameters": {"rope_theta": 5e4}}, "rope_parameters"),
    ],
)
def test_configs_are_alike_where_the_same_weights_compute_alike(
    kind: Callable[..., PreTrainedConfig],
    base: Changes,
    expert: Changes,
    differing: str | None,
    tmp_path: Path,
) -> None:
    """The oracle: logits of transformers' own models."""
    one, other = kind(**{**_SIZES, **base}), kind(**{**_SIZES, **expert})
    apart = furthest(one, other)
    if differing is None:
        assert apart < 1e-6
        opened(tmp_path, one, other)
        return
    assert apart > 1e-4
    with pytest.raises(UserError, match=f"^configs differ in {differing}"):
        opened(tmp_path, one, other)


def test_positions_that_are_worked_out_may_go_further(tmp_path: Path) -> None:
    """GPT-J keeps a table with a row for every position."""
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    one, other = (GPTJConfig(**sizes, n_positions=n) for n in (16, 32))
    opened(tmp_path, one, other)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    base = make_model("llama-tied")
    save(base, folder / "base", torch.float32)
    save(perturbed(base), folder / "expert", torch.float32)
    return folder


def edited(source: Path, target: Path, file: str = "config.json", **changes: Any) -> Path:
    shutil.copytree(source, target)
    path = target / file
    stated = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**stated, **changes}))
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_token_id": 40}, "pad_token_id = 40, but vocab_size = 40, so that tokens end at 39"),
        ({"hidden_act": "swigluu"}, "hidden_act = 'swigluu', which transformers does not know"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn': {'factor'}"),
        ({"num_hidden_layers": "2"}, "'num_hidden_layers' expected int, got str"),
        ({"hidden_size": None}, "'hidden_size' expected int, got NoneType"),
        ({"num_attention_heads": 5}, "The hidden size (16) is not a multiple of the number of att"),
        (
            {"vocab_size": 48},
            "has vocab_size = 48, which makes tensor model.embed_tokens.weight [48, 16], but its "
            "weights hold [40, 16]",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("side", ["base", "expert"])
def test_a_config_that_does_not_build_is_one_line(
    pair: Path, tmp_path: Path, side: str, changes: Changes, message: str
) -> None:
    broken = str(edited(pair / side, tmp_path / "broken", **changes))
    names = [broken, str(pair / "expert")] if side == "base" else [str(pair / "base"), broken]
    with pytest.raises(UserError) as refused:
        open_pair(*names, lambda *_: None)
    assert message in str(refused.value) and f"model '{broken}'" in str(refused.value)


def test_a_config_that_is_none_is_refused_in_a_recipe(pair: Path, tmp_path: Path) -> None:
    broken = edited(pair / "expert", tmp_path / "broken", num_hidden_layers="2")
    models = [{"model": str(broken), "parameters": {"weight": 1}}]
    text = {"merge_method": "task_arithmetic", "base_model": str(pair / "base"), "models": models}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(text))
    with pytest.raises(UserError, match=rf"^model {broken} cannot be read: .*num_hidden_layers"):
        preflight.check(recipe.read(tmp_path / "recipe.yml"), preflight.MergeOptions())


@pytest.mark.parametrize(
    "settings",
    [
        {"num_return_sequences": 4},
        {"cache_implementation": "sliding"},
        {"max_new_tokens": 0},
        {"do_sample": False, "temperature": 0.6},
    ],
    ids=str,
)
def test_only_end_tokens_are_read_of_a_generation_config(
    pair: Path, tmp_path: Path, settings: Changes
) -> None:
    settings = {"eos_token_id": [7, 3], **settings}
    folder = edited(pair / "expert", tmp_path / "model", "generation_config.json", **settings)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert end_tokens(folder, tokenizer) == sorted({3, 7, tokenizer.eos_token_id})
    ids = torch.tensor([[1, 2, 3]])
    found = load_folder(folder, "auto", "cpu")(ids).logits
    assert torch.equal(found, load_folder(pair / "expert", "auto", "cpu")(ids).logits)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "generation_config.json cannot be read"),
        ("[]", "generation_config.json is no JSON object"),
        ('{"eos_token_id": "</s>"}', 'has eos_token_id = "</s>"; expected a token\'s number'),
        ('{"eos_token_id": [true]}', r"has eos_token_id = \[true\]"),
    ],
)
def test_bad_end_tokens(pair: Path, tmp_path: Path, text: str, message: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair / "base")
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        end_tokens(tmp_path, tokenizer)


POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 4938985352\n"
)
FILES = ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["pointer", "link"])
def test_files_that_are_not_there_though_their_name_is(
    pair: Path, tmp_path: Path, file: str, how: str
) -> None:
    folder = shutil.copytree(pair / "expert", tmp_path / "expert")
    (folder / file).unlink(missing_ok=True)
    if how == "pointer":
        (folder / file).write_text(POINTER)
        message = f"{folder / file} is a Git LFS pointer, .* 'git lfs pull' in {folder}"
    else:
        (folder / file).symlink_to("../blobs/gone")
        message = rf"{folder / file} links to a file that is gone \(../blobs/gone\); download"
    with pytest.raises(UserError, match=message):
        open_pair(str(pair / "base"), str(folder), lambda *_: None)
    models = [{"model": str(folder), "parameters": {"weight": 1}}]
    text = {"merge_method": "task_arithmetic", "base_model": str(pair / "base"), "models": models}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(text))
    with pytest.raises(UserError, match=message):
        preflight.check(recipe.read(tmp_path / "recipe.yml"), preflight.MergeOptions())


def test_other_files_may_be_pointers(pair: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pair / "expert", tmp_path / "expert")
    (folder / "model.gguf").write_text(POINTER)
    (folder / "optimizer.pt").symlink_to("gone")
    open_pair(str(pair / "base"), str(folder), lambda *_: None)


@pytest.mark.parametrize("named", ["./gone", None])
def test_an_adapter_without_its_model(pair: Path, tmp_path: Path, named: str | None) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": named}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    written = f"'\\{named}'" if named else f"write 'BASE\\+{adapter}'"
    with pytest.raises(UserError, match=written):
        open_pair(str(pair / "base"), str(adapter), lambda *_: None)
    models = [{"model": str(adapter)}]
    text = {"merge_method": "task_arithmetic", "base_model": str(pair / "base"), "models": models}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(text))
    with pytest.raises(UserError, match=written):
        preflight.check(recipe.read(tmp_path / "recipe.yml"), preflight.MergeOptions())
    alone = "is a LoRA adapter without its model; write '" + f"{named or 'BASE'}\\+{adapter}'"
    with pytest.raises(UserError, match=alone):
        refuse_adapter_alone(adapter, str(adapter))  # as one on the Hub is
