"""What activation patches are made of: one pass of the donor, and only what is asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from mergekit_wp.engine.gradients import record_with_gradients
from mergekit_wp.engine.replay import Receiver
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.models.pair import open_pair
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import Sample
from mergekit_wp.runs.recordings import Portion, Recordings
from mergekit_wp.runs.references import measure_references
from mergekit_wp.scoring.blocks import exact_blocks
from mergekit_wp.scoring.measure import measure
from mergekit_wp.terms import SLICED_KINDS, Estimand
from tests.models import make_model, perturbed, save

torch.set_num_threads(1)
SAMPLES = [Sample((1, 2, 3), (4, 5)), Sample((6, 7), (8,)), Sample((6, 9), (1, 2))]


def recorded(folder: Path, family: str = "llama") -> Recordings:
    base = make_model(family)
    sides = [save(model, folder / name) for name, model in (("b", base), ("e", perturbed(base)))]
    pair = open_pair(*map(str, sides), lambda *_: None)
    resident = ResidentModel(pair, torch.float64, "cpu")
    return Recordings(resident, measure_references(resident, SAMPLES, ("kl",), 3), ("kl",))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2", "mixtral"])
@pytest.mark.parametrize("estimand", ["gain", "activation_gain"])
def test_a_kind_alone_changes_what_it_does_among_all(
    tmp_path: Path, family: str, estimand: Estimand
) -> None:
    """Recorded for it or not, and whichever layer comes first."""
    recordings = recorded(tmp_path, family)
    plain = recordings.receiver(0.0, Portion(0, 0, 3, 3), packs=False)
    every = {
        layer: recordings.changes(estimand, layer, plain, SLICED_KINDS) for layer in (1, 0)
    }  # the later one first
    recording = record_with_gradients(plain.decoder, plain.batch, SLICED_KINDS)
    assert all(call.read for call in recording.calls)
    kept = Receiver(plain.decoder, recording, plain.criteria, plain.targets)
    gradient = torch.randn(plain.recording.residual(0).shape, dtype=torch.float64)
    for receiver in (plain, kept):
        recordings._donor = None
        for layer in (0, 1):
            for kind in SLICED_KINDS:
                alone = recordings.changes(estimand, layer, receiver, [kind])[kind]
                close = {"rtol": 1e-9, "atol": 1e-12}
                indices = range(recordings.partition.dims.count(kind))
                change = every[layer][kind].changes(indices)
                assert change.abs().max() > 1e-4
                torch.testing.assert_close(alone.changes(indices), change, **close)
                projected = every[layer][kind].project(gradient)
                torch.testing.assert_close(alone.project(gradient), projected, **close)


def test_a_sweep_reads_every_layer_of_the_donor_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings = recorded(tmp_path)
    n_layers, heads = (getattr(recordings.partition.dims, n) for n in ("n_layers", "n_heads"))
    read: Counter[int] = Counter()
    donor = recordings.donor(0.0)
    layer = donor.layer
    monkeypatch.setattr(donor, "layer", lambda index: (read.update([index]), layer(index))[1])
    at_once = AtOnce(3, print, recordings.forget)
    selected = {"head": [list(range(heads))] * n_layers, "layer": [[0]] * n_layers}
    for block in exact_blocks(recordings, "activation_gain", selected):
        measure(block, recordings, at_once)
    assert read == dict.fromkeys(range(n_layers), 1)
