"""What bad input gets: one line on stderr, exit 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mergekit_wp.cli import main
from tests.models import _SIZES, VOCABULARY, make_model, perturbed, save, write_prompts

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Checkpoints with all sorts of faults, beside a good pair."""
    folder = tmp_path_factory.mktemp("zoo")
    base = make_model("llama-tied")
    save(base, folder / "base")
    save(perturbed(base), folder / "expert")
    save(base, folder / "twin")
    save(Qwen2ForCausalLM(Qwen2Config(**_SIZES, num_key_value_heads=2)).double(), folder / "qwen2")
    wide = {**_SIZES, "intermediate_size": 8}
    other = LlamaConfig(**wide, num_key_value_heads=2, tie_word_embeddings=True)
    save(LlamaForCausalLM(other).double(), folder / "wide")
    broken = perturbed(base)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[2, 3] = torch.nan
    save(broken, folder / "nan")
    unused = perturbed(base, 0.0)
    with torch.no_grad():  # letter 'B' occurs in no prompt, and as an answer its logit stays
        unused.model.layers[0].self_attn.q_proj.weight += 1e-9
    save(unused, folder / "same-behaviour")
    shutil.copytree(folder / "expert", folder / "truncated")
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(folder / "expert", folder / "mute")
    for file in (folder / "mute").glob("tokenizer*"):
        file.unlink()
    shutil.copytree(folder / "mute", folder / "mute-base")
    save(base, folder / "mute-base")
    for file in (folder / "mute-base").glob("tokenizer*"):
        file.unlink()
    for name, changes in {
        "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
        "untied": {"tie_word_embeddings": False},
        "deep": {"num_hidden_layers": 3},
    }.items():
        options = {**_SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True, **changes}
        save(LlamaForCausalLM(LlamaConfig(**options)).double(), folder / name)
    write_prompts(folder / "prompts.jsonl", 4)
    (folder / "surrogate.jsonl").write_text('{"prompt": "a", "contrast": "\\ud800"}\n')
    (folder / "digits.jsonl").write_text('{"prompt": "a", "n": ' + "9" * 5000 + "}\n")
    foreign = '{"prompt": "a", "response": "<extra>"}\n'
    (folder / "foreign.jsonl").write_text(foreign)
    tokenizer = json.loads((folder / "expert" / "tokenizer.json").read_text())
    extra = {**tokenizer["added_tokens"][-1], "id": VOCABULARY, "content": "<extra>"}
    tokenizer["added_tokens"].append(extra)
    (folder / "expert" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "empty.jsonl").write_text("\n\n")
    (folder / "broken.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "abc"\n')
    (folder / "keyless.jsonl").write_text('{"prompt": "abc"}\n\n{"text": "abc"}\n')
    (folder / "useless.jsonl").write_text('{"prompt": "abc", "contrast": "abc"}\n' * 4)
    message = {"prompt": [{"role": "user", "content": "abc"}]}
    (folder / "chat.jsonl").write_text(json.dumps(message) + "\n")
    return folder


def refused(capfd, tmp_path, *arguments: str, status: int = 2) -> str:
    """Run a scoring command that must fail, and give its one line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["score", *arguments, "--out", str(tmp_path / "out.safetensors")])
    lines = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == status
    assert len(lines) == 1, lines
    assert not list(tmp_path.iterdir()), "nothing may be left behind"
    return lines[0]


@pytest.mark.parametrize(
    ("base", "expert", "prompts", "message"),
    [
        ("base", "qwen2", "prompts", "base .*LlamaForCausalLM.*Qwen2ForCausalLM"),
        (
            "base",
            "wide",
            "prompts",
            r"shapes differ at tensor model.layers.0.mlp.gate_proj.weight: "
            r"base \[6, 16\], expert \[8, 16\]",
        ),
        ("base", "twin", "prompts", "nothing to score: .* have identical weights"),
        ("base", "nan", "prompts", "tensor model.layers.1.mlp.up_proj.weight holds NaN"),
        ("base", "truncated", "prompts", "(damaged|cannot be read)"),
        ("base", "nowhere", "prompts", "model folder '.*nowhere' not found"),
        ("mute-base", "mute", "prompts", "has a tokenizer; copy tokenizer.json"),
        (
            "base",
            "same-behaviour",
            "prompts",
            r"criterion 'kl' does not separate base from expert: they differ by -?\d",
        ),
        (
            "base",
            "rope",
            "prompts",
            r"configs differ in rope_parameters: base .* has .*10000.* expert .* has .*50000",
        ),
        ("base", "untied", "prompts", "output head of '.*base' is tied .* of '.*untied' is not"),
        ("untied", "base", "prompts", "output head of '.*base' is tied .* of '.*untied' is not"),
        (
            "base",
            "deep",
            "prompts",
            r"shapes differ at tensor model.layers.2.* base has none, expert \[",
        ),
        ("base", "expert", "foreign", "the tokenizer gives token 40; the models have 40 tokens"),
        ("base", "expert", "surrogate", "line 1: not JSON .it holds half a surrogate pair"),
        ("base", "expert", "digits", "line 1: not JSON"),
        ("base", "expert", "empty", "holds no prompts"),
        ("base", "expert", "broken", r"broken.jsonl, line 2: not JSON"),
        ("base", "expert", "keyless", r"keyless.jsonl, line 3: prompt: Field required"),
        ("base", "expert", "useless", "no usable contrast"),
        ("base", "expert", "missing", "prompt file .*missing.jsonl cannot be read"),
        ("base", "expert", "chat", "the tokenizer has no chat template"),
    ],
)
def test_bad_models_and_prompts(zoo, tmp_path, capfd, base, expert, prompts, message) -> None:
    import re

    line = refused(
        capfd,
        tmp_path,
        str(zoo / base),
        str(zoo / expert),
        "--prompts",
        str(zoo / prompts) + ".jsonl",
    )
    assert line.startswith("mergekit-wp: ")
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--estimand", "gains"], "unknown estimand 'gains'; choose from share, gain, knockout"),
        (["--criterion", "kl,x"], "unknown criterion 'x'; choose from kl, anchor, logprob"),
        (["--kinds", "heads"], "unknown kind 'heads'; choose from layer, tensor, head"),
        (["--estimand", ","], "no estimand given"),
        (["--anchor-layer", "-1"], "'-1' is neither 'auto' nor a whole number"),
        (
            ["--criterion", "anchor", "--anchor-layer", "2"],
            "out of range: the model has layers 0 to 1",
        ),
        (["--criterion", "anchor", "--max-prompts", "1"], "auto needs at least 2 prompts"),
        (["--batch-size", "0"], "'0' is neither 'auto' nor a whole number from 1"),
        (["--device", "warp"], "device 'warp' cannot be used here"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--device", "meta"], "device 'meta' holds no numbers"),
        (["--anchor-layer", "0"], "add --criterion anchor"),
        (["--verify", "-1"], "-1 is not in the range"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_bad_options(zoo, tmp_path, capfd, options, message) -> None:
    pair = [str(zoo / "base"), str(zoo / "expert"), "--prompts", str(zoo / "prompts.jsonl")]
    assert message in refused(capfd, tmp_path, *pair, *options)


def test_unknown_command(capfd) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["scores"])
    assert stop.value.code == 2
    assert len(capfd.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["", "score", "inspect", "plot", "merge"])
def test_help_is_there(capfd, command) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "Usage: mergekit-wp" in capfd.readouterr().out


def test_a_good_run_says_where_the_result_is(zoo, tmp_path, capfd) -> None:
    out = tmp_path / "s.safetensors"
    prompts = str(zoo / "prompts.jsonl")
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "score",
                str(zoo / "base"),
                str(zoo / "expert"),
                "--prompts",
                prompts,
                "--out",
                str(out),
            ]
        )
    assert stop.value.code == 0
    assert str(out) in capfd.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(out), "--json"])
    found = json.loads(capfd.readouterr().out)
    assert found["manifest"]["estimands"] == ["share", "gain"]
    assert found["manifest"]["criteria"] == ["kl"]
    scores = [c["score"] for c in found["components"]]
    assert scores == sorted(scores, reverse=True)
    assert set(found["components"][0]) == {
        "kind", "layer", "index", "name", "estimand", "criterion", "score", "se",
    }  # fmt: skip


def test_an_output_that_is_something_else_is_not_overwritten(zoo, tmp_path, capfd) -> None:
    precious = tmp_path / "notes.txt"
    precious.write_text("mine")
    arguments = [str(zoo / "base"), str(zoo / "expert"), "--prompts", str(zoo / "prompts.jsonl")]
    with pytest.raises(SystemExit) as stop:
        main(["score", *arguments, "--out", str(precious)])
    assert stop.value.code == 2
    assert "exists and is no score file" in capfd.readouterr().err
    assert precious.read_text() == "mine"


def test_unwritable_outputs_and_new_folders(zoo, tmp_path, capfd) -> None:
    (tmp_path / "file").write_text("")
    pair = [str(zoo / "base"), str(zoo / "expert"), "--prompts", str(zoo / "prompts.jsonl")]
    for out in ("file/s.safetensors", "x" * 300 + ".safetensors"):
        with pytest.raises(SystemExit) as stop:
            main(["score", *pair, "--out", str(tmp_path / out)])
        assert stop.value.code == 2
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and "cannot be written" in lines[0]
    bad = [*pair, "--criterion", "anchor", "--anchor-layer", "9"]
    with pytest.raises(SystemExit):
        main(["score", *bad, "--out", str(tmp_path / "new" / "deep" / "s.safetensors")])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_bare_command_shows_its_help(capfd) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "Commands:" in capfd.readouterr().err.splitlines()


def test_the_bases_tokenizer_steps_in_aloud(zoo, tmp_path, capfd) -> None:
    out = str(tmp_path / "s.safetensors")
    prompts = str(zoo / "prompts.jsonl")
    pair = [str(zoo / "base"), str(zoo / "mute")]
    with pytest.raises(SystemExit) as stop:
        main(["score", *pair, "--prompts", prompts, "--estimand", "share", "--out", out])
    assert stop.value.code == 0
    said = f"'{pair[1]}' has no tokenizer; that of '{pair[0]}' is used"
    assert said in capfd.readouterr().err
