"""The score file: a round trip, and everything that has to be refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_wp.errors import UserError
from mergekit_wp.files.scorefile import METADATA_KEY, ScoreFile, read, write
from mergekit_wp.runs.journal import Journal
from tests.factory import make_score_file


def manifest_of(path) -> dict:
    with safe_open(path, framework="pt") as handle:
        return json.loads(handle.metadata()[METADATA_KEY])


def test_round_trip(tmp_path) -> None:
    original = make_score_file(criteria=("kl", "anchor"), estimands=("share", "knockout"))
    write(original, tmp_path / "deep" / "s.safetensors")
    again = read(tmp_path / "deep" / "s.safetensors")
    assert again.manifest == original.manifest
    assert again.tensors.keys() == original.tensors.keys()
    assert all(torch.equal(again.tensors[k], v) for k, v in original.tensors.items())
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["s.safetensors"]


def test_names_are_those_of_the_design(tmp_path) -> None:
    write(make_score_file(criteria=("kl", "anchor")), tmp_path / "s.safetensors")
    fixed = (
        "format_version base expert behavior n_prompts prompts_sha256 architecture n_layers "
        "n_heads n_kv_groups n_neurons criteria estimands anchor fidelity noise_floor "
        "completeness tensor_names dtype seed created versions"
    )
    manifest = manifest_of(tmp_path / "s.safetensors")
    assert set(fixed.split()) <= set(manifest)
    assert manifest["format_version"] == 1
    assert {"reference", "revision", "config_hash"} <= set(manifest["base"])
    assert {"layer", "contrast", "separation"} <= set(manifest["anchor"])
    with safe_open(tmp_path / "s.safetensors", framework="pt") as handle:
        assert handle.get_slice("gain/kl/head").get_shape() == [2, 4]
        assert handle.get_slice("anchor/vector").get_shape() == [16]
        assert handle.get_slice("delta_norm").get_shape() == [20]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: t.pop("gain/kl/head"), "tensor 'gain/kl/head' is missing"),
        (lambda m, t: t.update(extra=torch.zeros(1)), "tensor 'extra' is not in the manifest"),
        (lambda m, t: t["gain/kl/head"].fill_(torch.nan), "'gain/kl/head' holds NaN"),
        (
            lambda m, t: t.update({"share/kl/neuron": torch.zeros(2, 7)}),
            r"'share/kl/neuron' has shape \(2, 7\), not \(2, 6\)",
        ),
        (
            lambda m, t: t.update({"share/kl/layer": torch.zeros(2).double()}),
            "is torch.float64, not torch.float32",
        ),
        (lambda m, t: m.update(format_version=2), "format version 2; this mergekit-wp reads 1"),
        (lambda m, t: m.update(n_heads="many"), "bad manifest: n_heads"),
        (lambda m, t: m.update(n_heads=0), "bad manifest: .*n_heads is 0, but kinds has 'head'"),
        (lambda m, t: m.update(noise_floor={"kl": float("nan")}), "bad manifest: noise_floor"),
        (lambda m, t: m.update(estimands=["share", "share"]), "a name stands twice"),
        (
            lambda m, t: m.update(
                anchor={"layer": 9, "contrast": "checkpoint", "separation": 1, "n_contrasts": 0}
            ),
            "the anchor lies in layer 9 of 2",
        ),
        (lambda m, t: t["delta_norm"].neg_(), "'delta_norm' holds a negative norm"),
        (lambda m, t: m.update(surprise=1), "bad manifest: surprise"),
        (lambda m, t: m.update(tensor_names=["a", "a"]), "tensor_names holds a name twice"),
        (
            lambda m, t: m["tensor_names"].__setitem__(0, "model.layers.9.x"),
            "tensor 'model.layers.9.x' lies in no layer of the model",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, message) -> None:
    path = tmp_path / "s.safetensors"
    good = make_score_file()
    manifest = json.loads(good.manifest.model_dump_json())
    tensors = {k: v.clone() for k, v in good.tensors.items()}
    change(manifest, tensors)
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(manifest)})
    with pytest.raises(UserError, match=message) as refusal:
        read(path)
    assert str(path) in str(refusal.value)


def test_no_score_file_no_json_no_file(tmp_path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(UserError, match=r"not found; make one with 'mergekit-wp score"):
        read(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a score file"):
        read(path)
    save_file({"a": torch.zeros(1)}, path, metadata={METADATA_KEY: "{"})
    with pytest.raises(UserError, match="its manifest is not JSON"):
        read(path)


@pytest.mark.parametrize(
    ("writes", "asked"),
    [
        ("fit", "inst.safetensors"),
        ("fit", "."),
        ("merge/fit", "."),
        ("inst.safetensors", "inst.safetensors"),
    ],
)
def test_a_file_whose_run_is_not_finished(tmp_path: Path, writes: str, asked: str) -> None:
    with pytest.raises(KeyError), Journal(tmp_path / writes, {}, restart=False) as journal:
        journal.save("block", {"a": torch.zeros(1)})
        raise KeyError
    message = f"; {tmp_path / writes}.partial holds an unfinished run; its command, given again"
    with pytest.raises(UserError, match=re.escape(message)):
        read(tmp_path / asked)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_truncated_or_flipped_files_never_pass_for_others(tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("s") / "s.safetensors"
    original = make_score_file()
    write(original, path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:  # in the header and manifest; flipped score bits are other scores
        header = int.from_bytes(content[:8], "little") + 8
        content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        found = read(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert found.tensors.keys() == original.tensors.keys()


def test_nothing_is_left_when_a_write_fails(tmp_path) -> None:
    good = make_score_file()
    bad = ScoreFile(good.manifest, {**good.tensors, "extra": torch.zeros(1)})
    with pytest.raises(UserError):
        write(bad, tmp_path / "s.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match="folder.safetensors cannot be written"):
        write(good, tmp_path / "folder.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.safetensors"]


def test_asking_for_absent_scores_says_what_there_is() -> None:
    with pytest.raises(UserError, match="no scores 'knockout/kl/head'.*it has share/kl/layer"):
        make_score_file().scores("knockout", "kl", "head")
