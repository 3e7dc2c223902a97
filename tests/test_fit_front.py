"""A fit's curve over the limit: its points against naive sums, the gates written, a killed run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import mergekit_wp.joint.fit
from mergekit_wp.cli import cli
from mergekit_wp.errors import UserError, option
from mergekit_wp.files.fit_section import Guard
from mergekit_wp.files.manifest import Manifest
from mergekit_wp.joint.ascent import FitState, Fitting
from mergekit_wp.joint.fit import warnings
from mergekit_wp.joint.front import front
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.runs.journal import Journal
from mergekit_wp.terms import FINE_KINDS
from tests.factory import make_fit
from tests.fitting import divergence, fitted, layout_of, load, merged
from tests.gating import Gates
from tests.joint_world import NAMES, make_world, write_task

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts, and a guard with responses: what the base makes of them is kept."""
    folder = make_world("llama-tied", tmp_path_factory.mktemp("front"))
    write_task(folder / "plain.jsonl", "qz")
    return folder


#: fits whose files are looked at, whatever they reach
SHORT: dict[str, Any] = {"steps": 9, "limit": 1.02}


def guarded(world: Path, out: Path, **options: Any) -> Gates:
    return fitted(world, out, **{"guards": (world / "plain.jsonl",), "rate": 0.1, **options})


@pytest.fixture(scope="module")
def curve(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit with two further limits."""
    out = tmp_path_factory.mktemp("front") / "curve"
    guarded(world, out, front=(1.05, 1.2), **SHORT)
    return out


def test_every_point_is_what_its_gates_do(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"start": "0", "steps": 30, "rate": 0.04}
    free = guarded(world, tmp_path / "free", limit=1e6, **options)
    room = free.fit.reached["plain"].kl
    limit, further = math.exp(room / 4), (math.exp(room / 2), math.exp(room))
    states: list[FitState] = []

    def remembered(fitting: Fitting, state: FitState) -> list[FitState]:
        states.extend([state, *front(fitting, state)])
        return states[1:]

    monkeypatch.setattr(mergekit_wp.joint.fit, "front", remembered)
    found = guarded(world, tmp_path / "found", limit=limit, front=further, **options)
    points = found.fit.curve
    assert found.fit.best_step > 0
    assert [point.limit for point in points] == [limit, *further]
    _, layout = layout_of(world)
    teachers = {name: load(world / name) for name in NAMES} | {"plain": load(world / "base")}
    for point, state in zip(points, states, strict=True):
        model = merged(world, layout, state.kept)
        for name, teacher in teachers.items():
            naive = divergence(model, teacher, world / f"{name}.jsonl")
            assert point.reached[name].kl == pytest.approx(naive, rel=1e-4, abs=1e-7)
        assert found.fit.held("plain", point)
        assert point.reached["plain"].kl <= 1.1 * math.log(point.limit)
    left = [sum(math.log(point.reached[name].kl) for name in NAMES) for point in points]
    assert left[2] < left[1] < left[0]  # each limit is used
    assert points[2].reached["plain"].kl > 1.1 * math.log(further[0])


def test_a_guard_has_its_own_limit(world: Path, tmp_path: Path) -> None:
    """What is furthest away is allowed to be; a smaller limit for all does not touch it."""
    write_task(world / "open.jsonl", "jv")
    guards = (world / "plain.jsonl", world / "open.jsonl")
    options: dict[str, Any] = {"start": "0", "steps": 30, "rate": 0.04, "guards": guards}
    free = guarded(world, tmp_path / "free", limit=1e6, **options)
    room = {name: math.exp(free.fit.reached[name].kl) for name in ("plain", "open")}
    assert min(room.values()) > 1.1, "both guards are to be harmed"
    tight = room["plain"] ** 0.25
    limits = {"open": room["open"] ** 2}
    found = guarded(world, tmp_path / "own", limit=tight, limit_of=tuple(limits.items()), **options)
    fit = found.fit
    assert {guard.behavior: guard.limit for guard in fit.guards} == {"plain": None, **limits}
    assert (fit.allowed("plain"), fit.allowed("open")) == (tight, limits["open"])
    assert fit.held("plain") and fit.held("open")
    base = load(world / "base")
    _, layout = layout_of(world)
    flat = torch.cat([found.gates(e)[k].double().flatten() for e in (0, 1) for k in FINE_KINDS])
    for name in room:
        naive = divergence(merged(world, layout, flat), base, world / f"{name}.jsonl")
        assert fit.reached[name].kl == pytest.approx(naive, rel=1e-4, abs=1e-7)
    assert fit.reached["open"].ratio > tight**1.1, "it uses what the other is not allowed"
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "own" / "east.safetensors")])
    said = " ".join(shown.output.split())
    assert f"limit {tight:g}, held" in said and f"limit {limits['open']:g}, held" in said


def test_a_further_limit_leaves_a_guards_own(world: Path, tmp_path: Path) -> None:
    write_task(world / "open.jsonl", "jv")
    guards = (world / "plain.jsonl", world / "open.jsonl")
    options: dict[str, Any] = SHORT | {"guards": guards, "front": (1.2, 3.0), "start": "1"}
    fit = guarded(world, tmp_path / "own", limit_of=(("open", 1.001),), **options).fit
    assert [fit.allowed("open", point) for point in fit.curve] == [1.001] * 3
    assert [fit.allowed("plain", point) for point in fit.curve] == [1.02, 1.2, 3.0]
    both = guarded(world, tmp_path / "both", **options).fit
    assert fit.curve[2].reached["open"].kl < both.curve[2].reached["open"].kl, "it is still held"
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "own" / "east.safetensors")])
    said = " ".join(shown.output.split())
    for point in fit.curve[1:]:
        one = point.reached
        held = ["" if fit.held(name, point) else ", beyond it" for name in ("plain", "open")]
        ratios = f"plain {one['plain'].ratio:.3f}{held[0]}, open {one['open'].ratio:.3f} (limit "
        assert f"base's perplexity: {ratios}1.001){held[1]}" in said
    with pytest.raises(UserError, match="front are further limits of guards without one of their"):
        guarded(world, tmp_path / "no", limit_of=(("plain", 1.1),), front=(1.2,))


def test_a_guard_that_is_held_and_keeps_little_is_a_warning() -> None:
    fit, _ = make_fit("owner/east", "owner/west")
    assert not [line for line in warnings(fit) if "plain" in line]
    seen = fit.reached | {"plain": fit.reached["plain"].model_copy(update={"tokens": 0.89})}
    moments = [moment.model_copy(update={"judged": seen}) for moment in fit.history]
    [line] = [w for w in warnings(fit.model_copy(update={"history": moments})) if "plain" in w]
    assert line == (
        "warning: of the base's own tokens on plain 0.89 are still the likeliest; a smaller "
        f"{option('limit')} keeps more"
    )


def test_ways_out_name_the_limit_that_binds() -> None:
    fit, _ = make_fit("owner/east", "owner/west")
    own = fit.guards[0].model_copy(update={"limit": 1.05, "behavior": "open"})
    harmed = {"behavior 0": fit.reached["behavior 0"]}
    assert fit.guards[0].price > 0 and harmed["behavior 0"].answers < 0.9

    def way_out(*guards: Guard) -> str:
        seen = fit.reached | {"open": fit.reached["plain"]}
        moments = [moment.model_copy(update={"judged": seen}) for moment in fit.history]
        how = fit.model_copy(update={"guards": guards, "history": moments, "done": True})
        return next(line for line in warnings(how) if "of behavior 0 only" in line)

    plain = fit.guards[0]
    assert f"a larger {option('limit')} for" in way_out(plain)
    assert f"a larger {option('limit_of')} for" in way_out(own)
    assert f"a larger {option('limit')} for" not in way_out(own)
    free = plain.model_copy(update={"price": 0.0})
    assert f"a larger {option('limit')} for" not in way_out(own, free)


def test_the_gates_written_are_those_of_the_limit(world: Path, curve: Path, tmp_path: Path) -> None:
    point, whole = guarded(world, tmp_path / "point", **SHORT), Gates.read(curve, list(NAMES))
    assert point.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(whole.tensors[key], tensor) for key, tensor in point.tensors.items())
    assert whole.fit.model_copy(update={"front": ()}) == point.fit and len(whole.fit.front) == 2
    file = str(curve / f"{NAMES[0]}.safetensors")
    shown = CliRunner().invoke(cli, ["inspect", file])
    answers = ", ".join(f"{n} {whole.fit.front[1].reached[n].answers:.2f}" for n in NAMES)
    assert f"limit 1.2: answers reproduced: {answers}" in " ".join(shown.output.split())
    for fit, drawn in ((curve, True), (tmp_path / "point", False)):
        file = str(fit / f"{NAMES[0]}.safetensors")
        done = CliRunner().invoke(cli, ["plot", file, "--out", str(tmp_path / "page.html")])
        assert done.exception is None, done.exception
        assert ("Answers reproduced by limit" in (tmp_path / "page.html").read_text()) == drawn
        (tmp_path / "page.html").unlink()


def test_a_run_killed_in_the_second_point_goes_on(
    world: Path, curve: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SHORT | {"front": (1.05, 1.2)}
    again, keep, saved = tmp_path / "again", Journal.save, list[str]()

    def killed(self: Journal, key: str, tensors: Any) -> None:
        saved.append(key)
        if saved.count("front-9-1") == 2:
            raise KeyboardInterrupt
        keep(self, key, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "save", killed)
        guarded(world, again, **options)
    assert [saved.count(key) for key in ("state", "front-9-0", "front-9-1")] == [9, 3, 2]
    saved.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "save", lambda *given: (saved.append(given[1]), keep(*given)))
        guarded(world, again, **options)
    assert saved == ["front-9-1"] * 2  # of three steps, one was kept
    for name in NAMES:
        one, two = (folder / f"{name}.safetensors" for folder in (again, curve))
        assert one.read_bytes() == two.read_bytes()


def test_points_of_a_fit_that_was_given_more_steps_begin_anew(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were kept began from other gates."""
    options = SHORT | {"front": (1.05, 1.2)}
    again, keep = tmp_path / "again", Journal.save

    def killed(self: Journal, key: str, tensors: Any) -> None:
        if key == "front-9-1":
            raise KeyboardInterrupt
        keep(self, key, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "save", killed)
        guarded(world, again, **options)
    more = options | {"steps": 12}
    found, whole = guarded(world, again, **more), guarded(world, tmp_path / "whole", **more)
    assert found.fit == whole.fit and len(whole.fit.history) == 13


def test_bad_input(world: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"guards": (), "unguarded": True, "front": (1.2,)}, "limits of guards; leave out unguar"),
        ({"limit": 1.05, "front": (1.02,)}, "front=1.02: expected limits that rise from"),
        ({"front": ("1.05", "1.05")}, "front=1.05,1.05: expected limits that rise from limit="),
        ({"front": (1.2, 1.1)}, "front=1.2,1.1: expected limits that rise from limit=1.01 on"),
    ):
        with pytest.raises(UserError, match=message):
            guarded(world, tmp_path / "no", **options)
    assert not (tmp_path / "no").exists()
    for value in ("1.05,0.9", "inf", "much"):
        with pytest.raises(UserError, match="^front: it should be "):
            FitRequest.of(recipe="r", prompts=(), front=value)
    file = guarded(world, tmp_path / "gates", steps=1, front=(1.2,))
    said = json.loads(file.manifest.model_dump_json())
    (point,) = said["fit"]["front"]
    for change, message in (
        ({"front": [point | {"limit": 1.005}]}, "limits do not rise from the fit's own"),
        ({"front": [point | {"reached": {}}]}, "front: limit 1.2 is of other behaviours"),
        ({"limit": None, "guards": []}, "a 'front' needs 'guards'"),
    ):
        with pytest.raises(ValueError, match=message):
            Manifest.model_validate(said | {"fit": said["fit"] | change})
