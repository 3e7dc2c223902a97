"""Stability of rankings: against scipy, by construction, and through the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from click.testing import CliRunner

from mergekit_wp.cli import cli
from mergekit_wp.errors import UserError
from mergekit_wp.files.scorefile import read, write
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from mergekit_wp.statistics import FURTHEST, between_files, between_halves, jaccard, leads
from tests.models import make_model, perturbed, save, write_prompts
from tests.test_scoring import Quiet

torch.set_num_threads(1)


def test_jaccard() -> None:
    one, two = np.array([5.0, 4, 3, 2, 1, 0]), np.array([5.0, 0, 4, 1, 2, 3])
    assert jaccard(one, two, 2) == pytest.approx(1 / 3)  # {0, 1} and {0, 2}
    assert jaccard(one, one, 3) == 1


def test_halves_of_noise_and_of_signal() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=2000)
    distance = np.ones(40)
    noise = between_halves(rng.normal(size=(40, 2000)), distance, 0)
    assert noise is not None and abs(noise.spearman) < 0.05 and noise.jaccard < 0.05
    assert noise.top == 20
    clear = between_halves(truth + 0.01 * rng.normal(size=(40, 2000)), distance, 0)
    assert clear is not None and clear.spearman > 0.99 and clear.jaccard > 0.9
    # half of the prompts: signal variance 1, noise variance 4 / 20
    middle = between_halves(truth + 2 * rng.normal(size=(40, 2000)), distance, 0)
    assert middle is not None
    pearson = 1 / (1 + 4 / 20)
    expected = 6 / np.pi * np.arcsin(pearson / 2)  # of normal variables
    assert middle.spearman == pytest.approx(expected, abs=0.02)
    assert middle.low <= middle.spearman <= middle.high
    flipped = between_halves(-truth - 0.01 * rng.normal(size=(40, 2000)), -distance, 0)
    assert flipped is not None and flipped.spearman > 0.99, "a criterion that falls ranks as well"
    assert between_halves(np.ones((3, 2000)), np.ones(3), 0) is None, "three prompts"
    assert between_halves(np.ones((8, 2000)), np.ones(8), 0) is None, "scores that do not vary"
    assert between_halves(rng.normal(size=(8, 9)), np.ones(8), 0) is None, "nine components"


def planted(shape: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """True scores of 3,000 components, and the noise of one prompt in each."""
    draw = {"even": rng.laplace, "uneven": lambda size: rng.standard_t(3, size)}[shape]
    truth = draw(size=3000)
    if shape == "even":
        return truth, np.full(3000, 2 * truth.std())
    return truth, 2 * (0.5 * abs(truth) + 0.5 * np.exp(0.7 * rng.normal(size=3000)))


@pytest.mark.parametrize("shape", ["even", "uneven"])
def test_the_prompts_that_stable_leaders_need(shape: str) -> None:
    """Said from 24 prompts; two scorings on so many others then share four fifths of the top 1%."""
    rng = np.random.default_rng(3)
    truth, noise = planted(shape, rng)
    distance = rng.uniform(0.5, 1.5, 24)
    changes = truth * distance[:, None] + noise * rng.normal(size=(24, 3000))
    found = between_halves(changes, distance, 0)
    assert found is not None and found.needed is not None and found.jaccard < 0.6

    def shared(prompts: float) -> float:
        pairs = (truth + noise * rng.normal(size=(2, 3000)) / np.sqrt(prompts) for _ in range(40))
        return float(
            np.mean([len({*np.argsort(-a)[:30]} & {*np.argsort(-b)[:30]}) / 30 for a, b in pairs])
        )

    assert shared(found.needed / 2) < 0.8 < shared(found.needed * 2), found
    assert shared(found.needed) == pytest.approx(0.8, abs=0.08)


def test_prompts_needed_where_there_is_nothing_to_extrapolate() -> None:
    rng = np.random.default_rng(0)
    distance = np.ones(16)
    uneven = np.exp(2 * rng.normal(size=2000))  # the noisiest lead both halves, and mean nothing
    noise = between_halves(uneven * rng.normal(size=(16, 2000)), distance, 0)
    assert noise is not None and noise.jaccard > 0.1 and noise.needed is None
    far = rng.laplace(size=2000) + 12 * rng.normal(size=(16, 2000))
    weak = between_halves(far, distance, 0)
    assert weak is not None and (weak.needed is None or weak.needed > 16 * FURTHEST / 4)
    clear = between_halves(rng.laplace(size=2000) + 1e-3 * rng.normal(size=(16, 2000)), distance, 0)
    assert clear is not None and clear.needed == 1


def test_leads_are_counted_over_draws_of_prompts() -> None:
    rng = np.random.default_rng(0)
    truth = np.zeros(1000)
    truth[:6] = 5.0  # six that lead whatever is drawn, and four more places for noise
    changes = truth + rng.normal(size=(12, 1000))
    found = leads(changes, np.ones(12), 0, 200)
    assert found is not None and found.dtype == np.uint8
    assert (found[:6] == 200).all() and found.sum() == 10 * 200 and found[6:].max() < 190
    # by hand: the same draws of prompts, ranked whole
    counts = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), size=200)
    want = np.zeros(1000)
    for drawn in counts:
        want[np.argsort(-(drawn @ changes), kind="stable")[:10]] += 1
    assert (want == found).all()
    fallen = leads(-changes, -np.ones(12), 0, 200)
    assert fallen is not None and (fallen == found).all(), "a criterion that falls"
    sparse = leads(np.eye(1, 1000) * np.ones((12, 1)), np.ones(12), 0, 200)
    assert sparse is not None and sparse.sum() == 200, "what changes nothing leads nothing"
    assert leads(changes[:3], np.ones(3), 0, 200) is None, "three prompts"
    assert leads(changes[:, :9], np.ones(12), 0, 200) is None, "nine components"


def test_between_files_is_spearman_with_an_interval_over_layers() -> None:
    rng = np.random.default_rng(1)
    one = np.round(rng.normal(size=(12, 100)), 1)  # with ties
    two = np.round(one + rng.normal(size=(12, 100)), 1)
    found = between_files(one, two, 0)
    assert found is not None
    want = scipy.stats.spearmanr(one.ravel(), two.ravel()).statistic
    assert found.spearman == pytest.approx(want, abs=1e-12)
    assert found.low < found.spearman < found.high
    # layers alike inside: as many independent numbers as layers, so a wide interval
    blocky = between_files(np.repeat(one[:, :1], 100, 1), np.repeat(two[:, :1], 100, 1), 0)
    assert blocky is not None and blocky.high - blocky.low > 4 * (found.high - found.low)
    assert between_files(np.ones((12, 100)), two, 0) is None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One base; two experts, the first scored on two behaviours and with two seeds."""
    root = tmp_path_factory.mktemp("stability")
    base = make_model("llama-tied")
    save(base, root / "base")
    for expert, seed in (("one", 1), ("two", 2)):
        save(perturbed(base, 0.1, seed), root / expert)
    prompts = write_prompts(root / "first.jsonl", 8, response=True)
    lines = prompts.read_text().splitlines(keepends=True)
    (root / "second.jsonl").write_text("".join(lines[2:7]))
    for out, expert, behavior, seed in (
        ("own", "one", "first", 0),
        ("seed", "one", "first", 1),
        ("behavior", "one", "second", 0),
        ("expert", "two", "first", 0),
    ):
        score(
            ScoreRequest(
                base=str(root / "base"),
                expert=str(root / expert),
                prompts=root / f"{behavior}.jsonl",
                out=root / f"{out}.safetensors",
                estimand=("knockout",),
                criterion=("kl",),
                kinds=("neuron", "head"),
                exact_budget=0.0,  # random probes, which depend on the seed
                verify=0,
                seed=seed,
            ),
            Quiet(),
        )
    return root


def test_the_command(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    file.write_bytes((world / "own.safetensors").read_bytes())
    others = [str(world / f"{name}.safetensors") for name in ("seed", "behavior", "expert")]
    alone = CliRunner().invoke(cli, ["stability", str(file)])
    assert alone.exception is None and "written" not in alone.output
    assert alone.output.count("halves of the prompts") == 1, "eight heads are too few to rank"
    done = CliRunner().invoke(cli, ["stability", str(file), *others])
    assert done.exception is None, done.exception
    found = read(file).manifest.stability
    assert [a.against for a in found] == ["halves", "run", "behavior", "expert"]
    assert all(a.low <= a.spearman <= a.high and a.kind == "neuron" for a in found)
    one, other = (read(world / f"{n}.safetensors") for n in ("own", "behavior"))
    scores = [f.scores("knockout", "kl", "neuron").flatten().numpy() for f in (one, other)]
    want = scipy.stats.spearmanr(*scores).statistic
    assert found[2].spearman == pytest.approx(want, abs=1e-6)
    assert found[2].name == f"second, {world / 'one'}"
    again = CliRunner().invoke(cli, ["stability", str(file), *others])
    assert again.output == done.output and len(read(file).manifest.stability) == 4
    shown = CliRunner().invoke(cli, ["inspect", str(file)])
    assert "another behaviour: second" in " ".join(shown.output.split())
    page = tmp_path / "page.html"
    CliRunner().invoke(cli, ["plot", str(file), "--out", str(page)])
    assert "Stability of the ranking" in page.read_text()
    assert read(file).digest() == read(world / "own.safetensors").digest()


def test_bad_input(world: Path, tmp_path: Path) -> None:
    file = world / "own.safetensors"
    before = file.read_bytes()
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(before)
    score_file = read(file)
    manifest = score_file.manifest.model_copy(update={"estimands": ("gain",)})
    tensors = {k.replace("knockout", "gain"): t for k, t in score_file.tensors.items()}
    write(replace(score_file, manifest=manifest, tensors=tensors), tmp_path / "gain.safetensors")
    save(make_model("mistral"), tmp_path / "base")
    save(perturbed(make_model("mistral")), tmp_path / "expert")
    score(
        ScoreRequest(
            base=str(tmp_path / "base"),
            expert=str(tmp_path / "expert"),
            prompts=world / "first.jsonl",
            out=tmp_path / "mistral.safetensors",
            estimand=("knockout",),
            verify=0,
        ),
        Quiet(),
    )
    for others, message in (
        ([str(copy)], "copy.safetensors holds the very same scores"),
        ([str(tmp_path / "gain.safetensors")], "has none of the same scores"),
        ([str(tmp_path / "mistral.safetensors")], "is of another architecture"),
        ([str(tmp_path / "none.safetensors")], "none.safetensors not found"),
        ([str(copy), str(copy)], "a file is given twice"),
    ):
        done = CliRunner().invoke(cli, ["stability", str(file), *others])
        assert isinstance(done.exception, UserError) and message in str(done.exception)
        assert file.read_bytes() == before


def test_inspect_lists_what_leads_stably(tmp_path: Path) -> None:
    base = make_model("llama-tied")
    save(base, tmp_path / "base")
    expert = perturbed(base, 0.02)
    with torch.no_grad():  # one neuron that matters far more than any other
        for part in ("gate_proj", "up_proj"):
            expert.get_parameter(f"model.layers.0.mlp.{part}.weight")[1] += 2.0
        expert.get_parameter("model.layers.0.mlp.down_proj.weight")[:, 1] *= 4.0
    save(expert, tmp_path / "expert")
    out = tmp_path / "scores.safetensors"
    notes = Quiet()
    request = ScoreRequest(
        base=str(tmp_path / "base"),
        expert=str(tmp_path / "expert"),
        prompts=write_prompts(tmp_path / "p.jsonl", 8, response=True),
        out=out,
        estimand=("gain", "knockout"),
        criterion=("kl",),
    )
    score(request, notes)
    (said,) = (note for note in notes.notes if "a stable top 1%" in note)
    assert "gain/kl/neuron " in said and said.endswith("these were 8")
    file = read(out)
    counted = file.tensors["gain/kl/neuron.leads"]
    assert (
        counted.dtype == torch.uint8 and counted.shape == file.scores("gain", "kl", "neuron").shape
    )
    assert counted.sum() == 5 * 200 and counted[0, 1] == 200
    assert file.tensors["knockout/kl/neuron.leads"][0, 1] == 200, "what is lost most leads"
    assert "gain/kl/layer.leads" not in file.tensors, "two layers have no top 1%"
    asked = ["inspect", str(out), "--stable", "--kind", "neuron", "--json"]
    shown = json.loads(CliRunner().invoke(cli, asked).output)["components"]
    sure = {
        (estimand, f"layer {layer} neuron {index}")
        for estimand in ("gain", "knockout")
        for layer, index in (file.tensors[f"{estimand}/kl/neuron.leads"] >= 190).nonzero().tolist()
    }
    assert {(c["estimand"], c["name"]) for c in shown} == sure
    table = CliRunner().invoke(cli, asked[:-1])
    assert table.exception is None and "layer 0 neuron 1" in table.output
    text = " ".join(table.output.split())
    assert "in at least 95% of draws over the prompts: of neurons" in text
    alone = CliRunner().invoke(cli, ["inspect", str(out), "--stable", "--kind", "layer"])
    assert isinstance(alone.exception, UserError)
    assert "--stable: this score file does not say how stably" in str(alone.exception)

    tensors = file.tensors | {"gain/kl/neuron.leads": counted.float()}
    with pytest.raises(UserError, match=r"neuron\.leads' is torch\.float32, not torch\.uint8"):
        write(replace(file, tensors=tensors), tmp_path / "bad.safetensors")
    tensors = file.tensors | {"gain/kl/neuron.leads": counted + 56}
    with pytest.raises(UserError, match=r"neuron\.leads' counts more than 200 draws"):
        write(replace(file, tensors=tensors), tmp_path / "bad.safetensors")
