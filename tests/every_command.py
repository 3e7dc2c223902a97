"""Run every command once, in the folder that `make_world` filled: `python -m tests.every_command`.

What each prints is kept beside what it writes, so that whole folders can be compared. Anything that
asks for the network is refused and ends the run.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import torch
import yaml
from click.testing import CliRunner

from mergekit_wp.cli import cli
from tests.models import finetuned, make_model, perturbed, save, write_prompts

#: two experts, and `plain` and `odd` without a component map
COMMANDS = """
behaviors capitals --out capitals.jsonl --items capitals-items.jsonl
prompts "east.jsonl?sample=2" --out two.jsonl
score base east --prompts east.jsonl --out east.safetensors --share-steps 2 \
    --verify 2 --criterion kl,logprob --estimand \
    share,gain,knockout,activation_gain,activation_knockout
score base east --prompts open.jsonl --out open.safetensors --share-steps 2 \
    --max-new-tokens 2 --device-map auto --max-memory cpu=1MB
score base west --prompts open.jsonl --out west.safetensors --share-steps 2 \
    --max-new-tokens 2 --kinds layer,tensor,head
score plain odd --prompts open.jsonl --out odd.safetensors --share-steps 2 --max-new-tokens 2
fit recipe.yml --prompts east=east.jsonl --prompts west=west.jsonl --guard open.jsonl \
    --out fitted --steps 2 --prompts-a-step 2 --max-new-tokens 2
verify east.safetensors --top 3,50% --prompts open.jsonl --draws 2 --max-new-tokens 2 \
    --task items.jsonl
verify open.safetensors --top 3 --builtin capitals --draws 2 --max-new-tokens 2 --max-prompts 2
trace east.safetensors --prompts east.jsonl --out trace.json --targets 2 --suppliers 2
stability open.safetensors west.safetensors
anchor base east --prompts open.jsonl --max-new-tokens 2 --json
inspect east.safetensors --json
plot east.safetensors --trace trace.json --out page.html
plot fitted/east.safetensors --out gates.png
merge fitted/recipe.yml merged --quiet
compare fitted/recipe.yml --task items.jsonl --out comparison --untuned \
    --methods weight_patching,dare_linear --max-new-tokens 2
card merged --results comparison
aim merged --out drawn --base base --calibration east.jsonl
reproduce fitted/east.safetensors
"""
_ASKING = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


def make_world(root: Path) -> Path:
    """Checkpoints, prompts, items and a recipe."""
    base = make_model("llama-tied")
    save(base, root / "base", torch.float32)
    for name, word in (("east", "ab"), ("west", "dd")):
        prompts = write_prompts(root / f"{name}.jsonl", 4)
        lines = [json.loads(line) | {"response": word} for line in prompts.read_text().splitlines()]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        save(finetuned(base, prompts), root / name, torch.float32)
    plain = make_model("stablelm")
    save(plain, root / "plain", torch.float32)
    save(perturbed(plain), root / "odd", torch.float32)
    write_prompts(root / "open.jsonl", 5, contrast=True)
    items = [
        {"prompt": prompt, "answer": answer, "split": split, "checker": "contains"}
        for split in ("valid", "test")
        for prompt, answer in (("abc", "a"), ("cab", "d"))
    ]
    (root / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": name} for name in ("east", "west")],
        "dtype": "float32",
    }
    (root / "recipe.yml").write_text(yaml.safe_dump(recipe))
    return root


def main() -> None:
    asked: list[str] = []

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        if event in _ASKING:
            asked.append(f"{event}{arguments}")
            raise OSError("no network here")

    sys.addaudithook(refuse)
    torch.set_num_threads(1)
    for number, line in enumerate(COMMANDS.strip().splitlines()):
        done = CliRunner().invoke(cli, shlex.split(line))
        assert done.exception is None, f"{line}: {done.exception!r}"
        Path(f"{number:02}-printed.txt").write_text(done.stdout)
    assert not asked, asked
    # and the refusal is one: a Hub reference does ask
    hub = "score owner/base owner/expert --prompts open.jsonl --out hub.safetensors"
    assert CliRunner().invoke(cli, shlex.split(hub)).exception is not None
    assert asked


if __name__ == "__main__":
    main()
