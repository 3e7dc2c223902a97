"""Every method on five seeds and four combinations of the zoo's experts.

``python -m benchmarks.zoo.bench`` (from the repository's root) trains what is missing, fits,
scores, compares through `mergekit_wp.comparison`, and prints the tables of README.md. Everything is
kept in build/zoo and resumes. ``--print`` prints the tables of what is committed in measured/.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from mergekit.config import MergeConfiguration
from tqdm import tqdm

from benchmarks.comparisons import commit, read_committed
from benchmarks.zoo.evaluate import accuracy, load_model
from benchmarks.zoo.pooled import tables
from benchmarks.zoo.tasks import distinct_items, prompt_line
from mergekit_wp.autoload import ensure_registered
from mergekit_wp.comparison.methods import (
    DEFAULT_METHODS,
    Method,
    as_long_as,
    methods_of,
    product,
)
from mergekit_wp.comparison.peers.table import PEERS
from mergekit_wp.comparison.plan import Plan
from mergekit_wp.comparison.results import Results
from mergekit_wp.comparison.rows import Comparison
from mergekit_wp.comparison.run import Runner
from mergekit_wp.files import scorefile
from mergekit_wp.joint.files import RECIPE
from mergekit_wp.joint.fit import fit
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.merging import recipe as recipes
from mergekit_wp.prompts import Prompt
from mergekit_wp.runs.progress import NoProgress
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "zoo"
#: comparisons item by item, without answers, to be committed
MEASURED = ROOT / "benchmarks" / "zoo" / "measured"
COMBINATIONS = (("inst", "math"), ("inst", "sort"), ("math", "sort"), ("inst", "math", "sort"))
SKILLS = COMBINATIONS[-1]
#: training seeds 0 and 1 were looked at while the method was made
FIRST_SEED, N_SEEDS = 2, 5
#: what an expert must reach on validation items of its own skill to be one
COMPETENT = 0.9
N_PROMPTS, N_VALID, N_TEST = 128, 100, 200
#: of a skill, for the fit and for peers that learn from prompts
N_FITTED = 256
#: the default methods, and those that learn
METHODS = tuple(dict.fromkeys((*DEFAULT_METHODS, *PEERS)))
#: of peers that learn step by step: such small models want larger rates than the defaults
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "adamerging": {"rate": (1e-3, 1e-2, 3e-2, 1e-1)},
    "expert_merging": {"rate": (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)},
    "joint_finetuning": {"rate": (3e-4, 1e-3, 3e-3, 1e-2)},
}
#: requests of copying: a skill of the base that no expert and no prompt is about
N_GUARD = 256
MAX_NEW_TOKENS = 14


def checkpoints(seed: int) -> Path:
    """The folder of one seed's base and experts, trained if it is not there."""
    folder = BUILD / f"seed{seed}"
    if not (folder / "eval").exists():
        command = [sys.executable, "benchmarks/zoo/train.py", "--seed", str(seed), "--out"]
        subprocess.run([*command, str(folder)], cwd=ROOT, check=True)
    return folder


def competence(seed: int) -> dict[str, float]:
    """Every expert's accuracy on validation items of its own skill."""
    folder = checkpoints(seed)
    known = folder / "competence.json"
    if not known.exists():
        found = {}
        for skill in SKILLS:
            items = distinct_items(skill, "valid", seed, N_VALID)
            model, tokenizer = load_model(folder / skill)
            found[skill] = accuracy(model, tokenizer, [(i.prompt, i.answer) for i in items])
        known.write_text(json.dumps(found))
    return dict(json.loads(known.read_text()))


def competent_seeds() -> list[int]:
    """The first seeds whose experts all learnt their skill; says which did not.

    An expert that failed is no expert, and accuracies relative to it mean nothing.
    """
    chosen: list[int] = []
    for seed in itertools.count(FIRST_SEED):
        found = competence(seed)
        if min(found.values()) >= COMPETENT:
            chosen.append(seed)
        else:
            told = ", ".join(f"{skill} {value:.2f}" for skill, value in found.items())
            click.echo(f"seed {seed} is left out: its experts reach {told}", err=True)
        if len(chosen) == N_SEEDS:
            return chosen
    raise AssertionError


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def prompts(folder: Path, seed: int, skill: str, n: int = N_PROMPTS) -> Path:
    """Scoring prompts of the train split; the first 128 are those of `train.py`."""
    lines = [prompt_line(item) for item in distinct_items(skill, "train", seed + 1000, n)]
    return write_lines(folder / f"prompts{n}" / f"{skill}.jsonl", lines)


def unlabelled(folder: Path, seed: int, skill: str, n: int) -> Path:
    """The scoring prompts without their answers: the expert's own are taken."""
    lines = prompts(folder, seed, skill, n).read_text().splitlines()
    bare = [{"prompt": json.loads(line)["prompt"]} for line in lines]
    return write_lines(folder / f"unlabelled{n}" / f"{skill}.jsonl", bare)


def task(folder: Path, seed: int, skill: str) -> JsonlTask:
    """Validation and test items of one skill."""
    lines = [
        {"prompt": i.prompt, "answer": i.answer, "split": split, "max_new_tokens": MAX_NEW_TOKENS}
        for split, count in (("valid", N_VALID), ("test", N_TEST))
        for i in distinct_items(skill, split, seed, count)
    ]
    return JsonlTask.read(
        write_lines(folder / "tasks" / f"{skill}.jsonl", lines), Checkers.load(None)
    )


def weight_patching(
    folder: Path, experts: Sequence[str], files: dict[str, dict[str, str]], **parameters: Any
) -> MergeConfiguration:
    """A recipe of ours; ``files`` gives each expert its ``scores``."""
    data = {
        "merge_method": "weight_patching",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / e), "parameters": files[e]} for e in experts],
        "parameters": parameters,
        "dtype": "float32",
    }
    return MergeConfiguration.model_validate(data)


def fit_request(
    folder: Path,
    seed: int,
    experts: Sequence[str],
    n: int,
    out: Path,
    *,
    guarded: bool = True,
    **options: Any,
) -> FitRequest:
    """A fit on n unlabelled prompts a skill, with copying as guard."""
    recipe = folder / f"fitting-{'-'.join(experts)}.yml"
    models = [{"model": str(folder / e)} for e in experts]
    data = {"merge_method": "task_arithmetic", "base_model": str(folder / "base")}
    recipe.write_text(yaml.safe_dump(data | {"models": models}))
    settings: dict[str, Any] = {
        "recipe": recipe,
        "prompts": tuple((e, unlabelled(folder, seed, e, n)) for e in experts),
        "out": out,
        "guards": (unlabelled(folder, seed, "copy", N_GUARD),) if guarded else (),
        "unguarded": not guarded,
        "max_new_tokens": MAX_NEW_TOKENS,
        "restart": True,
        "overwrite": True,
    }
    return FitRequest(**(settings | options))


def fitted(folder: Path, seed: int, experts: Sequence[str], n: int = N_PROMPTS) -> Path:
    """The folder of a fit of the experts together."""
    out = folder / f"fitted-{'-'.join(experts)}-{n}"
    if not (out / RECIPE).exists():
        fit(fit_request(folder, seed, experts, n, out), NoProgress())
    return out


def alone(folder: Path, seed: int, expert: str, n: int = N_PROMPTS, **options: Any) -> Path:
    """One expert's score file on its own skill."""
    label = "-".join(f"{k}={v}" for k, v in options.items()).replace("'", "").replace(" ", "")
    out = folder / "alone" / f"{expert}-on-{expert}-{n}{label and '-'}{label}.safetensors"
    if not out.exists():
        request = ScoreRequest(
            base=str(folder / "base"),
            expert=str(folder / expert),
            prompts=prompts(folder, seed, expert, n),
            out=out,
            **{"estimand": ("share",), "criterion": ("kl",), **options},
        )
        score(request, NoProgress())
    return out


def scored_alone(folder: Path, seed: int, experts: Sequence[str]) -> MergeConfiguration:
    """Weight patching by the scores of each expert alone."""
    own = {e: {"scores": str(alone(folder, seed, e))} for e in experts}
    return weight_patching(folder, experts, own)


def _with_grid(method: Method) -> Method:
    """With the values of `GRIDS`."""
    if method.name not in GRIDS:
        return method
    chosen = product(**GRIDS[method.name])
    return replace(method, grid=tuple(method.untuned | each for each in chosen))


class Notes(NoProgress):
    def note(self, text: str) -> None:
        print(text)


def compare(
    seed: int,
    experts: Sequence[str],
    methods: Sequence[str],
    extra: dict[str, MergeConfiguration],
    label: str,
    bar: Any,
    n: int = N_PROMPTS,
) -> Comparison:
    """One comparison by a fit on ``n`` prompts a skill; finished parts are read, not run."""
    folder = checkpoints(seed)
    made = fitted(folder, seed, experts, n)
    how = scorefile.read(made / f"{experts[0]}.safetensors").manifest.fit
    recipe = recipes.read(made / RECIPE).config
    recipe.dtype = "float32"
    calibration = [
        Prompt.model_validate_json(line)
        for e in experts
        for line in prompts(folder, seed, e, 32).read_text().splitlines()
    ]
    plan = Plan(
        base=str(folder / "base"),
        experts=tuple(str(folder / e) for e in experts),
        names=tuple(experts),
        recipe=recipe,
        extra=extra,
        methods=tuple(
            as_long_as(_with_grid(m), how) for m in methods_of(methods, len(experts), recipe)
        ),
        tasks=tuple(task(folder, seed, e) for e in experts),
        keep=(task(folder, seed, "copy"),),
        relative=True,
        calibration=tuple(calibration),
        prompts=tuple((e, unlabelled(folder, seed, e, n)) for e in experts),
        max_new_tokens=MAX_NEW_TOKENS,
        dtype="float32",
        device="cpu",
        eval_dtype=torch.float32,
    )
    plan.check()
    inputs = {"seed": seed, "experts": list(experts), "label": label, "fitted on": n}
    bar.set_postfix_str(f"seed {seed}, {'+'.join(experts)}")
    with Results(folder / label / "-".join(experts), inputs) as results:
        return Runner(plan, results, Notes()).run()


@click.command(context_settings={"show_default": True})
@click.option("--seeds", help="Training seeds: 2,4,6.  [default: the first five with experts]")
@click.option("--only", type=click.Choice(["-".join(c) for c in COMBINATIONS]))
@click.option("--only-run", is_flag=True, help="Do not print the tables.")
@click.option("--record", is_flag=True, help="Write what was compared, without answers, to commit.")
@click.option("--print", "print_only", is_flag=True, help="Print the tables of what is committed.")
def main(
    seeds: str | None, only: str | None, only_run: bool, record: bool, print_only: bool
) -> None:
    """Train, fit, score, compare, and print the tables."""
    torch.set_num_threads(1)
    ensure_registered()
    os.chdir(ROOT)
    combinations = [c for c in COMBINATIONS if only in (None, "-".join(c))]
    if print_only:
        click.echo(tables(committed(combinations)))
        return
    chosen = [int(seed) for seed in seeds.split(",")] if seeds else competent_seeds()
    found: dict[tuple[str, ...], dict[int, Comparison]] = {c: {} for c in combinations}
    with tqdm(total=len(chosen) * len(found), unit="comparison", mininterval=5) as bar:
        for seed in chosen:
            for experts in found:
                by_own = scored_alone(checkpoints(seed), seed, experts)
                extra = {"scored alone, untuned": by_own}
                made = compare(seed, experts, METHODS, extra, "peers", bar, N_FITTED)
                found[experts][seed] = made
                if record:
                    commit(made, MEASURED / f"{'-'.join(experts)}-{seed}.json")
                bar.update()
    if not only_run:
        click.echo(tables(found))


def committed(combinations: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], Any]:
    """What ``--record`` wrote, by combination and training seed."""
    found: dict[tuple[str, ...], dict[int, Comparison]] = {}
    for experts in combinations:
        start = f"{'-'.join(experts)}-"
        for path in sorted(MEASURED.glob(f"{start}*.json")):
            if (seed := path.stem.removeprefix(start)).isdigit():
                found.setdefault(experts, {})[int(seed)] = read_committed(path)
    if not found:
        raise click.ClickException(f"nothing is committed in {MEASURED}")
    return found


if __name__ == "__main__":
    main()
