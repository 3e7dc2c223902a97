"""`make demo`: score and fit the zoo's experts, merge by stock mergekit, compare with TIES.

Every step is a public command, printed before it runs. Usage, from the repository's root:
``python benchmarks/zoo/demo.py [--only-scores]``
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
ZOO = Path("benchmarks/zoo/checkpoints")
SCORES = Path("scores")
FITTED = SCORES / "fitted"
OUT = Path("build/demo")
EXPERTS = ("inst", "math", "sort")
RECIPES = {
    "two-experts": "weight_patching, inst + math",
    "one-expert": "weight_patching, math, positive scores only",
    "three-experts": "weight_patching, three experts",
    "three-experts-fitted": "weight_patching, three fitted together",
    "three-experts-task-arithmetic": "plain averaging, three experts",
    "three-experts-ties": "TIES, three experts",
    "three-experts-dare-ties": "DARE-TIES, three experts",
}


def run(*command: str) -> str:
    """Print and run a command from the environment that runs this script."""
    click.echo(click.style(f"$ {' '.join(command)}", bold=True))
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run(
        [str(program), *command[1:]],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        },
    )
    return done.stdout


def score_experts() -> None:
    """Write scores/EXPERT.safetensors and scores/fitted/; what exists is kept."""
    for expert in EXPERTS:
        out = SCORES / f"{expert}.safetensors"
        if (ROOT / out).exists():
            click.echo(f"{out} is there already")
            continue
        prompts = ZOO / "prompts" / f"{expert}.jsonl"
        run(
            *("mergekit-wp", "score", str(ZOO / "base"), str(ZOO / expert)),
            *("--prompts", str(prompts), "--criterion", "kl"),
            *("--out", str(out)),
        )
    if (ROOT / FITTED / "recipe.yml").exists():
        click.echo(f"{FITTED} is there already")
        return
    pairs = (f"{expert}={ZOO / 'prompts' / expert}.jsonl" for expert in EXPERTS)
    run(
        *("mergekit-wp", "fit", "recipes/three-experts.yml"),
        *(part for pair in pairs for part in ("--prompts", pair)),
        *("--guard", str(ZOO / "guard" / "copy.jsonl"), "--out", str(FITTED)),
    )


def merge_and_compare() -> None:
    """Merge every recipe with the stock command and print accuracies on every skill."""
    for recipe in RECIPES:
        shutil.rmtree(ROOT / OUT / recipe, ignore_errors=True)
        run(
            *("mergekit-yaml", f"recipes/{recipe}.yml", str(OUT / recipe)),
            *("--quiet", "--random-seed", "0"),  # for DARE
        )
    models = {"base": ZOO / "base", **{f"expert {e}": ZOO / e for e in EXPERTS}}
    models |= {RECIPES[recipe]: OUT / recipe for recipe in RECIPES}
    printed = run(
        *("python", "benchmarks/zoo/evaluate.py", "--json"), *(str(p) for p in models.values())
    )
    accuracy = dict(zip(models, json.loads(printed).values(), strict=True))
    skills = list(next(iter(accuracy.values())))
    click.echo(f"\n{'accuracy on 200 unseen questions':44}" + "".join(f"{s:>7}" for s in skills))
    for name, values in accuracy.items():
        click.echo(f"{name:44}" + "".join(f"{values[s]:7.2f}" for s in skills))
    click.echo("\nmean over the three skills, relative to each skill's own expert:")
    for recipe, name in RECIPES.items():
        if not recipe.startswith("three"):
            continue
        parts = [accuracy[name][e] / accuracy[f"expert {e}"][e] for e in EXPERTS]
        click.echo(f"{name:44}{sum(parts) / len(parts):7.2f}")


@click.command()
@click.option("--only-scores", is_flag=True, help="Stop before merging (`make scores`).")
def main(only_scores: bool) -> None:
    """Score, fit, merge, compare."""
    score_experts()
    if only_scores:
        return
    merge_and_compare()
    report = OUT / "inst.html"
    run("mergekit-wp", "plot", str(SCORES / "inst.safetensors"), "--out", str(report))
    click.echo(f"\nWhat the instruction expert's components do: file://{ROOT / report}")


if __name__ == "__main__":
    main()
