"""What a comparison will do: steps of peers, and test items that were seen before are said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_wp.comparison.compare import compare
from mergekit_wp.comparison.making import cost_of
from mergekit_wp.comparison.reading import read_comparison
from mergekit_wp.comparison.request import CompareRequest, fingerprint, make_plan
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.files.manifest import Manifest
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.prompts import Message, Text, prompt_source, read_prompts, text_digest
from mergekit_wp.runs.progress import NoProgress
from tests.comparing import asked_family
from tests.gating import gate, gated_recipe
from tests.merging import Family

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return asked_family(tmp_path_factory.mktemp("overlap"))


def items(path: Path, **prompts: list[Text]) -> str:
    """A task file with these prompts by split."""
    rows = [
        {"prompt": prompt, "pattern": "", "checker": "regex", "split": split, "id": f"{split}{n}"}
        for split, texts in prompts.items()
        for n, prompt in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row, default=Message.model_dump) + "\n" for row in rows))
    return str(path)


def test_a_prompt_is_the_same_however_it_is_written() -> None:
    told = text_digest("what is b")
    assert text_digest(" what is b\n") == told
    assert text_digest([Message(role="user", content="what is b")]) == told
    others: list[Text] = [
        "what is c",
        [Message(role="assistant", content="what is b")],
        [Message(role="system", content="be brief"), Message(role="user", content="what is b")],
        [Message(role="user", content=[{"type": "text", "text": "what is b"}])],
    ]
    assert len({told, *map(text_digest, others)}) == 1 + len(others)


def test_a_score_file_says_which_prompts_it_was_made_with(family: Family) -> None:
    prompts = read_prompts(prompt_source(["a", {"prompt": "b", "response": "x"}]), None)
    assert prompts.digests == (text_digest("a"), text_digest("b"))
    manifest = family.files[0].manifest
    assert manifest.prompt_digests is None and "prompt_digests" not in manifest.model_dump()
    data = manifest.model_dump() | {"n_prompts": 2}
    assert Manifest.model_validate(data | {"prompt_digests": prompts.digests}).n_prompts == 2
    for wrong in (prompts.digests[:1], ("A" * 16, "b" * 16), ("a", "b")):
        with pytest.raises(ValueError, match="prompt_digests"):
            Manifest.model_validate(data | {"prompt_digests": wrong})


@pytest.mark.parametrize("written", ["top", "base among them", "filtered"])
def test_scores_may_stand_wherever_a_merge_reads_them(
    family: Family, tmp_path: Path, written: str
) -> None:
    """What it cost and what results depend on is of the files, wherever a recipe names them."""
    own, (first, *_) = family.recipe(), family.paths
    models: list[dict[str, Any]] = own["models"]  # type: ignore[assignment]
    if written == "top":
        own["models"] = [{"model": models[0]["model"]}]
        own["parameters"] = {"scores": str(first)}
    elif written == "base among them":
        own["models"] = [{"model": own["base_model"]}, *models]
    else:
        last = models[1]["parameters"]["scores"]
        models[1]["parameters"]["scores"] = [{"filter": "mlp", "value": last}, {"value": last}]
    task = items(tmp_path / "one.jsonl", valid=["c"], test=["d"])
    request = {"recipes": (own,), "tasks": (task,), "methods": ("weight_patching",)}
    plan, _ = make_plan(CompareRequest.model_validate(request))
    assert plan.recipe is not None
    before, cost = fingerprint(plan), cost_of(plan.recipe, None)
    assert cost.prompts == sum(f.manifest.n_prompts for f in family.files[: len(own["models"])])  # type: ignore[arg-type]
    content = first.read_bytes()
    scorefile.write(family.files[0], first)
    try:
        other = family.files[0].manifest.model_copy(update={"created": "2020-01-01"})
        scorefile.write(ScoreFile(other, family.files[0].tensors), first)
        assert fingerprint(plan)["recipe"] != before["recipe"]
    finally:
        first.write_bytes(content)
    assert fingerprint(plan) == before


def test_whoever_saw_test_items_is_named(family: Family, tmp_path: Path) -> None:
    def asked(**options: object) -> list[str]:
        plan, notes = make_plan(CompareRequest.model_validate(given | options))
        assert list(plan.warnings) == [note for note in notes if note.startswith("warning: ")]
        return [line.removeprefix("warning: ").partition(";")[0] for line in plan.warnings]

    recipe = family.recipe()
    made = family.files[0]
    said = {"n_prompts": 3, "prompt_digests": [text_digest(text) for text in "abk"]}
    manifest = Manifest.model_validate(made.manifest.model_dump() | said)
    path = tmp_path / "own.safetensors"
    scorefile.write(ScoreFile(manifest, made.tensors), path)
    recipe["models"][0]["parameters"]["scores"] = str(path)  # type: ignore[index]
    chat: Text = [Message(role="user", content="b ")]
    task = items(tmp_path / "one.jsonl", valid=["c", "k"], test=["a", chat, "d", "e"])
    given = {"recipes": (recipe,), "tasks": (task,), "methods": ("weight_patching",)}
    assert asked() == [
        "2 of 4 test items of task 'one' are among the prompts that the scores of 'test' were made "
        "with"
    ]
    unseen = items(tmp_path / "unseen.jsonl", valid=["c", "k"], test=["d", "e"])
    assert asked(tasks=(f"one={unseen}",)) == []
    both = items(tmp_path / "both.jsonl", valid=["c", "d"], test=["d", "e", "f"])
    assert asked(tasks=(f"one={both}",)) == [
        "1 of 3 test items of task 'one' are validation items as well"
    ]
    assert asked(tasks=(f"one={both}",), untuned=True) == [], "nothing is chosen by them"
    apart = items(tmp_path / "apart.jsonl", valid=["g"])
    assert asked(tasks=(f"one={both}",), validation=(f"one={apart}",)) == []
    with pytest.raises(UserError, match="nothing is chosen by validation with untuned=True"):
        asked(tasks=(f"one={both}",), validation=(f"one={apart}",), untuned=True)
    seen = (prompt_source(["e", "f", "z"]), tmp_path / "calibration.jsonl")
    seen[1].write_text('{"prompt": "e"}\n')
    unread = {"prompts": (("expert0", seen[0]),), "calibration": seen[1]}
    assert asked(tasks=(f"one={unseen}",), **unread) == [], "no method looks at them"
    learning = {
        "methods": ("weight_patching", "regmean", "ties+aim"),
        "prompts": tuple((f"expert{n}", seen[0]) for n in range(2)),
        "calibration": seen[1],
    }
    assert asked(tasks=(f"one={unseen}",), **learning) == [
        "1 of 2 test items of task 'one' are among the prompts of expert0",
        "1 of 2 test items of task 'one' are among the prompts of expert1",
        "1 of 2 test items of task 'one' are among the prompts for calibration",
    ]


def test_guards_are_looked_at_and_what_is_kept(family: Family, tmp_path: Path) -> None:
    """A guard's prompts are those that a skill of the base is not lost on."""
    for file in gate(family, tmp_path).files:
        assert file.manifest.fit is not None
        data = file.manifest.model_dump()
        data["fit"]["guards"][0]["prompt_digests"] = [text_digest("x"), text_digest("y")]
        path = tmp_path / f"{Path(file.manifest.expert.reference).name}.safetensors"
        scorefile.write(ScoreFile(Manifest.model_validate(data), file.tensors), path)
    task = items(tmp_path / "one.jsonl", valid=["a"], test=["b"])
    kept = items(tmp_path / "kept.jsonl", test=["x", "z"])
    request = CompareRequest(
        recipes=(gated_recipe(family, tmp_path),),
        tasks=(task,),
        keep=(kept,),
        methods=("weight_patching",),
    )
    [line] = make_plan(request)[0].warnings
    assert line.startswith(
        "warning: 1 of 2 test items of task 'kept' are among the prompts of guard plain; "
    )


def test_peers_that_learn_step_by_step_have_the_steps_of_the_recipes_fit(
    family: Family, tmp_path: Path
) -> None:
    gates = gate(family, tmp_path)
    task = items(tmp_path / "one.jsonl", valid=["a"], test=["b"])
    given = {
        "tasks": (task,),
        "methods": ("weight_patching", "joint_finetuning"),
        "prompts": tuple((f"expert{n}", prompt_source(["c"])) for n in range(2)),
    }
    for recipe, steps in ((family.recipe(), 60), (gated_recipe(family, tmp_path), 1)):
        plan, _ = make_plan(CompareRequest.model_validate(given | {"recipes": (recipe,)}))
        assert {setting["steps"] for setting in plan.methods[1].grid} == {steps}
    assert gates.fit.history[-1].step == 1


def test_the_warning_stands_beside_the_numbers(family: Family, tmp_path: Path) -> None:
    task = items(tmp_path / "one.jsonl", valid=["a", "b"], test=["b", "c", "d"])
    out = tmp_path / "out"
    request = CompareRequest(
        recipes=(family.recipe(),),
        tasks=(task,),
        methods=("weight_patching",),
        max_new_tokens=2,
        out=out,
    )
    found = compare(request, NoProgress())
    line = "warning: 1 of 3 test items of task 'one' are validation items as well"
    assert line in found.table() and line in (out / "table.md").read_text()
    assert json.loads((out / "summary.json").read_text())["warnings"][0].startswith(line)
    assert "W" + line[1:].replace("'", "&#39;") in (out / "report.html").read_text()
    assert found.comparison.warnings == read_comparison(out).warnings


def test_scores_that_are_not_there_are_refused_before_anything_is_merged(
    family: Family, tmp_path: Path
) -> None:
    task = items(tmp_path / "one.jsonl", valid=["a"], test=["b"])
    recipe = family.recipe()
    recipe["models"][0]["parameters"]["scores"] = str(tmp_path / "none.safetensors")  # type: ignore[index]
    request = CompareRequest(recipes=(recipe,), tasks=(task,), methods=("weight_patching",))
    with pytest.raises(UserError, match=r"score file .*none\.safetensors not found"):
        make_plan(request)
