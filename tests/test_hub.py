"""Models, adapters and score files on the Hub: a local cache in its layout, and no network."""

from __future__ import annotations

import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, XetDownloadError
from huggingface_hub.utils import filter_repo_objects
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.card import sources as card_sources
from mergekit_wp.card.sources import NOT_READ
from mergekit_wp.cli import cli, main
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.joint.fit import fit
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.merging import preflight
from mergekit_wp.merging import recipe as recipes
from mergekit_wp.merging.model_references import data_of
from mergekit_wp.merging.recipe import read as read_recipe
from mergekit_wp.models import hub
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.pair import open_pair
from mergekit_wp.runs.scored import scored_model
from tests.fitting import fitted
from tests.gating import gate, gated_merge, gated_recipe
from tests.joint_world import NAMES, make_world
from tests.merging import Family, llama_config
from tests.models import make_model, perturbed, save, write_prompts
from tests.test_inputs import Merged, assert_close, by_ours, by_stock, expected
from tests.test_lora import make_adapter
from tests.test_scoring import Quiet

ensure_registered()
torch.set_num_threads(1)
FIRST, SECOND = "1" * 40, "2" * 40


class Cache:
    """The Hub's cache on this machine, filled by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, repository: str, commit: str, source: Path, *names: str) -> Path:
        """Files of a repository at a commit, to which branches and tags point."""
        home = self.folder / f"models--{repository.replace('/', '--')}"
        snapshot = home / "snapshots" / commit
        shutil.copytree(source, snapshot, dirs_exist_ok=True)
        for name in names:
            self.point(repository, name, commit)
        return snapshot

    def point(self, repository: str, name: str, commit: str) -> None:
        ref = self.folder / f"models--{repository.replace('/', '--')}" / "refs" / name
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    made = Cache(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(made.folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def listed(repository: str, revision: str | None = None, **_: object) -> list[str]:
        return os.listdir(huggingface_hub.snapshot_download(repository, revision=revision))

    monkeypatch.setattr(huggingface_hub, "list_repo_files", listed)  # mergekit asks for it
    monkeypatch.chdir(tmp_path)
    LoaderCache.loaders.clear()
    hub._fetch.cache_clear()
    yield made
    hub._fetch.cache_clear()


@pytest.fixture
def pair(cache: Cache, tmp_path: Path) -> Cache:
    """``owner/base``, whose tag v1 is another commit than main, and ``owner/expert``."""
    base = make_model("llama-tied")
    cache.put("owner/base", FIRST, save(base, tmp_path / "first", torch.float32), "v1")
    moved = perturbed(base, seed=8)
    cache.put("owner/base", SECOND, save(moved, tmp_path / "second", torch.float32), "main")
    expert = perturbed(base)
    cache.put("owner/expert", SECOND, save(expert, tmp_path / "expert", torch.float32), "main")
    return cache


def run(*arguments: str, status: int = 0) -> None:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == status


def scored(tmp_path: Path, base: str, expert: str, status: int = 0) -> Path:
    out = tmp_path / "s.safetensors"
    run(
        "score", base, expert, "--prompts", str(write_prompts(tmp_path / "p.jsonl", 2)),
        "--out", str(out), "--estimand", "share", "--share-steps", "1", "--max-new-tokens", "2",
        status=status,
    )  # fmt: skip
    return out


def test_revisions_are_read_and_recorded(pair: Cache, tmp_path: Path) -> None:
    manifest = scorefile.read(scored(tmp_path, "owner/base@v1", "owner/expert")).manifest
    assert (manifest.base.reference, manifest.base.revision) == ("owner/base@v1", FIRST)
    assert (manifest.expert.reference, manifest.expert.revision) == ("owner/expert", SECOND)
    assert scored_model(manifest.expert) == f"owner/expert@{SECOND}"
    by_folder = open_pair(str(tmp_path / "first"), str(tmp_path / "expert"), lambda *_: None)
    found = scorefile.read(tmp_path / "s.safetensors").delta_norm
    assert found == pytest.approx(by_folder.delta_norm, rel=1e-6)


@pytest.mark.parametrize("revision", [FIRST, "v1", "main", None])
def test_every_way_to_write_a_revision(pair: Cache, tmp_path: Path, revision: str | None) -> None:
    checkpoint = Checkpoint("owner/base" + (f"@{revision}" if revision else ""))
    first = revision in (FIRST, "v1")
    assert checkpoint.revision == (FIRST if first else SECOND)
    stored = load_file(tmp_path / ("first" if first else "second") / "model.safetensors")
    name = "model.norm.weight"
    assert torch.equal(checkpoint.tensor(name, torch.float32), stored[name])
    assert checkpoint.tokenizer() is not None


def test_config_and_weights_are_of_one_commit(
    pair: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody pushes after the config was read."""
    download = huggingface_hub.snapshot_download

    def late(repository: str, **options: Any) -> str:
        pair.point("owner/base", "main", FIRST)
        return download(repository, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", late)
    checkpoint = Checkpoint("owner/base")
    assert checkpoint.revision == SECOND
    stored = load_file(tmp_path / "second" / "model.safetensors")
    name = "model.norm.weight"
    assert torch.equal(checkpoint.tensor(name, torch.float32), stored[name])


@pytest.mark.parametrize(
    ("fetch", "wanted"),
    [
        (
            hub.checkpoint,
            {
                "config.json", "chat_template.jinja", "tokenizer.json", "tokenizer.model",
                "merges.txt", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
            },
        ),
        (
            hub.adapter,
            {
                "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
                "tokenizer.json", "tokenizer.model",
            },
        ),
    ],
    ids=["checkpoint", "adapter"],
)  # fmt: skip
def test_what_is_fetched(monkeypatch: pytest.MonkeyPatch, fetch: Any, wanted: set[str]) -> None:
    """Chat templates and nothing pickled, no second copy of the weights, no other formats."""
    files = [
        *wanted, "pytorch_model.bin", "adapter_model.bin", "README.md", "model.gguf",
        "original/params.json", "onnx/model.safetensors", "consolidated.safetensors",
        "training_args.bin", "optimizer.pt",
    ]  # fmt: skip
    asked: dict[str, Any] = {}

    def noted(
        repository: str, *, revision: str | None, cache_dir: str | None = None, **patterns: Any
    ) -> str:
        assert cache_dir is None
        asked.update(patterns, repository=repository, revision=revision)
        return "/x/snapshots/abc"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", noted)
    assert hub.commit_of(fetch("owner/name", "v1")) == "abc"
    assert (asked.pop("repository"), asked.pop("revision")) == ("owner/name", "v1")
    assert set(filter_repo_objects(files, **asked)) == wanted


def test_an_adapter_of_a_commit(pair: Cache, tmp_path: Path) -> None:
    adapter, merged = make_adapter(tmp_path / "first", tmp_path)
    pair.put("owner/adapter", FIRST, adapter, "v2", "main")
    reference = "owner/base@v1+owner/adapter"
    manifest = scorefile.read(scored(tmp_path, "owner/base@v1", reference)).manifest
    assert manifest.expert.revision == FIRST
    assert scored_model(manifest.expert) == f"{reference}@{FIRST}"
    ours, theirs = Checkpoint(f"{reference}@v2"), Checkpoint(str(merged))
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(ours.tensor(name, torch.float32), theirs.tensor(name, torch.float32))


@pytest.mark.parametrize("merged", [by_stock, by_ours])
def test_a_merge_of_hub_models_by_scores_on_the_hub(
    cache: Cache, tmp_path: Path, merged: Merged
) -> None:
    family = Family.make(tmp_path, llama_config())
    cache.put("owner/base", FIRST, family.base.path, "v1")
    recipe = family.recipe(base_model="owner/base@v1")
    for e, (expert, path) in enumerate(zip(family.experts, family.paths, strict=True)):
        shutil.copy(path, expert.path / "scores.safetensors")
        cache.put(f"owner/expert{e}", SECOND, expert.path, "main")
        recipe["models"][e] = {
            "model": f"owner/expert{e}@{SECOND}",
            "parameters": {"scores": f"hf://owner/expert{e}/scores.safetensors"},
        }
    assert_close(merged(recipe, tmp_path / "out"), expected(family))
    file = "hf://owner/expert0/scores.safetensors"
    for command in (["inspect", file], ["plot", file, "--out", str(tmp_path / "page.html")]):
        done = CliRunner().invoke(cli, command)
        assert done.exception is None, done.exception
    swapped = recipe["models"][0]["parameters"], recipe["models"][1]["parameters"]
    recipe["models"][1]["parameters"], recipe["models"][0]["parameters"] = swapped
    with pytest.raises(UserError, match="these are scores of another expert"):
        merged(recipe, tmp_path / "swapped")


@pytest.mark.parametrize("merged", [by_stock, by_ours])
def test_a_merge_of_hub_models_by_gates_on_the_hub(
    cache: Cache, tmp_path: Path, merged: Merged
) -> None:
    family = Family.make(tmp_path, llama_config())
    file = gate(family, tmp_path / "g")
    cache.put("owner/base", FIRST, family.base.path, "v1")
    cache.put("owner/gates", SECOND, tmp_path / "g", "v2")
    for e, expert in enumerate(family.experts):
        cache.put(f"owner/expert{e}", SECOND, expert.path, "main")
    recipe = {
        "merge_method": "weight_patching",
        "base_model": "owner/base@v1",
        "models": [
            {
                "model": model,
                "parameters": {"scores": f"hf://owner/gates@v2/expert{e}.safetensors"},
            }
            for e, model in ((1, f"owner/expert1@{SECOND}"), (0, "owner/expert0"))
        ],
        "parameters": {"fusion": "path"},
        "dtype": "float32",
    }
    experts = [expert.state for expert in family.experts]
    assert_close(merged(recipe, tmp_path / "out"), gated_merge(family.base.state, experts, file))
    cache.put("owner/expert0", FIRST, family.experts[1].path, "other")
    recipe["models"][1]["model"] = "owner/expert0@other"
    with pytest.raises(UserError, match="owner/expert0@other: .* these are scores of another"):
        merged(recipe, tmp_path / "another-revision")
    recipe["models"][0]["parameters"]["scores"] = "hf://owner/gates@v3/expert1.safetensors"
    with pytest.raises(UserError, match="score file hf://owner/gates@v3/exp.* not be fetched"):
        merged(recipe, tmp_path / "no-gates")


def test_revisions_are_fitted(cache: Cache, tmp_path: Path) -> None:
    """The commits are recorded, and the gates are those of the same folders."""
    world = make_world("llama-tied", tmp_path / "world")
    plain = fitted(world, tmp_path / "plain", steps=1)
    cache.put("owner/base", FIRST, world / "base", "v1")
    for name, commit in zip(NAMES, (FIRST, SECOND), strict=True):
        cache.put(f"owner/{name}", commit, world / name, "main", "v2")
    models = [{"model": "owner/east@v2"}, {"model": "owner/west"}]
    recipe = {"merge_method": "ties", "base_model": "owner/base@v1", "models": models}
    (world / "recipe.yml").write_text(yaml.safe_dump(recipe))
    file = fitted(world, tmp_path / "gates", steps=1)
    assert all(torch.equal(tensor, plain.tensors[key]) for key, tensor in file.tensors.items())
    models = [file.manifest.base, *(own.manifest.expert for own in file.files)]
    assert [(m.reference, m.revision) for m in models] == [
        ("owner/base@v1", FIRST), ("owner/east@v2", FIRST), ("owner/west", SECOND)
    ]  # fmt: skip
    found = by_ours(
        data_of(read_recipe(tmp_path / "gates" / "recipe.yml").config, exclude_none=True),
        tmp_path / "out",
    )
    same = data_of(read_recipe(tmp_path / "plain" / "recipe.yml").config, exclude_none=True)
    assert all(torch.equal(found[k], t) for k, t in by_ours(same, tmp_path / "same").items())
    recipe["models"][0]["model"] = "owner/east@v9"
    (world / "recipe.yml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match="model 'owner/east@v9' cannot be read: "):
        fitted(world, tmp_path / "no")


@pytest.mark.parametrize("merged", [by_stock, by_ours])
def test_two_revisions_are_two_experts(cache: Cache, tmp_path: Path, merged: Merged) -> None:
    """Merged by scores and by gates; a fit calls them by their revisions."""
    family = Family.make(tmp_path, llama_config())
    recipe = family.recipe()
    for e, (expert, commit) in enumerate(zip(family.experts, (FIRST, SECOND), strict=True)):
        cache.put("owner/expert", commit, expert.path, f"v{e}")
        recipe["models"][e]["model"] = f"owner/expert@v{e}"
    assert_close(merged(recipe, tmp_path / "out"), expected(family))
    named = [
        replace(e, path=Path(m["model"]))
        for e, m in zip(family.experts, recipe["models"], strict=True)
    ]
    file = gate(replace(family, experts=named), tmp_path / "g")
    by_gates = gated_recipe(replace(family, experts=named[::-1]), tmp_path / "g")
    want = gated_merge(family.base.state, [expert.state for expert in family.experts], file)
    assert_close(merged(by_gates, tmp_path / "gated"), want)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    prompts = tuple((model["model"], tmp_path / "p.jsonl") for model in recipe["models"])
    request = FitRequest(recipe=tmp_path / "recipe.yml", prompts=prompts, out=tmp_path / "no")
    with pytest.raises(UserError, match=r"p\.jsonl"):  # past the names: there is no such file
        fit(request, Quiet())


@pytest.mark.parametrize("merged", [by_stock, by_ours])
def test_one_commit_by_two_names_is_one_model(cache: Cache, tmp_path: Path, merged: Merged) -> None:
    family = Family.make(tmp_path, llama_config(), n_experts=1)
    cache.put("owner/expert", FIRST, family.experts[0].path, "main", "v1")
    recipe = family.recipe()
    scores = recipe["models"][0]["parameters"]
    recipe["models"] = [
        {"model": name, "parameters": scores} for name in ("owner/expert", "owner/expert@v1")
    ]
    with pytest.raises(UserError, match="owner/expert is listed twice, .* as owner/expert@v1"):
        merged(recipe, tmp_path / "out")


@pytest.mark.parametrize("method", ["weight_patching", "task_arithmetic"])
def test_a_merge_without_a_network_lists_no_repository(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """As with HF_HUB_OFFLINE=1; and what is written names the models, not where they are cached."""

    def refuse(*_: object, **__: object) -> list[str]:
        raise OfflineModeIsEnabled("a network was asked for")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", refuse)
    family = Family.make(tmp_path, llama_config())
    local = family.recipe()
    recipe = family.recipe(base_model="owner/base@v1")
    for entries in (local, recipe):
        if method == "task_arithmetic":
            entries.pop("parameters", None)
            entries["merge_method"] = method
            for model in entries["models"]:
                model["parameters"] = {"weight": 0.5}
    cache.put("owner/base", FIRST, family.base.path, "v1")
    for e, expert in enumerate(family.experts):
        cache.put(f"owner/expert{e}", SECOND, expert.path, "main")
        recipe["models"][e]["model"] = f"owner/expert{e}"
    found = {}
    for name, entries in (("local", local), ("hub", recipe)):
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump(entries))
        run("merge", str(tmp_path / f"{name}.yml"), str(tmp_path / name))
        found[name] = load_file(tmp_path / name / "model.safetensors")
    assert all(torch.equal(tensor, found["hub"][key]) for key, tensor in found["local"].items())
    for file in ("mergekit_config.yml", "README.md", "config.json"):
        assert str(cache.folder) not in (tmp_path / "hub" / file).read_text()
    assert "owner/expert1" in (tmp_path / "hub" / "mergekit_config.yml").read_text()


class Answers(http.server.BaseHTTPRequestHandler):
    """What huggingface.co answers for gated, private, unknown and busy repositories."""

    def do_HEAD(self) -> None:
        kinds: dict[str, tuple[int, str | None]] = {
            "gated": (401, "GatedRepo"), "forbidden": (403, "GatedRepo"),
            "disabled": (403, None), "busy": (429, None), "branch": (404, "RevisionNotFound"),
            "no-file": (404, "EntryNotFound"),
        }  # fmt: skip
        kind = next((k for k in kinds if k in self.path), None)
        status, code = kinds[kind] if kind else (404, "RepoNotFound")
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        said = "Access to this resource is disabled." if kind == "disabled" else f"said: {kind}"
        self.send_header("X-Error-Message", said)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub of one's own."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.chdir(tmp_path)
    hub._fetch.cache_clear()
    yield
    server.shutdown()
    hub._fetch.cache_clear()


REASONS = {
    "gated": "gated: accept its licence at http.*/owner/gated, and log in with 'hf auth login'",
    "forbidden": "gated: accept its licence .* log in with 'hf auth login'",
    "disabled": "disabled",
    "busy": "rate limit is reached: log in .* or wait",
    "branch": "no such revision",
    "unknown": "no such repository on the Hub; if it is a private one, log in with 'hf auth login'",
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_the_hub_refuses_is_said_in_four_places(
    online: None, tmp_path: Path, kind: str
) -> None:
    base = save(make_model("llama-tied"), tmp_path / "base", torch.float32)
    message = f"owner/{kind}.*{REASONS[kind]}"
    with pytest.raises(UserError, match=message):
        Checkpoint(f"owner/{kind}")
    with pytest.raises(UserError, match=message):
        Checkpoint(f"{base}+owner/{kind}")
    with pytest.raises(UserError, match=message):
        hub.local_path(f"hf://owner/{kind}/scores.safetensors")
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": f"owner/{kind}", "parameters": {"weight": 1}}],
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=message):
        preflight.check(recipes.read(tmp_path / "recipe.yml"), MergeOptions())


def test_a_file_that_the_hub_does_not_have(online: None) -> None:
    with pytest.raises(UserError, match="the repository has no such file"):
        hub.local_path("hf://owner/no-file/scores.safetensors")


def test_an_adapter_on_the_hub_without_its_model(pair: Cache, tmp_path: Path) -> None:
    adapter, _ = make_adapter(tmp_path / "first", tmp_path)
    pair.put("owner/adapter", FIRST, adapter, "main")
    with pytest.raises(UserError, match=r"write '.*first\+owner/adapter'"):
        Checkpoint("owner/adapter")


def test_what_is_not_there_is_said_in_one_line(pair: Cache, tmp_path: Path, capfd: Any) -> None:
    for base, expert, message in (
        ("owner/base@v1", "owner/nothing", "model 'owner/nothing' cannot be read: "),
        ("owner/base@v9", "owner/expert", "model 'owner/base@v9' cannot be read: "),
        ("owner/base@v1", "owner/base@v1+owner/none", "adapter 'owner/none' cannot be read: "),
    ):
        scored(tmp_path, base, expert, status=2)
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert message in line
    snapshot = pair.folder / "models--owner--expert" / "snapshots" / SECOND
    (snapshot / "model.safetensors").unlink()
    scored(tmp_path, "owner/base@v1", "owner/expert", status=2)
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "'owner/expert' has no model.safetensors" in line


@pytest.mark.parametrize(
    "error", [HfHubHTTPError.__bases__[0]("no network"), XetDownloadError("broken")]
)
def test_what_the_client_raises_is_no_crash(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error

    hub._fetch.cache_clear()
    for where in (huggingface_hub, card_sources):
        monkeypatch.setattr(where, "hf_hub_download", refuse)
    with pytest.raises(UserError, match=f"score file hf://a/b/c could not be fetched: {error}"):
        hub.local_path("hf://a/b/c")
    config = MergeConfiguration.model_validate(
        {"merge_method": "linear", "models": [{"model": "a/b", "parameters": {"weight": 1}}]}
    )
    assert [source.licence for source in card_sources.sources(config)] == [NOT_READ]


@pytest.mark.parametrize("error", [TypeError, KeyError, AssertionError, AttributeError])
def test_a_bug_is_not_taken_for_the_network(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> str:
        raise error("ours")

    hub._fetch.cache_clear()
    for where in (huggingface_hub, card_sources):
        monkeypatch.setattr(where, "hf_hub_download", broken)
    with pytest.raises(error, match="ours"):
        hub.local_path("hf://a/b/c")
    config = MergeConfiguration.model_validate(
        {"merge_method": "linear", "models": [{"model": "a/b", "parameters": {"weight": 1}}]}
    )
    with pytest.raises(error, match="ours"):
        card_sources.sources(config)


def test_a_score_file_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, filename: str, revision: str | None) -> str:
        asked.append((repo, filename, revision))
        return "found.safetensors"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    hub._fetch.cache_clear()
    for _ in range(2):
        found = hub.local_path("hf://me/exp@refs%2Fpr%2F1/wp/s.safetensors")
        assert found == "found.safetensors"
    assert hub.local_path("hf://me/exp/s.safetensors") == "found.safetensors"
    assert asked == [
        ("me/exp", "wp/s.safetensors", "refs/pr/1"),
        ("me/exp", "s.safetensors", None),
    ]
    hub._fetch.cache_clear()


def test_bad_references_of_score_files(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is not a Hub file; write hf://owner/repo"):
        hub.local_path("hf://nobody")

    def refuse(*_: object, **__: object) -> str:
        raise OSError("no such repository\nlong help")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    whole = "score file hf://a/b/c could not .*: no such repository long help$"
    with pytest.raises(UserError, match=whole):
        hub.local_path("hf://a/b/c")
