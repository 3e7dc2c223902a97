"""What we never do: load pickles, run a checkpoint's code, write elsewhere.

`test_every_command` sees that the network is left alone.
"""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergekit_wp.cli import main
from mergekit_wp.errors import UserError
from mergekit_wp.files.atomic import staged_folder
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.report.page import html
from tests.factory import make_score_file
from tests.merging import Family, llama_config
from tests.models import make_model, perturbed, save, write_prompts

torch.set_num_threads(1)
PACKAGE = Path(__file__).parents[1] / "mergekit_wp"


class Bomb:
    """A pickle that leaves a trace where it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def run(*arguments: str, status: int = 0) -> None:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == status


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    base = make_model("llama-tied")
    save(base, tmp_path / "base", torch.float32)
    save(perturbed(base), tmp_path / "expert", torch.float32)
    write_prompts(tmp_path / "prompts.jsonl", 2)
    return tmp_path


def scored(folder: Path, *more: str, status: int = 0) -> Path:
    out = folder / "expert.safetensors"
    run(
        "score", str(folder / "base"), str(folder / "expert"), "--prompts",
        str(folder / "prompts.jsonl"), "--out", str(out), "--estimand", "share",
        "--share-steps", "1", "--max-new-tokens", "2", *more, status=status,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("where", ["alone", "in an index of safetensors"])
def test_pickles_are_refused_unopened(pair: Path, where: str, capfd: Any) -> None:
    (pair / "expert" / "model.safetensors").unlink()
    trace = pair / "trace"
    weights = pair / "expert" / "pytorch_model.bin"
    weights.write_bytes(pickle.dumps(Bomb(trace)))
    if where != "alone":
        index = {"weight_map": {"model.norm.weight": weights.name}}
        (pair / "expert" / "model.safetensors.index.json").write_text(json.dumps(index))
    scored(pair, status=2)
    said = capfd.readouterr().err
    assert ("pickled weights, which are never loaded" in said) == (where == "alone")
    assert "only safetensors files beside the index are read" in said or where == "alone"
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../base/model.safetensors", "/etc/passwd", 3])
def test_an_index_names_no_file_elsewhere(pair: Path, name: object) -> None:
    (pair / "expert" / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": name}}
    (pair / "expert" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="only safetensors files beside the index are read"):
        Checkpoint(str(pair / "expert"))


def test_pickles_are_refused_before_a_merge(tmp_path: Path, capfd: Any) -> None:
    family = Family.make(tmp_path, llama_config())
    folder = family.experts[0].path
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(family.recipe()))
    run("merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out"), "--quiet", status=2)
    assert "has pickled weights, which are never loaded" in capfd.readouterr().err
    assert not (tmp_path / "trace").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
def test_a_checkpoints_own_code_is_not_run(pair: Path, part: str, monkeypatch: Any) -> None:
    """Nor does anything ask on the terminal, which would stop a batch job."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    trace = pair / "trace"
    for folder in (pair / "base", pair / "expert"):
        (folder / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Own: ...\n")
        config = json.loads((folder / part).read_text())
        own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
        config["auto_map"] = own | {"AutoTokenizer": ["own.Own", "own.Own"]}
        (folder / part).write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        main(["score", str(pair / "base"), str(pair / "expert"), "--prompts",
              str(pair / "prompts.jsonl"), "--out", str(pair / "s.safetensors"),
              "--estimand", "share", "--share-steps", "1", "--max-new-tokens", "2"])  # fmt: skip
    assert not trace.exists()


def test_every_call_says_that_remote_code_is_not_trusted() -> None:
    """transformers' default is to ask, so each call of ours has to say no."""
    calls = 0
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = ast.unparse(node.func.value)
            loads = node.func.attr in ("from_pretrained", "from_config") and "Auto" in owner
            if loads or (node.func.attr == "config" and isinstance(node.func.value, ast.Name)):
                said = {key.arg: ast.unparse(key.value) for key in node.keywords}
                trusted = said.get("trust_remote_code", "missing")
                assert trusted == "False" or trusted.endswith(".trust_remote_code"), (file, owner)
                calls += 1
            assert (owner, node.func.attr) != ("torch", "load"), file
            assert owner != "pickle", file
    assert calls >= 5


def test_links_do_not_lead_a_merge_out_of_its_folder(tmp_path: Path, capfd: Any) -> None:
    family = Family.make(tmp_path / "zoo", llama_config())
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(family.recipe()))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "scores").symlink_to(elsewhere)
    arguments = ("merge", str(tmp_path / "recipe.yml"), str(out), "--quiet", "--no-copy-tokenizer")
    run(*arguments, status=2)
    assert "leads out of" in capfd.readouterr().err
    assert not list(elsewhere.iterdir())
    (out / "scores").unlink()
    (elsewhere / "mine").write_text("mine")
    (out / "config.json").symlink_to(elsewhere / "mine")
    run(*arguments, "--overwrite")
    assert (elsewhere / "mine").read_text() == "mine"
    shutil.rmtree(out / "scores")
    (out / "scores").symlink_to(elsewhere)
    run("card", str(out), status=2)
    assert [path.name for path in elsewhere.iterdir()] == ["mine"]


def test_score_files_with_odd_names_are_copied_into_scores(tmp_path: Path) -> None:
    family = Family.make(tmp_path / "zoo", llama_config())
    odd = tmp_path / "zoo" / "...safetensors"
    family.paths[0].rename(odd)
    family.paths[0] = odd
    recipe = family.recipe({"scores": f"{tmp_path}/zoo/scores/../...safetensors"}, {})
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    before = set(tmp_path.rglob("*"))
    run("merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out"), "--quiet",
        "--no-copy-tokenizer")  # fmt: skip
    new = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "out") for path in new)
    assert len(list((tmp_path / "out" / "scores").iterdir())) == 2


def test_a_staged_folder_stays_inside(tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    target.mkdir()
    elsewhere.mkdir()
    (target / "deep").symlink_to(elsewhere)
    with pytest.raises(UserError, match="leads out of"), staged_folder(target) as folder:
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "file").write_text("x")
    assert not list(elsewhere.iterdir())


def test_names_of_a_manifest_are_text_in_a_page() -> None:
    file = make_score_file()
    hostile = "<script>alert(1)</script>"
    update = {"behavior": hostile, "versions": {hostile: hostile},
              "base": file.manifest.base.model_copy(update={"reference": hostile}),
              "created": hostile}  # fmt: skip
    page = html(ScoreFile(file.manifest.model_copy(update=update), file.tensors))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    strange = {"architecture": hostile, "kinds": ("tensor",)}  # only a class without heads may be
    bare = {"n_heads": 0, "n_kv_groups": 0, "n_neurons": 0}
    plain = make_score_file(estimands=("share",), kinds=("tensor",))
    page = html(ScoreFile(plain.manifest.model_copy(update=strange | bare), plain.tensors))
    assert "<script>alert" not in page
