"""Tokenizer, chat template and end tokens travel with a model: its checkpoint's, or its merge's.

The oracle is transformers alone: `generate` on a folder, with what lies in that folder.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import mergekit_wp as wp
from mergekit_wp.autoload import ensure_registered
from mergekit_wp.comparison.compare import compare
from mergekit_wp.comparison.request import CompareRequest
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.joint.fit import fit
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.merging.interface import write_beside
from mergekit_wp.models.generation import TextInterface, end_tokens
from tests.merging import scores_for
from tests.models import EOS, LETTERS, make_model, perturbed, save, write_prompts

ensure_registered()
torch.set_num_threads(1)
TEMPLATE = "{% for m in messages %}qz{{ m['content'] }}{% endfor %}k"
PROMPTS = ["abc", "b", "hgf", "kk", "za", "q0", "mnop", "xy"]
NEW = 8


@pytest.fixture(autouse=True)
def fresh_loaders() -> Iterator[None]:
    LoaderCache.loaders.clear()
    yield


class Notes:
    """A progress that remembers its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def job(self, *_: Any) -> None: ...

    def plan(self, *_: Any) -> None: ...

    def stage(self, *_: Any) -> None: ...

    def advance(self, *_: Any, **__: Any) -> None: ...


def generated(folder: Path) -> list[tuple[str, bool]]:
    """Each prompt's answer by transformers, and whether it ended: the folder as a user runs it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stated = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])} - {None}
    found = []
    for prompt in PROMPTS:
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False).input_ids
        else:
            ids = tokenizer(prompt).input_ids
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=sorted(ends),
            pad_token_id=EOS,
        )[0, len(ids) :].tolist()
        found.append((tokenizer.decode(out, skip_special_tokens=True), out[-1] in ends))
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain base, an expert with a template, one whose end is in generation_config.json only."""
    root = tmp_path_factory.mktemp("asked")
    base = make_model("llama-tied", seed=5)
    save(base, root / "base", torch.float32)
    for seed, name in enumerate(("inst", "late"), 1):
        folder = root / name
        save(perturbed(base, 0.05, seed), folder, torch.float32)
        if name == "inst":
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.chat_template = TEMPLATE
            tokenizer.save_pretrained(folder)
        # a letter that it writes, though not at once, ends its answers
        letters = Counter(c for text, _ in generated(folder) for c in set(text[2:]) - set(text[:2]))
        end = letters.most_common(1)[0][0]
        if name == "inst":
            tokenizer.eos_token = end
            tokenizer.save_pretrained(folder)
        else:
            config = {"eos_token_id": [EOS, LETTERS.index(end)], "temperature": 0.3}
            (folder / "generation_config.json").write_text(json.dumps(config))
        assert sum(ended for _, ended in generated(folder)) > 0, "else it shows nothing"
        states = [load_file(root / n / "model.safetensors") for n in ("base", name)]
        scores = scores_for(*states, LlamaConfig.from_pretrained(folder), seed=seed)
        scorefile.write(scores, root / f"{name}.scores.safetensors")
    lines = [
        {"prompt": p, "answer": "n", "split": "test", "max_new_tokens": NEW, "id": str(i)}
        for i, p in enumerate(PROMPTS)
    ]
    (root / "task.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name in ("inst", "late"):
        write_prompts(root / f"{name}.jsonl", 4, response=True)
        prompts = (root / f"{name}.jsonl").read_text().replace('"prompt": "', f'"prompt": "{name}')
        (root / f"{name}.jsonl").write_text(prompts)
    return root


def recipe(world: Path, *experts: str, **top: Any) -> dict[str, Any]:
    models = [
        {
            "model": str(world / name),
            "parameters": {"scores": str(world / f"{name}.scores.safetensors")},
        }
        for name in experts or ("inst", "late")
    ]
    return {
        "merge_method": "weight_patching",
        "base_model": str(world / "base"),
        "models": models,
        "dtype": "float32",
    } | top


def compared(world: Path, out: Path, notes: Notes, *recipes: Any, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "untuned": True,
        "methods": ("weight_patching", "linear"),
        "tasks": (str(world / "task.jsonl"),),
    }
    request = CompareRequest.of(recipes=recipes, out=out, **(settings | options))
    return compare(request, notes)


def merged(out: Path, name: str) -> Path:
    """A merge of the comparison as a user makes it, of the recipe that was written."""
    recipe = MergeConfiguration.model_validate(
        yaml.safe_load((out / "recipes" / f"{name}.yml").read_text())
    )
    run_merge(recipe, str(out / name), MergeOptions(quiet=True, write_model_card=False))
    return out / name


def outputs(out: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in map(json.loads, (out / "results.jsonl").read_text().splitlines()):
        found.setdefault(line["model"], []).append(line.get("output", line.get("failed")))
    return found


def source(world: Path, kind: str) -> dict[str, Any]:
    inst = str(world / "inst")
    return {
        "plain": {},
        "template": {"chat_template": "auto"},
        "template-written-out": {
            "chat_template": "{% for m in messages %}a{{ m.content }}{% endfor %}"
        },
        "source": {"tokenizer_source": inst},
        "tokenizer": {"tokenizer": {"source": inst}, "chat_template": "auto"},
    }[kind]


KINDS = ("plain", "template", "template-written-out", "source", "tokenizer")
QUICK = ("plain", "tokenizer")


@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_merges_answer_as_their_folders_do(world: Path, tmp_path: Path, kind: str) -> None:
    ours = recipe(world, **source(world, kind))
    for where in ("memory", "disk"):
        out = tmp_path / where
        compared(world, out, Notes(), ours, merge_in=where)
        found = outputs(out)
        for name, folder in (
            ("base", world / "base"),
            ("expert inst", world / "inst"),
            ("expert late", world / "late"),
            ("weight_patching", merged(out, "weight_patching-untuned")),
            ("linear", merged(out, "linear-untuned")),
        ):
            assert found[name] == [text for text, _ in generated(folder)], name
    read = [(tmp_path / w / "results.jsonl").read_text() for w in ("memory", "disk")]
    assert read[0] == read[1]


def test_the_same_weights_asked_alike_score_alike(world: Path, tmp_path: Path) -> None:
    """The expert as a merge: alone by `linear`, with its own tokenizer and without."""
    right = [text for text, ended in generated(world / "inst") if ended]
    assert right
    items = [
        {"prompt": p, "answer": text, "split": "test", "max_new_tokens": NEW}
        for p, (text, ended) in zip(PROMPTS, generated(world / "inst"), strict=True)
        if ended
    ]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, items)))
    settings = {"tokenizer": {"source": str(world / "inst")}}
    scores = {}
    for name, top in (("asked alike", settings), ("asked as the base", {})):
        found = compared(
            world,
            tmp_path / name.replace(" ", "-"),
            Notes(),
            recipe(world, "inst", **top),
            tasks=(str(tmp_path / "task.jsonl"),),
            methods=("linear",),
        )
        folder = merged(tmp_path / name.replace(" ", "-"), "linear-untuned")
        one, own = (load_file(f / "model.safetensors") for f in (folder, world / "inst"))
        assert all(torch.equal(one[key], own[key]) for key in own)
        rows = {row.name: row.scores["task"][0] for row in found.comparison.rows}
        scores[name] = rows["linear (untuned)"]
        assert rows["expert inst"] == [1.0] * len(items)
    assert scores["asked alike"] == [1.0] * len(items)
    assert scores["asked as the base"] != scores["asked alike"]


def test_an_end_token_of_the_generation_config_alone_ends(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    items = [
        {"prompt": p, "answer": text, "split": "test", "max_new_tokens": NEW}
        for p, (text, ended) in zip(PROMPTS, generated(world / "late"), strict=True)
        if ended
    ]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, items)))
    tasks = (str(tmp_path / "task.jsonl"),)
    found = compared(world, out, Notes(), recipe(world), tasks=tasks, methods=("weight_patching",))
    rows = {row.name: row.scores["task"][0] for row in found.comparison.rows}
    assert items and rows["expert late"] == [1.0] * len(items)


def test_what_lies_beside_a_merge_in_memory_is_mergekits(world: Path, tmp_path: Path) -> None:
    options = MergeOptions(quiet=True, write_model_card=False)
    for kind in KINDS:
        config = MergeConfiguration.model_validate(recipe(world, **source(world, kind)))
        run_merge(config.model_copy(deep=True), str(tmp_path / kind / "whole"), options)
        (tmp_path / kind / "beside").mkdir()
        write_beside(config, options, tmp_path / kind / "beside")
        read = [
            {p.name: p.read_bytes() for p in (tmp_path / kind / w).iterdir()}
            for w in ("whole", "beside")
        ]
        assert {n: b for n, b in read[0].items() if "safetensors" not in n} == read[1]
        assert "tokenizer.json" in read[1]


def test_one_line_says_where_experts_are_asked_otherwise(world: Path, tmp_path: Path) -> None:
    notes = Notes()
    compared(world, tmp_path / "a", notes, recipe(world))
    (line,) = [note for note in notes.notes if "not asked as" in note]
    assert f"'{world / 'inst'}' (tokens, chat template, end tokens)" in line
    assert f"'{world / 'late'}' (end tokens)" in line
    assert f"has the tokenizer, chat template and end tokens of the base '{world / 'base'}'" in line
    assert line.endswith("`tokenizer: {source: MODEL}` in the recipe takes another's")

    said = Notes()
    wp.merge(recipe(world), tmp_path / "merged", progress=said)
    assert said.notes == [line]
    wp.merge(recipe(world, tokenizer_source=str(world / "inst")), tmp_path / "i", progress=said)
    assert said.notes[1].endswith(f"has the tokenizer and chat template of '{world / 'inst'}'")

    copied(world)  # asked as its base
    alike, models = Notes(), [{"model": str(world / "twin"), "parameters": {"weight": 1.0}}]
    other = {"merge_method": "task_arithmetic", "base_model": str(world / "late")}
    wp.merge(other | {"models": models}, tmp_path / "b", progress=alike)
    assert alike.notes == []


def copied(world: Path) -> None:
    """A model with other weights that is asked as `late` is."""
    other = world / "twin"
    other.mkdir(exist_ok=True)
    for file in (world / "late").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    save_file(load_file(world / "inst" / "model.safetensors"), other / "model.safetensors")


def test_the_card_says_how_the_merge_is_asked(world: Path, tmp_path: Path) -> None:
    wp.merge(recipe(world), tmp_path / "plain", progress=False)
    text = (tmp_path / "plain" / "README.md").read_text()
    section = text.partition("## How to ask it\n\n")[2].splitlines()[0]
    assert section == (
        "This model has the tokenizer, chat template and end tokens of the base 'base': prompts go "
        "without a chat template, and an answer ends with `<eos>`. Not asked as the base: "
        "`inst` (tokens, chat template, end tokens); `late` (end tokens)."
    )
    wp.merge(recipe(world, tokenizer_source=str(world / "inst")), tmp_path / "i", progress=False)
    text = (tmp_path / "i" / "README.md").read_text()
    section = text.partition("## How to ask it\n\n")[2].splitlines()[0]
    ends = end_tokens(tmp_path / "i", AutoTokenizer.from_pretrained(tmp_path / "i"))
    shown = ", ".join(
        f"`{t}`" for t in AutoTokenizer.from_pretrained(tmp_path / "i").convert_ids_to_tokens(ends)
    )
    assert section.startswith(
        "This model has the tokenizer and chat template of 'inst': prompts go with a chat "
        f"template, and an answer ends with {shown}."
    )


def test_written_recipes_keep_how_the_merge_is_asked(world: Path, tmp_path: Path) -> None:
    settings = {
        "tokenizer": {"source": str(world / "inst"), "pad_to_multiple_of": 8},
        "chat_template": "auto",
        "dtype": "bfloat16",
        "out_dtype": "float16",
    }
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe(world) | settings))
    common: dict[str, Any] = {
        "recipe": path,
        "prompts": {name: world / f"{name}.jsonl" for name in ("inst", "late")},
        "steps": 1,
        "prompts_a_step": 2,
    }
    notes = Notes()
    fit(FitRequest(out=tmp_path / "fitted", **common), notes)
    assert len([note for note in notes.notes if "not asked as" in note]) == 1
    written = yaml.safe_load((tmp_path / "fitted" / "recipe.yml").read_text())
    assert {key: written.get(key) for key in settings} == settings
    scores = wp.fit(**common, progress=False)
    saved = yaml.safe_load(scores.save(tmp_path / "saved").read_text())
    assert {key: saved.get(key) for key in settings} == settings

    del settings["out_dtype"]
    del settings["tokenizer"]["pad_to_multiple_of"]
    settings["dtype"] = "float32"
    compared(world, tmp_path / "c", Notes(), recipe(world, **settings))
    for name in ("weight_patching", "linear"):
        text = (tmp_path / "c" / "recipes" / f"{name}-untuned.yml").read_text()
        written = yaml.safe_load(text)
        assert {key: written.get(key) for key in settings} == settings


def test_a_chat_template_that_mergekit_does_not_know(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="recipe in memory: Invalid chat template: chatmel"):
        wp.merge(recipe(world, chat_template="chatmel"), tmp_path / "no", progress=False)
    wp.merge(recipe(world, chat_template="chatml"), tmp_path / "yes", progress=False)
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(tmp_path / "yes").chat_template


def test_results_belong_to_how_models_are_asked(world: Path, tmp_path: Path) -> None:
    copied(world)
    other = recipe(world, "inst") | {"base_model": str(world / "base")}
    other["models"][0]["model"] = str(world / "twin")
    compared(world, tmp_path / "out", Notes(), other)
    config = {"eos_token_id": EOS}
    (world / "twin" / "generation_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="changed: experts"):
        compared(world, tmp_path / "out", Notes(), other)


def test_end_tokens_are_transformers_where_there_is_no_generation_config(tmp_path: Path) -> None:
    save(make_model("llama-tied", seed=5), tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": [3, EOS]}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = TextInterface.read(tmp_path, "model")
    assert found is not None and sorted(model.generation_config.eos_token_id) == list(found.ends)
