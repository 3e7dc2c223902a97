"""A decoder of another package: declared from outside, scored and merged as exactly as ours."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from benchmarks.components import components, fine_components, slices
from mergekit_wp.architectures import Architecture, known, of_type, register
from mergekit_wp.architectures.declaration import columns, rows
from mergekit_wp.architectures.families import LLAMA
from mergekit_wp.cli import main
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.terms import KINDS
from tests.merging import reference
from tests.models import EOS, EXACT, LETTERS, VOCABULARY, perturbed, write_prompts
from tests.oracle import Naive
from tests.test_architectures import at, gradients_between
from tests.test_scoring import double_precision_file, partition_of, run

torch.set_num_threads(1)
__all__ = ["double_precision_file"]


class ToyConfig(PreTrainedConfig):
    """No norms, names of its own, and masks that nobody sees."""

    model_type = "wp_toy"

    def __init__(self, inner: int = 3, **others) -> None:
        self.vocab_size, self.hidden_size, self.inner = VOCABULARY, 16, inner
        self.num_hidden_layers, self.num_attention_heads = 2, 2
        super().__init__(**{"eos_token_id": EOS, "tie_word_embeddings": False, **others})


class Mix(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        q, k, v = (
            to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        read = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(read.transpose(1, 2).flatten(2)), None


class Feed(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.up = nn.Linear(16, config.inner)
        self.down = nn.Linear(config.inner, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).tanh())


class Block(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.mix, self.feed = Mix(config), Feed(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0.7 * self.mix(x)[0]
        return x + self.feed(x)


class ToyPreTrained(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "body"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.4)


class ToyBody(ToyPreTrained):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.tokens, self.places = nn.Embedding(VOCABULARY, 16), nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> BaseModelOutput:
        places = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        x = self.tokens(input_ids) + self.places(places)
        for block in self.blocks:
            x = block(x)
        return BaseModelOutput(last_hidden_state=x)


class ToyForCausalLM(ToyPreTrained):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.body, self.readout = ToyBody(config), nn.Linear(16, VOCABULARY)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.readout

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, **_) -> CausalLMOutput:
        hidden = self.body(input_ids, use_cache=use_cache).last_hidden_state
        return CausalLMOutput(logits=1.3 * self.readout(hidden))


def toy() -> Architecture:
    """The declaration, made anew as a notebook's cell would that runs again."""
    return Architecture(
        "wp_toy",
        "ToyForCausalLM",
        layers="body.blocks",
        embedding="body.tokens",
        positions="body.places",
        norm=None,
        head="readout",
        attention="mix",
        mlp="feed",
        attention_out="mix.out.weight",
        mlp_out="feed.down.weight",
        cuts={
            **{f"mix.to_q.{part}": rows("head") for part in ("weight", "bias")},
            **{f"mix.to_{x}.{p}": rows("kv_group") for x in "kv" for p in ("weight", "bias")},
            "mix.out.weight": columns("head"),
            "feed.up.weight": rows("neuron"),
            "feed.up.bias": rows("neuron"),
            "feed.down.weight": columns("neuron"),
        },
        n_neurons=lambda config: int(config.inner),
    )


AutoConfig.register("wp_toy", ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)


@pytest.fixture
def undeclared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test declares is forgotten after it."""
    for table in ("_BY_TYPE", "_BY_CLASS"):
        monkeypatch.setattr(known, table, dict(getattr(known, table)))


@pytest.fixture
def declared(undeclared: None) -> Iterator[None]:
    register(toy())
    yield


def with_responses(path: Path) -> Path:
    """Prompts with their responses: the toy keeps no cache to generate from."""
    return write_prompts(path, 3, response=True)


def sequences_of(prompts: Path) -> list[tuple[list[int], list[int]]]:
    lines = [json.loads(line) for line in prompts.read_text().splitlines()]
    ids = {letter: i for i, letter in enumerate(LETTERS)}
    return [
        ([ids[x] for x in line["prompt"]], [*(ids[x] for x in line["response"]), EOS])
        for line in lines
    ]


def make_toy() -> ToyForCausalLM:
    torch.manual_seed(0)
    return ToyForCausalLM(ToyConfig()).double().eval().requires_grad_(False)


def test_scores_equal_naive_swapping_and_autograd(
    tmp_path, declared, double_precision_file
) -> None:
    base = make_toy()
    expert = perturbed(base)
    prompts = with_responses(tmp_path / "p.jsonl")
    result = run(
        tmp_path,
        base,
        expert,
        prompts=prompts,
        estimand=("gain", "knockout", "share"),
        criterion=("kl", "anchor"),
        anchor_layer=0,
        share_steps=1,
        batch_size=7,
    )
    (scores,) = double_precision_file
    assert result.manifest.kinds == KINDS
    partition, sequences = partition_of(base, result), sequences_of(prompts)
    assert set(partition.whole_tensors) == {
        "body.tokens.weight",
        "body.places.weight",
        "readout.weight",
        "readout.bias",
        *(f"body.blocks.{i}.mix.out.bias" for i in range(2)),
    }
    naive = Naive(base, expert, partition, sequences, (0, scores["anchor"]))
    for estimand in ("gain", "knockout"):
        for kind in KINDS:
            for component in components(partition, kind):
                for criterion, want in naive.score(estimand, component).items():
                    if criterion != "logprob":
                        found = at(scores[f"{estimand}/{criterion}/{kind}"], component)
                        assert found == pytest.approx(want, abs=EXACT), component
    for criterion in ("kl", "anchor"):
        products = gradients_between(base, expert, sequences, scores["anchor"], criterion)
        span = float((naive.at_expert[criterion] - naive.at_base[criterion]).mean())
        for component in fine_components(partition):
            want = sum(
                float(products[name][index].sum())
                for name, index in slices(partition, component).items()
            )
            found = at(scores[f"share/{criterion}/{component.kind}"], component)
            assert found == pytest.approx(want / span, abs=EXACT), component


def test_prompts_that_begin_alike_are_not_packed_where_no_mask_says_so(
    tmp_path, declared, double_precision_file
) -> None:
    """Rows that hold several prompts need a mask, and this decoder takes none."""
    base = make_toy()
    expert = perturbed(base)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(f'{{"prompt": "abcdefgh{x}", "response": "{x}a"}}\n' for x in "ijk"))
    result = run(tmp_path, base, expert, prompts=prompts, estimand=("gain",), criterion=("kl",))
    partition = partition_of(base, result)
    naive = Naive(base, expert, partition, sequences_of(prompts))
    for component in components(partition, "head"):
        found = at(double_precision_file[0]["gain/kl/head"], component)
        assert found == pytest.approx(naive.score("gain", component)["kl"], abs=EXACT)


def test_a_merge_equals_the_definition(tmp_path, declared) -> None:
    base = make_toy()
    expert = perturbed(base)
    result = run(
        tmp_path, base, expert, dtype="float32", prompts=with_responses(tmp_path / "p.jsonl")
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""merge_method: weight_patching
base_model: {tmp_path}/base
models:
- model: {tmp_path}/expert
  parameters: {{scores: {tmp_path}/scores.safetensors}}
parameters: {{fusion: gate}}
dtype: float64
"""
    )
    with pytest.raises(SystemExit) as end:
        main(["merge", str(recipe), str(tmp_path / "out")])
    assert end.value.code == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    states = [dict(model.named_parameters()) for model in (base, expert)]
    wanted = reference(states[0], states[1:], [result], fusion="gate")
    assert set(merged) == set(states[0])
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), wanted[name].double(), rtol=1e-6, atol=1e-6)


def test_a_score_file_of_an_unregistered_architecture_is_refused(
    tmp_path, undeclared, monkeypatch
) -> None:
    with monkeypatch.context() as patched:
        for table in ("_BY_TYPE", "_BY_CLASS"):
            patched.setattr(known, table, dict(getattr(known, table)))
        register(toy())
        base = make_toy()
        prompts = with_responses(tmp_path / "p.jsonl")
        run(tmp_path, base, perturbed(base), prompts=prompts, estimand=("gain",))
    with pytest.raises(
        UserError,
        match=r"scores.safetensors: architecture 'ToyForCausalLM' is not declared here: import",
    ):
        scorefile.read(tmp_path / "scores.safetensors")
    register(toy())
    assert scorefile.read(tmp_path / "scores.safetensors").manifest.n_heads == 2


def test_the_same_may_be_registered_again_and_another_not(undeclared) -> None:
    register(toy())
    register(toy())
    register(LLAMA)
    with pytest.raises(UserError, match="architecture 'wp_toy' is declared already"):
        register(replace(toy(), head="lm_head"))
    with pytest.raises(UserError, match="'wp_toy' is declared already"):
        register(replace(toy(), n_neurons=lambda config: 2 * int(config.inner)))
    with pytest.raises(UserError, match="'llama' is declared already, and otherwise; give yours"):
        register(Architecture("llama", "MyForCausalLM"))
    with pytest.raises(UserError, match="'LlamaForCausalLM' is declared already"):
        register(Architecture("mine", "LlamaForCausalLM"))
    with pytest.raises(UserError, match="'mine' declares no path of its layers"):
        register(Architecture("mine", "MyForCausalLM", layers=""))
    assert copy.copy(of_type("llama")) == LLAMA
    assert of_type("mine") is None
