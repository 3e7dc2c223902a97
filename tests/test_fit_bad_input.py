"""What a fit refuses, and what a merge by gates refuses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from mergekit_wp.cli import cli
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.files.manifest import Manifest
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.joint.gates import Layout
from mergekit_wp.joint.request import FitRequest
from tests.fitting import fitted, load
from tests.joint_world import NAMES, make_world, write_task
from tests.models import save
from tests.test_scoring import Quiet

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["llama-tied", "qwen2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(request.param, tmp_path_factory.mktemp("fit"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": "2.0"}, "start=2 is not within 0 and 1.5"),
        ({"start": "none.safetensors"}, "start=none.safetensors: give a number, or 'scores'"),
        ({"start": "scores"}, "is of 'ties' and has no scores to start from"),
        ({"prompts": ()}, "has no prompts; add prompts=east=FILE.jsonl"),
        (
            {"guards": (Path("plain.jsonl"),), "unguarded": True},
            "unguarded and guards exclude each other",
        ),
        ({"limit": 1.05, "unguarded": True}, "limit is of guards; leave out unguarded or it"),
        (
            {"unguarded": False, "limit_of": (("open", 1.05),)},
            "limit_of=open=1.05 is of no guard; expected one of plain-text",
        ),
        ({"limit_of": (("open", 1.05),)}, "limit_of=open=1.05 is of no guard; nothing is guarded"),
        (
            {"unguarded": False, "limit_of": (("plain-text", 1.05), ("plain-text", 1.1))},
            "limit_of=plain-text=1.1: 'plain-text' has a limit already; give each guard one",
        ),
    ],
)
def test_bad_input(world: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fitted(world, tmp_path / "gates", **change)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"limit": "inf"}, "limit=inf: expected a finite number; .* any limit give unguarded=True"),
        ({"limit": "nan"}, "limit: it should be greater than 1, not 'nan'"),
        *(
            ({name: "inf"}, f"{name}: it should be a finite number, not 'inf'")
            for name in ("upper", "rate", "shrinkage", "front")
        ),
        ({"limit_of": {"open": 1}}, "limit_of: it should be greater than 1, not 1"),
        ({"limit_of": "open=inf"}, "limit_of: it should be a finite number, not 'inf'"),
        ({"limit_of": 1.05}, "limit_of: 1.05 names no guard; write GUARD=NUMBER"),
        ({"limit_of": "1.05"}, "limit_of: '1.05' names no guard; write GUARD=NUMBER"),
        (
            {"limit_of": "a=1.1,b=1.2"},
            "several in one; give the option once for each: a=1.1 and b=1.2",
        ),
        ({"limit_of": "lr=2e-5=much"}, "it should be a valid number, .* not 'much'"),
        ({"front": ""}, "front: '' holds nothing; give one, or several with commas"),
        ({"seed": "99999999999999999999"}, "seed: it should be less than 4294967296"),
        ({"seed": -1}, "seed: it should be greater than or equal to 0"),
    ],
)
def test_requests_refuse(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FitRequest.of(recipe="r.yml", prompts=(), **given)


def test_slopes_that_are_not_finite_end_a_fit(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As float16 may overflow: in one sentence, with nothing written."""
    collect = Layout.collect

    def overflown(layout: Layout, slopes: Any) -> torch.Tensor:
        return collect(layout, slopes) * float("inf")

    monkeypatch.setattr(Layout, "collect", overflown)
    with pytest.raises(UserError, match="after 0 steps the slopes of east are not finite; give"):
        fitted(world, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_behaviours_of_one_name_are_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    guard = tmp_path / "other" / f"{NAMES[0]}.jsonl"
    write_task(guard, "q")
    with pytest.raises(UserError, match=f"would be called '{NAMES[0]}'; rename one"):
        fitted(world, tmp_path / "gates", guards=(guard,))
    assert not (tmp_path / "gates").exists()


def test_a_guard_asks_what_no_expert_is_asked(world: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (world / f"{NAMES[0]}.jsonl").read_text().splitlines()]
    open_rows = [{"prompt": row["prompt"]} for row in rows]
    other = [{"prompt": "fedcba"}]
    for guard, message in (
        (rows, "^guard .*g.jsonl has no prompt but those of .*; give a guard of other prompts"),
        (open_rows[1:3], f"has no prompt but those of expert '{NAMES[0]}'"),
        (open_rows + other, None),
    ):
        (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in guard))
        asked = partial(fitted, world, tmp_path / "gates", guards=(tmp_path / "g.jsonl",), steps=1)
        if message is None:
            asked()
            continue
        with pytest.raises(UserError, match=message):
            asked()
        assert not (tmp_path / "gates").exists()


def test_a_prompt_that_repeats_another_is_fitted_on_once(world: Path, tmp_path: Path) -> None:
    """Of a behaviour and of a guard: what is held out would else be what is fitted on."""
    name, said = NAMES[0], Quiet()
    guard, twice = tmp_path / "g.jsonl", tmp_path / f"{name}.jsonl"
    guard.write_text('{"prompt": "fedcba"}\n{"prompt": "abc"}\n{"prompt": "fedcba"}\n')
    twice.write_text((world / f"{name}.jsonl").read_text() * 2)
    prompts = ((name, twice), (NAMES[1], world / f"{NAMES[1]}.jsonl"))
    want = fitted(world, tmp_path / "want", guards=(guard,), steps=2)
    got = fitted(world, tmp_path / "got", said=said, prompts=prompts, guards=(guard,), steps=2)
    assert got.tensors.keys() == want.tensors.keys()
    assert all(torch.equal(got.tensors[key], tensor) for key, tensor in want.tensors.items())
    assert got.files[0].manifest.n_prompts == 4 and got.fit.guards[0].n_prompts == 2
    notes = " ".join(said.notes)
    assert "4 repeat another; 4 of 8 are used, each once" in notes
    assert "2 of 3 are used, each once" in notes


def test_experts_may_share_one_prompt_file(world: Path, tmp_path: Path) -> None:
    """Gates are those of a copy under a second name; behaviours are called after the experts."""
    shared, copied = tmp_path / "p.jsonl", tmp_path / "copy.jsonl"
    shared.write_text((world / f"{NAMES[0]}.jsonl").read_text())
    copied.write_text(shared.read_text())
    want = fitted(
        world, tmp_path / "want", prompts=tuple(zip(NAMES, (shared, copied), strict=True))
    )
    got = fitted(world, tmp_path / "got", prompts=tuple((name, shared) for name in NAMES))
    assert list(want.fit.held_out) == ["p", "copy"] and list(got.fit.held_out) == list(NAMES)
    for name in NAMES:
        a, b = (scorefile.read(tmp_path / w / f"{name}.safetensors") for w in ("want", "got"))
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)
        assert [m.behavior for m in b.manifest.company or ()] == list(NAMES)


def test_no_recipe_is_overwritten(world: Path, tmp_path: Path) -> None:
    before = (world / "recipe.yml").read_text()
    with pytest.raises(UserError, match="where the recipe is that is read; give another folder"):
        fitted(world, world)
    assert (world / "recipe.yml").read_text() == before
    assert not list(world.glob("*.safetensors")) and not list(world.glob("*.partial"))


def test_scores_of_others_are_no_start(world: Path, tmp_path: Path) -> None:
    fitted(world, tmp_path / "gates", steps=1)
    recipe = yaml.safe_load((tmp_path / "gates" / "recipe.yml").read_text())
    one, two = recipe["models"]
    one["parameters"], two["parameters"] = two["parameters"], one["parameters"]
    (tmp_path / "gates" / "swapped.yml").write_text(yaml.safe_dump(recipe))
    message = "east differs from .*west.safetensors was made for .*: these are other models; give"
    with pytest.raises(UserError, match=message):
        fitted(world, tmp_path / "no", recipe=tmp_path / "gates" / "swapped.yml", start="scores")
    assert not (tmp_path / "no").exists()


def test_bad_recipes_and_files(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "gates"
    file = fitted(world, out, steps=1)
    recipe = yaml.safe_load((out / "recipe.yml").read_text())
    one, two = recipe["models"]

    def refused(change: dict[str, Any]) -> str:
        (out / "bad.yml").write_text(yaml.safe_dump(recipe | change))
        done = CliRunner().invoke(cli, ["merge", str(out / "bad.yml"), str(tmp_path / "m")])
        assert isinstance(done.exception, UserError) and not (tmp_path / "m").exists()
        return str(done.exception)

    missing = one | {"parameters": {"scores": "none.safetensors"}}
    assert "score file none.safetensors not found" in refused({"models": [missing, two]})
    assert "unknown parameter 'gates'" in refused({"parameters": {"gates": "g.safetensors"}})
    assert "has no 'share/kl' scores" in refused({"parameters": {"fusion": "share"}})
    alone = refused({"models": [one]})
    assert "was fitted for a merge of" in alone and "west" in alone
    fitted(world, tmp_path / "other", steps=2)
    other = two | {"parameters": {"scores": str(tmp_path / "other" / "west.safetensors")}}
    assert "with other scores for some" in refused({"models": [one, other]})
    assert "has no 'scores'" in refused({"models": [one, two, {"model": "x/y"}]})
    swapped = [a | {"parameters": b["parameters"]} for a, b in ((one, two), (two, one))]
    assert "made for" in refused({"models": swapped})
    (tmp_path / "swapped").mkdir()
    save(load(world / "west"), tmp_path / "swapped" / "east")
    assert "made for" in refused(
        {"models": [one | {"model": str(tmp_path / "swapped" / "east")}, two]}
    )

    own = file.files[0]
    head = own.tensors["path/kl/head"]
    for change, message in (
        ({"path/kl/head": head + 2}, "holds a score that is not within 0 and 1.5"),
        ({"path/kl/head": head - 2}, "holds a score that is not within 0 and 1.5"),
        ({"path/kl/head": head[:1]}, "has shape"),
        ({"path/kl/head": head * float("nan")}, "holds NaN"),
        ({"more": torch.ones(1)}, "'more' is not in the manifest"),
    ):
        with pytest.raises(UserError, match=message):
            scorefile.write(ScoreFile(own.manifest, own.tensors | change), out / "bad.safetensors")
    said = own.manifest.model_dump()
    history = said["fit"]["history"]
    other = [m | {"fitted": {"stranger": {"kl": 1, "answers": 1, "tokens": 1}}} for m in history]
    for fit, message in (
        ({"history": history[1:], "best_step": 0}, "steps do not count up from 0"),
        ({"best_step": len(history)}, "history has no step"),
        ({"history": other}, "step 0 is of other behaviours"),
        ({"upper": 0.0}, "greater than 0"),
        ({"limit": 1.05}, "'guards' and a 'limit' belong together"),
        ({"best_step": 0, "history": [history[0] | {"judged": None}]}, "nothing was judged"),
    ):
        with pytest.raises(ValueError, match=message):
            Manifest.model_validate(said | {"fit": said["fit"] | fit})
    for change in ({"company": None}, {"fit": None}, {"estimands": ["share"]}):
        with pytest.raises(ValueError, match="'path' scores, a 'company' and a 'fit' belong toge"):
            Manifest.model_validate(said | change)


def test_an_inputs_folder_is_none_for_a_fit(world: Path) -> None:
    for name in ("base", "east"):
        with pytest.raises(UserError, match=f"{name} is an input of the fit; give another folder"):
            fitted(world, world / name)
        assert not (world / name / "recipe.yml").exists()


def test_an_experts_prompts_as_guard_are_called_that(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no prompt but those of expert 'east'"):
        fitted(world, tmp_path / "no", guards=(world / "east.jsonl",))


def test_limits_are_the_same_in_any_order() -> None:
    one, two = (
        FitRequest.of(recipe="r.yml", prompts=(), limit_of=given)
        for given in (["b=1.2", "a=1.1"], {"a": 1.1, "b": 1.2})
    )
    assert one == two and one.limit_of == (("a", 1.1), ("b", 1.2))
