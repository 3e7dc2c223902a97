"""`mergekit-wp inspect`: the JSON against the tensors, the table, and what it refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks.components import components
from mergekit_wp.architectures import Dims
from mergekit_wp.architectures.families import LLAMA
from mergekit_wp.commands.inspect import inspect
from mergekit_wp.components import Partition
from mergekit_wp.errors import UserError
from mergekit_wp.files.manifest import Fidelity
from mergekit_wp.files.scorefile import ScoreFile, write
from mergekit_wp.report import table, words
from mergekit_wp.report.ranking import select, to_json
from tests.factory import llama_tensor_names, make_score_file

DIMS = Dims(n_layers=3, n_heads=4, n_kv_groups=2, n_neurons=6, architecture=LLAMA)


@pytest.fixture
def score_file() -> ScoreFile:
    made = make_score_file(dims=DIMS, criteria=("kl", "anchor"))
    errors = {
        f"gain/{c}/{kind}.se": made.tensors[f"gain/{c}/{kind}"].abs() / 8
        for c in ("kl", "anchor")
        for kind in ("head", "neuron")
    }
    return ScoreFile(made.manifest, made.tensors | errors)


@pytest.fixture
def path(score_file: ScoreFile, tmp_path: Path) -> Path:
    write(score_file, tmp_path / "scores.safetensors")
    return tmp_path / "scores.safetensors"


def run(*args: str | Path) -> str:
    result = CliRunner().invoke(inspect, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def changed(score_file: ScoreFile, **fields: Any) -> ScoreFile:
    return ScoreFile(score_file.manifest.model_copy(update=fields), score_file.tensors)


def oracle(score_file: ScoreFile) -> list[dict[str, Any]]:
    """Every component by a plain loop over `Partition.components`."""
    manifest = score_file.manifest
    shapes = dict.fromkeys(manifest.tensor_names, (12, 12))
    partition = Partition(manifest.dims, shapes)
    found = []
    for estimand in manifest.estimands:
        for criterion in manifest.criteria:
            for kind in manifest.kinds:
                scores = score_file.scores(estimand, criterion, kind).flatten().tolist()
                known = score_file.tensors.get(f"{estimand}/{criterion}/{kind}.se")
                errors = [None] * len(scores) if known is None else known.flatten().tolist()
                for c, score, se in zip(components(partition, kind), scores, errors, strict=True):
                    found.append(
                        {
                            "kind": kind,
                            "layer": c.layer,
                            "index": c.index,
                            "name": c.name,
                            "estimand": estimand,
                            "criterion": criterion,
                            "score": score,
                            "se": se,
                        }
                    )
    return sorted(found, key=lambda item: -item["score"])


def key(item: dict[str, Any]) -> str:
    return json.dumps(item, sort_keys=True)


def test_json_holds_every_component_highest_first(path: Path, score_file: ScoreFile) -> None:
    answer = json.loads(run(path, "--json"))
    assert list(answer) == ["manifest", "components"]
    assert answer["manifest"] == json.loads(score_file.manifest.model_dump_json())
    scores = [item["score"] for item in answer["components"]]
    assert scores == sorted(scores, reverse=True)
    assert sorted(map(key, answer["components"])) == sorted(map(key, oracle(score_file)))


def test_json_has_exactly_the_promised_fields_in_order(path: Path) -> None:
    components = json.loads(run(path, "--json"))["components"]
    fields = ["kind", "layer", "index", "name", "estimand", "criterion", "score", "se"]
    assert all(list(item) == fields for item in components)
    outside = {i["name"] for i in components if i["layer"] is None}
    assert outside == {"model.embed_tokens.weight", "model.norm.weight"}


def test_json_filters_and_top(path: Path, score_file: ScoreFile) -> None:
    text = run(path, "--json", "--estimand", "gain", "--criterion", "anchor", "--kind", "head")
    components = json.loads(text)["components"]
    wanted = ("gain", "anchor", "head")
    expected = [
        i for i in oracle(score_file) if (i["estimand"], i["criterion"], i["kind"]) == wanted
    ]
    assert components == expected
    assert json.loads(run(path, "--json", "--top", "3"))["components"] == oracle(score_file)[:3]


def test_equal_scores_keep_the_usual_order(score_file: ScoreFile) -> None:
    zeros = {k: v * 0 for k, v in score_file.tensors.items()}
    flat = ScoreFile(score_file.manifest, zeros)
    components = json.loads("".join(to_json(flat, select(flat), None)))["components"]
    assert components == oracle(flat)


def test_table_shows_the_leaders_and_what_they_mean(path: Path, score_file: ScoreFile) -> None:
    lines = run(path, "--top", "4").splitlines()
    assert lines[0] == "behaviour: test"
    text = " ".join(" ".join(lines).split())
    assert "-1 at the base, 0 at the expert: 1 apart; noise floor 0" in text
    assert "taken after layer 1, direction by checkpoint, separation 1" in text
    ruled = [i for i, line in enumerate(lines) if line and not line.strip("-")]
    ends = [i - 1 for i in ruled[1:]] + [len(lines)]
    sections = {
        lines[i - 1]: " ".join(" ".join(lines[i:end]).split())
        for i, end in zip(ruled, ends, strict=True)
    }
    for estimand, criterion in select(score_file).pairs:
        section = sections[f"{estimand}/{criterion}"]
        assert "method layer, tensor, head, kv_group, neuron: exact swaps" in section
        of_pair = [
            i
            for i in oracle(score_file)
            if (i["estimand"], i["criterion"]) == (estimand, criterion)
        ]
        fine = set(score_file.fine_tensor_names)
        leaders = [
            i
            for i in of_pair
            if i["kind"] != "layer" and (i["kind"] != "tensor" or i["name"] in fine)
        ]
        for number, item in enumerate(leaders[:4], 1):
            layer = "-" if item["layer"] is None else item["layer"]
            row = f"{number} {item['kind']} {layer} {item['index']} {item['score']:+.3f}"
            row += "" if item["se"] is None else f" {item['se']:.3f}"
            assert f"{row} {item['name']}" in section
        for kind in ("layer", "tensor"):
            for item in [i for i in of_pair if i["kind"] == kind][:4]:
                assert f"{item['name']} {item['score']:+.3f}" in section


def test_table_shows_standard_errors_and_fits_80_columns(score_file: ScoreFile) -> None:
    tensors = score_file.tensors | {
        "share/kl/head.se": torch.full((DIMS.n_layers, DIMS.n_heads), 0.125)
    }
    with_se = ScoreFile(score_file.manifest, tensors)
    lines = list(table.render(with_se, select(with_se, "share", "kl", "head"), 3, width=80))
    assert "± se" in lines[-4] and all(" 0.125 " in line for line in lines[-3:])
    both = [*lines, *table.render(with_se, select(with_se, "gain", "kl", "tensor"), 99, width=80)]
    assert max(map(len, both)) <= 80
    whole = "\n".join(table.render(with_se, select(with_se, "gain", "kl", "tensor"), 99))
    assert all(name in whole for name in llama_tensor_names(DIMS.n_layers))


def test_table_without_fine_kinds_and_with_zero_scores() -> None:
    coarse = make_score_file(dims=DIMS, kinds=("tensor", "layer"))
    text = "\n".join(table.render(coarse, select(coarse), 99))
    assert "layer 2" in text and "model.layers.2.mlp.down_proj.weight" in text
    zero = ScoreFile(coarse.manifest, {k: v * -0.0 for k, v in coarse.tensors.items()})
    text = "\n".join(table.render(zero, select(zero), 2))
    assert "none of" in text and "-0.0" not in text


def test_fidelity_in_words() -> None:
    first = Fidelity(
        method="first-order",
        verified_top=8,
        verified_random=4,
        pearson=0.98123,
        spearman=0.9,
        pearson_random=0.8,
        largest_missed=0.00123,
    )
    assert words.fidelity_words(first) == (
        "first-order; against 12 exact swaps (8 leaders, 4 random): Pearson 0.981, "
        "Spearman 0.900, Pearson of the random alone 0.800, largest missed 0.0012"
    )
    assert words.fidelity_words(Fidelity(method="exact")) == "exact swaps"
    unchecked = words.fidelity_words(Fidelity(method="first-order"))
    assert unchecked == "first-order; not verified by exact swaps"
    gradients = words.fidelity_words(Fidelity(method="integrated-gradients", steps=3))
    assert gradients == "integrated gradients, 3 steps"
    assert words.fidelity_words(None) == "method not recorded"


def test_share_adds_up_by_kind(score_file: ScoreFile) -> None:
    facts = words.portrait(score_file, "share", "kl")
    fine = score_file.fine_scores("share", "kl")
    every = torch.cat([v.flatten() for v in fine.values()]).double()
    assert facts.total == pytest.approx(float(every.sum()))
    assert facts.by_kind["neuron"] == pytest.approx(float(fine["neuron"].double().sum()))
    positive = every[every > 0].sort(descending=True).values
    leading = next(
        n for n in range(1, len(positive) + 1) if positive[:n].sum() >= positive.sum() / 2
    )
    assert (facts.n, facts.n_positive, facts.n_half) == (len(every), len(positive), leading)
    stated = changed(score_file, completeness={"share/kl": 1.0625})
    assert words.share_words(stated, "kl").startswith("the shares add up to 1.06 (1 is complete)")


def test_text_from_elsewhere_cannot_steer_the_terminal(score_file: ScoreFile) -> None:
    hostile = changed(score_file, behavior="a\x1b[2Jb\u202ec\nd")
    text = "\n".join(table.render(hostile, select(hostile), 2))
    assert text.splitlines()[0] == r"behaviour: a\x1b[2Jb\u202ec\nd"
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--estimand", "knockout", "no estimand 'knockout' in this score file; it has share, gain"),
        ("--criterion", "logprob", "no criterion 'logprob' in this score file; it has kl, anchor"),
    ],
)
def test_a_filter_that_matches_nothing_says_what_there_is(
    path: Path, option: str, value: str, message: str
) -> None:
    with pytest.raises(UserError) as error:
        run(path, option, value)
    assert str(error.value) == message


def test_an_unknown_kind_is_a_usage_error(path: Path) -> None:
    result = CliRunner().invoke(inspect, [str(path), "--kind", "expert"])
    assert result.exit_code == 2 and "'neuron'" in result.output


def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.safetensors not found"):
        run(tmp_path / "nowhere.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08")
    with pytest.raises(UserError, match=r"bad\.safetensors: it is unreadable or trunc"):
        run(tmp_path / "bad.safetensors")


def test_many_components_are_fast() -> None:
    dims = Dims(n_layers=80, n_heads=1, n_kv_groups=1, n_neurons=5000, architecture=LLAMA)
    big = make_score_file(dims=dims, estimands=("share",), kinds=("neuron", "tensor"))
    begin = time.perf_counter()
    list(table.render(big, select(big), 20))
    pieces = sum(len(piece) for piece in to_json(big, select(big), 200_000))
    assert pieces > 200_000 * 100
    assert time.perf_counter() - begin < 20
