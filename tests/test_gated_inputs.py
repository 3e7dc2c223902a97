"""The inputs of `test_inputs`, merged by fitted score files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.io.tasks import LoaderCache
from safetensors.torch import load_file, save_file

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.errors import UserError
from tests.gating import gate, gated_merge, gated_recipe
from tests.merging import Checkpoint as Stored
from tests.merging import Family, State, add, llama_config, qwen_config, random_state
from tests.models import VOCABULARY, make_model, perturbed, save
from tests.test_inputs import (
    WAYS,
    Merged,
    assert_close,
    reshard,
    state_quantised,
)
from tests.test_vocabulary import (
    EMBEDDING,
    add_tokens,
    assert_rows,
    noise,
    renumber,
    rows_of,
    with_rows,
)

ensure_registered()
torch.set_num_threads(1)
Recipe = dict[str, Any]


@pytest.fixture(autouse=True)
def fresh_loaders() -> Iterator[None]:
    LoaderCache.loaders.clear()
    yield


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family.make(tmp_path, llama_config())


def expected(family: Family, gates: Path, lam: float = 1.0) -> State:
    file = gate(family, gates)
    return gated_merge(family.base.state, [e.state for e in family.experts], file, lam)


# --- what merges ---------------------------------------------------------------------------------


def as_slices(family: Family, recipe: Recipe, layers: int = 2) -> Recipe:
    """The same models, layer by layer."""
    models = [*recipe.pop("models"), {"model": str(family.base.path)}]
    cut = [{"sources": [m | {"layer_range": [i, i + 1]} for m in models]} for i in range(layers)]
    return recipe | {"slices": cut}


def as_modules(family: Family, recipe: Recipe) -> Recipe:
    return recipe | {"modules": {"default": {"models": recipe.pop("models")}}}


def listing_the_base(family: Family, recipe: Recipe) -> Recipe:
    recipe["models"].insert(1, {"model": str(family.base.path)})
    return recipe


def in_another_order(family: Family, recipe: Recipe) -> Recipe:
    return recipe | {"models": recipe["models"][::-1]}


def elsewhere(family: Family, recipe: Recipe) -> Recipe:
    """Experts that were moved since."""
    for model in recipe["models"]:
        folder = Path(model["model"])
        (folder.parent / "moved").mkdir(exist_ok=True)
        model["model"] = str(shutil.move(folder, folder.parent / "moved"))
    return recipe


def in_shards(family: Family, recipe: Recipe) -> Recipe:
    for checkpoint, size in zip((family.base, *family.experts), ("2KB", "3KB", "4KB"), strict=True):
        reshard(checkpoint.path, size)
    return recipe


@pytest.mark.parametrize(
    "change",
    [
        as_slices,
        as_modules,
        listing_the_base,
        in_another_order,
        elsewhere,
        in_shards,
    ],
)
@pytest.mark.parametrize("config", [llama_config(), qwen_config()], ids=["tied", "untied"])
@WAYS
def test_recipes_and_files_of_every_shape(
    tmp_path: Path, config: Any, change: Callable[[Family, Recipe], Recipe], merged: Merged
) -> None:
    family = Family.make(tmp_path, config)
    want = expected(family, tmp_path / "g", lam=0.5)
    recipe = gated_recipe(family, tmp_path / "g")
    recipe["parameters"]["lambda"] = 0.5
    assert_close(merged(change(family, recipe), tmp_path / "out"), want)


DTYPES = pytest.mark.parametrize(
    ("dtypes", "written"),
    [
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, torch.bfloat16),
    ],
    ids=str,
)


@DTYPES
@pytest.mark.parametrize("coarse", ["experts", "base", "all but norms"])
@WAYS
def test_mixed_dtypes(
    family: Family,
    tmp_path: Path,
    coarse: str,
    dtypes: dict[str, Any],
    written: torch.dtype,
    merged: Merged,
) -> None:
    checkpoints = [family.base, *family.experts]
    for e, expert in enumerate(family.experts):
        expert.state = add(family.base.state, random_state(family.config, e, 0.01))
    rounded = {"experts": checkpoints[1:], "base": checkpoints[:1]}.get(coarse, checkpoints)
    for checkpoint in rounded:
        checkpoint.state = {
            name: t if coarse == "all but norms" and "norm" in name else t.bfloat16()
            for name, t in checkpoint.state.items()
        }
    for checkpoint in checkpoints:
        file = checkpoint.path / "model.safetensors"
        save_file(checkpoint.state, file, metadata={"format": "pt"})
    want = expected(family, tmp_path / "g")
    found = merged(gated_recipe(family, tmp_path / "g", **dtypes), tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {written}
    assert_close(found, want, 1e-6 if written == torch.float32 else 2**-7)


@WAYS
def test_gates_of_one_module(family: Family, tmp_path: Path, merged: Merged) -> None:
    want = expected(family, tmp_path / "g")
    recipe = gated_recipe(family, tmp_path / "g")
    module = {"models": recipe.pop("models"), "parameters": recipe.pop("parameters")}
    recipe["modules"] = {"default": module}
    assert_close(merged(recipe, tmp_path / "out"), want)


@pytest.mark.parametrize("change", ["order", "tokens", "padding"])
@WAYS
def test_embeddings_that_mergekit_rearranges(tmp_path: Path, change: str, merged: Merged) -> None:
    """Gates fitted for plain models; what is merged has other numbers for tokens, or more rows."""
    model, names = make_model("llama-tied"), ("base", "chat")
    plain = [save(m, tmp_path / "plain" / n, torch.float32) for m, n in
             zip((model, perturbed(model)), names, strict=True)]  # fmt: skip
    states = [load_file(folder / "model.safetensors") for folder in plain]
    checkpoints = [Stored(folder, state) for folder, state in zip(plain, states, strict=True)]
    tensors = [name for name, _ in model.named_parameters()]
    checkpoints[0].state = {name: states[0][name] for name in tensors}
    gate(Family(model.config, checkpoints[0], checkpoints[1:], [], []), tmp_path / "g", 0.5)
    order = [1, 0, *range(2, VOCABULARY)]
    base, chat = model, perturbed(model)
    if change == "order":
        chat = with_rows(chat, rows_of(chat)[order])
    elif change == "tokens":
        chat = with_rows(chat, torch.cat([rows_of(chat), noise(2, 3)]))
    else:
        base, chat = (with_rows(m, torch.cat([rows_of(m), noise(8, 4)])) for m in (base, chat))
    folders = [save(m, tmp_path / n, torch.float32) for m, n in
               zip((base, chat), names, strict=True)]  # fmt: skip
    if change == "order":
        renumber(folders[1], order)
    elif change == "tokens":
        add_tokens(folders[1], "<im_start>", "<im_end>")
    recipe = {
        "merge_method": "weight_patching",
        "base_model": str(folders[0]),
        "models": [
            {
                "model": str(folders[1]),
                "parameters": {"scores": str(tmp_path / "g" / "chat.safetensors")},
            }
        ],
        "parameters": {"fusion": "path"},
        "tokenizer": {"source": "union"},
        "dtype": "float32",
    }
    merged(recipe, tmp_path / "out")
    assert_rows(tmp_path / "out", folders[0], [folders[1]])
    foreign = with_rows(perturbed(model), rows_of(perturbed(model)) + 0.05 * noise(VOCABULARY, 5))
    save(foreign, folders[1], torch.float32)
    with pytest.raises(UserError, match=f"{EMBEDDING} of .*chat: its difference .* score file"):
        merged(recipe, tmp_path / "no")


# --- what does not -------------------------------------------------------------------------------


def shifted(family: Family, recipe: Recipe) -> Recipe:
    models = [*recipe.pop("models"), {"model": str(family.base.path)}]
    sources = [model | {"layer_range": [1, 2]} for model in models]
    return recipe | {"slices": [{"sources": sources}]}


def one_expert_in_one_slice(family: Family, recipe: Recipe) -> Recipe:
    recipe = as_slices(family, recipe)
    del recipe["slices"][1]["sources"][0]
    return recipe


def listing_an_expert_twice(family: Family, recipe: Recipe) -> Recipe:
    recipe["models"].append({"model": recipe["models"][0]["model"] + "/"})
    return recipe


def listing_the_base_by_another_name(family: Family, recipe: Recipe) -> Recipe:
    recipe["models"].append({"model": f"{family.base.path}/"})
    return recipe


def leaving_one_out(family: Family, recipe: Recipe) -> Recipe:
    return recipe | {"models": recipe["models"][:1]}


def with_weights_of_the_other(family: Family, recipe: Recipe) -> Recipe:
    one, two = (expert.path / "model.safetensors" for expert in family.experts)
    shutil.copy(two, one)
    return recipe


def with_a_stranger(family: Family, recipe: Recipe) -> Recipe:
    stranger = family.experts[0].path.parent / "stranger"
    shutil.copytree(family.experts[0].path, stranger)
    recipe["models"].append({"model": str(stranger)})
    return recipe


def with_a_quantised_expert(family: Family, recipe: Recipe) -> Recipe:
    state_quantised(family.experts[1].path, quant_method="gptq", bits=4)
    return recipe


def with_a_missing_shard(family: Family, recipe: Recipe) -> Recipe:
    in_shards(family, recipe)
    sorted(family.experts[0].path.glob("model-*"))[1].unlink()
    return recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shifted, "shifted layers|layers to keep their numbers"),
        (one_expert_in_one_slice, "expert1, but this recipe merges .*mergekit-wp fit RECIPE"),
        (listing_an_expert_twice, "expert0 is listed twice"),
        (listing_the_base_by_another_name, "the base model .* is listed among the models as"),
        (leaving_one_out, "was fitted for a merge of .*expert0, .*expert1, but this recipe merges"),
        (
            with_weights_of_the_other,
            "of .*expert0: its .*score file .* was made for .* are scores of",
        ),
        # stock mergekit says in its own words what our method's spec requires
        (with_a_stranger, "stranger has no 'scores'; give|required parameter scores for .*strang"),
        (with_a_quantised_expert, r"expert1' is quantised \(gptq\).*give the checkpoint it was"),
        (with_a_missing_shard, "expert0': weight file model-00002-of-.* is missing"),
    ],
)
@WAYS
def test_what_gates_do_not_fit_is_refused(
    family: Family,
    tmp_path: Path,
    change: Callable[[Family, Recipe], Recipe],
    message: str,
    merged: Merged,
) -> None:
    gate(family, tmp_path / "g")
    recipe = change(family, gated_recipe(family, tmp_path / "g"))
    by_mergekit = RuntimeError if change is with_a_stranger else UserError
    with pytest.raises((UserError, by_mergekit), match=message):
        merged(recipe, tmp_path / "out")
