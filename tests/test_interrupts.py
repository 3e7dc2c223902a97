"""Ctrl-C, SIGTERM and a full disk in one process; killed processes are in `test_durability`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_wp.cli import main
from mergekit_wp.interrupts import Interrupted, finishing, listening
from mergekit_wp.runs.journal import Journal
from tests.killing import contents, small_files
from tests.models import make_model, perturbed, save, write_prompts

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def strike(number: signal.Signals = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def test_the_first_waits_for_the_block_and_the_second_does_not(
    capfd: pytest.CaptureFixture[str],
) -> None:
    done = []
    with listening(), pytest.raises(Interrupted) as stop, finishing():
        strike(signal.SIGTERM)
        done.append("block")
    assert done == ["block"] and stop.value.status == 143
    said = "mergekit-wp: finishing the current block; once more leaves at once"
    assert capfd.readouterr().err.split("\n") == ["", said, ""]
    with listening(), pytest.raises(Interrupted) as stop, finishing(), finishing():
        strike()
        strike()
        done.append("never")
    assert done == ["block"] and stop.value.status == 130
    with listening(), pytest.raises(Interrupted):
        strike()
        done.append("never")
    with listening(), finishing():
        done.append("another")  # what the others were sent is forgotten
    assert done == ["block", "another"]


def test_a_signal_that_comes_in_a_destructor_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    class Struck:
        def __del__(self) -> None:
            strike()

    with listening(), pytest.raises(Interrupted) as stop:
        Struck()
        time.sleep(2)
    assert stop.value.status == 130 and capfd.readouterr().err == ""


def test_after_the_last_block_there_is_nothing_to_stop() -> None:
    with listening(), finishing(last=True):
        strike()


def test_a_failure_is_told_rather_than_the_signal() -> None:
    with listening(), pytest.raises(ZeroDivisionError), finishing():
        strike()
        raise ZeroDivisionError
    with listening(), finishing():
        pass


def strike_in_c_code() -> None:
    """As torch does it: whatever is raised meanwhile becomes an error of its own."""
    try:
        strike()
    except Interrupted:
        raise ValueError("could not determine the shape of object type") from None


def test_an_interruption_is_one_under_another_name_too(tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as stop, listening():
        strike_in_c_code()
    assert stop.value.status == 130 and stop.value.kept is None
    with (
        pytest.raises(Interrupted) as stop,
        listening(),
        Journal(tmp_path / "j", {}, False) as kept,
    ):
        kept.block("one", lambda: {"x": torch.ones(1)})
        strike_in_c_code()
    assert stop.value.kept == tmp_path / "j.partial"
    with pytest.raises(ZeroDivisionError), listening():  # the interruptions before are forgotten
        raise ZeroDivisionError


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with listening():
        strike()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("interrupts")
    base = make_model("llama-tied")
    save(base, root / "base", torch.float32)
    save(perturbed(base), root / "expert", torch.float32)
    write_prompts(root / "p.jsonl", 4)
    return root


def score(world: Path, out: Path, *more: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(
            [
                *("score", str(world / "base"), str(world / "expert"), "--batch-size=2"),
                *(f"--prompts={world / 'p.jsonl'}", "--max-new-tokens=3", f"--out={out}", *more),
            ]
        )
    assert isinstance(stop.value.code, int)
    return stop.value.code


def while_saving(do: Callable[[], None], block: int) -> Callable[..., None]:
    """A `Journal.save` that does something before it keeps its n-th block."""
    save, saved = Journal.save, 0

    def patched(self: Journal, key: str, tensors: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == block:
            do()
        save(self, key, tensors)

    return patched


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_its_block_and_says_how_to_go_on(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
    status: int,
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    out, whole = tmp_path / "s.safetensors", tmp_path / "whole.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "save", while_saving(lambda: strike(number), 4))
        assert score(world, out) == status
    kept = tmp_path / "s.safetensors.partial"
    assert len(list(kept.glob("*.safetensors"))) == 4, "the block it was in is kept as well"
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"mergekit-wp: interrupted; what is done is kept in {kept}; start the same command again"
    )
    assert score(world, out) == 0
    assert "continuing the run in" in capfd.readouterr().err
    assert score(world, whole) == 0
    assert out.read_bytes() == whole.read_bytes() and not kept.exists()


def test_a_full_disk_is_one_line_and_the_run_goes_on_after_it(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    out, whole = tmp_path / "s.safetensors", tmp_path / "whole.safetensors"
    save = Journal.save

    def on_a_full_disk(self: Journal, key: str, tensors: Any) -> None:
        with small_files(100 if key.startswith("share") else 1 << 20):
            save(self, key, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "save", on_a_full_disk)
        assert score(world, out) == 1
    kept = tmp_path / "s.safetensors.partial"
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"mergekit-wp: {kept} cannot be written: File too large; what is done is kept in {kept}; "
        "make room and start the same command again"
    )
    assert sorted(p.name.split(".")[0] for p in kept.iterdir()) == (
        ["batch-size", "inputs", "lock", "responses", "responses"]
    ), "the expert's answers are kept, and nothing of the block that did not fit"
    assert score(world, out) == 0 and score(world, whole) == 0
    assert out.read_bytes() == whole.read_bytes()


def test_no_room_from_the_start_leaves_nothing(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_files(500):  # what is captured here is a file, too
        assert score(world, tmp_path / "new" / "s.safetensors") == 1
    assert (
        capfd.readouterr()
        .err.splitlines()[-1]
        .endswith(
            "cannot be written: File too large; nothing half-written is left; "
            "make room and start the same command again"
        )
    )
    assert contents(tmp_path) == {} and not list(tmp_path.iterdir())


def test_a_restarted_run_must_not_be_restarted_again(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["mergekit-wp", "score", "--restart"])
    monkeypatch.setattr(Journal, "save", while_saving(strike, 2))
    assert score(world, tmp_path / "s.safetensors", "--restart") == 130
    assert capfd.readouterr().err.strip().endswith("start the same command again without --restart")
