"""What a notebook gets wrong is one sentence, and what surrounds a call changes no number."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_wp as wp
from mergekit_wp.results import Scores
from mergekit_wp.runs.ambient import plain_torch
from tests.joint_world import make_world
from tests.merging import Family, llama_config
from tests.models import make_model, perturbed, save

torch.set_num_threads(1)
TEXTS = ["abcd", "bcd", "cab", "dd"]
QUICK: dict[str, Any] = {
    "estimand": "share",
    "share_steps": 2,
    "max_new_tokens": 2,
    "kinds": "head",
    "progress": False,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_world("llama-tied", tmp_path_factory.mktemp("mistakes"))
    save(perturbed(make_model("llama-tied"), 0.2), root / "expert")
    return root


def scored(world: Path, prompts: Any = TEXTS, **options: Any) -> Scores:
    return wp.score(world / "base", world / "expert", prompts=prompts, **(QUICK | options))


@pytest.fixture(scope="module")
def scores(world: Path) -> Scores:
    return scored(world)


def test_a_frame_of_prompts_is_read_row_by_row(world: Path, scores: Scores) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"prompt": TEXTS, "response": [None, float("nan"), None, None]})
    assert scored(world, frame).file.digest() == scores.file.digest()
    rows = pandas.DataFrame({"question": TEXTS, "answer": ["a"] * 4})
    same = [{"prompt": text, "response": "a"} for text in TEXTS]
    assert scored(world, rows).file.digest() == scored(world, same).file.digest()
    with pytest.raises(wp.UserError, match="^guards: expected sources of prompts in a list"):
        wp.fit(world / "base", {"a": world / "expert"}, prompts={"a": frame}, guards=frame)


@pytest.mark.parametrize(
    "around",
    [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode, torch.no_grad],
    ids=["autocast", "inference mode", "no grad"],
)
def test_scores_are_the_same_whatever_surrounds_the_call(
    world: Path, scores: Scores, around: Callable[[], AbstractContextManager[Any]]
) -> None:
    with around():
        again = scored(world)
        assert torch.is_autocast_enabled("cpu") == isinstance(around(), torch.autocast)
    assert again.file.digest() == scores.file.digest()


def test_new_tensors_are_on_the_cpu_where_another_device_is_the_default() -> None:
    torch.set_default_device("meta")
    try:
        with plain_torch():
            assert torch.zeros(1).device.type == "cpu"
        assert torch.zeros(1).device.type == "meta"
    finally:
        torch.set_default_device(None)


def test_dtypes_and_devices_may_be_torchs_own(world: Path, scores: Scores) -> None:
    own = scored(world, dtype=torch.float32, device=torch.device("cpu"))
    assert own.file.digest() == scores.file.digest() and own.manifest.dtype == "float32"


def test_states_by_other_names_are_refused(tmp_path: Path) -> None:
    family = Family.make(tmp_path, llama_config(), 1)
    [expert], own = family.experts, {"a": wp.load_scores(family.paths[0])}
    merged = wp.fuse(family.base.state, {"a": expert.state}, own)
    assert not all(torch.equal(merged[name], t) for name, t in family.base.state.items())
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in family.base.state.items()}
    names = len(own["a"].manifest.tensor_names)
    with pytest.raises(wp.UserError, match=rf"^base has none of the {names} tensors that the"):
        wp.fuse(compiled, {"a": compiled}, own)
    for name, tensor in merged.items():  # one after the other takes little memory
        [alone] = wp.fuse({name: family.base.state[name]}, {"a": expert.state}, own).values()
        assert torch.equal(alone, tensor)


def test_one_expert_twice_is_refused_before_anything_is_fitted(world: Path) -> None:
    twice = {"a": world / "expert", "b": world / "expert"}
    prompts = {"a": TEXTS[:2], "b": TEXTS[2:]}
    with pytest.raises(wp.UserError, match=r"experts a \(.*\) and b \(.*\) have the same weights"):
        wp.fit(world / "base", twice, prompts=prompts, progress=False)


def fit(world: Path, name: Any = "a", **given: Any) -> Any:
    """One expert under a name."""
    given = {"prompts": {name: TEXTS}, "progress": False} | given
    return wp.fit(world / "base", {name: world / "expert"}, **given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, s: fit(w, "../evil"), "^expert '../evil': expected a name of your choice with"),
        (lambda w, s: fit(w, "owner/a"), "^expert 'owner/a': expected a name of your choice"),
        (lambda w, s: fit(w, ""), "^expert '': expected a name of your choice"),
        (lambda w, s: fit(w, 1), "^expert 1: expected a name of your choice"),
        (lambda w, s: fit(w, prompts=[{"prompt": "a"}]), "^prompts: expected those of each expert"),
        (lambda w, s: fit(w, prompts=None), "^prompts: expected those of each expert by its name"),
        (
            lambda w, s: fit(w, prompts=[1, 2]),
            "^prompts: expected those of each expert by its name",
        ),
        (lambda w, s: fit(w, prompts=[["a"], ["b"]]), "^prompts: expected those of each expert by"),
        (lambda w, s: fit(w, guards=None), "^guards: expected sources of prompts in a list; leave"),
        (lambda w, s: fit(w, progress=None), "^progress: expected True, False, or an object with"),
        (lambda w, s: fit(w, prompts={"b": TEXTS}), "'b' is no expert of this fit; it has a$"),
        (
            lambda w, s: wp.fit(recipe={"models": []}, prompts={}),
            "^recipe: expected a path or a Hub id, not dict",
        ),
        (
            lambda w, s: wp.score(torch.nn.Linear(1, 1), "b", prompts=TEXTS),
            "^base: expected a path or a Hub id, not Linear; what is in memory has to be saved",
        ),
        (lambda w, s: scored(w, None), "^prompts: expected a path, or texts, chats or objects"),
        (lambda w, s: wp.load_scores(None), "^path: expected a path or a Hub id, not NoneType"),
        (lambda w, s: wp.merge(None, w / "m"), "^expected scores, score files, or a recipe, to"),
        (lambda w, s: wp.compare(s, tasks=[["a"]]), "^tasks: expected a path or a Hub id, not l"),
        (
            lambda w, s: wp.compare(s, tasks={"a": "a"}),
            "^tasks: expected a path or a Hub id",
        ),
        (lambda w, s: wp.fuse({}, {"a": {}}, {"a": "a.safetensors"}), "^scores of 'a': expected S"),
        (lambda w, s: wp.fuse("base", {"a": {}}, {"a": s}), "^base: expected parameters by name"),
        (lambda w, s: wp.fuse({}, {"a": 1}, {"a": s}), "^expert 'a': expected parameters by na"),
        (lambda w, s: wp.stability("a", [None]), "^others: expected a path or a Hub id"),
        (lambda w, s: wp.stability("none.safetensors", "b"), "none.safetensors not found"),
        (lambda w, s: s.top("a"), r"^top\('a'\): expected how many, from 1 on"),
        (lambda w, s: s.top(-1), r"^top\(-1\): expected how many"),
    ],
)
def test_mistakes(world: Path, scores: Scores, call: Any, message: str) -> None:
    with pytest.raises(wp.UserError, match=message) as refused:
        call(world, scores)
    assert "\n" not in str(refused.value)


def test_scores_may_be_held_against_each_other_and_be_keys(world: Path, scores: Scores) -> None:
    assert scores == scores and len({scores, scores}) == 1
    assert scores != scored(world)
