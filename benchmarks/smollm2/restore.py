"""The restoration curve: base plus the top K% of components, against random ones of their kinds.

Each point is a recipe (`fusion: topk`, `density: K`) merged by `mergekit-wp merge` and evaluated on
unseen prompts; the merged checkpoint is deleted. Points are kept in a journal, so that a stopped
run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import yaml
from tqdm import tqdm

from benchmarks.files import command, dtype, read_jsonl
from benchmarks.smollm2.control import random_control
from benchmarks.smollm2.curve import Point, draw, table
from benchmarks.smollm2.evaluate import measure
from benchmarks.smollm2.paths import BASE, BUILD, EXPERT, PROMPTS, SCORES
from mergekit_wp.files import scorefile

DENSITIES = (0.02, 0.05, 0.1, 0.2)


def recipe(scores: Path, density: float) -> str:
    """The recipe of one point; paths are relative to the repository's root."""
    model = {"model": str(EXPERT), "parameters": {"scores": str(scores), "density": density}}
    content = {
        "merge_method": "weight_patching",
        "base_model": str(BASE),
        "models": [model],
        "parameters": {"fusion": "topk"},
        "dtype": "float32",
    }
    return yaml.safe_dump(content, sort_keys=False)


def measure_point(scores: Path, density: float, requests: list[str], work: Path) -> Point:
    """Merge by the public command, evaluate, delete the merged checkpoint."""
    path, merged = work / "recipe.yml", work / f"{scores.stem}-{density:g}"
    path.write_text(recipe(scores, density))
    command("mergekit-wp", "merge", str(path), str(merged), quiet=True)
    try:
        outcome = measure(merged, requests, asked=True, max_new_tokens=40)
    finally:
        shutil.rmtree(merged)
    return Point(scores.stem, density, sum(outcome.capitals), len(requests))


@click.command()
@click.option("--scores", type=click.Path(exists=True, path_type=Path), default=SCORES)
@click.option("--prompts", type=click.Path(path_type=Path), default=PROMPTS / "test.jsonl")
@click.option("--n", default=0, help="Only the first N prompts.")
@click.option("--draws", default=2, show_default=True, help="Random controls.")
@click.option("--out", type=click.Path(path_type=Path), default=BUILD / "restore.json")
@click.option("--plot", type=click.Path(path_type=Path), default=BUILD / "restore.png")
def main(scores: Path, prompts: Path, n: int, draws: int, out: Path, plot: Path) -> None:
    """Measure the curve, print it as a table and draw it."""
    work = BUILD / "restore"
    work.mkdir(parents=True, exist_ok=True)
    requests = [row["prompt"] for row in read_jsonl(prompts)[: n or None]]
    files = [scores]
    for seed in range(draws):
        files.append(work / f"random{seed}.safetensors")
        scorefile.write(random_control(scorefile.read(scores), seed), files[-1])
    journal: dict[str, dict[str, Any]] = json.loads(out.read_text()) if out.exists() else {}
    points = []
    jobs = [(file, density) for file in files for density in DENSITIES]
    for file, density in tqdm(jobs, desc="restoration", unit="merge"):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        key = f"{digest} {density:g} n={len(requests)} {dtype()}"
        if key not in journal:
            journal[key] = asdict(measure_point(file, density, requests, work))
            out.write_text(json.dumps(journal, indent=1))
        points.append(Point(**journal[key]))
    levels = {}
    for name, folder in (("base", BASE), ("expert", EXPERT)):
        outcome = measure(folder, requests, asked=True, max_new_tokens=40)
        levels[name] = outcome.rate
    shutil.rmtree(work)
    click.echo(table(points, scores.stem))
    click.echo(", ".join(f"{name} {level:.2f}" for name, level in levels.items()))
    draw(points, scores.stem, levels, plot)
    click.echo(f"{plot} written")


if __name__ == "__main__":
    main()
