"""Divergences against answers: each criterion beside a naive one, ranks, and a whole family."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import combinations, family, family_agreement, files
from benchmarks.agreement import (
    DIVERGENCES,
    SHARES,
    Answers,
    Journal,
    Measured,
    criteria,
    partings,
    picture,
    ranking,
)
from benchmarks.family import Family
from benchmarks.files import read_jsonl, write_jsonl
from mergekit_wp.models.generation import TextInterface

ZOO = files.REPO / "benchmarks" / "zoo" / "checkpoints"


def model(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(ZOO / name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def expected() -> Answers:
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "inst")
    prompts = [
        tokenizer(row["prompt"]).input_ids for row in read_jsonl(ZOO / "eval" / "inst.jsonl")
    ]
    return Answers.of(model("inst"), TextInterface.of(ZOO / "inst", tokenizer), prompts[:12], 14)


def test_an_expert_is_as_close_to_itself_as_can_be(expected: Answers) -> None:
    found = criteria(model("inst"), expected)
    assert all(abs(found[name]) < 1e-5 for name in DIVERGENCES)
    assert (found["top-1"], found["answers"]) == (1, 1)
    assert found["parted"] == {"first": 0, "end": 0, "slips": 0}


@torch.no_grad()
def test_criteria_are_those_of_a_loop_over_prompts(expected: Answers) -> None:
    base, expert = model("base"), model("inst")
    rows: list[dict[str, float]] = []
    parts = []
    for ids, answer in zip(expected.ids, expected.answer, strict=True):
        where = answer.nonzero()[:, 0].tolist()
        kls, right, probability = [], [], 1.0
        prompt = ids[: where[0] + 1].tolist()
        for at in where:
            ours, theirs = (
                m(torch.tensor([ids[: at + 1].tolist()])).logits[0, -1].double().softmax(-1)
                for m in (base, expert)
            )
            kls.append(float((theirs * (theirs / ours).log()).sum()))
            token = int(ids[at + 1])
            assert token == int(theirs.argmax())  # the answer is the expert's own
            right.append(int(ours.argmax()) == token)
            probability *= float(ours[token])
        assert prompt == ids[: len(prompt)].tolist()
        rows.append(
            {
                "kl": sum(kls) / len(kls),
                "first token": kls[0],
                "end": kls[-1],
                "worst token": max(kls),
                "whole answer": sum(kls),
                "log of kl": -math.log(sum(kls) / len(kls) + 1e-4),
                "top-1": sum(right) / len(right),
                "probability": probability,
                "answers": float(all(right)),
                "length": len(kls),
            }
        )
        if not all(right):
            parts.append((right.index(False) == 0, right.index(False) == len(right) - 1))
    found = criteria(base, expected)
    for name in (*DIVERGENCES, *SHARES, "length"):
        assert found[name] == pytest.approx(sum(row[name] for row in rows) / len(rows), rel=1e-3)
    assert parts
    for place, at in (("first", 0), ("end", 1)):
        assert found["parted"][place] == pytest.approx(sum(p[at] for p in parts) / len(parts))


def row(merge: str, kind: str, kl: float, answers: float, accuracy: float) -> dict[str, Any]:
    others = dict.fromkeys((*DIVERGENCES, *SHARES), 1.0)
    parted = {"first": 1.0, "end": 0.0, "slips": 2.0}
    own = {"kl": kl, "answers": answers, "accuracy": accuracy, "length": 3.0, "parted": parted}
    return {"group": "g", "merge": merge, "kind": kind, "skill": "a"} | others | own


def test_a_criterion_is_ranked_by_what_choosing_by_it_loses() -> None:
    # kl puts "c" first, which answers least; answers put "a" first, which answers most
    merges = [("a", 0.3, 0.9), ("b", 0.2, 0.8), ("c", 0.1, 0.1), ("d", 0.5, 0.5), ("e", 0.6, 0.4)]
    rows = [row(n, "peer", kl, right, right) for n, kl, right in merges]
    found = Measured.of([row("base", "base", 1.0, 0.0, 0.0), *rows])
    assert found.value(rows[0], "kl") == pytest.approx(0.7)
    assert found.misses("kl", found.rows) == pytest.approx(0.8)
    assert found.misses("answers", found.rows) == 0
    assert found.rank("answers", found.rows) == pytest.approx(1)
    assert found.rank("kl", found.rows) < 0.3
    assert math.isnan(found.rank("end", found.rows))  # nothing varies
    lines = {line.split("|")[1].strip(): line for line in ranking(found).splitlines()}
    assert lines["answers"].endswith("| 0.00 |")
    assert lines["kl"].endswith("| 0.80 |")
    assert "| a | 2 | 3.00 |" in partings(found)  # "b" and "c" recover 0.8 of the kl or more
    assert len(picture(found).axes) == 2


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    """Two experts of the zoo as a family."""
    for module in (combinations, family, family_agreement, files):
        monkeypatch.setattr(module, "REPO", tmp_path)
    monkeypatch.chdir(tmp_path)  # as the command does
    monkeypatch.setattr(family_agreement, "METHODS", ("task_arithmetic",))
    monkeypatch.setattr(family_agreement, "N_DRAWN", 1)
    found = Family("toys", ("inst", "math"))
    (found.build / "experts").mkdir(parents=True)
    (tmp_path / found.here).mkdir(parents=True)
    (tmp_path / found.here / "checkers.py").write_text("")
    found.base.symlink_to(ZOO / "base")
    for skill in found.skills:
        found.expert(skill).symlink_to(ZOO / skill)
        rows = read_jsonl(ZOO / "eval" / f"{skill}.jsonl")[:12]
        items = [
            {
                "id": i,
                "prompt": row["prompt"],
                "answer": row["answer"],
                "split": "valid" if i < 6 else "test",
                "checker": "exact",
                "max_new_tokens": 14,
            }
            for i, row in enumerate(rows)
        ]
        write_jsonl(found.task(skill), items)
    return found


def test_a_family_is_measured_once_and_goes_on(
    toys: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = family_agreement.main(toys)
    done = CliRunner().invoke(command, [], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = Journal(toys.folder / "agreement.jsonl").rows
    assert [r["merge"] for r in rows[:2]] == ["base", "base"]
    assert len(rows) == 2 * (1 + 7 + 1)  # the base, the grid's seven weights, one drawn
    base = {r["skill"]: r for r in rows[:2]}
    best = {skill: max(r["answers"] for r in rows if r["skill"] == skill) for skill in toys.skills}
    assert base["inst"]["kl"] > 0.1
    assert best["inst"] > base["inst"]["answers"]
    before = json.dumps(rows)
    monkeypatch.setattr(family_agreement.World, "measured", None)  # nothing is measured twice
    again = CliRunner().invoke(command, [], catch_exceptions=False)
    assert json.dumps(Journal(toys.folder / "agreement.jsonl").rows) == before
    assert CliRunner().invoke(command, ["--print"]).output in again.output
