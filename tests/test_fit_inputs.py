"""The inputs of `test_inputs`, fitted: gates as of plain checkpoints, and a merge by them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.io.tasks import LoaderCache
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.errors import UserError
from mergekit_wp.merging.model_references import data_of
from mergekit_wp.merging.recipe import read as read_recipe
from mergekit_wp.models.checkpoint import Checkpoint
from tests import test_lora
from tests.fitting import fitted
from tests.gating import Gates, gated_merge
from tests.joint_world import NAMES, write_recipe, write_task
from tests.merging import State
from tests.models import finetuned, make_model, save, save_tokenizer
from tests.test_architectures import save_mistral3
from tests.test_inputs import (
    WAYS,
    Merged,
    assert_close,
    by_stock,
    reshard,
    state_quantised,
)
from tests.test_lora import change_weights, make_adapter, scored
from tests.test_vocabulary import way_out, with_rows

ensure_registered()
torch.set_num_threads(1)
WORDS = dict(zip(NAMES, ("abca", "dd"), strict=True))
Change = Callable[[Path, dict[str, Any]], None]


@pytest.fixture(autouse=True)
def fresh_loaders() -> Iterator[None]:
    LoaderCache.loaders.clear()
    yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedModel]:
    """A base and two experts that want different answers."""
    root, base = tmp_path_factory.mktemp("models"), make_model("llama-tied")
    tasks = {name: write_task(root / f"{name}.jsonl", word) for name, word in WORDS.items()}
    return {"base": base} | {name: finetuned(base, task) for name, task in tasks.items()}


def stored(root: Path, models: dict[str, PreTrainedModel], **dtypes: torch.dtype) -> Path:
    """Their checkpoints with prompts and a recipe."""
    root.mkdir()
    for name, model in models.items():
        model.to(dtypes.get(name, torch.float32)).save_pretrained(root / name)
        model.to(torch.float64)
        save_tokenizer(root / name)
    for name, word in WORDS.items():
        write_task(root / f"{name}.jsonl", word)
    return write_recipe(root)


@pytest.fixture
def world(tmp_path: Path, models: dict[str, PreTrainedModel]) -> Path:
    return stored(tmp_path / "world", models)


def quick(world: Path, out: Path, **options: Any) -> Gates:
    return fitted(world, out, **({"steps": 2, "dtype": "float32"} | options))


def assert_same_gates(one: Gates, two: Gates) -> None:
    assert one.tensors.keys() == two.tensors.keys()
    for key, tensor in one.tensors.items():
        assert torch.equal(tensor, two.tensors[key]), key


def edit_recipe(world: Path, change: Change) -> None:
    path = world / "recipe.yml"
    recipe = yaml.safe_load(path.read_text())
    change(world, recipe)
    path.write_text(yaml.safe_dump(recipe))


def weights(reference: Path | str, file: Gates) -> State:
    checkpoint = Checkpoint(str(reference))
    names = file.manifest.tensor_names
    return {name: checkpoint.tensor(name, torch.float32) for name in names}


def reference(world: Path, file: Gates) -> State:
    experts = [weights(world / name, file) for name in NAMES]
    return gated_merge(weights(world / "base", file), experts, file)


# --- what is fitted ------------------------------------------------------------------------------


def in_shards(world: Path, recipe: dict[str, Any]) -> None:
    for name, size in zip(("base", *NAMES), ("2KB", "3KB", "4KB"), strict=True):
        reshard(world / name, size)


def listing_the_base(world: Path, recipe: dict[str, Any]) -> None:
    recipe["models"].insert(1, {"model": str(world / "base")})


def with_a_head_stored_twice(world: Path, recipe: dict[str, Any]) -> None:
    for name in ("base", *NAMES):
        file = world / name / "model.safetensors"
        state = load_file(file)
        head = state["model.embed_tokens.weight"].clone()
        save_file(state | {"lm_head.weight": head}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("change", [in_shards, listing_the_base, with_a_head_stored_twice])
@WAYS
def test_gates_are_those_of_plain_files(
    world: Path, tmp_path: Path, change: Change, merged: Merged
) -> None:
    plain = quick(world, tmp_path / "plain")
    edit_recipe(world, change)
    file = quick(world, tmp_path / "gates")
    assert_same_gates(file, plain)
    recipe = data_of(read_recipe(tmp_path / "gates" / "recipe.yml").config, exclude_none=True)
    found, want = merged(recipe, tmp_path / "out"), reference(world, file)
    if "lm_head.weight" in found:
        want["lm_head.weight"] = want["model.embed_tokens.weight"]
    assert_close(found, want)


BF16 = torch.bfloat16


@pytest.mark.parametrize("coarse", [NAMES, ("base",), ("west",)], ids=str)
@WAYS
def test_mixed_dtypes(
    models: dict[str, PreTrainedModel], tmp_path: Path, coarse: tuple[str, ...], merged: Merged
) -> None:
    """What is stored in bfloat16 is fitted as the same numbers in float32."""
    rounded = {
        name: with_rounded_weights(model) if name in coarse else model
        for name, model in models.items()
    }
    fine = stored(tmp_path / "fine", rounded)
    mixed = stored(tmp_path / "mixed", rounded, **dict.fromkeys(coarse, BF16))
    file = quick(mixed, tmp_path / "gates")
    assert_same_gates(file, quick(fine, tmp_path / "plain"))
    recipe = data_of(read_recipe(tmp_path / "gates" / "recipe.yml").config, exclude_none=True)
    assert recipe["dtype"] == ("bfloat16" if "base" in coarse else "float32")
    assert_close(merged(recipe, tmp_path / "out"), reference(fine, file), 2**-7)
    exact = merged(recipe | {"dtype": "float32"}, tmp_path / "exact")
    assert_close(exact, reference(fine, file))


def with_rounded_weights(model: PreTrainedModel) -> PreTrainedModel:
    copy = with_rows(model, model.state_dict()["model.embed_tokens.weight"])
    return copy.to(BF16).double()


@pytest.mark.parametrize("merged", [test_lora.by_stock, test_lora.by_ours])
@pytest.mark.parametrize("start", ["0.5", "scores"])
def test_adapters_of_one_base(world: Path, tmp_path: Path, merged: Merged, start: str) -> None:
    """The same as the models that peft merges, and merged from mergekit's cache."""
    references = {}
    for factor, name in enumerate(NAMES, start=1):
        (tmp_path / name).mkdir()
        adapter, whole = make_adapter(world / "base", tmp_path / name)
        change_weights(lambda w, factor=factor: [t.mul_(factor / 4) for t in w.values()])(adapter)
        target = adapter.rename(tmp_path / f"to-{name}")
        shutil.rmtree(world / name)
        apply(world / "base", target, whole)
        shutil.move(whole, world / name)
        references[name] = f"{world / 'base'}+{target}"

    def by_scores(world: Path, recipe: dict[str, Any]) -> None:
        recipe |= {"merge_method": "weight_patching", "dtype": "float32"}
        for model in recipe["models"]:
            model["parameters"] = {"scores": str(tmp_path / f"{Path(model['model']).name}.st")}

    def by_adapters(world: Path, recipe: dict[str, Any]) -> None:
        for model in recipe["models"]:
            model["model"] = references[Path(model["model"]).name]

    if start == "scores":
        for name in NAMES:
            scored(world / "base", references[name], tmp_path / f"{name}.st")
        edit_recipe(world, by_scores)
    plain = quick(world, tmp_path / "plain", start=start)
    edit_recipe(world, by_adapters)
    prompts = tuple((f"to-{name}", world / f"{name}.jsonl") for name in NAMES)
    file = quick(world, tmp_path / "gates", prompts=prompts, start=start)
    assert not any(model.lora for model in LoaderCache.loaders)
    assert [own.manifest.expert.reference for own in file.files] == list(references.values())
    for key, tensor in file.tensors.items():
        torch.testing.assert_close(tensor, plain.tensors[key], rtol=1e-3, atol=1e-4, msg=key)
    recipe = data_of(read_recipe(tmp_path / "gates" / "recipe.yml").config, exclude_none=True)
    found = merged(recipe, tmp_path / "out", tmp_path / "cache")
    assert_close(found, reference(world, file), 1e-5)
    recipe["models"][0]["model"] = f"{world / 'base'}+{tmp_path / 'elsewhere' / 'to-east'}"
    shutil.copytree(tmp_path / "to-west", tmp_path / "elsewhere" / "to-east")
    with pytest.raises(UserError, match=r"east \(as merged in lora_merge_cache\): its diff"):
        merged(recipe, tmp_path / "no", tmp_path / "cache")


def apply(base: Path, adapter: Path, target: Path) -> None:
    """Let peft merge an adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target)


def test_experts_with_more_tokens(
    models: dict[str, PreTrainedModel], world: Path, tmp_path: Path
) -> None:
    """Refused; fitted as docs/faq.md shows, and merged by either name."""
    rows = models["east"].state_dict()["model.embed_tokens.weight"]
    grown = with_rows(models["east"], torch.cat([rows, rows[:2]]))
    save(grown, world / "east", torch.float32)
    with pytest.raises(UserError, match="has 40 rows for tokens, expert '.*east' 42"):
        quick(world, tmp_path / "no")
    cut = tmp_path / "cut"
    by_stock(way_out(world / "base", world / "east"), cut / "east")
    save_tokenizer(cut / "east")
    kept = load_file(cut / "east" / "model.safetensors")
    assert len(kept["model.embed_tokens.weight"]) == len(rows)
    edit_recipe(world, lambda _, r: r["models"][0].update(model=str(cut / "east")))
    file = quick(world, tmp_path / "gates")
    recipe = data_of(read_recipe(tmp_path / "gates" / "recipe.yml").config, exclude_none=True)
    one = by_stock(recipe, tmp_path / "one")
    experts = [weights(cut / "east", file), weights(world / "west", file)]
    assert_close(one, gated_merge(weights(world / "base", file), experts, file))
    recipe["models"][0]["model"] = str(world / "east")
    two = by_stock(recipe | {"tokenizer": {"source": "base"}}, tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


@WAYS
def test_modules_of_a_larger_model(tmp_path: Path, merged: Merged) -> None:
    """Its text part is fitted; a recipe may name the modules that mergekit knows, or none."""
    base, world = make_model("mistral"), tmp_path / "world"
    world.mkdir()
    save_mistral3(base, world / "base")
    for i, (name, word) in enumerate(WORDS.items(), start=1):
        task = write_task(world / f"{name}.jsonl", word)
        save_mistral3(finetuned(base, task), world / name, vision=i)
    file = quick(write_recipe(world), tmp_path / "gates")
    text = reference(world, file)
    whole = load_file(world / "base" / "model.safetensors")
    want = {name: text.get(name.removeprefix("language_model."), whole[name]) for name in whole}
    assert len(text) < len(want)
    recipe = data_of(read_recipe(tmp_path / "gates" / "recipe.yml").config, exclude_none=True) | {
        "dtype": "float32"
    }
    models = {"models": recipe.pop("models")}
    names = ("text_decoder", "multi_modal_projector", "vision_tower")
    for i, which in enumerate((models, {"modules": dict.fromkeys(names, models)})):
        found = merged(recipe | which, tmp_path / f"{i}")
        assert_close(found, {name: tensor.double() for name, tensor in want.items()})


# --- what is refused -----------------------------------------------------------------------------


def quantised(world: Path, recipe: dict[str, Any]) -> None:
    state_quantised(world / "west", quant_method="gptq", bits=4)


def listed_twice(world: Path, recipe: dict[str, Any]) -> None:
    recipe["models"].append({"model": f"{world / 'west'}/"})


def the_base_by_another_name(world: Path, recipe: dict[str, Any]) -> None:
    recipe["models"].append({"model": f"{world / 'base'}/"})


def slices(world: Path, recipe: dict[str, Any]) -> None:
    sources = [model | {"layer_range": [0, 2]} for model in recipe.pop("models")]
    recipe["slices"] = [{"sources": sources}]


def modules(world: Path, recipe: dict[str, Any]) -> None:
    recipe["modules"] = {"default": {"models": recipe.pop("models")}}


def a_missing_shard(world: Path, recipe: dict[str, Any]) -> None:
    in_shards(world, recipe)
    sorted((world / "west").glob("model-*"))[1].unlink()


def untied(world: Path, recipe: dict[str, Any]) -> None:
    with_a_head_stored_twice(world, recipe)
    config = world / "west" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantised, r"west' is quantised \(gptq\).*give the checkpoint it was quantised from"),
        (listed_twice, "west is listed twice, the second time as .*west/; list it once"),
        (the_base_by_another_name, "the base model .* is listed among the models as .*base/"),
        (slices, "has 'slices'; here whole experts are wanted: list them as 'models'"),
        (modules, "has 'modules'; here whole experts are wanted: list them as 'models'"),
        (a_missing_shard, "west': weight file model-00002-of-.* is missing"),
        (untied, "base' is tied to its embedding, that of '.*west' is not; untie"),
    ],
)
def test_what_cannot_be_fitted(world: Path, tmp_path: Path, change: Change, message: str) -> None:
    edit_recipe(world, change)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        fitted(world, tmp_path / "gates")
    assert set(tmp_path.rglob("*")) == before
