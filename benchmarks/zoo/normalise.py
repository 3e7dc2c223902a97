"""Does it matter to divide prompt by prompt, and which ranking says better what to restore?

``python -m benchmarks.zoo.normalise`` scores the three experts of the zoo by quotients of means and
by means of quotients, and restores the leading components of both on prompts that were not scored.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np
import torch

import mergekit_wp as wp
from mergekit_wp.prompts import read_prompts
from mergekit_wp.report.verification import area, curve
from mergekit_wp.results import Scores
from mergekit_wp.statistics import between_files
from mergekit_wp.terms import SLICED_KINDS

ZOO = Path(__file__).parent / "checkpoints"
N_PROMPTS = 32
WAYS = ("mean", "prompt")


def ranking(scores: Scores, criterion: str) -> np.ndarray:
    """Gains of heads, K/V groups and neurons in one row."""
    parts = [scores.tensor("gain", criterion, kind).flatten() for kind in SLICED_KINDS]
    return torch.cat(parts).double().numpy()


@click.command()
def main() -> None:
    """Print the table of docs/mechanism.md."""
    torch.set_num_threads(1)
    click.echo(
        "| expert | criterion | left out | rank corr. | overlap | area, mean | area, prompt |"
    )
    click.echo("|---|---|---|---|---|---|---|")
    for skill in ("inst", "math", "sort"):
        prompts = read_prompts(ZOO / "prompts" / f"{skill}.jsonl", 2 * N_PROMPTS).prompts
        scored, held = prompts[:N_PROMPTS], prompts[N_PROMPTS:]
        with tempfile.TemporaryDirectory() as folder:
            files = {way: Path(folder) / f"{way}.safetensors" for way in WAYS}
            found = {
                way: wp.score(
                    ZOO / "base",
                    ZOO / skill,
                    prompts=list(scored),
                    estimand=["gain"],
                    criterion=["kl", "anchor", "logprob"],
                    kinds=SLICED_KINDS,
                    normalise=way,
                    out=file,
                    progress=False,
                )
                for way, file in files.items()
            }
            for criterion in ("kl", "anchor", "logprob"):
                likeness = between_files(*(ranking(found[way], criterion) for way in WAYS), 0)
                areas = []
                for file in files.values():
                    sets = wp.verify(
                        file,
                        prompts=list(held),
                        top="1%,2%,5%,10%,20%",
                        criterion=criterion,
                        draws=2,
                        progress=False,
                    )
                    areas.append(area(curve(sets, "restoration", "kl", "top")))
                assert likeness is not None
                left_out = found["prompt"].manifest.left_out
                assert left_out is not None
                cells = (
                    f"{len(left_out[criterion])} of {N_PROMPTS}",
                    f"{likeness.spearman:.3f}",
                    f"{likeness.jaccard:.2f}",
                    *(f"{value:.3f}" for value in areas),
                )
                click.echo(f"| {skill} | {criterion} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
