"""The model card: loads on the Hub's own terms, and says what the merge did."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from benchmarks.components import fine_components
from mergekit_wp.architectures import Dims
from mergekit_wp.card import sources as card_sources
from mergekit_wp.card.contributions import Contributions, Tally, contributions
from mergekit_wp.card.scores import copy_scores
from mergekit_wp.card.sources import NOT_READ, NOT_STATED, common_licence, sources
from mergekit_wp.card.write import BEGIN, mergekit_card
from mergekit_wp.cli import cli
from mergekit_wp.comparison.resampling import Resampled
from mergekit_wp.comparison.rows import UNTUNED, Comparison, Row
from mergekit_wp.comparison.table import summary
from mergekit_wp.components import Partition
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.files.manifest import Fidelity
from mergekit_wp.merging import recipe as recipes
from mergekit_wp.merging.plan import plan
from mergekit_wp.merging.recipe import score_texts
from mergekit_wp.models.model_names import distinct_names, file_names, is_called
from mergekit_wp.terms import RowRole
from tests.merging import Family, llama_config


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked the Hub")

    LoaderCache.loaders.clear()
    monkeypatch.setattr(huggingface_hub, "repo_exists", refuse)
    monkeypatch.setattr(card_sources, "hf_hub_download", refuse)
    yield


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family.make(tmp_path, llama_config())


def write(recipe: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False))
    return path


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, UserError | SystemExit):
        raise result.exception
    return result


def merged(recipe: Path, out: Path) -> Path:
    result = run("merge", recipe, out, "--quiet", "--no-copy-tokenizer")
    assert result.exception is None, result.exception
    return out


def refusal(*arguments: object) -> str:
    result = run("card", *arguments)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def carded(*arguments: object) -> ModelCard:
    result = run("card", *arguments)
    assert result.exception is None, result.exception
    return ModelCard.load(Path(str(arguments[0])) / "README.md")


# --- what a merge writes ---------------------------------------------------------------------


def test_a_merge_has_a_card_its_recipe_and_its_scores(family: Family, tmp_path: Path) -> None:
    manifest = family.files[0].manifest
    checked = Fidelity(method="first-order", verified_top=4, verified_random=2, spearman=0.875)
    fidelity = manifest.fidelity | {"share/kl/neuron": checked}
    told = scorefile.ScoreFile(
        manifest.model_copy(update={"fidelity": fidelity, "completeness": {"share/kl": 0.987}}),
        family.files[0].tensors,
    )
    scorefile.write(told, family.paths[0])
    out = merged(write(family.recipe(), tmp_path / "recipe.yml"), tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model_relation == "merge"
    assert {"mergekit", "merge"} <= set(card.data.tags)
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None, "folders are no Hub ids"
    for path in family.paths:
        copy = out / "scores" / path.name
        assert copy.read_bytes() == path.read_bytes()
        assert hashlib.sha256(copy.read_bytes()).hexdigest() in card.text
    assert (out / "contributions.png").read_bytes()[:4] == b"\x89PNG"
    assert "share/kl of neurons: first-order; against 6 exact swaps" in card.text
    assert "Spearman 0.875" in card.text and "share/kl sums to 0.987 of 1" in card.text


def test_the_folder_alone_makes_the_same_merge(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = merged(write(family.recipe(), tmp_path / "recipe.yml"), tmp_path / "out")
    for path in family.paths:
        path.unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = merged(out / "mergekit_config.yml", elsewhere / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (out, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_folders_with_one_slash_need_no_network(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # mergekit's own card asks the Hub whether 'x/base' is a repository, after the whole merge
    data = family.recipe()
    data["base_model"] = f"{tmp_path.name}/base"
    for i, model in enumerate(data["models"]):  # type: ignore[arg-type]
        model["model"] = f"{tmp_path.name}/expert{i}"
    monkeypatch.chdir(tmp_path.parent)
    out = merged(write(data, tmp_path / "recipe.yml"), tmp_path / "out")
    text = (out / "README.md").read_text()
    assert f"* {tmp_path.name}/expert0" in text
    assert f"using {tmp_path.name}/base as a base" in text
    assert str(tmp_path) not in text.replace(f"{tmp_path.name}/", "")


def test_folders_of_adapters_need_no_network_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "adapter"):
        (tmp_path / "x" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = {"model": "x/base+x/adapter", "parameters": {"weight": 1}}
    data = {"merge_method": "linear", "models": [model]}
    text = mergekit_card(MergeConfiguration.model_validate(data), yaml.safe_dump(data), "out")
    assert "* x/base + x/adapter\n" in text and str(tmp_path) not in text


def test_no_model_card_on_request(family: Family, tmp_path: Path) -> None:
    recipe = write(family.recipe(), tmp_path / "recipe.yml")
    result = run("merge", recipe, tmp_path / "out", "--no-write-model-card", "--no-copy-tokenizer")
    assert result.exception is None
    assert not (tmp_path / "out" / "README.md").exists()
    assert not (tmp_path / "out" / "scores").exists()


def test_other_methods_get_the_front_matter_only(family: Family, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(e.path), "parameters": {"weight": 1.0}} for e in family.experts],
        "dtype": "float32",
    }
    out = merged(write(recipe, tmp_path / "recipe.yml"), tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model_relation == "merge"
    assert "## Inputs" in card.text
    assert "Score files" not in card.text and not (out / "scores").exists()


# --- the recipe beside the weights -----------------------------------------------------------


def recipe_at(path: Path, text: str) -> recipes.Recipe:
    return recipes.read(write(text, path))


def test_comments_and_order_stay_when_paths_move(family: Family, tmp_path: Path) -> None:
    text = yaml.safe_dump(family.recipe(), sort_keys=False) + "# tried 0.9 too\n"
    copies, moved = copy_scores(recipe_at(tmp_path / "recipe.yml", text), tmp_path / "out")
    assert moved.endswith("# tried 0.9 too\n")
    assert [copy.name for copy in copies] == [
        "scores/expert0.safetensors",
        "scores/expert1.safetensors",
    ]
    wanted = yaml.safe_load(text)
    for i, model in enumerate(wanted["models"]):
        model["parameters"]["scores"] = f"scores/expert{i}.safetensors"
    assert yaml.safe_load(moved) == wanted


def test_files_of_one_name_are_kept_apart_and_prefixes_are_no_matches(
    family: Family, tmp_path: Path
) -> None:
    first, second = (
        tmp_path / "a" / "s.safetensors",
        tmp_path / "a" / "s.safetensors.old" / "s.safetensors",
    )
    scorefile.write(family.files[0], first)
    scorefile.write(family.files[1], second)
    data = family.recipe()
    data["models"][0]["parameters"]["scores"] = "a/s.safetensors"  # type: ignore[index]
    data["models"][1]["parameters"]["scores"] = "a/s.safetensors.old/s.safetensors"  # type: ignore[index]
    recipe = recipe_at(tmp_path / "recipe.yml", yaml.safe_dump(data))
    copies, moved = copy_scores(recipe, tmp_path / "out")
    named = [m["parameters"]["scores"] for m in yaml.safe_load(moved)["models"]]
    assert (
        named
        == [copy.name for copy in copies]
        == ["scores/s.safetensors", "scores/s-2.safetensors"]
    )
    for name, source in zip(named, (first, second), strict=True):
        assert (tmp_path / "out" / name).read_bytes() == source.read_bytes()


def test_hub_references_stay_and_are_copied(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = family.recipe()
    reference = "hf://me/scores@main/expert0.safetensors"
    data["models"][0]["parameters"]["scores"] = reference  # type: ignore[index]
    monkeypatch.setattr("mergekit_wp.merging.recipe.local_path", lambda _: str(family.paths[0]))
    recipe = recipe_at(tmp_path / "recipe.yml", yaml.safe_dump(data))
    copies, moved = copy_scores(recipe, tmp_path / "out")
    assert reference in moved
    assert len(copies) == 2 and (tmp_path / "out" / copies[0].name).exists()


# --- contributions ---------------------------------------------------------------------------


def tallied(recipe: recipes.Recipe) -> Contributions:
    tasks = plan(recipe, MergeOptions())
    return contributions(recipes.experts_in_order(recipe.config), tasks)


@pytest.mark.parametrize("fusion", ["share", "winner", "gate"])
def test_contributions_against_a_count_by_component(
    family: Family, tmp_path: Path, fusion: str
) -> None:
    weights = (1.0, 0.5)
    shared = {"fusion": fusion} | ({"power": 1} if fusion == "share" else {})
    data = family.recipe({"weight": 1.0}, {"weight": 0.5}, parameters=shared)
    recipe = recipes.read(write(data, tmp_path / "recipe.yml"))
    found = tallied(recipe)
    assert found.experts == tuple(str(e.path) for e in family.experts)

    shapes = {name: tuple(t.shape) for name, t in family.base.state.items()}
    partition = Partition(Dims.from_config(family.config), shapes)
    parts = list(fine_components(partition))
    tables = []
    for file in family.files:
        raw = [
            float(
                file.tensors[f"share/kl/{p.kind}"][
                    (p.layer, p.index) if p.kind != "tensor" else p.index
                ]
            )
            for p in parts
        ]
        total = sum(max(v, 0) for v in raw)
        tables.append([max(v, 0) / total for v in raw])
    expected: dict[str, list[list[float]]] = {}
    for part, s in zip(parts, zip(*tables, strict=True), strict=True):
        if fusion == "share":
            gates = [w * x / sum(s) if sum(s) else 0 for w, x in zip(weights, s, strict=True)]
        elif fusion == "winner":
            gates = [w if x and x == max(s) else 0 for w, x in zip(weights, s, strict=True)]
        else:
            gates = [w if x else 0 for w, x in zip(weights, s, strict=True)]
        expected.setdefault(part.kind, []).append(gates)
    assert set(found.kinds) == set(expected)
    for kind, tally in found.kinds.items():
        gates = expected[kind]
        assert tally.total == len(gates)
        assert tally.taking == tuple(sum(g[e] > 0 for g in gates) for e in range(2))
        assert tally.gates == pytest.approx(
            [sum(g[e] for g in gates) / len(gates) for e in range(2)]
        )
        leads = [
            sum((g[e] == max(g)) / g.count(max(g)) for g in gates if max(g) > 0) for e in range(2)
        ]
        assert tally.leading == pytest.approx(leads)


def test_a_tensor_that_an_expert_did_not_change_is_no_contribution(tmp_path: Path) -> None:
    config = llama_config()
    family = Family.make(tmp_path, config, n_experts=1)
    unchanged = {n: 0.0 if "norm" in n else v for n, v in family.files[0].delta_norm.items()}
    tensors = family.files[0].tensors | {"delta_norm": torch.tensor(list(unchanged.values()))}
    scorefile.write(scorefile.ScoreFile(family.files[0].manifest, tensors), family.paths[0])
    recipe = recipes.read(write(family.recipe(), tmp_path / "recipe.yml"))
    before = tallied(recipe).kinds["tensor"]
    norms = sum("norm" in name for name in unchanged)
    assert before.total == norms + 1, "the embedding is the one other whole tensor"
    assert before.taking[0] <= 1
    assert isinstance(before, Tally)


@pytest.mark.parametrize(
    ("references", "names"),
    [
        (["me/math", "you/code"], ("math", "code")),
        (["me/math", "you/math", "me/code"], ("me--math", "you--math", "code")),
        (["b+me/lora@v1", "b+me/lora@refs/pr/1"], ("lora@v1", "lora@refs-pr-1")),
        (["me/math@v1", "me/math@v2"], ("math@v1", "math@v2")),
        (["b+me/lora", "c+me/lora"], ("me--lora", "me--lora")),  # nothing tells them apart
    ],
)
def test_files_of_models_of_one_name(references: list[str], names: tuple[str, ...]) -> None:
    assert file_names(references) == names


def test_files_of_folders_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in ("math", "code"):
        (tmp_path / run / "checkpoint-500").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "math")
    runs = ["checkpoint-500", "../code/checkpoint-500/"]
    assert file_names(runs) == ("math--checkpoint-500", "code--checkpoint-500")
    assert [is_called(run, "math/checkpoint-500") for run in runs] == [True, False]
    assert all(is_called(run, "checkpoint-500") for run in runs)
    assert not any(is_called(run, "500") for run in runs)


def test_distinct_names() -> None:
    assert distinct_names(["a/b/inst", "a/b/math"]) == ("inst", "math")
    assert distinct_names(["me/x", "you/x"]) == ("me/x", "you/x")


# --- inputs ----------------------------------------------------------------------------------


def licensed(path: Path, licence: str) -> None:
    (path / "README.md").write_text(f"---\nlicense: {licence}\n---\n# A model\n")


def test_one_common_licence_is_the_merges(family: Family, tmp_path: Path) -> None:
    for model in (family.base, *family.experts):
        licensed(model.path, "apache-2.0")
    out = merged(write(family.recipe(), tmp_path / "recipe.yml"), tmp_path / "out")
    assert ModelCard.load(out / "README.md").data.license == "apache-2.0"


@pytest.mark.parametrize("licence", ["mit", None])
def test_licences_that_differ_are_listed_for_a_person_to_choose(
    family: Family, tmp_path: Path, licence: str | None
) -> None:
    licensed(family.base.path, "apache-2.0")
    licensed(family.experts[0].path, "apache-2.0")
    if licence:
        licensed(family.experts[1].path, licence)
    out = merged(write(family.recipe(), tmp_path / "recipe.yml"), tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    assert card.data.license is None
    assert f"| expert | a local folder | {licence or NOT_STATED} |" in card.text


def test_hub_ids_come_with_commit_and_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo: str, file: str, revision: str | None = None) -> str:
        if repo == "org/secret":
            raise OSError("401")
        assert (repo, file, revision) == ("org/base", "README.md", "v2")
        licensed(tmp_path, "llama3.2")
        return str(tmp_path / "README.md")

    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = {"org/base": f"/cache/snapshots/{commit}/config.json"}
    monkeypatch.setattr(card_sources, "hf_hub_download", download)
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda repo, file, revision: cached.get(repo)
    )
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "linear",
            "base_model": "org/base@v2",
            "models": [{"model": "org/secret", "parameters": {"weight": 1}}],
        }
    )
    base, secret = sources(config)
    assert (base.on_hub, base.revision, base.licence) == (True, commit, "llama3.2")
    assert (secret.role, secret.revision, secret.licence) == ("expert", None, NOT_READ)
    assert common_licence([base, secret]) is None
    assert common_licence([base]) == "llama3.2"
    assert ModelReference.parse("org/base@v2").model.revision == "v2"


# --- `card` ----------------------------------------------------------------------------------


def test_card_completes_what_mergekit_yaml_wrote_and_what_people_added(
    family: Family, tmp_path: Path
) -> None:
    text = yaml.safe_dump(family.recipe(), sort_keys=False)
    out = tmp_path / "out"
    options = MergeOptions(copy_tokenizer=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options, text)
    readme = out / "README.md"
    readme.write_text(
        readme.read_text().replace("tags:", "license: mit\ntags:") + "\nMy own words.\n"
    )
    first = carded(out)
    assert first.data.license == "mit" and "My own words." in first.text
    assert "scores: scores/expert0.safetensors" in first.text, "the recipe as it can be repeated"
    written = readme.read_text()
    again = carded(out)
    assert readme.read_text() == written and again.text.count(BEGIN) == 1
    asks = "add the Hub ids of your inputs to its 'base_model'"
    assert asks in run("card", out).output
    readme.write_text(written.replace("tags:", "base_model:\n- a/b\n- a/c\ntags:"))
    said = run("card", out)
    assert said.exit_code == 0 and asks not in said.output, "they are there"


def comparison(folder: Path, recipe: dict[str, Any]) -> Path:
    """A finished comparison whose untuned row has this recipe."""
    right = {
        "base": [0, 0, 0, 0],
        "expert e0": [1, 1, 1, 1],
        "weight_patching (untuned)": [1, 0, 1, 1],
        "ties": [0, 0, 0, 1],
        "ties+aim": [0, 0, 1, 1],
    }
    roles: dict[str, RowRole] = {"base": "base", "expert e0": "expert", "ties": "peer"}
    rows = [
        Row(name, roles.get(name, "ours"), {}, {"math": [[float(x) for x in scores]]})
        for name, scores in right.items()
    ]
    rows.append(Row("della", "peer", failed="out of memory"))
    found = Comparison(tuple(rows), ("math",), False, "weight_patching (untuned)")
    for name in ("weight_patching-untuned", "ties+aim"):
        write(recipe, folder / "recipes" / f"{name}.yml")
    write(recipe | {"parameters": {"lambda": 0.5}}, folder / "recipes" / "ties.yml")
    lines = [
        {
            "model": m.removesuffix(UNTUNED),
            "task": "math",
            "split": split,
            "item": str(i),
            "score": s,
        }
        for m, scores in right.items()
        for split, values in (("test", scores), ("valid", [0, 0, 0, 0]))
        for i, s in enumerate(values)
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps(summary(Resampled(found, 100))))
    files = {
        path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in score_texts(recipe)
    }
    (folder / "comparison.json").write_text(json.dumps({"score files": files}))
    return folder


def test_results_of_the_row_with_the_same_recipe(family: Family, tmp_path: Path) -> None:
    results = comparison(tmp_path / "cmp", family.recipe())
    out = merged(write(family.recipe(), tmp_path / "recipe.yml"), tmp_path / "out")
    card = carded(out, "--results", results)
    [found] = card.data.eval_results
    assert (found.dataset_name, found.dataset_split, found.metric_value) == ("math", "test", 0.75)
    assert card.data.model_name == "out"
    assert "**weight_patching (untuned)**" in card.text
    assert "| ties | 0.25 [" in card.text and "failed: out of memory" in card.text
    [other] = carded(out, "--results", results, "--row", "ties+aim").data.eval_results
    assert other.metric_value == 0.5, "replaced, not added"
    text = (out / "README.md").read_text()
    theirs = text.replace("(mergekit-wp compare)", "(by hand)")
    (out / "README.md").write_text(theirs)
    assert carded(out).data.eval_results == ModelCard(theirs).data.eval_results, "others' stay"
    (out / "README.md").write_text(text)
    bare = carded(out)
    assert bare.data.eval_results is None and "| ties |" not in bare.text
    assert "model-index" not in (out / "README.md").read_text()


def test_results_of_score_files_that_were_made_anew_since_are_refused(
    family: Family, tmp_path: Path
) -> None:
    results = comparison(tmp_path / "cmp", family.recipe())
    tensors = family.files[0].tensors
    anew = {name: value * 0.5 if "share" in name else value for name, value in tensors.items()}
    scorefile.write(scorefile.ScoreFile(family.files[0].manifest, anew), family.paths[0])
    out = merged(write(family.recipe(), tmp_path / "recipe.yml"), tmp_path / "out")
    assert "none of the recipes in" in refusal(out, "--results", results)
    (results / "comparison.json").write_text("{}")
    assert "does not say by which score files" in refusal(out, "--results", results)


def test_results_of_other_merges_are_refused(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe(parameters={"lambda": 0.9})
    results = comparison(tmp_path / "cmp", family.recipe())
    out = merged(write(recipe, tmp_path / "recipe.yml"), tmp_path / "out")
    before = (out / "README.md").read_text()
    assert "say --row NAME" in refusal(out, "--results", results)
    assert "has no merge 'dare'; it has" in refusal(out, "--results", results, "--row", "dare")
    assert "out of memory" in refusal(out, "--results", results, "--row", "della")
    lines = (results / "results.jsonl").read_text().splitlines()
    (results / "results.jsonl").write_text("\n".join(x for x in lines if '"ties"' not in x))
    assert "no test items of 'ties'" in refusal(out, "--results", results)
    (results / "summary.json").write_text("{")
    assert "holds no finished comparison" in refusal(out, "--results", results)
    (results / "summary.json").unlink()
    assert "holds no finished comparison" in refusal(out, "--results", results)
    assert (out / "README.md").read_text() == before


def test_bad_folders_are_refused(family: Family, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no mergekit_config.yml" in refusal(empty)
    assert "give both" in refusal(empty, "--row", "ties")
    out = merged(write(family.recipe(), tmp_path / "recipe.yml"), tmp_path / "out")
    (out / "README.md").write_text("---\nlicense: [\n---\nx\n")
    assert "mend its front matter" in refusal(out)
    (out / "scores" / "expert0.safetensors").unlink()
    assert "scores/expert0.safetensors not found" in refusal(out)
