"""The documentation runs: every fenced block of README, docs/ and the benchmarks' pages.

`README.md` and `docs/` run as they stand, page by page, in a folder in which tiny random models
(`WORLD`) have the names that the page uses. The tutorial has only what it makes itself. Benchmarks
take hours, so of their pages commands are checked, not run.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from safetensors.torch import load_file

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.cli import cli
from mergekit_wp.files import scorefile
from mergekit_wp.prompts import read_prompts
from tests.doc_blocks import ROOT, Block, Shell, agrees, blocks, commands
from tests.factory import make_score_file
from tests.models import FAMILIES, make_model, perturbed, save, write_prompts

ensure_registered()
torch.set_num_threads(1)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*/README.md"))
#: a built-in behaviour with long prompts, and a fit to its end; test_first_steps has its commands
SLOW = {"compare.md", "mechanism.md", "tutorial.md"}
KINDS = {"bash", "text", "yaml", "json", "python", "mermaid"}
#: blocks of output that are compared elsewhere or cannot be here, by how they begin
NOT_COMPARED = {
    "accuracy on 200 unseen questions": "test_the_demo_prints_what_the_page_shows",
    "stage    ": "a plan of SmolLM2: test_dry_run, benchmarks/forecast",
    "mergekit-wp: needs about": "the same",
}


def make_world(folder: Path) -> None:
    """What the pages take for granted: models, prompts, items and files of earlier commands."""
    base = make_model("llama-tied")
    for name in ("BASE", "owner/base", "TIED"):
        save(base, folder / name, torch.float32)
    for seed, name in enumerate(("EXPERT", "owner/inst", "owner/math"), start=1):
        save(perturbed(base, seed=seed), folder / name, torch.float32)
    for name in ("prompts", "p", "held-out"):
        write_prompts(folder / f"{name}.jsonl", 4, contrast=True, response=True)
    for name, n in {"inst": 11, "math": 11, "plain": 22}.items():  # a guard asks more
        write_prompts(folder / f"{name}.jsonl", n, response=True)
    for name in ("items", "inst-items", "math-items"):
        lines = [
            {"prompt": "abc", "answer": "d", "split": "valid", "max_new_tokens": 1},
            {"prompt": "xyz", "answer": "d", "split": "test", "max_new_tokens": 1},
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = {"merge_method": "linear", "base_model": "owner/base", "dtype": "float32"}
    models = [{"model": f"owner/{name}", "parameters": {"weight": 1}} for name in ("inst", "math")]
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe | {"models": models}))
    for seed, name in enumerate(("capitals", "title", "seed1")):
        scorefile.write(make_score_file(seed=seed), folder / f"{name}.safetensors")


#: of fits of the random models of `make_world`, whose answers no page shows
STEPS = 12


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    (tmp_path / "world").mkdir()
    return Shell(tmp_path / "world", monkeypatch)


def follow(page: Path, shell: Shell) -> None:
    """Do what the page says, from top to bottom."""
    printed, names = "", {}
    for block in blocks(page):
        assert block.kind in KINDS, f"{block}: '{block.kind}' is none of {', '.join(KINDS)}"
        if block.kind == "bash":
            printed = shell.run(block)
        elif block.kind == "text":
            if not any(block.code.startswith(begin) for begin in NOT_COMPARED):
                assert agrees(block.code, printed), f"{block}: printed was\n{printed}"
        elif block.kind == "yaml":
            config = MergeConfiguration.model_validate(yaml.safe_load(block.code))
            assert config.base_model is not None, block
            Path("recipe.yml").write_text(block.code)
            merge_recipe(shell, block.code)
        elif block.kind == "json":
            Path("read.jsonl").write_text(block.code)
            assert len(read_prompts(Path("read.jsonl"), None).prompts) == len(
                block.code.splitlines()
            )
        elif block.kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block.code, str(block), "exec"), names)
            printed = out.getvalue()


FIT = (
    "mergekit-wp fit recipe.yml --prompts inst=inst.jsonl --prompts math=math.jsonl --out scores/\n"
)
SCORE = "".join(
    f"mergekit-wp score owner/base owner/{name} --prompts {name}.jsonl --estimand share "
    f"--out scores/{name}.safetensors\n"
    for name in ("inst", "math")
)


def merge_recipe(shell: Shell, recipe: str) -> None:
    """Merge the recipe that the page has just shown, by scores made here if it made none."""
    lines = "mergekit-wp merge recipe.yml of-the-recipe/\n"
    if "scores:" in recipe and not Path("scores").exists():
        lines = (FIT if "fusion: path" in recipe else SCORE) + lines
    shell.run(Block(Path(__file__), 0, "bash", lines))
    assert load_file("of-the-recipe/model.safetensors")
    shutil.rmtree("of-the-recipe")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in SLOW else [])
        for page in PAGES
    ],
)
def test_a_page_runs_as_it_stands(page: Path, shell: Shell) -> None:
    if page.name == "tutorial.md":
        Path("benchmarks").symlink_to(ROOT / "benchmarks")
    else:
        make_world(shell.folder)
        shell.steps = STEPS
    follow(page, shell)
    for line in shell.noted.read_text().splitlines():
        program, *arguments = line.split()
        if program == "make":
            assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text(), line
        elif program == "python":
            known_module(line)


def test_a_block_that_is_not_run_fails(tmp_path: Path, shell: Shell) -> None:
    page = tmp_path / "page.md"
    for fence, kind in (("```", ""), ("~~~", "console"), ("  ````", "sh")):
        page.write_text(f"# Page\n\n{fence}{kind}\ntrue\n{fence}\n")
        with pytest.raises(AssertionError, match=f"page.md, line 4: '{kind}' is none of"):
            follow(page, shell)
    page.write_text("# Page\n\n    true\n")
    with pytest.raises(AssertionError, match="line 3: code needs a fence"):
        follow(page, shell)
    for code in ("false", "mergekit-wp inspect nothing.safetensors", "mergekit-wp nothing"):
        page.write_text(f"```bash\n{code}\n```\n")
        with pytest.raises(AssertionError, match="page.md, line 2: "):
            follow(page, shell)


def test_output_is_compared(tmp_path: Path, shell: Shell) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\necho one 0.51\n```\n\n```text\none  0.5\n```\n")
    follow(page, shell)
    page.write_text("```bash\necho one 0.51\n```\n\n```text\none 0.6\n```\n")
    with pytest.raises(AssertionError, match=r"page.md, line 6: printed was\s+one 0.51"):
        follow(page, shell)
    assert agrees("a … c 3", "a b c 3") and not agrees("a b", "a b c")


@pytest.mark.parametrize("page", [*PAGES, *BENCHMARKS], ids=lambda page: str(page.parent.name))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = page.parent / path if path else page
            assert target.exists(), link
        if anchor and "://" not in link:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            made = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in made, link


def test_the_site_has_every_page() -> None:
    """`make docs` builds it; a page that no menu names is not found."""
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    for page in [*PAGES, *BENCHMARKS, *(ROOT / "docs").glob("*/*.md")]:
        assert f": {page.relative_to(ROOT)}\n" in menu, page


@pytest.mark.slow  # scores, merges and measures for some minutes
def test_the_demo_prints_what_the_page_shows(tmp_path: Path) -> None:
    for name in ("benchmarks/zoo", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name)
    demo = [sys.executable, str(tmp_path / "benchmarks" / "zoo" / "demo.py")]
    done = subprocess.run(demo, check=True, stdout=subprocess.PIPE, text=True)
    page = ROOT / "docs" / "results.md"
    (shown,) = (b for b in blocks(page) if b.code.startswith(tuple(NOT_COMPARED)))
    assert agrees(f"…{shown.code}…", done.stdout), done.stdout


def test_summaries_say_what_the_benchmarks_say() -> None:
    """Every row of the summaries with an interval stands on a benchmark's page, too."""
    lines = [line for page in BENCHMARKS for line in page.read_text().splitlines()]
    summaries = (ROOT / "README.md").read_text() + (ROOT / "docs" / "results.md").read_text()
    rows = re.findall(r"^\| .*\[[-+\d].*\|$", summaries, re.MULTILINE)
    assert len(rows) >= 9
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")[2:] if cell.strip()]
        assert any(all(cell in line for cell in cells) for line in lines), row


# --- the benchmarks' pages -----------------------------------------------------------------------


def known_module(line: str) -> None:
    """A `python` line names a module or script of ours, which has the options given."""
    words = line.split()
    if words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).is_file() for word in words if word.endswith(".py")), line
        assert "-k" not in words or words[-1] in FAMILIES, line
        return
    path = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
    source = (ROOT / path.replace("../", "benchmarks/zoo/")).read_text()
    for _ in range(2):  # options may be a shared module's, or one's that it imports
        shared = re.findall(r"^from benchmarks\.(\w+) import", source, re.MULTILINE)
        modules = {ROOT / "benchmarks" / f"{name}.py" for name in shared}
        source += "".join(module.read_text() for module in modules if module.exists())
    given = [word for word in shlex.split(line) if " " not in word]  # else another command's
    options = [word.split("=")[0] for word in given if word.startswith("--")]
    assert all(f'"{option}"' in source for option in options), line


def known_options(line: str) -> None:
    """A `mergekit-wp` line names a subcommand, which has the options given."""
    words = line.split("#")[0].split()
    context = cli.make_context("x", ["--help"], resilient_parsing=True)
    command = cli.get_command(context, words[1])
    assert command is not None, line
    known = {name for option in command.params for name in option.opts}
    assert {word for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("page", BENCHMARKS, ids=lambda page: page.parent.name)
def test_a_benchmark_s_commands_exist(page: Path) -> None:
    for block in blocks(page):
        assert block.kind in {"", "bash", "text"}, f"{block}: {block.kind}"
        for line in commands(block.code):
            line = re.sub(r"^\$ |^(\w+=\S+ )+|^cd \S+ && ", "", line.split("   #")[0])
            line = re.sub(r"(^|&& )\.venv/bin/python", r"\1python", line)
            for part in line.split(" && "):
                if part.startswith("python "):
                    known_module(part)
                elif part.startswith("mergekit-wp ") and block.kind != "text":
                    known_options(part)
                elif part.startswith("make "):
                    assert f"\n{part.split()[1]}:" in (ROOT / "Makefile").read_text(), part
