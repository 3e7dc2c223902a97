"""Tracing: a circuit built by hand, naive path patching in float64, and the command."""

from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from benchmarks.components import Component, fine_components
from mergekit_wp.cli import cli
from mergekit_wp.components import Partition
from mergekit_wp.errors import UserError
from mergekit_wp.files import circuitfile, scorefile
from mergekit_wp.files.circuitfile import Edge, Measured, Node, Rules, TraceFile
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.mechanism.circuit import trace
from mergekit_wp.mechanism.request import TraceRequest
from mergekit_wp.mechanism.roles import is_edge, role
from mergekit_wp.models.pair import open_pair
from mergekit_wp.runs.journal import Journal
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from tests.circuit import HEAD, LATE, NEURON, write_world
from tests.models import (
    DEVICE,
    EOS,
    LETTERS,
    count_fetched,
    make_model,
    perturbed,
    save,
    tolerance,
    write_prompts,
)
from tests.oracle import WRITERS, layers_of, swapped, values, with_activation
from tests.test_scoring import Quiet

torch.set_num_threads(1)

Place = tuple[str, int, int]


def name(place: Place) -> str:
    return f"layer {place[1]} {place[0]} {place[2]}"


def scored(root: Path, *estimands: str, **options: Any) -> ScoreFile:
    settings: dict[str, Any] = {
        "estimand": estimands,
        "criterion": ("kl",),
        "dtype": "float64",
        "device": DEVICE,
        "verify": 0,
        **options,
    }
    request = ScoreRequest(
        base=str(root / "base"),
        expert=str(root / "expert"),
        prompts=root / "prompts.jsonl",
        out=root / "scores.safetensors",
        **settings,
    )
    return score(request, Quiet())


def traced(root: Path, **options: Any) -> TraceFile:
    settings: dict[str, Any] = {"targets": 4, "dtype": "float64", "device": DEVICE, **options}
    return trace(
        TraceRequest(
            file=root / "scores.safetensors",
            prompts=root / "prompts.jsonl",
            out=root / "trace.json",
            **settings,
        ),
        Quiet(),
    )


def large(file: ScoreFile, estimand: str, least: float = 0.5) -> set[Place]:
    found = set()
    for kind in ("head", "kv_group", "neuron"):
        scores = file.scores(estimand, "kl", kind)
        found |= {(kind, *place) for place in (scores > least).nonzero().tolist()}
    return found


@pytest.mark.parametrize("changed", [NEURON, HEAD, LATE])
def test_a_circuit_built_by_hand(tmp_path: Path, changed: Place) -> None:
    root = write_world(tmp_path, changed)
    file = scored(root, "gain", "knockout", "activation_gain", "activation_knockout")
    path = [NEURON, HEAD, LATE]
    downstream = path[path.index(changed) :]
    # weights point at what was changed, activations at the whole path from there on
    assert large(file, "gain") == large(file, "knockout") == {changed}
    passing = set(downstream)
    if changed == NEURON:
        passing.add(("kv_group", 1, 1))  # the head reads the flag through its keys and values
    assert large(file, "activation_gain") == passing
    assert large(file, "activation_knockout") == passing

    found = traced(root)
    nodes = {node.name: node for node in found.nodes if node.activation.value > 0.5}
    assert set(nodes) == {name(place) for place in downstream}
    roles = {NEURON: "carrier", HEAD: "router", LATE: "executor"}
    roles |= {HEAD: "carrier"} if changed == HEAD else {}
    assert {n: node.role for n, node in nodes.items()} == {name(p): roles[p] for p in downstream}
    small = [node for node in found.nodes if node.name not in nodes]
    assert all(node.role is None for node in small), "components that hardly matter have no role"
    edges = {
        (edge.source, edge.target, edge.via) for edge in found.strong if edge.supply.value > 0.5
    }
    steps = list(itertools.pairwise(downstream))
    passed_on = {(name(a), name(b), "activations") for a, b in steps}
    from_weights = {(name(a), name(b), "weights") for a, b in steps if a == changed}
    assert edges == passed_on | from_weights
    for edge in found.strong:
        if edge.supply.value > 0.5:
            assert edge.supply.value == pytest.approx(1, abs=0.01)


def test_weights_left_in_the_checkpoints_supply_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_world(tmp_path, HEAD)
    scored(root, "activation_gain")
    held, fetched = traced(root), count_fetched(monkeypatch)
    (root / "trace.json").unlink()
    assert traced(root, device_map="auto", max_memory={"cpu": 0}) == held and fetched


def test_the_rules_can_be_adjusted(tmp_path: Path) -> None:
    root = write_world(tmp_path, HEAD)
    scored(root, "activation_gain")

    def role_of(place: Place, **rules: Any) -> str | None:
        nodes = traced(root, rules=Rules(**rules)).nodes
        return next(node.role for node in nodes if node.name == name(place))

    assert role_of(HEAD) == "carrier"
    assert role_of(HEAD, shallow=0.3) is None, "the second of four layers is no longer shallow"
    root = write_world(tmp_path / "other", NEURON)
    scored(root, "activation_gain")
    assert role_of(HEAD) == "router"
    assert role_of(HEAD, suppliers=2) is None
    assert role_of(HEAD, direct=0.1) == "executor"


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


#: models with a norm between each block and the residual stream
NORMED = ("gemma2", "gemma3_text", "olmo2")
#: models whose MLPs read what enters their layer
PARALLEL = ("gpt_neox", "phi", "cohere2")


@torch.no_grad()
def naive_supply(
    root: Path, partition: Partition, source: Component, target: Component, via: str
) -> float:
    """Three whole runs: the source's change of its block, the target's answer to it, its effect."""
    base, expert = load(root / "base"), load(root / "expert")
    patch = swapped if via == "weights" else with_activation
    changed = patch(base, expert, partition, source)
    writers = WRITERS.get(base.config.model_type, ("self_attn.o_proj", "mlp.down_proj"))
    attention = writers[0].partition(".")[0]
    block = "mlp" if source.kind == "neuron" else attention
    head_dim = getattr(base.config, "head_dim", None)
    head_dim = head_dim or base.config.hidden_size // base.config.num_attention_heads
    total = []

    # what a block adds to the residual stream: its output, through a norm or times a factor
    added, factor = block, getattr(base.config, "residual_multiplier", 1.0)
    if base.config.model_type in NORMED:
        added = "post_feedforward_layernorm" if block == "mlp" else "post_attention_layernorm"

    def output(model: PreTrainedModel, layer: int, part: str, ids: torch.Tensor) -> torch.Tensor:
        seen = []
        module = getattr(layers_of(model)[layer], part)
        handle = module.register_forward_hook(
            lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        model(ids)
        handle.remove()
        return seen[0]

    sequences = []
    for line in (root / "prompts.jsonl").read_text().splitlines():
        item = json.loads(line)
        answer = [*(LETTERS.index(c) for c in item["response"]), EOS]
        sequences.append(([LETTERS.index(c) for c in item["prompt"]], answer))
    for sequence in sequences:
        # what the engine reads: the last token is only ever predicted
        ids = torch.tensor([[*sequence[0], *sequence[1]]])
        moved_by = [output(model, source.layer, added, ids) for model in (changed, base)]
        delta = factor * (moved_by[0] - moved_by[1])
        moved = copy.deepcopy(base)
        layer = layers_of(moved)[target.layer]
        layer.register_forward_pre_hook(lambda _m, args, delta=delta: (args[0] + delta,))
        if target.kind == "neuron":
            held = output(base, target.layer, attention, ids)
            layer.get_submodule(attention).register_forward_hook(
                lambda _m, _a, _o, held=held: (held, None)
            )
            path, width = writers[1], 1
        else:
            path, width = writers[0], head_dim
        reads: list[torch.Tensor] = []
        for model in (moved, base):
            module = layers_of(model)[target.layer].get_submodule(path)
            handle = module.register_forward_pre_hook(
                lambda _m, args, reads=reads: reads.append(args[0])
            )
            model(ids)
            handle.remove()
        cut = slice(target.index * width, (target.index + 1) * width)
        module = layers_of(base)[target.layer].get_submodule(path)
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        change = (reads[0] - reads[1])[..., cut] @ weight[:, cut].T
        final = copy.deepcopy(base)
        layers_of(final)[target.layer].get_submodule(path).register_forward_hook(
            lambda _m, _a, out, change=change: out + change
        )
        total.append(values(final, expert, [sequence], None)["kl"])
    at_base = values(base, expert, sequences, None)["kl"].mean()
    at_expert = values(expert, expert, sequences, None)["kl"].mean()
    return float((torch.stack(total).mean() - at_base) / (at_expert - at_base))


@pytest.mark.parametrize(
    "family",
    [
        *("llama-tied", "gpt2"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "qwen3",
                "gemma3",
                "phi3",
                "olmo2",
                "phi",
                "starcoder2",
                "gemma2",
                "granite",
                "gpt_neox",
                "cohere2",
            )
        ),
    ],
)
def test_supplies_equal_naive_path_patching(tmp_path: Path, family: str) -> None:
    base = make_model(family)
    save(base, tmp_path / "base")
    save(perturbed(base, 0.2), tmp_path / "expert")
    write_prompts(tmp_path / "prompts.jsonl", 3, response=True)
    file = scored(tmp_path, "gain", "activation_gain")
    found = traced(tmp_path, targets=9, suppliers=2, batch_size=4)
    pair = open_pair(str(tmp_path / "base"), str(tmp_path / "expert"), lambda *_: None)
    parts = {
        f"layer {c.layer} {c.kind} {c.index}": c
        for c in fine_components(pair.partition)
        if c.kind != "tensor"
    }
    # as many are drawn as lead, leaders among them: a sample of all
    assert found.screen.verified_random == found.screen.verified_top > 0
    assert len(found.edges) > 8 and {e.via for e in found.edges} == {"weights", "activations"}
    kinds = {(parts[e.source].kind, parts[e.target].kind) for e in found.edges}
    assert {target for _, target in kinds} == {"head", "neuron"} and len(kinds) >= 3
    within = {e for e in found.edges if parts[e.source].layer == parts[e.target].layer}
    assert bool(within) == (family not in PARALLEL)
    for edge in found.edges:
        want = naive_supply(
            tmp_path, pair.partition, parts[edge.source], parts[edge.target], edge.via
        )
        assert edge.supply.value == pytest.approx(want, abs=tolerance(family)), edge
    for node in found.nodes:
        for estimand, measured in (("gain", node.gain), ("activation_gain", node.activation)):
            scores = file.scores(estimand, "kl", node.kind)
            assert measured.value == pytest.approx(float(scores[node.layer, node.index]), abs=1e-6)


@pytest.mark.parametrize(
    ("family", "second_order"), [("mistral", 5e-3), ("gemma3", 0.04), ("olmo2", 0.04)]
)
def test_small_changes_add_up_and_the_screen_is_exact(
    tmp_path: Path, family: str, second_order: float
) -> None:
    """To first order a head's or neuron's effect is its own weights' and all that reaches it."""
    base = make_model(family)
    expert = perturbed(base, 0.0)
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in expert.named_parameters():
            if "proj" in key:  # norms and embeddings are suppliers that are not traced
                parameter.add_(1e-4 * torch.randn_like(parameter))
    save(base, tmp_path / "base")
    save(expert, tmp_path / "expert")
    write_prompts(tmp_path / "prompts.jsonl", 4, response=True)
    scored(tmp_path, "activation_gain", criterion=("logprob",))
    found = traced(tmp_path, targets=6, suppliers=4)
    targets = [node for node in found.nodes if node.target]
    assert {node.layer for node in targets} == {0, 1}
    for node in targets:
        if node.kind == "neuron":  # a head's keys and values are weights of another component
            assert node.accounted == pytest.approx(1, abs=second_order), node.name
    for edge in found.edges:
        assert edge.screened == pytest.approx(edge.supply.value, rel=4 * second_order, abs=1e-3)
    assert found.screen.pearson is not None and found.screen.pearson > 0.999


def measured(value: float, se: float = 0.0) -> Measured:
    return Measured(value=value, se=se)


def test_rules() -> None:
    rules = Rules()
    assert is_edge(measured(0.1), measured(1.0), rules)
    assert not is_edge(measured(0.04), measured(1.0), rules), "under 5% of the target's effect"
    assert not is_edge(measured(0.1, se=0.06), measured(1.0), rules), "within its error"
    assert not is_edge(measured(0.1), measured(-1.0), rules)
    assert is_edge(Measured(value=0.1, se=None), Measured(value=1.0, se=None), rules)

    def node(gain: float, direct: float, layer: int = 1) -> Node:
        return Node(
            kind="neuron",
            layer=layer,
            index=0,
            name="it",
            target=True,
            gain=measured(gain),
            activation=measured(1.0),
            direct=measured(direct),
        )

    def edge(source: str, target: str, via: str = "weights", strong: bool = True) -> Edge:
        return Edge(
            source=source,
            target=target,
            via=via,  # type: ignore[arg-type]
            supply=measured(0.5),
            screened=0.5,
            strong=strong,
        )

    leaving, arriving = edge("it", "other"), edge("other", "it")
    assert role(node(0.9, 0.0), [leaving], 1.0, 11, rules) == "carrier"
    assert role(node(0.9, 0.0, layer=5), [leaving], 1.0, 11, rules) is None, "halfway up"
    assert role(node(0.9, 0.0), [edge("it", "other", "activations")], 1.0, 11, rules) is None
    assert role(node(0.9, 0.9), [leaving], 1.0, 11, rules) == "carrier"
    assert role(node(0.9, 0.9, layer=9), [leaving], 1.0, 11, rules) == "executor"
    assert role(node(0.1, 0.0), [arriving], 1.0, 11, rules) == "router"
    assert role(node(0.1, 0.0), [edge("other", "it", strong=False)], 1.0, 11, rules) is None
    assert role(node(0.1, 0.0), [arriving], 100.0, 11, rules) is None, "a small effect"


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_world(tmp_path, NEURON)
    scored(root, "activation_gain")
    whole = traced(root, batch_size=4)
    text = (root / "trace.json").read_text()
    (root / "trace.json").unlink()
    saved, keep = 0, Journal.save

    def killed(self: Journal, key: str, tensors: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 9:
            raise KeyboardInterrupt
        keep(self, key, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "save", killed)
        traced(root, batch_size=4)
    assert not (root / "trace.json").exists()
    assert traced(root, batch_size=4) == whole
    assert (root / "trace.json").read_text() == text
    assert not list(root.glob("*.partial"))


def test_the_command_and_its_file(tmp_path: Path) -> None:
    root = write_world(tmp_path, NEURON)
    file = scored(root, "gain", "activation_gain")
    out = root / "trace.json"
    options = ["--prompts", str(root / "prompts.jsonl"), "--out", str(out), "--targets", "3"]
    done = CliRunner().invoke(cli, ["trace", str(root / "scores.safetensors"), *options])
    assert done.exception is None, done.exception
    assert re.search(r"layer 0 neuron 3 +layer 1 head 2 +weights +\+1\.000", done.output)
    assert "carrier" in done.output and "executor" in done.output
    read = circuitfile.read(out, file)
    assert read.behavior == "prompts" and read.n_layers == 4
    page = root / "page.html"
    drawn = CliRunner().invoke(
        cli,
        ["plot", str(root / "scores.safetensors"), "--trace", str(out), "--out", str(page)],
    )
    assert drawn.exception is None, drawn.exception
    assert "layer 1 head 2" in page.read_text() and "executor" in page.read_text()

    other = scorefile.ScoreFile(file.manifest, file.tensors | {"delta_norm": torch.ones(1)})
    with pytest.raises(UserError, match=r"trace\.json was made from other scores"):
        circuitfile.read(out, other)
    for content, message in (
        ("{", "cannot be read"),
        ("[]", "make one with"),
        (out.read_text().replace('"weights"', '"magic"', 1), "via: Input should be"),
    ):
        (root / "bad.json").write_text(content)
        with pytest.raises(UserError, match=message):
            circuitfile.read(root / "bad.json", file)


@pytest.mark.parametrize(
    ("estimands", "change", "message"),
    [
        (("gain",), {}, "has no 'activation_gain/kl' scores; it has gain/kl; `score` with"),
        (("activation_gain",), {"criterion": "logprob"}, "has no 'activation_gain/logprob'"),
        (("activation_gain",), {"expert": "BASE"}, "nothing to score"),
    ],
)
def test_bad_input(
    tmp_path: Path, estimands: tuple[str, ...], change: dict[str, Any], message: str
) -> None:
    root = write_world(tmp_path, NEURON)
    scored(root, *estimands)
    change = {k: str(root / "base") if v == "BASE" else v for k, v in change.items()}
    with pytest.raises(UserError, match=message):
        traced(root, **change)
    assert not (root / "trace.json").exists() and not list(root.glob("*.partial"))
