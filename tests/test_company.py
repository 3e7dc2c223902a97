"""Experts scored together: the guided path against a naive walk in float64."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.components import Component, fine_components, slices
from mergekit_wp.cli import cli
from mergekit_wp.components import Partition
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.joint.company import score_company
from mergekit_wp.joint.files import RECIPE
from mergekit_wp.joint.request import CompanyRequest
from mergekit_wp.models import generation
from mergekit_wp.models.pair import Pair, open_pair
from mergekit_wp.runs.journal import Journal
from tests.models import (
    DEVICE,
    EOS,
    LETTERS,
    finetuned,
    make_model,
    save,
    with_eager_experts,
    write_prompts,
)
from tests.test_scoring import Quiet

torch.set_num_threads(1)
NAMES = ("east", "west")


def write_task(path: Path, word: str) -> Path:
    """Prompts that all want the same answer."""
    prompts = write_prompts(path, 4)
    lines = [json.loads(line) | {"response": word} for line in prompts.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module", params=["llama-tied", "qwen2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(request.param, tmp_path_factory.mktemp("company"))


def write_recipe(root: Path, names: tuple[str, ...] = NAMES) -> Path:
    models = [{"model": str(root / name)} for name in names]
    recipe = {"merge_method": "ties", "base_model": str(root / "base"), "models": models}
    (root / "recipe.yml").write_text(yaml.safe_dump(recipe))
    return root


def make_world(family: str, root: Path) -> Path:
    """A base, two experts that want different answers, prompts and a recipe."""
    base = make_model(family)
    save(base, root / "base")
    for name, word in zip(NAMES, ("abca", "dd"), strict=True):
        task = write_task(root / f"{name}.jsonl", word)
        save(finetuned(base, task), root / name)
    return write_recipe(root)


def request_for(world: Path, out: Path, **options: object) -> CompanyRequest:
    settings: dict[str, object] = {
        "recipe": world / "recipe.yml",
        "prompts": tuple((name, world / f"{name}.jsonl") for name in NAMES),
        "out": out,
        "dtype": "float64",
        "device": DEVICE,
        "batch_size": 3,
        "path_steps": 4,
        **options,
    }
    return CompanyRequest(**settings)


def load(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return with_eager_experts(model)


class NaiveWalk:
    """The definition written out: whole-model gradients, one component at a time."""

    def __init__(self, world: Path, steps: int) -> None:
        self.base = load(world / "base")
        self.experts = [load(world / name) for name in NAMES]
        shapes = {n: tuple(p.shape) for n, p in self.base.named_parameters()}
        pair = open_pair(str(world / "base"), str(world / NAMES[0]), lambda *_: None)
        self.partition = Partition(pair.partition.dims, shapes)
        self.tasks = [
            [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]
            for name in NAMES
        ]
        self.start = [self.value(self.base, b).item() for b in range(len(NAMES))]
        components: list[Component] = list(fine_components(self.partition))
        self.reached = [dict.fromkeys(components, 0.0) for _ in NAMES]
        self.brought = [dict.fromkeys(components, 0.0) for _ in NAMES]
        for _ in range(steps):
            self.step(1 / steps)

    def value(self, model: PreTrainedModel, b: int) -> torch.Tensor:
        """Minus the KL divergence from expert b on its prompts."""
        found = []
        for item in self.tasks[b]:
            prompt = [LETTERS.index(c) for c in item["prompt"]]
            ids = torch.tensor([prompt + [LETTERS.index(c) for c in item["response"]] + [EOS]])
            with torch.no_grad():
                target = self.experts[b](ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            ours = model(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            found.append(-(target.exp() * (target - ours)).sum(-1).mean())
        return torch.stack(found).mean()

    def merged(self) -> PreTrainedModel:
        model = load_like(self.base)
        weights = dict(model.named_parameters())
        ours = dict(self.base.named_parameters())
        with torch.no_grad():
            for expert, reached in zip(self.experts, self.reached, strict=True):
                theirs = dict(expert.named_parameters())
                for component, gate in reached.items():
                    for name, index in slices(self.partition, component).items():
                        weights[name][index] += gate * (theirs[name] - ours[name])[index]
        return model

    def recoveries(self, model: PreTrainedModel) -> list[torch.Tensor]:
        # the expert's own value is 0: it does not diverge from itself
        return [1 - self.value(model, b) / self.start[b] for b in range(len(NAMES))]

    def step(self, length: float) -> None:
        model = self.merged().requires_grad_(True)
        torch.stack(self.recoveries(model)).sum().backward()
        slopes = {name: p.grad for name, p in model.named_parameters()}
        self.follow(slopes, length)

    @torch.no_grad()
    def follow(self, slopes: dict[str, torch.Tensor], length: float) -> None:
        ours = dict(self.base.named_parameters())
        for e, expert in enumerate(self.experts):
            theirs = dict(expert.named_parameters())
            for component in self.reached[e]:
                slope = sum(
                    float((slopes[name] * (theirs[name] - ours[name]))[index].sum())
                    for name, index in slices(self.partition, component).items()
                )
                here = self.reached[e][component]
                if slope > 0:
                    moved = min(1.0, here + length) - here
                    self.reached[e][component] += moved
                    self.brought[e][component] += moved * slope


def load_like(model: PreTrainedModel) -> PreTrainedModel:
    copy = type(model)(model.config).double().eval()
    with_eager_experts(copy)
    copy.load_state_dict(model.state_dict())
    return copy


def written(request: CompanyRequest, progress: Quiet) -> tuple[list[Path], Path]:
    """The score files and the recipe of a company, which are what was returned."""
    found = score_company(request, progress)
    assert request.out is not None
    files = [request.out / f"{name}.safetensors" for name in found]
    for file, kept in zip(files, found.values(), strict=True):
        assert scorefile.read(file).digest() == kept.digest()
    assert sorted(request.out.iterdir()) == sorted([*files, request.out / RECIPE])
    return files, request.out / RECIPE


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_fused_and_stacked_weights_walk_alike(tmp_path: Path, family: str) -> None:
    test_the_path_equals_a_naive_walk(make_world(family, tmp_path), tmp_path)


def test_the_path_equals_a_naive_walk(world: Path, tmp_path: Path) -> None:
    naive = NaiveWalk(world, steps=4)
    files, _ = written(request_for(world, tmp_path / "out"), Quiet())
    for e, path in enumerate(files):
        file = scorefile.read(path)
        for estimand, want in (("path", naive.reached[e]), ("share", naive.brought[e])):
            fine = file.fine_scores(estimand, "kl")
            got = torch.cat([fine[k].flatten() for k in ("head", "kv_group", "neuron", "tensor")])
            torch.testing.assert_close(
                got.double(), torch.tensor(list(want.values())).double(), atol=1e-6, rtol=1e-5
            )
        assert 0 < float(fine["neuron"].gt(0).double().mean()) <= 1
    merged = naive.merged()
    with torch.no_grad():
        recovered = [float(r) for r in naive.recoveries(merged)]
    company = scorefile.read(files[0]).manifest.company
    assert company is not None
    assert [m.recovery for m in company] == pytest.approx(recovered, abs=1e-6)
    assert [m.behavior for m in company] == list(NAMES)


def test_shares_of_all_experts_add_up_to_what_came_back(world: Path, tmp_path: Path) -> None:
    files, _ = written(request_for(world, tmp_path / "out", path_steps=40), Quiet())
    read = [scorefile.read(path) for path in files]
    total = sum(
        float(scores.sum()) for file in read for scores in file.fine_scores("share", "kl").values()
    )
    company = read[0].manifest.company
    assert company is not None
    assert total == pytest.approx(sum(m.recovery for m in company), rel=0.05)
    assert read[0].manifest.completeness["share/kl"] == pytest.approx(1, abs=0.05)
    for file in read:
        layers = file.scores("share", "kl", "layer").sum()
        outside = sum(
            float(file.scores("share", "kl", "tensor")[i])
            for i, name in enumerate(file.manifest.tensor_names)
            if "layers" not in name
        )
        fine = sum(float(s.sum()) for s in file.fine_scores("share", "kl").values())
        assert float(layers) + outside == pytest.approx(fine, rel=1e-4)


def test_the_written_recipe_merges_to_the_end_of_the_path(world: Path, tmp_path: Path) -> None:
    naive = NaiveWalk(world, steps=4)
    _, recipe = written(request_for(world, tmp_path / "out"), Quiet())
    done = CliRunner().invoke(cli, ["merge", str(recipe), str(tmp_path / "merged"), "--quiet"])
    assert done.exit_code == 0, done.output
    got = load(tmp_path / "merged").state_dict()
    for name, want in naive.merged().state_dict().items():
        # gates are stored, and applied, in float32
        torch.testing.assert_close(got[name], want, atol=1e-5, rtol=1e-5)


def test_lambda_and_weight_scale_the_path(world: Path, tmp_path: Path) -> None:
    _, recipe = written(request_for(world, tmp_path / "out"), Quiet())
    data = yaml.safe_load(recipe.read_text())
    data["parameters"]["lambda"] = 0.5
    data["models"][1]["parameters"]["weight"] = 0.0
    recipe.write_text(yaml.safe_dump(data))
    done = CliRunner().invoke(cli, ["merge", str(recipe), str(tmp_path / "half"), "--quiet"])
    assert done.exit_code == 0, done.output
    naive = NaiveWalk(world, steps=4)
    naive.reached = [
        {component: 0.5 * gate for component, gate in naive.reached[0].items()},
        dict.fromkeys(naive.reached[1], 0.0),
    ]
    got = load(tmp_path / "half").state_dict()
    for name, want in naive.merged().state_dict().items():
        torch.testing.assert_close(got[name], want, atol=1e-5, rtol=1e-5)


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    whole, _ = written(request_for(world, tmp_path / "whole"), Quiet())
    request, saved, original = request_for(world, tmp_path / "killed"), [], Journal.save

    class Killed(BaseException):
        """Stands for SIGKILL: nothing may catch it."""

    def die(self: Journal, key: str, tensors: dict[str, torch.Tensor]) -> None:
        original(self, key, tensors)
        saved.append(key)
        if len(saved) in (1, 4, 7):
            raise Killed

    monkeypatch.setattr(Journal, "save", die)
    for _ in range(3):
        with pytest.raises(Killed):
            score_company(request, Quiet())
        assert not list(request.out.glob("*.safetensors"))
    progress = Quiet()
    files, _ = written(request, progress)
    assert len(saved) == len(set(saved))
    assert [f.read_bytes() for f in files] == [f.read_bytes() for f in whole]
    assert progress.done == sum(total for _, total in progress.stages)
    assert not (request.out / "company.partial").exists()


def test_a_step_reads_differences_once_and_a_run_one_tokenizer(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many behaviours there are, and copies of the base's tokenizer with the experts."""
    reads, loads, steps = Counter[tuple[str, str]](), list[Path](), 3
    delta, load_tokenizer = Pair.delta, generation.AutoTokenizer.from_pretrained

    def read(pair: Pair, name: str, *rest: object) -> torch.Tensor:
        reads[pair.expert.name, name] += 1
        return delta(pair, name, *rest)

    def loaded(folder: Path, **options: object) -> object:
        loads.append(folder)
        return load_tokenizer(folder, **options)

    monkeypatch.setattr(Pair, "delta", read)
    monkeypatch.setattr(generation.AutoTokenizer, "from_pretrained", loaded)
    generation._loaded.cache_clear()
    score_company(request_for(world, tmp_path / "out", path_steps=steps, batch_size=8), Quiet())
    assert len(loads) == 1
    tied = json.loads((world / "base" / "config.json").read_text())["tie_word_embeddings"]
    embedding = "model.embed_tokens.weight"  # a tied one is passed at both ends of the model
    for (_, name), count in reads.items():
        assert count == steps * (2 if tied and name == embedding else 1), name
    assert {expert for expert, _ in reads} == {str(world / name) for name in NAMES}


def test_another_tokenizer_is_another(world: Path, tmp_path: Path) -> None:
    """Equal files are one vocabulary, changed ones another; clocks and templates are apart."""
    for name in ("one", "two", "other"):
        shutil.copytree(world / "base", tmp_path / name)
    file = tmp_path / "other" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    one, two, other = (
        generation.read_tokenizer([tmp_path / name], name) for name in ("one", "two", "other")
    )
    assert one is not two and generation.same_files(one, two)
    assert not generation.same_files(one, other)
    assert (one.chat_template, other.chat_template) == (None, "{{ messages }}")
    one.chat_template = "x"
    assert two.chat_template is None
    plain = generation.AutoTokenizer.from_pretrained(tmp_path / "one")
    assert two("abc").input_ids == plain("abc").input_ids


def rewrite(recipe: Path, change: dict[str, object]) -> Path:
    data = yaml.safe_load(recipe.read_text()) | change
    path = recipe.with_name("changed.yml")
    path.write_text(yaml.safe_dump(data))
    return path


def test_scores_of_another_company_are_refused(world: Path, tmp_path: Path) -> None:
    _, recipe = written(request_for(world, tmp_path / "out"), Quiet())
    models = yaml.safe_load(recipe.read_text())["models"]
    alone = rewrite(recipe, {"models": models[:1]})
    done = CliRunner().invoke(cli, ["merge", str(alone), str(tmp_path / "x")])
    assert isinstance(done.exception, UserError)
    assert "in the company of" in str(done.exception) and "west" in str(done.exception)
    other, _ = written(request_for(world, tmp_path / "other", path_steps=3), Quiet())
    mixed = [models[0], {**models[1], "parameters": {"scores": str(other[1])}}]
    done = CliRunner().invoke(
        cli, ["merge", str(rewrite(recipe, {"models": mixed})), str(tmp_path / "x")]
    )
    assert isinstance(done.exception, UserError)
    assert "other scores for some" in str(done.exception)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["BASE", "EXPERT", "--prompts", "p"], "Missing|BASE does not go with --company"),
        (["--kinds", "head", "--prompts", "east=e"], "--kinds does not go with --company"),
        (["--prompts", "east.jsonl"], "write EXPERT=SOURCE"),
        (["--prompts", "north=e.jsonl"], "'north' is no expert of the recipe"),
        (["--prompts", "east=EAST", "--prompts", "east=WEST"], "'east' has prompts already"),
        (["--prompts", "east=EAST"], "has no prompts; add --prompts west=FILE.jsonl"),
        (["--prompts", "east=EAST", "--prompts", "west=none.jsonl"], "none.jsonl cannot be read"),
    ],
)
def test_bad_input(world: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    names = {"EAST": str(world / "east.jsonl"), "WEST": str(world / "west.jsonl")}
    for key, value in names.items():
        arguments = [argument.replace(key, value) for argument in arguments]
    out = tmp_path / "out"
    command = ["score", *arguments, "--company", str(world / "recipe.yml"), "--out", str(out)]
    done = CliRunner().invoke(cli, command)
    assert any(part in str(done.exception) for part in message.split("|")), done.exception
    assert not out.exists()


def test_bad_recipes(world: Path, tmp_path: Path) -> None:
    good = yaml.safe_load((world / "recipe.yml").read_text())
    twin, link = tmp_path / "copy" / "west", tmp_path / "link" / "west"
    shutil.copytree(world / "east", twin)
    link.parent.mkdir()
    link.symlink_to(world / "east")
    copied, linked = ({"models": [good["models"][0], {"model": str(m)}]} for m in (twin, link))
    for change, message in [
        ({"base_model": None}, "expected 'base_model' and a list of 'models'"),
        ({"models": [{"model": good["base_model"]}]}, "names no expert beside the base"),
        (copied, "have the same weights"),
        (linked, "east is listed twice, the second time as .*link/west; list it once"),
    ]:
        path = tmp_path / "recipe.yml"
        path.write_text(yaml.safe_dump(good | change))
        with pytest.raises(UserError, match=message):
            score_company(request_for(world, tmp_path / "out", recipe=path), Quiet())
    assert not (tmp_path / "out").exists()


def test_a_company_file_can_be_looked_at(world: Path, tmp_path: Path) -> None:
    (east, _), _ = written(request_for(world, tmp_path / "out"), Quiet())
    table = CliRunner().invoke(cli, ["inspect", str(east)])
    assert table.exception is None, table.exception
    assert (
        "guided path, 4 steps" in table.output
        and "scored together; recovered by 'path':" in table.output
    )
    for name in ("page.html", "picture.png"):
        drawn = CliRunner().invoke(cli, ["plot", str(east), "--out", str(tmp_path / name)])
        assert drawn.exception is None, drawn.exception
        assert (tmp_path / name).stat().st_size > 1000
