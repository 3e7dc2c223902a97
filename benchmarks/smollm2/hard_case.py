"""What closes the gap where two strongly trained experts disturb each other.

``python -m benchmarks.smollm2.hard_case`` (after `benchmarks.smollm2.bench`) merges the instruction
and the math expert by every way of using scores that was tried, nothing tuned, and prints the
table. Each is one recipe beside the default, and everything goes through `mergekit-wp compare`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from scipy.stats import spearmanr

from benchmarks.combinations import MAX_PROMPTS, make_missing, score
from benchmarks.files import command, local
from benchmarks.smollm2.paths import BASE, BUILD, SMOLLM2
from benchmarks.smollm2.straight import write_straight
from mergekit_wp.files import scorefile

PAIR = ("instruction", "math")
FOLDER = BUILD / "hard-case"


def write(name: str, scores: dict[str, dict[str, str]], **parameters: Any) -> Path:
    """One recipe of the pair."""
    data = {
        "merge_method": "weight_patching",
        "base_model": local(BASE),
        "models": [{"model": local(BUILD / "experts" / e), "parameters": scores[e]} for e in PAIR],
        "parameters": parameters,
        "dtype": "float32",
    }
    path = FOLDER / "recipes" / f"{name}.yml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def recipes() -> list[Path]:
    """The default first, then what it is compared with."""
    make_missing(SMOLLM2)
    company, _ = score(SMOLLM2, PAIR)
    together = {e: {"scores": local(company.with_name(f"{e}.safetensors"))} for e in PAIR}
    alone = {e: {"scores": local(BUILD / "alone" / f"{e}.safetensors")} for e in PAIR}
    made = [
        company,
        write("company, one gate a tensor", together, fusion="path", granularity="tensor"),
        write("company, share fusion of its shares", together, fusion="share"),
        write("company, positive shares, lambda 0.7", together, fusion="gate", **{"lambda": 0.7}),
        write("alone", alone),
        write("alone, positive shares, lambda 0.7", alone, fusion="gate", **{"lambda": 0.7}),
        write("alone, winner", alone, fusion="winner"),
    ]
    write_straight(PAIR, company.parent, FOLDER / "straight", MAX_PROMPTS)
    straight = {e: {"scores": local(FOLDER / "straight" / f"{e}.safetensors")} for e in PAIR}
    for scale in (0.7, 1.0):
        name = f"straight joint path, positive, lambda {scale:g}"
        made.append(write(name, straight, fusion="path", **{"lambda": scale}))
    made += [write(f"alone, power {p:g}", alone, power=p) for p in (0.0, 1.0)]
    return made


def agreement() -> str:
    """How well scores from the base foretell how far the neurons come in company."""
    path, share = [], []
    for expert in PAIR:
        company = scorefile.read(BUILD / "company" / "-".join(PAIR) / f"{expert}.safetensors")
        alone = scorefile.read(BUILD / "alone" / f"{expert}.safetensors")
        path.append(company.scores("path", "kl", "neuron").flatten())
        share.append(alone.scores("share", "kl", "neuron").flatten())
    lines = ["Spearman's correlation over all neurons:"]
    for expert, came, alone_share in zip(PAIR, path, share, strict=True):
        value = spearmanr(came, alone_share)[0]
        lines.append(f"  {expert}: path in company with share alone {value:.2f}")
    lines.append(f"  path of one expert with path of the other {spearmanr(*path)[0]:.2f}")
    return "\n".join(lines)


def main() -> None:
    """Score what is missing, merge, measure."""
    tasks = [part for e in PAIR for part in ("--task", f"{e}={local(BUILD / 'tasks' / e)}.jsonl")]
    command(
        *("mergekit-wp", "compare", *map(local, recipes()), *tasks, "--untuned", "--relative"),
        *("--methods", "weight_patching,task_arithmetic,ties", "--out", local(FOLDER / "compare")),
        *("--dtype", "bfloat16"),
    )
    print(agreement())


if __name__ == "__main__":
    main()
