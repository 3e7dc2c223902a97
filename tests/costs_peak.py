"""Peak memory, said and taken, in a fresh process: `python -m tests.costs_peak COMMAND FOLDER`.

Prints JSON: bytes beside those that were taken when the run was told of its cost.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_wp.costs.forecast import counted
from mergekit_wp.joint.fit import fit
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.mechanism.request import VerifyRequest
from mergekit_wp.mechanism.verify import verify
from mergekit_wp.models.memory import peak_memory, resident_memory
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from tests.models import EOS, save_tokenizer, write_prompts
from tests.test_scoring import Quiet


def save_models(folder: Path) -> None:
    """A base and two experts whose unembedding is large, as that of real models is."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name in ("base", "east", "west"):
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name)
        write_prompts(folder / f"{name}.jsonl", 4, response=True)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1 * float(parameter.std()))
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in ("east", "west")],
        "dtype": "float32",
    }
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))


def watched(run: Callable[[Quiet], object]) -> tuple[float, float]:
    """Bytes that were said, and taken."""
    said, before = [0.0], [0]

    class Watching(Quiet):
        def plan(self, opened: object) -> None:
            said[0] = sum(part.size for part in counted(opened).memory)
            Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
            before[0] = resident_memory()

    run(Watching())
    return said[0], float(peak_memory() - before[0])


def main(command: str, folder: Path) -> None:
    """Measure, and print."""
    torch.set_num_threads(1)
    save_models(folder)
    members = {
        "recipe": folder / "recipe.yml",
        "prompts": tuple((name, folder / f"{name}.jsonl") for name in ("east", "west")),
        "device": "cpu",
    }
    one = {"prompts": folder / "east.jsonl", "device": "cpu"}
    asked = ScoreRequest(
        base=str(folder / "base"),
        expert=str(folder / "east"),
        out=folder / "scores",
        estimand=("share",),
        kinds=("layer", "head"),
        share_steps=1,
        **one,
    )
    runs: dict[str, Callable[[Quiet], object]] = {
        "score": lambda said: score(asked, said),
        "fit": lambda said: fit(FitRequest(steps=1, unguarded=True, **members), said),
        "verify": lambda said: verify(
            VerifyRequest(file=folder / "scores", top="3", draws=2, **one), None, said
        ),
    }
    if command == "verify":
        asked = asked.model_copy(update={"max_prompts": 1})
        runs["score"](Quiet())
        gc.collect()
    print(json.dumps(watched(runs[command])))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
