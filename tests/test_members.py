"""The experts of a recipe: how they are named and read, and which are refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from mergekit_wp.cli import cli
from mergekit_wp.errors import UserError
from mergekit_wp.joint.fit import fit
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.models import generation
from mergekit_wp.models.pair import Pair
from tests.joint_world import NAMES, make_world
from tests.models import DEVICE
from tests.test_scoring import Quiet

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["llama-tied", "qwen2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(request.param, tmp_path_factory.mktemp("members"))


def request_for(world: Path, out: Path, **options: object) -> FitRequest:
    settings: dict[str, object] = {
        "recipe": world / "recipe.yml",
        "prompts": tuple((name, world / f"{name}.jsonl") for name in NAMES),
        "out": out,
        "device": DEVICE,
        "unguarded": True,
        "steps": 2,
        **options,
    }
    return FitRequest(**settings)


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
    fit(request_for(world, tmp_path / "out", steps=steps), Quiet())
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
    command = ["fit", str(world / "recipe.yml"), *arguments, "--out", str(out)]
    done = CliRunner().invoke(cli, command)
    assert message in str(done.exception), done.exception
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
        (copied, "have the same weights; experts that are fitted together have to differ"),
        (linked, "east is listed twice, the second time as .*link/west; list it once"),
    ]:
        path = tmp_path / "recipe.yml"
        path.write_text(yaml.safe_dump(good | change))
        with pytest.raises(UserError, match=message):
            fit(request_for(world, tmp_path / "out", recipe=path), Quiet())
    assert not (tmp_path / "out").exists()
