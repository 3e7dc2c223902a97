"""--dry-run: all inputs are checked, the plan is printed, and nothing is computed or written."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

import mergekit_wp.costs.forecast as forecasts
from mergekit_wp.cli import cli, main
from mergekit_wp.files.atomic import locked
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.runs.warnings import emulated
from tests.every_command import make_world

torch.set_num_threads(1)
BOTH = "--prompts east=east.jsonl --prompts west=west.jsonl"
#: every command that takes long, as in `tests.every_command`
LINES = {
    "score": "score base east --prompts open.jsonl --out new.safetensors --share-steps 2",
    "fit": f"fit recipe.yml {BOTH} --guard open.jsonl --out new --steps 2 --prompts-a-step 2",
    "experts": f"fit base east west {BOTH} --unguarded --out new --steps 2 --prompts-a-step 2",
    "verify": "verify east.safetensors --top 3,50% --prompts open.jsonl --task items.jsonl",
    "builtin": "verify east.safetensors --top 3 --builtin capitals --max-prompts 2",
    "trace": "trace east.safetensors --prompts east.jsonl --out new.json --targets 2",
    "anchor": "anchor base east --prompts open.jsonl --max-new-tokens 2",
    "merge": "merge fitted/recipe.yml new",
    "merge fitted": f"merge base east west {BOTH} --out new --prompts-a-step 2",
    "compare": "compare fitted/recipe.yml --task items.jsonl --out new",
    "suite": "compare --suite suite.yml --out new",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_world(tmp_path_factory.mktemp("dry"))
    suite = {
        "base": "base",
        "experts": {name: {"model": name, "prompts": f"{name}.jsonl"} for name in ("east", "west")},
        "test": {"items": ["items.jsonl"]},
        "fit": {"prompts_a_step": 2, "steps": 3},
    }
    (root / "suite.yml").write_text(yaml.safe_dump(suite))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(root)
        for line in (
            "score base east --prompts east.jsonl --out east.safetensors --share-steps 1 "
            "--estimand share,activation_gain",
            f"fit recipe.yml {BOTH} --out fitted --steps 1 --prompts-a-step 2",
        ):
            assert CliRunner().invoke(cli, shlex.split(line)).exit_code == 0
    return root


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


def run(line: str) -> Result:
    return CliRunner().invoke(cli, shlex.split(line), catch_exceptions=False)


def files(root: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
    }


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("something was computed")


@pytest.mark.parametrize("command", LINES)
def test_it_stops_before_anything_is_done(
    here: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(here)
    monkeypatch.setattr(ResidentModel, "fill", refuse)
    monkeypatch.setattr("mergekit_wp.merging.merge.run_merge", refuse)
    monkeypatch.setattr("mergekit_wp.comparison.compare.Runner", refuse)
    done = run(f"{LINES[command]} --dry-run")
    assert done.exit_code == 0, done.output
    assert "in all" in done.stdout and "memory when it is fullest" in done.stdout
    assert "nothing was computed or written" in done.stdout
    head, first, *_ = done.stdout[done.stdout.index("stage ") :].splitlines()
    column = head.index("time here") + len("time here")
    assert first[:column].endswith(("s", "done")), "numbers stand under their heads"
    assert files(here) == before


def test_a_plan_is_of_the_whole_command(here: Path) -> None:
    """A merge of experts fits and merges; a suite is fitted and compared."""
    merge, suite = (run(f"{LINES[name]} --dry-run").stdout for name in ("merge fitted", "suite"))
    assert "fitting gates" in merge and "\nmerging " in merge
    assert "fitting gates" in suite and "\nanswering " in suite


def test_a_guard_is_answered_by_the_base(here: Path) -> None:
    stages = run(f"{LINES['fit']} --dry-run").stdout.splitlines()
    assert [line.split("  ")[0] for line in stages if " answers " in line] == ["base answers"]


@pytest.mark.parametrize("has", [False, True])
@pytest.mark.parametrize("command", ["score", "fit", "verify", "trace", "anchor", "compare"])
def test_a_dtype_that_the_cpu_emulates_is_said_once(
    here: Path, command: str, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    done = run(f"{LINES[command]} --dry-run --dtype bf16 --device cpu")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("no instructions for bfloat16") == (0 if has else 1)
    assert ("give --dtype float32 if memory allows" in done.stderr) is not has


@pytest.mark.parametrize(
    ("dtype", "device", "said"),
    [
        (torch.bfloat16, "cpu", "no instructions for bfloat16"),
        (torch.float16, "cpu", "no instructions for float16"),
        (torch.float32, "cpu", None),
        (torch.float64, "cpu", None),
        (torch.bfloat16, "cuda", None),
    ],
)
def test_what_a_cpu_emulates(
    dtype: torch.dtype, device: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: False)
    found = emulated(dtype, device)
    assert (found is None) if said is None else (found is not None and said in found)


BAD = {
    "a file that is missing": ("score base east --prompts none.jsonl --out n", "none.jsonl"),
    "a folder as the file": ("score base east --prompts east.jsonl --out fitted", "a folder"),
    "a file as the folder above": (
        "score base east --prompts east.jsonl --out east.jsonl/new.safetensors",
        "cannot be written",
    ),
    "a result that is there": (
        "score base east --prompts east.jsonl --out east.safetensors",
        "--overwrite",
    ),
    "an expert without prompts": (
        "fit recipe.yml --prompts east=east.jsonl --out new",
        "has no prompts",
    ),
    "what a fit does not take": (f"fit recipe.yml {BOTH} --out new --limit 0.5", "--limit"),
    "scores that are missing": (
        "verify east.safetensors --top 3 --estimand knockout --prompts open.jsonl",
        "no 'knockout/kl' scores",
    ),
    "nothing to trace": ("trace fitted/east.safetensors --prompts open.jsonl --out n", "it has"),
    "an input as the output": ("merge fitted/recipe.yml base", "input"),
    "no validation items": (
        "compare fitted/recipe.yml --task east.jsonl --out new",
        "east.jsonl",
    ),
    "quick and methods": (
        "compare fitted/recipe.yml --task items.jsonl --out new --quick --methods ties",
        "--quick chooses the methods, and tunes none; leave out --methods, or --quick",
    ),
    "quick and a grid": (
        "compare fitted/recipe.yml --task items.jsonl --out new --quick --grid suite.yml",
        "leave out --grid, or --quick",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_as_in_a_real_run(
    here: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line, said = BAD[what]
    before, found = files(here), []
    for more in ("", " --dry-run"):
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(line + more))
        assert ended.value.code == 2
        found.append(capsys.readouterr().err.splitlines()[-1])
    assert found[0] == found[1] and said in found[1]
    assert files(here) == before


def test_what_an_earlier_run_left_is_held_against_the_new_one(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = tmp_path / "new.safetensors.partial"
    left.mkdir()
    inputs = {"created": "2026-01-01", "inputs": {"dtype": "bfloat16"}}
    (left / "inputs.json").write_text(json.dumps(inputs))
    line = f"score base east --prompts east.jsonl --out {tmp_path / 'new.safetensors'} --dry-run"
    with pytest.raises(SystemExit):
        main(shlex.split(line))
    assert "other inputs" in capsys.readouterr().err
    assert run(f"{line} --restart").exit_code == 0  # which would throw it away, and does not
    lock = locked(left / "lock")
    assert lock is not None
    try:
        with pytest.raises(SystemExit):
            main(shlex.split(f"{line} --restart"))
        assert "another run is writing" in capsys.readouterr().err
    finally:
        lock.release()
    assert json.loads((left / "inputs.json").read_text()) == inputs


def test_another_comparison_is_held_against_the_new_one(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "comparison.json").write_text('{"dtype": "bfloat16"}')
    line = f"compare fitted/recipe.yml --task items.jsonl --out {tmp_path} --dry-run"
    with pytest.raises(SystemExit):
        main(shlex.split(line))
    assert "another configuration" in capsys.readouterr().err
    assert run(f"{line} --restart").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.json"]


@pytest.mark.parametrize("worth", [0.0, 30.0])
def test_a_line_goes_before_a_long_run_and_none_before_a_short_one(
    here: Path, tmp_path: Path, worth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasts, "WORTH", worth)
    done = run(f"score base east --prompts east.jsonl --share-steps 1 --out {tmp_path / 's'}")
    assert done.exit_code == 0
    said = [line for line in done.stderr.splitlines() if "needs about" in line]
    assert len(said) == (1 if worth == 0 else 0)
    if said:
        assert "of memory, reads" in said[0] and said[0].endswith("here")
        assert done.stderr.index(said[0]) < done.stderr.index("peak memory")


def test_a_forecast_never_ends_a_run(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise ValueError("an odd model")

    monkeypatch.setattr(forecasts, "counted", fails)
    done = run(f"score base east --prompts east.jsonl --share-steps 1 --out {tmp_path / 's'}")
    assert done.exit_code == 0 and (tmp_path / "s").exists()
    assert "could not be told (ValueError: an odd model)" in done.stderr


def test_compare_always_says_how_much_it_is(here: Path, tmp_path: Path) -> None:
    line = "compare fitted/recipe.yml --task items.jsonl --max-new-tokens 2"
    done = run(f"{line} --out {tmp_path / 'quick'} --quick")
    assert done.exit_code == 0
    # three merges, a base and two experts answer two test items each
    assert "3 merges, 12 answers, 0.00 GiB of disk" in done.stderr
    rows = json.loads((tmp_path / "quick" / "summary.json").read_text())["rows"]
    names = [row["name"] for row in rows]
    assert names == [
        "base",
        "expert east",
        "expert west",
        "weight_patching (untuned)",
        "task_arithmetic (untuned)",
        "ties (untuned)",
    ]
    whole = run(f"{line} --out {tmp_path / 'whole'} --dry-run").stdout
    assert "(--quick makes 3 merges)" in whole
