"""Lengths that change what a model computes, and those for which it has no positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Phi3Config

from mergekit_wp.architectures.computation import RopeBorders
from mergekit_wp.errors import UserError
from mergekit_wp.merging.aim import activation_importance
from mergekit_wp.models.encoding import Context
from mergekit_wp.models.generation import TextInterface, greedy
from mergekit_wp.models.load import load_folder
from mergekit_wp.models.pair import open_pair
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import Prompt, Sample
from mergekit_wp.prompts.location import Location
from mergekit_wp.runs.references import measure_references
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask
from mergekit_wp.tasks.plain_text import PlainText
from tests.models import EOS, FAMILIES, LETTERS, OTHERS, make_model, perturbed, save
from tests.test_scoring import Quiet

torch.set_num_threads(1)

#: where the frequencies change
BORDER = 8
_SIZES = {
    "vocab_size": len(LETTERS) + 4,
    "hidden_size": 32,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": None,
}
CONFIGS = {
    "longrope": lambda: Phi3Config(
        **_SIZES,
        max_position_embeddings=64,
        original_max_position_embeddings=BORDER,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 2.5, 3.0, 4.0],
        },
    ),
    "dynamic": lambda: LlamaConfig(
        **_SIZES,
        max_position_embeddings=BORDER,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
    ),
}
#: shorter than the border, crossing it while they are answered, at it, and beyond
LENGTHS = (2, 3, 5, 7, 8, 9, 9, 13, 12)


def text(i: int, length: int) -> str:
    return "".join(LETTERS[(5 * i + 3 * j) % 26] for j in range(length))


def ids_of(words: str) -> list[int]:
    return [LETTERS.index(letter) for letter in words]


PROMPTS = [text(i, length) for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(CONFIGS[request.param]()).double().eval()
    save(base, root / "base")
    save(perturbed(base, 0.05), root / "expert")
    return root


def fresh(folder: Path) -> Any:
    """transformers' own model, which has run nothing yet."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.parametrize("new", [1, 4, 7])
def test_answers_are_those_that_transformers_gives_to_each_prompt_alone(
    world: Path, new: int
) -> None:
    prompts = [ids_of(words) for words in PROMPTS]
    found = greedy(load_folder(world / "expert", torch.float64, "cpu"), prompts, new, [EOS], "cpu")
    for prompt, answer in zip(prompts, found, strict=True):
        own = fresh(world / "expert").generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=EOS,
            pad_token_id=EOS,
        )  # fmt: skip
        assert answer == own[0, len(prompt) :].tolist()


@torch.no_grad()
def logprobs_alone(folder: Path, sample: Sample) -> torch.Tensor:
    """``[response, vocabulary]`` of a model that has run nothing else; the last token is not read.

    Reading it would move a dynamic rope.
    """
    logits = fresh(folder)(torch.tensor([sample.input_ids])).logits[0]
    return logits[len(sample.prompt_ids) - 1 :].log_softmax(-1)


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_values_are_those_of_each_prompt_alone(world: Path, batch_size: int) -> None:
    pair = open_pair(str(world / "base"), str(world / "expert"), lambda *_: None)
    resident = ResidentModel(pair, torch.float64, "cpu")
    response = torch.tensor([1, 2, EOS])
    samples = [Sample(tuple(ids_of(words)), tuple(response.tolist())) for words in PROMPTS]
    found = measure_references(
        resident, samples, ("kl", "logprob", "anchor"), batch_size, anchor_layer=0
    ).values
    differences = []
    for i, sample in enumerate(samples):
        base, expert = (logprobs_alone(world / side, sample) for side in ("base", "expert"))
        kl = (expert.exp() * (expert - base)).sum(-1).mean()
        assert found["kl"].base[i].item() == pytest.approx(-kl.item(), abs=1e-9)
        for reference, logprobs in (
            (found["logprob"].base, base),
            (found["logprob"].expert, expert),
        ):
            own = logprobs[range(3), response].mean()
            assert reference[i].item() == pytest.approx(own.item(), abs=1e-9)
        # the anchor reads the prompt alone, which may lie on another side than with its response
        alone = torch.tensor([sample.prompt_ids])
        with torch.no_grad():
            ends = [
                fresh(world / side)(alone, output_hidden_states=True).hidden_states[1][0, -1]
                for side in ("base", "expert")
            ]
        differences.append(ends[1] - ends[0])
    mean = torch.stack(differences).mean(0)
    wanted = torch.stack(differences) @ mean / mean.norm()
    torch.testing.assert_close(found["anchor"].distance, wanted, rtol=1e-7, atol=1e-9)


def test_scores_do_not_depend_on_the_batch(world: Path) -> None:
    lines = [{"prompt": words, "response": text(i, 3)} for i, words in enumerate(PROMPTS)]
    prompts = world / "p.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def made(batch_size: int) -> dict[str, torch.Tensor]:
        return score(
            ScoreRequest(
                base=str(world / "base"), expert=str(world / "expert"), prompts=prompts,
                estimand=("share", "gain", "activation_gain"), batch_size=batch_size,
                dtype="float64", share_steps=1,
            ),
            Quiet(),
        ).tensors  # fmt: skip

    alone, together = made(1), made(9)
    for name, found in alone.items():
        torch.testing.assert_close(together[name], found, rtol=1e-5, atol=1e-7, msg=name)


def test_activations_do_not_depend_on_the_batch(world: Path) -> None:
    model = load_folder(world / "base", torch.float64, "cpu")
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    prompts = [Prompt(prompt=words) for words in PROMPTS]
    alone = activation_importance(model, tokenizer, prompts, 1)
    for name, found in activation_importance(model, tokenizer, prompts, 9).items():
        torch.testing.assert_close(found, alone[name], rtol=1e-6, atol=1e-9)


def test_the_harness_runs_such_models_one_text_at_a_time(world: Path, monkeypatch: Any) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval import evaluator
    from lm_eval.models import huggingface

    from mergekit_wp.tasks.lm_eval import LmEvalTask

    sizes: list[int] = []
    row = {"filter": "f", "doc_id": 0, "m": 1, "filtered_resps": ""}
    monkeypatch.setattr(huggingface, "HFLM", lambda **given: sizes.append(given["batch_size"]))
    monkeypatch.setattr(
        evaluator,
        "evaluate",
        lambda **_: {"samples": {"t": [row]}},
    )

    class Documents:
        _config, OUTPUT_TYPE = None, "loglikelihood"

    task = LmEvalTask("t", "", Documents(), "m", 8, Location(place="lm-eval:t"))
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    asked = TextInterface(tokenizer, (EOS,))
    task.evaluate(load_folder(world / "base", torch.float32, "cpu"), asked, "test")
    assert sizes == [1]


def test_the_sides_of_borders() -> None:
    long, dynamic = (RopeBorders.of(CONFIGS[name]()) for name in ("longrope", "dynamic"))
    assert [long.side(n) == long.side(n + 1) for n in (6, 7, 8, 9)] == [True, True, False, True]
    assert [dynamic.side(n) == dynamic.side(n + 1) for n in (6, 7, 8, 9)] == [
        True, True, False, False,
    ]  # fmt: skip
    assert long and dynamic and not RopeBorders.of(LlamaConfig())


# --- texts longer than a context ---------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in (*FAMILIES, *OTHERS) if f != "mixtral"])
def test_positions_end_where_a_model_fails(family: str) -> None:
    """The oracle is the model: run one token further than its config says."""
    config = (FAMILIES | OTHERS)[family]()
    config.max_position_embeddings = 16
    model = AutoModelForCausalLM.from_config(config).eval()
    context = Context.of(model)
    assert context is not None
    assert context.length == 16
    with torch.no_grad():
        model(torch.zeros((1, 16), dtype=torch.long))
        if context.ends:
            with pytest.raises(IndexError):
                model(torch.zeros((1, 17), dtype=torch.long))
        else:
            model(torch.zeros((1, 17), dtype=torch.long))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gpt2")  # 16 positions
    base = make_model("gpt2")
    save(base, root / "base")
    save(perturbed(base), root / "expert")
    return root


def scored(world: Path, lines: list[dict[str, str]], **options: Any) -> Quiet:
    prompts = world / "q.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    progress = Quiet()
    settings = {"estimand": ("share",), "share_steps": 1, "verify": 0} | options
    score(
        ScoreRequest(base=str(world / "base"), expert=str(world / "expert"), prompts=prompts,
                     **settings),
        progress,
    )  # fmt: skip
    return progress


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ({"prompt": text(1, 17)}, {}, r"prompt 2 has 17 tokens, and its answer up to 64; .*"
         r"made for 16 and has no positions beyond; shorten it$"),
        ({"prompt": text(1, 10)}, {}, r"prompt 2 has 10 tokens, and its answer up to 64; .*"
         r"shorten it, or give max_new_tokens=7"),
        ({"prompt": text(1, 10), "response": text(2, 7)}, {},
         r"prompt 2 with its response has 17 tokens; .*made for 16"),
        ({"prompt": "ab", "response": "c", "contrast": text(1, 17)}, {},
         r"the contrast of prompt 2 has 17 tokens"),
    ],
)  # fmt: skip
def test_texts_beyond_the_positions_are_refused_before_anything_runs(
    gpt2: Path, line: dict[str, str], options: dict[str, Any], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ResidentModel, "move_to", lambda *_: pytest.fail("a model ran"))
    with pytest.raises(UserError, match=message):
        scored(gpt2, [{"prompt": "a", "response": "b"}, line], **options)


def test_texts_that_just_fit_are_scored(gpt2: Path) -> None:
    # the last token of an answer is never read
    scored(gpt2, [{"prompt": text(1, 10), "response": text(2, 6)}, {"prompt": text(3, 10)}],
           max_new_tokens=7)  # fmt: skip


def test_models_without_an_end_say_so_once(tmp_path: Path) -> None:
    config = LlamaConfig(**_SIZES, max_position_embeddings=BORDER)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).double().eval()
    save(base, tmp_path / "base")
    save(perturbed(base), tmp_path / "expert")
    lines = [{"prompt": text(i, n), "response": "a"} for i, n in enumerate((3, 9, 12))]
    notes = [n for n in scored(tmp_path, lines).notes if "is made for" in n]
    [note] = notes
    assert "prompt 2 with its response has 10 tokens; " in note
    assert "is made for 8 (2 texts are so long): what it computes beyond may mean little" in note
    assert not [n for n in scored(tmp_path, lines[:1]).notes if "is made for" in n]


def test_items_beyond_the_positions_are_refused(gpt2: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    item = {"prompt": text(1, 12), "answer": "a", "split": "test", "id": "seven"}
    path.write_text(json.dumps(item) + "\n")
    model = load_folder(gpt2 / "base", torch.float32, "cpu")
    tokenizer = AutoTokenizer.from_pretrained(gpt2 / "base")
    task = JsonlTask.read(path, Checkers.load(None), max_new_tokens=6)
    with pytest.raises(UserError, match=r"item seven has 12 tokens, and its answer up to 6; .*16"):
        task.too_long(model, tokenizer)
    fits = JsonlTask.read(path, Checkers.load(None), max_new_tokens=5)
    assert fits.too_long(model, tokenizer) is None
    fits.evaluate(model, TextInterface(tokenizer, (EOS,)), "test")
    short, long = (PlainText("plain", "", text(1, n)) for n in (6, 40))
    assert short.too_long(model, tokenizer) is None
    with pytest.raises(UserError, match="text 'plain' has 40 tokens; .* 16"):
        long.too_long(model, tokenizer)
