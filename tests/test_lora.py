"""Adapters against peft's own merge, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.commands.merge import merge
from mergekit_wp.errors import UserError
from mergekit_wp.joint.fit import fit
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.model_names import last_name
from mergekit_wp.models.pair import open_pair
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from tests.merging import State
from tests.merging import reference as expected_merge
from tests.models import make_model, perturbed, save, save_tokenizer, write_prompts
from tests.test_safety import Bomb
from tests.test_scoring import Quiet

ensure_registered()
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
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.2)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    save_tokenizer(folder / "merged")
    return folder / "adapter", folder / "merged"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(make_model("llama-tied"), tmp_path / "base", torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 4}},
        {"alpha_pattern": {r"layers\.1\..*": 3, "v_proj": 4}},  # the first that matches
        {"alpha_pattern": {"model.layers.0.mlp.down_proj": 1, "proj": 50, "q_proj": 0.5}},
        {"alpha_pattern": {"q_proj": 9}, "rank_pattern": {"q_proj": 3}, "use_rslora": True},
    ],
    ids=str,
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


def test_embeddings_in_an_adapter_are_those_peft_loads(tmp_path: Path) -> None:
    """peft writes them where an embedding is trained or resized, with no word in the config."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = save(make_model("llama"), tmp_path / "base", torch.float32)
    adapter, _ = make_adapter(base, tmp_path)
    head = torch.randn(Checkpoint(str(base)).header("lm_head.weight")[0])
    change_weights(lambda w: w.update({"base_model.model.lm_head.weight": head}))(adapter)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
    found = Checkpoint(f"{base}+{adapter}")
    assert torch.equal(merged["lm_head.weight"], head)
    for name, want in merged.items():
        torch.testing.assert_close(found.tensor(name, torch.float32), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("modules", [["lm_head", "embed_tokens"], ["norm", "o_proj"]], ids=str)
def test_modules_saved_whole_are_those_peft_merges(tmp_path: Path, modules: list[str]) -> None:
    base = save(make_model("llama"), tmp_path / "base", torch.float32)
    adapter, merged = make_adapter(base, tmp_path, modules_to_save=modules)
    ours, theirs = Checkpoint(f"{base}+{adapter}"), Checkpoint(str(merged))
    start, names = Checkpoint(str(base)), [n for n in theirs.headers if modules[1] in n]
    for name in theirs.headers:
        want = theirs.tensor(name, torch.float32)
        torch.testing.assert_close(ours.tensor(name, torch.float32), want, rtol=1e-6, atol=1e-6)
    assert names and all(
        not torch.equal(ours.tensor(n, torch.float32), start.tensor(n, torch.float32))
        for n in names
    )


def test_what_mergekit_extracts_is_read_as_it_merges_it(tmp_path: Path) -> None:
    """It saves norms and embeddings whole, and gives every weight a rank and an alpha."""
    from mergekit.scripts.extract_lora import main as extract
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = make_model("llama")
    base = save(model, tmp_path / "base", torch.float32)
    expert = save(perturbed(model, 0.05), tmp_path / "expert", torch.float32)
    extracted = [f"--base-model={base}", f"--model={expert}", f"--out-path={tmp_path / 'lora'}"]
    done = CliRunner().invoke(extract, [*extracted, "--max-rank=64"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["modules_to_save"]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, tmp_path / "lora").merge_and_unload()
    ours, theirs = Checkpoint(f"{base}+{tmp_path / 'lora'}"), Checkpoint(str(expert))
    for name, want in merged.state_dict().items():
        found = ours.tensor(name, torch.float32)
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
        if not name.endswith(".bias"):  # of which it extracts none; of the rest all, at this rank
            torch.testing.assert_close(found, theirs.tensor(name, torch.float32), atol=1e-5, rtol=0)


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


def saved_whole(module: str, *shape: int) -> Callable[[Path], None]:
    """The adapter with one more module, saved whole."""

    def apply(adapter: Path) -> None:
        more = {f"base_model.model.{module}.weight": torch.zeros(*shape)}
        change_weights(lambda w: w.update(more))(adapter)

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_config(use_dora=True), "use_dora = true, which is not known to be plain LoRA"),
        (saved_whole("lm_head", 40, 16), "changes lm_head.weight, of which its model has no"),
        (saved_whole("model.norm", 3), r"its model.norm.weight is \[3\], that of its model \["),
        (saved_whole("model.embed_tokens", 40, 16), "whole, but the output head .* is tied to it"),
        (saved_whole("model.layers.0.self_attn.q_proj", 16, 16), "and holds it whole as well"),
        (change_config(bias="all"), "bias = \"all\""),
        (change_config(alpha_pattern={"q_proj": "4"}), r"has alpha_pattern\['q_proj'\] = \"4\""),
        (change_config(alpha_pattern={"q(": 4}), r"'q\(' in alpha_pattern is no pattern of names"),
        (change_config(alpha_pattern=[4]), "alpha_pattern is no JSON object of numbers"),
        (change_config(alora_invocation_tokens=[5, 6]), r"alora_invocation_tokens = \[5, 6\]"),
        (change_config(from_next_year=0), "from_next_year = 0, which is not known to be plain"),
        (change_config(megatron_config={"a": 1}), r"megatron_config = \{\"a\": 1\}"),
        (change_config(init_lora_weights="pissa"), "init_lora_weights = \"pissa\""),
        (change_config(peft_type="IA3"), "is of type IA3; only LORA"),
        (change_config(lora_alpha=None), "config.json has lora_alpha = null; expected a number"),
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


def test_a_change_of_rank_zero_is_none(base: Path, tmp_path: Path) -> None:
    adapter, _ = make_adapter(base, tmp_path)
    change_weights(
        lambda w: w.update(
            {f"{Q}.lora_A.weight": torch.zeros(0, 16), f"{Q}.lora_B.weight": torch.zeros(16, 0)}
        )
    )(adapter)
    name = "model.layers.0.self_attn.q_proj.weight"
    ours, start = Checkpoint(f"{base}+{adapter}"), Checkpoint(str(base))
    assert torch.equal(ours.tensor(name, torch.float32), start.tensor(name, torch.float32))


def test_a_missing_adapter_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model folder '.*nowhere' not found"):
        Checkpoint(f"{base}+{tmp_path}/nowhere")


# --- merging -------------------------------------------------------------------------------------


def by_stock(recipe: dict[str, Any], out: Path, cache: Path, **options: Any) -> State:
    LoaderCache.loaders.clear()
    config = MergeConfiguration.model_validate(recipe)
    run_merge(config, str(out), MergeOptions(quiet=True, lora_merge_cache=str(cache), **options))
    return load_file(out / "model.safetensors")


def by_ours(recipe: dict[str, Any], out: Path, cache: Path, **options: Any) -> State:
    LoaderCache.loaders.clear()
    path = out.with_suffix(".yml")
    path.write_text(yaml.safe_dump(recipe))
    more = [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    arguments = [str(path), str(out), "--quiet", "--lora-merge-cache", str(cache), *more]
    done = CliRunner().invoke(merge, arguments)
    if done.exception is not None:
        assert not out.exists()
        raise done.exception
    return load_file(out / "model.safetensors")


WAYS = pytest.mark.parametrize("merged", [by_stock, by_ours])


def recipe_of(base: Path, expert: str, scores: Path, **top: Any) -> dict[str, Any]:
    return {
        "merge_method": "weight_patching",
        "base_model": str(base),
        "models": [{"model": expert, "parameters": {"scores": str(scores)}}],
        "dtype": "float32",
    } | top


@WAYS
@pytest.mark.parametrize("lora_merge_dtype", [None, "float32"])
def test_small_changes_of_a_bfloat16_base(
    tmp_path: Path, merged: Callable[..., State], lora_merge_dtype: str | None
) -> None:
    """peft rounds the sum to the base's dtype before mergekit sees it; other adapters show."""
    base = save(make_model("llama-tied"), tmp_path / "base", torch.bfloat16)
    adapter, _ = make_adapter(base, tmp_path)
    change_weights(lambda w: [t.mul_(0.1) for t in w.values()])(adapter)
    reference, scores = f"{base}+{adapter}", tmp_path / "s.safetensors"
    file = scored(base, reference, scores)
    assert file.manifest.expert.weights_dtype == "float32"
    options = {"lora_merge_dtype": lora_merge_dtype} if lora_merge_dtype else {}
    found = merged(recipe_of(base, reference, scores), tmp_path / "out", tmp_path / "c", **options)
    start, end = Checkpoint(str(base)), Checkpoint(reference)
    names = file.manifest.tensor_names
    ours, theirs = ({n: c.tensor(n, torch.float32) for n in names} for c in (start, end))
    want, reached = expected_merge(ours, [theirs], [file]), 0
    for name, tensor in found.items():
        coarse = 0 if lora_merge_dtype else 2**-8 * float(theirs[name].abs().max())
        torch.testing.assert_close(tensor.double(), want[name], rtol=1e-6, atol=1e-6 + coarse)
        reached += not torch.equal(tensor, ours[name])
    assert reached == 6
    (tmp_path / "other").mkdir()
    shutil.copytree(adapter, tmp_path / "other" / "adapter")
    change_weights(lambda w: [t.mul_(1.5) for t in w.values()])(tmp_path / "other" / "adapter")
    other = recipe_of(base, f"{base}+{tmp_path}/other/adapter", scores)
    with pytest.raises(UserError, match=r"\(as merged in lora_merge_cache\): its difference"):
        merged(other, tmp_path / "no", tmp_path / "c", **options)


@pytest.fixture
def adapted(base: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An adapter of the base, and its scores."""
    adapter, _ = make_adapter(base, tmp_path)
    scored(base, f"{base}+{adapter}", tmp_path / "s.safetensors")
    return adapter, tmp_path / "s.safetensors"


@pytest.mark.parametrize("method", ["weight_patching", "linear"])
@pytest.mark.parametrize("pickled", ["adapter", "base"])
def test_no_adapter_is_merged_from_a_pickle(
    base: Path, adapted: tuple[Path, Path], tmp_path: Path, method: str, pickled: str
) -> None:
    adapter, scores = adapted
    weights = adapter / "adapter_model.safetensors"
    if pickled == "base":
        weights = base / "model.safetensors"
    target = weights.with_name("pytorch_model.bin" if pickled == "base" else "adapter_model.bin")
    target.write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    weights.unlink()
    recipe = recipe_of(base, f"{base}+{adapter}", scores, merge_method=method)
    if method == "linear":
        recipe["models"][0]["parameters"] = {"weight": 1.0}
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    arguments = [str(path), str(tmp_path / "out"), "--lora-merge-cache", str(tmp_path / "cache")]
    done = CliRunner().invoke(merge, [*arguments, "--lazy-unpickle"])
    assert isinstance(done.exception, UserError)
    assert "pickled weights" in str(done.exception) and "never loaded" in str(done.exception)
    assert not (tmp_path / "trace").exists() and not (tmp_path / "cache").exists()


def test_a_merged_adapter_that_is_not_whole_is_refused(
    base: Path, adapted: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter, scores = adapted
    recipe, cache = recipe_of(base, f"{base}+{adapter}", scores), tmp_path / "cache"
    by_ours(recipe, tmp_path / "out", cache)
    (merged,) = cache.iterdir()
    (merged / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"{merged} holds no merged model.*remove that folder"):
        by_ours(recipe, tmp_path / "again", cache)


def test_an_adapter_that_cannot_be_merged_leaves_no_folder(
    base: Path, adapted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit makes the folder first, and takes it for a merged model the next time."""
    adapter, scores = adapted
    recipe, cache = recipe_of(base, f"{base}+{adapter}", scores), tmp_path / "cache"

    def stop(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr("peft.PeftModel.from_pretrained", stop)
        with pytest.raises(UserError, match="cannot be read: out of luck"):
            by_ours(recipe, tmp_path / "out", cache)
    assert not list(cache.iterdir())
    by_ours(recipe, tmp_path / "out", cache)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda a: shutil.rmtree(a), "adapter folder '.*adapter' not found"),
        (lambda a: (a / "adapter_config.json").unlink(), "has no adapter_config.json; give"),
    ],
)
def test_a_recipe_without_its_adapter(
    base: Path, adapted: tuple[Path, Path], tmp_path: Path, break_it: Any, message: str
) -> None:
    adapter, scores = adapted
    break_it(adapter)
    with pytest.raises(UserError, match=message):
        by_ours(recipe_of(base, f"{base}+{adapter}", scores), tmp_path / "out", tmp_path / "cache")


@WAYS
def test_a_base_with_an_adapter(base: Path, tmp_path: Path, merged: Callable[..., State]) -> None:
    """The same scores and the same merge as of the model that peft merges."""
    adapter, whole = make_adapter(base, tmp_path)
    expert = str(save(perturbed(make_model("llama-tied")), tmp_path / "expert", torch.float32))
    reference = Path(f"{base}+{adapter}")
    found = []
    for i, start in enumerate((reference, whole)):
        file = scored(start, expert, tmp_path / f"{i}.st")
        recipe = recipe_of(start, expert, tmp_path / f"{i}.st")
        found.append((file.tensors, merged(recipe, tmp_path / f"{i}", tmp_path / "cache")))
    for ours, theirs in zip(*found, strict=True):
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)
    wrong = recipe_of(base, expert, tmp_path / "0.st")
    with pytest.raises(UserError, match="these are scores of another expert, base"):
        merged(wrong, tmp_path / "no", tmp_path / "cache")


def test_two_adapters_of_one_base_are_fitted_together(base: Path, tmp_path: Path) -> None:
    """Experts are called by their adapters; of one name, by the folders of these as well."""
    references = []
    for seed, name in enumerate(("east", "west")):
        (tmp_path / name).mkdir()
        adapter, _ = make_adapter(base, tmp_path / name)
        change_weights(lambda w, seed=seed: [t.mul_(1 + seed) for t in w.values()])(adapter)
        references.append(f"{base}+{adapter}")
    recipe = recipe_of(base, references[0], tmp_path / "unused")
    recipe["models"] = [{"model": reference} for reference in references]
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    prompts = [
        (f"{n}/adapter", write_prompts(tmp_path / f"{n}.jsonl", 2)) for n in ("east", "west")
    ]
    request = FitRequest(
        recipe=tmp_path / "recipe.yml", prompts=tuple(prompts), out=tmp_path / "scores",
        dtype="float64", max_new_tokens=2, steps=2, unguarded=True,
    )  # fmt: skip
    files = fit(request, Quiet())
    assert list(files) == ["east--adapter", "west--adapter"]
    made = yaml.safe_load((tmp_path / "scores" / "recipe.yml").read_text())
    for model in made["models"]:
        model["parameters"]["scores"] = str(
            tmp_path / "scores" / Path(model["parameters"]["scores"]).name
        )
    by_stock(made, tmp_path / "out", tmp_path / "cache")


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("owner/model", "model"),
        ("owner/model@v1", "model"),
        ("owner/base@v1+owner/adapter@v2", "adapter"),
        ("owner/base@v1+/tmp/some/adapter/", "adapter"),
        ("/tmp/some/folder/", "folder"),
    ],
)
def test_last_names(reference: str, name: str) -> None:
    assert last_name(reference) == name


def test_a_folder_may_have_signs_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "a+b@c").mkdir()
    assert last_name(str(tmp_path / "a+b@c")) == "a+b@c"


def test_nan_in_an_adapter_is_named(base: Path, tmp_path: Path) -> None:
    adapter, _ = make_adapter(base, tmp_path)
    change_weights(lambda w: w[f"{Q}.lora_A.weight"].fill_(torch.nan))(adapter)
    with pytest.raises(UserError, match=r"q_proj.weight holds NaN"):
        open_pair(str(base), f"{base}+{adapter}", lambda *_: None)


def test_commands_that_need_whole_models_say_so(base: Path, tmp_path: Path) -> None:
    adapter, _ = make_adapter(base, tmp_path)
    with pytest.raises(UserError, match="compare needs whole models"):
        Checkpoint(f"{base}+{adapter}").require_whole("compare")
