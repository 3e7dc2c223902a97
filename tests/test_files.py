"""Folders and files that appear whole, locks, and what a full disk is called."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergekit_wp.cli import main
from mergekit_wp.errors import DiskError, OutOfMemory, UserError
from mergekit_wp.files.atomic import (
    disk_trouble,
    locked,
    refuse_existing,
    staged_folder,
    written_whole,
)
from mergekit_wp.runs.journal import Journal, unfinished
from tests.killing import contents, small_files
from tests.merging import Family, llama_config
from tests.test_merge_command import write


def test_what_a_full_disk_is_called(tmp_path: Path) -> None:
    full = {"a": torch.zeros(1000)}
    with small_files(100):
        for name, write_it in (("x.safetensors", save_file), ("x.bin", torch.save)):
            with (
                pytest.raises(DiskError, match=f"{name} cannot be written: "),
                written_whole(tmp_path / name) as temporary,
            ):
                write_it(full, temporary)
        with (
            pytest.raises(DiskError, match="merged cannot be written: File too large"),
            staged_folder(tmp_path / "merged") as folder,
        ):
            folder.mkdir()
            save_file(full, folder / "model.safetensors")
    assert not list(tmp_path.iterdir())
    assert disk_trouble(OSError(errno.EDQUOT, "")) == os.strerror(errno.EDQUOT)
    assert disk_trouble(OSError(errno.ENOENT, "")) is None
    assert disk_trouble(RuntimeError("anything else")) is None
    # torch 2.11, as seen
    stream = RuntimeError("basic_ios::clear: iostream error")
    assert disk_trouble(stream) == os.strerror(errno.ENOSPC)


def test_an_error_about_something_else_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_folder(tmp_path / "merged"):
        (tmp_path / "an input that is missing").read_text()
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        (tmp_path / "folder").mkdir()
        with written_whole(tmp_path / "folder") as temporary:
            temporary.write_text("")
    assert contents(tmp_path) == {}


def test_a_lock_is_held_by_one_and_survives_its_removal(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    held = locked(path)
    assert held is not None and locked(path) is None
    path.unlink()  # its holder clears up, and goes
    other = locked(path)
    assert other is not None
    held.release()
    assert locked(path) is None, "the removed file's lock is worth nothing"
    other.release()
    assert locked(path) is not None


def test_two_merges_into_one_folder_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "merged"
    with staged_folder(target) as staged:
        staged.mkdir()
        message = "another run is writing .*merged; wait for it"
        with pytest.raises(UserError, match=message), staged_folder(target):
            raise AssertionError
        assert staged.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_what_a_killed_merge_left_is_removed(tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        with staged_folder(tmp_path / "merged") as staged:
            staged.mkdir()
            (staged / "model.safetensors").write_text("looks complete")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [".merged.partial"]
    with staged_folder(tmp_path / "merged") as staged:
        assert not staged.exists()
        staged.mkdir()
        (staged / "config.json").write_text("new")
    assert contents(tmp_path) == {"merged/config.json": b"new"}


def test_a_model_that_is_replaced_is_never_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every rename: no weights by which a loader would take the folder for a model."""
    target = tmp_path / "merged"
    target.mkdir()
    old = ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "config.json")
    for name in (*old, "notes.txt"):
        (target / name).write_text("old")
    seen, replace = [], os.replace

    def noted(source: Any, to: Any) -> None:
        seen.append({p.name for p in target.iterdir()} & {"model.safetensors", old[0]})
        replace(source, to)

    monkeypatch.setattr(os, "replace", noted)
    with staged_folder(target, overwrite=True) as staged:
        staged.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (staged / name).write_text("new")
    assert seen == [set()] * 3
    new = dict.fromkeys(("config.json", "model.safetensors", "tokenizer.json"), b"new")
    assert contents(target) == new | {"notes.txt": b"old"}


def model_into(target: Path, *, overwrite: bool = False) -> None:
    with staged_folder(target, overwrite=overwrite) as staged:
        (staged / "scores").mkdir(parents=True)
        for name in ("README.md", "config.json", "model.safetensors", "scores/e.safetensors"):
            (staged / name).write_text("new")


MODEL = dict.fromkeys(
    ("README.md", "config.json", "model.safetensors", "scores/e.safetensors"), b"new"
)


@pytest.mark.parametrize("name", ["README.md", "scores/e.safetensors"])
def test_files_of_others_are_replaced_only_when_asked(tmp_path: Path, name: str) -> None:
    target = tmp_path / "merged"
    (target / name).parent.mkdir(parents=True)
    (target / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} exists already; add overwrite=True"):
        model_into(target)
    assert contents(tmp_path) == {f"merged/{name}": b"mine"}
    (target / name).write_text("new")  # as it will be
    model_into(target)
    (target / name).write_text("mine")
    model_into(target, overwrite=True)
    assert contents(target) == MODEL


@pytest.mark.parametrize("name", ["README.md/", "scores"])
def test_what_cannot_be_moved_is_found_before_anything_is(tmp_path: Path, name: str) -> None:
    target = tmp_path / "merged"
    target.mkdir()
    (target / "model.safetensors").write_text("old")
    if name.endswith("/"):
        (target / name).mkdir()
    else:
        (target / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name.strip('/')} is a .* and would be written"):
        model_into(target, overwrite=True)
    assert contents(target)["model.safetensors"] == b"old"


def test_a_move_that_fails_leaves_no_card_without_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "merged"
    (target / "merge").mkdir(parents=True)
    (target / "merge" / "recipe.yml").write_text("fitted")
    (target / "config.json").write_bytes(MODEL["config.json"])  # as the model's, but not by it
    replace = os.replace

    def failing(source: Any, to: Any) -> None:
        if Path(to).name == "model.safetensors":
            raise PermissionError
        replace(source, to)

    with monkeypatch.context() as patched, pytest.raises(PermissionError):
        patched.setattr(os, "replace", failing)
        model_into(target)
    own = {"merged/config.json": MODEL["config.json"]}
    assert contents(tmp_path) == {"merged/merge/recipe.yml": b"fitted"} | own


@pytest.mark.parametrize("fails", [False, True])
def test_a_merge_killed_while_its_files_are_moved_goes_on(tmp_path: Path, fails: bool) -> None:
    target = tmp_path / "merged"
    target.mkdir()
    if (child := os.fork()) == 0:
        replace = os.replace

        def killed(source: Any, to: Any) -> None:
            if Path(to).name == "model.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, to)

        os.replace = killed  # type: ignore[assignment]
        model_into(target)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (target / "README.md").exists() and not (target / "model.safetensors").exists()
    refuse_existing(target, False, ["README.md"])
    if fails:
        with pytest.raises(ZeroDivisionError), staged_folder(target):
            raise ZeroDivisionError
        assert contents(tmp_path) == {}
    model_into(target)
    assert contents(tmp_path) == {f"merged/{name}": text for name, text in MODEL.items()}


def test_a_disk_of_its_own_is_staged_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        shared = tmp_path  # one disk only: then the link is all there is to test
    elsewhere = shared / f"mergekit-wp-{os.getpid()}"
    elsewhere.mkdir()
    try:
        (tmp_path / "merged").symlink_to(elsewhere)
        with staged_folder(tmp_path / "merged") as staged:
            staged.mkdir()
            (staged / "config.json").write_text("new")
        assert contents(elsewhere) == {"config.json": b"new"}
    finally:
        for path in elsewhere.iterdir():
            path.unlink()
        elsewhere.rmdir()


def test_blocks_without_their_inputs_are_nobodys(tmp_path: Path) -> None:
    """A run that is killed while its folder is cleared must not lend its blocks to another."""
    with pytest.raises(KeyError), Journal(tmp_path / "out", {"expert": 1}, False) as journal:
        journal.save("block", {"x": torch.ones(1)})
        raise KeyError
    (tmp_path / "out.partial" / "inputs.json").unlink()
    with Journal(tmp_path / "out", {"expert": 2}, False) as journal:
        assert not journal.resumed and journal.load("block") is None


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"seed": 0}, {"seed": 1}, "seed (0 -> 1)"),
        (
            {"prompts": {"inst": "a" * 64, "math": "b" * 64}},
            {"prompts": {"inst": "a" * 64, "math": "c" * 64}},
            f"prompts of math ({'b' * 60} -> {'c' * 60})",
        ),
        ({"prompts": {"inst": "a"}}, {"prompts": {"math": "a"}}, "prompts of inst (a -> None), pr"),
        ({"guards": ["a", "b"]}, {"guards": ["a", "c"]}, "guards 2 (b -> c)"),
        ({"guards": ["a", "b"]}, {"guards": ["a"]}, "guards (['a', 'b'] -> ['a'])"),
        ({"x": "a" * 99}, {"x": "a" * 98 + "b"}, f"x (…{'a' * 31} -> …{'a' * 30}b)"),
    ],
)
def test_a_changed_input_is_named_to_where_it_changed(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], said: str
) -> None:
    with pytest.raises(KeyError), Journal(tmp_path / "out", one, False) as journal:
        journal.save("block", {"x": torch.ones(1)})
        raise KeyError
    with pytest.raises(UserError) as refused, Journal(tmp_path / "out", other, False):
        pass
    assert f"changed: {said}" in str(refused.value)


def test_a_run_for_which_there_is_no_memory_now_keeps_its_answers(tmp_path: Path) -> None:
    """It says to free some and to begin again; refused inputs will not go on."""
    for error, kept in ((OutOfMemory("full"), True), (UserError("no"), False)):
        out = tmp_path / type(error).__name__
        with pytest.raises(type(error)), Journal(out, {"a": 1}, False) as journal:
            journal.save("responses.east", {"ids": torch.ones(1)})
            raise error
        assert unfinished(out) == kept


def test_a_refused_run_does_not_cost_the_answers_of_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Journal(tmp_path / "out", {"expert": 1}, False) as journal:
        journal.save("responses.batch0000", {"x": torch.ones(1)})
        raise KeyError
    with (
        pytest.raises(UserError, match="changed: expert"),
        Journal(tmp_path / "out", {"expert": 2}, False),
    ):
        pass
    with Journal(tmp_path / "out", {"expert": 1}, False) as journal:
        assert journal.load("responses.batch0000") is not None


@pytest.mark.parametrize("option", ["--safe-serialization", "--no-safe-serialization"])
def test_a_merge_on_a_full_disk(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], option: str
) -> None:
    family = Family.make(tmp_path, llama_config())
    recipe = write(family.recipe(), tmp_path / "recipe.yml")
    before = contents(tmp_path)
    arguments = ["merge", str(recipe), str(tmp_path / "out"), "--quiet", option]
    with small_files(2000), pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"mergekit-wp: {tmp_path / 'out'} cannot be written: ")
    assert "make room and start the same command again" in last
    assert contents(tmp_path) == before


def test_a_tokenizer_that_did_not_fit_ends_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """mergekit logs that it could not copy it, and calls the merge successful."""
    family = Family.make(tmp_path, llama_config())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (family.base.path / name).write_text("{}")
    recipe = write(family.recipe(), tmp_path / "recipe.yml")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys.modules["mergekit.merge"].shutil, "copy", full)
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(recipe), str(tmp_path / "out"), "--quiet"])
    assert stop.value.code == 1 and not (tmp_path / "out").exists()
    assert "out cannot be written: No space left on device" in capfd.readouterr().err
