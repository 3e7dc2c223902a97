"""Checkpoints as people have them: sharded, of mixed dtypes, quantised, listed twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.io.tasks import LoaderCache
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.commands.merge import merge
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.joint.fit import fit
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.merging.recipe import Experts
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.pair import open_pair
from tests.gating import gate, gated_recipe
from tests.merging import Checkpoint as Stored
from tests.merging import (
    Family,
    State,
    add,
    by_mergekit,
    llama_config,
    random_state,
    reference,
    scores_for,
)
from tests.models import _SIZES, make_model, perturbed, save, write_prompts
from tests.test_lora import scored
from tests.test_scoring import Quiet

ensure_registered()
torch.set_num_threads(1)
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def fresh_loaders() -> Iterator[None]:
    LoaderCache.loaders.clear()
    yield


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family.make(tmp_path, llama_config())


def by_stock(recipe: dict[str, Any], out: Path, **options: Any) -> State:
    LoaderCache.loaders.clear()
    return by_mergekit(recipe, out, **options)


def by_ours(recipe: dict[str, Any], out: Path, *options: str) -> State:
    LoaderCache.loaders.clear()
    path = out.with_suffix(".yml")
    path.write_text(yaml.safe_dump(recipe))
    arguments = [str(path), str(out), "--quiet", "--no-copy-tokenizer", *options]
    result = CliRunner().invoke(merge, arguments)
    if result.exception is not None:
        assert not out.exists()
        raise result.exception
    return load_file(out / "model.safetensors")


WAYS = pytest.mark.parametrize("merged", [by_stock, by_ours])
Merged = Callable[..., State]


def expected(family: Family, **options: Any) -> State:
    states = [expert.state for expert in family.experts]
    return reference(family.base.state, states, family.files, **options)


def assert_close(merged: State, want: State, rtol: float = 1e-6) -> None:
    assert set(merged) == set(want)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), want[name], rtol=rtol, atol=rtol, msg=name)


# --- shards --------------------------------------------------------------------------------------


def reshard(folder: Path, size: str) -> None:
    """Save a checkpoint again in files of that size."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=size)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2


@pytest.fixture
def sharded(family: Family) -> Family:
    """Base and experts are cut in different places."""
    for checkpoint, size in zip((family.base, *family.experts), ("2KB", "3KB", "4KB"), strict=True):
        reshard(checkpoint.path, size)
    return family


@WAYS
def test_shards_that_split_differently_are_merged(
    sharded: Family, tmp_path: Path, merged: Merged
) -> None:
    assert_close(merged(sharded.recipe(), tmp_path / "out"), expected(sharded))


def stored_otherwise(base: Path, expert: Path, how: str) -> None:
    """The same numbers in other files; in bfloat16 or float16 as far as they are such numbers."""
    for folder, size in ((base, "3KB"), (expert, "4KB")):
        file = folder / "model.safetensors"
        state = load_file(file)
        if how == "shards":
            reshard(folder, size)
        elif how == "head stored twice":
            head = state["model.embed_tokens.weight"].clone()
            save_file(state | {"lm_head.weight": head}, file, metadata={"format": "pt"})
        elif folder == expert or how == "both":
            coarse = torch.float16 if how == "some in float16" else torch.bfloat16
            named = {n: t for n, t in state.items() if "norm" not in n or coarse != torch.float16}
            cast = {n: t.to(coarse) for n, t in named.items()}
            assert all(torch.equal(t.float(), state[n]) for n, t in cast.items())
            save_file(state | cast, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "how", ["shards", "head stored twice", "expert", "both", "some in float16"]
)
def test_how_checkpoints_are_stored_does_not_change_scores(tmp_path: Path, how: str) -> None:
    base = make_model("llama-tied")
    ends = [perturbed(base, seed=seed).half().bfloat16().double() for seed in (1, 2)]
    start = save(base.half().bfloat16().double(), tmp_path / "base", torch.float32)
    first, second = (
        save(end, tmp_path / name, torch.float32)
        for end, name in zip(ends, ("first", "second"), strict=True)
    )
    fits = {name: tmp_path / name for name in ("plain", "changed")}
    plain = scored(start, str(first), tmp_path / "plain.safetensors")
    fitted(start, (first, second), fits["plain"])
    stored_otherwise(start, first, how)
    changed = scored(start, str(first), tmp_path / "changed.safetensors")
    fitted(start, (first, second), fits["changed"])
    pairs = [(plain.tensors, changed.tensors)]
    for name in ("first", "second"):
        files = [scorefile.read(folder / f"{name}.safetensors") for folder in fits.values()]
        pairs.append((files[0].tensors, files[1].tensors))
    for ours, theirs in pairs:
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), key


def fitted(base: Path, experts: tuple[Path, ...], out: Path) -> None:
    models = [{"model": str(base)}, *({"model": str(expert)} for expert in experts)]
    recipe = {"merge_method": "ties", "base_model": str(base), "models": models}
    out.with_suffix(".yml").write_text(yaml.safe_dump(recipe))
    prompts = tuple((e.name, write_prompts(out.parent / f"{e.name}.jsonl", 2)) for e in experts)
    request = FitRequest(
        recipe=out.with_suffix(".yml"), prompts=prompts, out=out,
        dtype="float64", max_new_tokens=2, steps=2, unguarded=True,
    )  # fmt: skip
    fit(request, Quiet())


def refused_everywhere(family: Family, tmp_path: Path, message: str) -> None:
    """One error, whether the first expert is scored or merged, by mergekit or by us."""
    with pytest.raises(UserError, match=message):
        open_pair(str(family.base.path), str(family.experts[0].path), lambda *_: None)
    for merged in (by_stock, by_ours):
        with pytest.raises(UserError, match=message):
            merged(family.recipe(), tmp_path / "out")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)  # mergekit's own leaves an empty one


def test_a_missing_shard_is_named(sharded: Family, tmp_path: Path) -> None:
    sorted(sharded.experts[0].path.glob("model-*"))[1].unlink()
    refused_everywhere(
        sharded, tmp_path, "expert0': weight file model-00002-of-.* is missing; copy"
    )


def test_an_index_that_does_not_fit_its_shards_is_refused(sharded: Family, tmp_path: Path) -> None:
    index = sharded.experts[0].path / INDEX
    content = json.loads(index.read_text())
    files = content["weight_map"]
    first, last = min(files, key=files.get), max(files, key=files.get)
    files[first], files[last] = files[last], files[first]
    index.write_text(json.dumps(content))
    refused_everywhere(sharded, tmp_path, f"its index says that .*({first}|{last}) is in model-")


def test_a_tensor_that_the_index_forgot_is_missing(sharded: Family) -> None:
    index = sharded.experts[0].path / INDEX
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"expert0' has no tensor model\.norm\.weight"):
        open_pair(str(sharded.base.path), str(sharded.experts[0].path), lambda *_: None)


def test_two_sets_of_weights_in_one_folder_are_refused(sharded: Family, tmp_path: Path) -> None:
    folder = sharded.experts[0].path
    save_file(sharded.experts[0].state, folder / "model.safetensors", metadata={"format": "pt"})
    message = f"has model.safetensors and {INDEX}, and programs differ"
    with pytest.raises(UserError, match=message):
        Checkpoint(str(folder))
    with pytest.raises(UserError, match=message):
        by_ours(sharded.recipe(), tmp_path / "out")


def test_a_model_with_an_adapter_beside_it_is_refused(sharded: Family, tmp_path: Path) -> None:
    """transformers takes the adapter and the model that it names, and not these weights."""
    folder = sharded.experts[0].path
    (folder / "adapter_config.json").write_text("{}")
    message = "is a whole model with an adapter beside it.* or write BASE\\+ADAPTER"
    with pytest.raises(UserError, match=message):
        Checkpoint(str(folder))
    with pytest.raises(UserError, match=message):
        by_ours(sharded.recipe(), tmp_path / "out")


def test_weights_of_a_compiled_model_are_refused_with_the_reason(family: Family) -> None:
    expert = family.experts[0]
    state = {f"_orig_mod.{name}": tensor for name, tensor in expert.state.items()}
    save_file(state, expert.path / "model.safetensors", metadata={"format": "pt"})
    message = r"no tensor (model.+weight), but one called _orig_mod\.\1; .*of torch.compile"
    with pytest.raises(UserError, match=message):
        open_pair(str(family.base.path), str(expert.path), lambda *_: None)


def test_a_folder_without_safetensors_says_so(family: Family) -> None:
    folder = family.base.path
    (folder / "model.safetensors").rename(folder / "model.gguf")
    with pytest.raises(UserError, match=r"base' has no model.safetensors, nor .*save_pretrained"):
        Checkpoint(str(folder))


# --- dtypes --------------------------------------------------------------------------------------


def store(family: Family, cast: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Store every checkpoint in the dtypes that a function gives; scores are made anew."""
    for checkpoint in (family.base, *family.experts):
        checkpoint.state = {name: cast(name, t) for name, t in checkpoint.state.items()}
        save_file(
            checkpoint.state, checkpoint.path / "model.safetensors", metadata={"format": "pt"}
        )
    for e, expert in enumerate(family.experts):
        family.files[e] = scores_for(family.base.state, expert.state, family.config, seed=e)
        scorefile.write(family.files[e], family.paths[e])


DTYPES = pytest.mark.parametrize(
    ("dtypes", "written"),
    [
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": None, "out_dtype": "float32"}, torch.float32),
    ],
    ids=str,
)


@DTYPES
@WAYS
def test_experts_in_bfloat16_over_a_float32_base(
    tmp_path: Path, dtypes: dict[str, Any], written: torch.dtype, merged: Merged
) -> None:
    family = Family.make(tmp_path, llama_config())
    start = family.base.state
    for e, expert in enumerate(family.experts):
        expert.state = add(start, random_state(family.config, e, 0.01))
    for e, expert in enumerate(family.experts):
        expert.state = {name: t.bfloat16() for name, t in expert.state.items()}
        save_file(expert.state, expert.path / "model.safetensors", metadata={"format": "pt"})
        file = scores_for(start, expert.state, family.config, seed=e)
        coarse = file.manifest.expert.model_copy(update={"weights_dtype": "bfloat16"})
        manifest = file.manifest.model_copy(update={"expert": coarse})
        family.files[e] = scorefile.ScoreFile(manifest, file.tensors)
        scorefile.write(family.files[e], family.paths[e])
    found = merged(family.recipe(**dtypes), tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {written}
    assert_close(found, expected(family), 1e-6 if written == torch.float32 else 2**-7)


@DTYPES
@WAYS
def test_a_float32_tensor_in_a_bfloat16_checkpoint(
    tmp_path: Path, dtypes: dict[str, Any], written: torch.dtype, merged: Merged
) -> None:
    """Its change is far below bfloat16's rounding, which the other tensors never saw."""
    family = Family.make(tmp_path, llama_config())
    fine = ("norm", "layers.1.mlp.up_proj")
    for e, expert in enumerate(family.experts):
        small = random_state(family.config, e, 0.0003)
        expert.state = {
            name: family.base.state[name] + small[name] if any(f in name for f in fine) else tensor
            for name, tensor in expert.state.items()
        }
    store(family, lambda name, t: t if any(f in name for f in fine) else t.bfloat16())
    for e in range(2):
        model = family.files[e].manifest.base.model_copy(update={"weights_dtype": "bfloat16"})
        update = {"base": model, "expert": model}
        manifest = family.files[e].manifest.model_copy(update=update)
        scorefile.write(scorefile.ScoreFile(manifest, family.files[e].tensors), family.paths[e])
    found = merged(family.recipe(**dtypes), tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {written}
    assert_close(found, expected(family), 1e-6 if dtypes == {"dtype": "float32"} else 2**-7)
    for path in family.paths:
        path.rename(path.with_suffix(".tmp"))
    for path, other in zip(family.paths, family.paths[::-1], strict=True):
        path.with_suffix(".tmp").rename(other)
    with pytest.raises(UserError, match="these are scores of another expert"):
        merged(family.recipe(**dtypes), tmp_path / "swapped")


def test_the_dtype_a_file_states_is_the_commonest(family: Family) -> None:
    store(family, lambda name, t: t if "norm" in name else t.bfloat16())
    assert Checkpoint(str(family.base.path)).weights_dtype == "bfloat16"


# --- quantised -----------------------------------------------------------------------------------


def state_quantised(folder: Path, key: str = "quantization_config", **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: settings}))


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8", "weight_block_size": [2, 2]}, "fp8"),
    ],
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantised_experts_are_refused(
    family: Family, tmp_path: Path, settings: dict[str, Any], method: str, key: str
) -> None:
    state_quantised(family.experts[0].path, key, **settings)
    message = rf"expert0' is quantised \({method}\).*give the checkpoint it was quantised from"
    refused_everywhere(family, tmp_path, message)


def test_a_quantised_base_is_refused(family: Family, tmp_path: Path) -> None:
    state_quantised(family.base.path, quant_method="gptq", bits=4)
    refused_everywhere(family, tmp_path, r"base' is quantised \(gptq\)")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_in_eight_bits_are_refused(
    family: Family, tmp_path: Path, dtype: torch.dtype
) -> None:
    expert = family.experts[0]
    coarse = {n: t.to(dtype) if "proj" in n else t for n, t in expert.state.items()}
    save_file(coarse, expert.path / "model.safetensors", metadata={"format": "pt"})
    refused_everywhere(family, tmp_path, r"proj.weight is stored as \w+ \(quantised\?\)")


@pytest.mark.parametrize(
    "packed", ["qweight", "weight_packed", "weight_scale", "weight_scale_inv", "SCB"]
)
def test_packed_weights_whose_config_says_nothing(
    family: Family, tmp_path: Path, packed: str
) -> None:
    """Old GPTQ checkpoints have a file of their own beside the config."""
    expert = family.experts[0]
    weight = "model.layers.1.mlp.up_proj.weight"
    name = weight.replace("weight", packed)
    state = expert.state | {name: torch.ones(2, 3, dtype=torch.int32)}
    if packed in ("qweight", "weight_packed"):
        del state[weight]
    save_file(state, expert.path / "model.safetensors", metadata={"format": "pt"})
    refused_everywhere(family, tmp_path, f"expert0' is quantised: it stores {name}; .* quantised")


# --- models listed twice -------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", ["{0}", "{0}/", "{0}/../expert0", "{1}"])
def test_an_expert_does_not_count_twice(family: Family, tmp_path: Path, spelled: str) -> None:
    link = tmp_path / "link"
    link.symlink_to(family.experts[0].path)
    again = spelled.format(family.experts[0].path, link)
    recipe = family.recipe()
    recipe["models"].append({"model": again, "parameters": {"scores": str(family.paths[0])}})
    message = "expert0 is listed twice.*; list it once"
    for merged in (by_stock, by_ours):
        with pytest.raises(UserError, match=message):
            merged(recipe, tmp_path / "out")
    with pytest.raises(UserError, match=message):
        Experts.read(tmp_path / "out.yml")


@pytest.mark.parametrize("where", [0, 1, 2])
@WAYS
def test_the_base_may_be_listed(family: Family, tmp_path: Path, where: int, merged: Merged) -> None:
    recipe = family.recipe()
    recipe["models"].insert(where, {"model": str(family.base.path)})
    assert_close(merged(recipe, tmp_path / "out"), expected(family))


@WAYS
def test_the_base_is_no_expert_of_another_name(
    family: Family, tmp_path: Path, merged: Merged
) -> None:
    recipe = family.recipe()
    scores = {"scores": str(family.paths[0])}
    recipe["models"].append({"model": f"{family.base.path}/", "parameters": scores})
    with pytest.raises(UserError, match="the base model .*base is listed among the models as"):
        merged(recipe, tmp_path / "out")


def test_an_expert_may_come_in_several_slices(family: Family, tmp_path: Path) -> None:
    plain = family.recipe()
    models = [*plain.pop("models"), {"model": str(family.base.path)}]
    cut = [{"sources": [m | {"layer_range": [i, i + 1]} for m in models]} for i in range(2)]
    assert_close(by_ours(plain | {"slices": cut}, tmp_path / "out"), expected(family))


@WAYS
def test_an_expert_may_be_in_some_slices_only(
    family: Family, tmp_path: Path, merged: Merged
) -> None:
    """mergekit takes what stands before the layers from the first slice, the rest from the last."""
    plain = family.recipe()
    one, two = plain.pop("models")
    base = {"model": str(family.base.path)}
    cut = [
        {"sources": [m | {"layer_range": [i, i + 1]} for m in models]}
        for i, models in enumerate(([one, two, base], [two, base]))
    ]
    found = merged(plain | {"slices": cut}, tmp_path / "out")
    both = expected(family)
    alone = reference(family.base.state, [family.experts[1].state], family.files[1:])
    last = ("layers.1.", "model.norm")
    assert_close(found, {n: alone[n] if any(p in n for p in last) else both[n] for n in both})


@WAYS
def test_layers_may_be_left_out(family: Family, tmp_path: Path, merged: Merged) -> None:
    plain = family.recipe()
    models = [*plain.pop("models"), {"model": str(family.base.path)}]
    first = [{"sources": [m | {"layer_range": [0, 1]} for m in models]}]
    found = merged(plain | {"slices": first}, tmp_path / "out")
    assert_close(found, {n: t for n, t in expected(family).items() if "layers.1." not in n})


# --- tied and untied -----------------------------------------------------------------------------


def test_a_head_that_should_be_tied_is_not_dropped_silently(tmp_path: Path) -> None:
    """transformers unties such a checkpoint, so its scores would be those of another model."""
    base = make_model("llama-tied")
    start = save(base, tmp_path / "base", torch.float32)
    expert = save(perturbed(base), tmp_path / "expert", torch.float32)
    weights = load_file(expert / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    twice = weights | {"lm_head.weight": embedding.clone()}
    save_file(twice, expert / "model.safetensors", metadata={"format": "pt"})
    open_pair(str(start), str(expert), lambda *_: None)
    other = weights | {"lm_head.weight": embedding + 1}
    save_file(other, expert / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(expert)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    with pytest.raises(UserError, match="lm_head.weight and model.embed_tokens.weight differ; set"):
        open_pair(str(start), str(expert), lambda *_: None)


def untie(source: Path, target: Path) -> Path:
    """As docs/faq.md shows."""
    page = (Path(__file__).parents[1] / "docs" / "faq.md").read_text()
    code = page.split("is tied to its embedding")[1].split("```python\n")[1].split("```")[0]
    exec(code.replace("TIED", str(source)).replace('"untied"', repr(str(target))), {})
    for file in source.glob("tokenizer*"):
        shutil.copy(file, target)
    return target


def test_an_untied_copy_is_scored_and_merged(tmp_path: Path) -> None:
    base = make_model("llama-tied")
    start = save(base, tmp_path / "tied", torch.float32)
    options = _SIZES | {"num_key_value_heads": 2}
    head = LlamaForCausalLM(LlamaConfig(**options)).double()
    head.load_state_dict(perturbed(base).state_dict())
    with torch.no_grad():
        head.lm_head.weight.add_(0.1 * torch.randn_like(head.lm_head.weight))
    expert = save(head, tmp_path / "expert", torch.float32)
    with pytest.raises(UserError, match="is tied to its embedding, that of '.*expert' is not"):
        scored(start, str(expert), tmp_path / "no.safetensors")
    loose = untie(start, tmp_path / "untied")
    file = scored(loose, str(expert), tmp_path / "s.safetensors")
    assert "lm_head.weight" in file.manifest.tensor_names
    recipe = {
        "merge_method": "weight_patching",
        "base_model": str(loose),
        "models": [
            {"model": str(expert), "parameters": {"scores": str(tmp_path / "s.safetensors")}}
        ],
        "dtype": "float32",
    }
    stored = [load_file(folder / "model.safetensors") for folder in (loose, expert)]
    ours, theirs = ({name: state[name] for name in file.manifest.tensor_names} for state in stored)
    want = reference(ours, [theirs], [file])
    for merged in (by_stock, by_ours):
        assert_close(merged(recipe, tmp_path / merged.__name__), want, 1e-5)


@WAYS
def test_a_head_of_its_own_is_not_merged_as_the_embedding(
    family: Family, tmp_path: Path, merged: Merged
) -> None:
    """Also where the stored tensors are looked at: by the name they are stored under."""
    expert = family.experts[0]
    head = expert.state["model.embed_tokens.weight"] * 2
    save_file(
        expert.state | {"lm_head.weight": head},
        expert.path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match=r"lm_head.weight of .*expert0: its difference"):
        merged(family.recipe(), tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("by_gates", [False, True], ids=["scores", "gates"])
@WAYS
def test_a_base_that_is_not_tied_as_the_scored_one(
    tmp_path: Path, tied: bool, by_gates: bool, merged: Merged
) -> None:
    """Its head would stay at the base beside a changed embedding, or be merged as one."""
    family = Family.make(tmp_path, llama_config(tied=tied))
    other = llama_config(tied=not tied)
    recipe = family.recipe()
    if by_gates:
        gate(family, tmp_path / "g")
        recipe = gated_recipe(family, tmp_path / "g")
    for checkpoint in (family.base, *family.experts):
        head = checkpoint.state["model.embed_tokens.weight"].clone()
        stored = checkpoint.state | {"lm_head.weight": head}
        Stored.save(checkpoint.path, other, stored, torch.float32)
    sides = ("tied", "is not") if tied else ("not tied", "is")
    message = f"is of models whose output head is {sides[0]} to .* base model {sides[1]}. Merge the"
    with pytest.raises(UserError, match=message):
        merged(recipe, tmp_path / "out")
