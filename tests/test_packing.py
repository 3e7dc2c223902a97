"""Packed rows: the same numbers as one sample a row, with fewer tokens."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_wp.criteria import AnchorDirection, Targets
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.packing import TokenCost, packed
from mergekit_wp.engine.replay import Receiver, record
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.models.pair import open_pair
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import PromptBatch, Sample
from mergekit_wp.runs.recordings import Portion, Recordings
from mergekit_wp.runs.references import References
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from tests.models import CONFIGS, VOCABULARY, make_model, perturbed, save
from tests.test_scoring import Quiet

torch.set_num_threads(1)
CHEAP_ATTENTION = TokenCost(1000.0, 1.0)
SAMPLES = [
    Sample((1, 2, 3, 4, 5), (6, 7)),
    Sample((1, 2, 3, 4, 5, 6, 9), (8,)),  # begins as the first one goes on
    Sample((1, 2, 3), (4, 5, 9)),  # the prefix of both
    Sample((1, 2, 3, 11, 12), (13,)),
    Sample((1, 2, 3, 11, 12), (13, 14, 15)),  # the same prompt again
]


@pytest.mark.parametrize("family", list(CONFIGS))
def test_packed_rows_have_the_values_of_padded_ones(family: str) -> None:
    decoder = Decoder(make_model(family))
    batch = PromptBatch.of(SAMPLES, range(len(SAMPLES)), "cpu")
    row = packed(batch, CHEAP_ATTENTION)
    assert row.n_rows < batch.n_rows and row.ids.numel() < batch.ids.numel()
    torch.manual_seed(0)
    target = torch.randn(batch.rows.numel(), VOCABULARY).double().log_softmax(-1)
    direction = torch.randn(16).double()
    targets = Targets(target, AnchorDirection(direction, 0))
    criteria = ("kl", "logprob", "anchor")
    with torch.no_grad():
        one = Receiver(decoder, record(decoder, batch), criteria, targets).own
        many = Receiver(decoder, record(decoder, row), criteria, targets).own
    for criterion in criteria:
        torch.testing.assert_close(many[criterion], one[criterion], rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=6),
            st.lists(st.integers(0, 2), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_every_token_sees_its_own_past_and_nothing_else(texts) -> None:
    samples = [Sample(tuple(prompt), tuple(response)) for prompt, response in texts]
    batch = PromptBatch.of(samples, range(len(samples)), "cpu")
    row = packed(batch, CHEAP_ATTENTION)
    if row is batch:
        return
    seen, positions = row.arguments["attention_mask"][:, 0], row.arguments["position_ids"]
    for owner, r, c in zip(row.owners.tolist(), row.rows.tolist(), row.cols.tolist(), strict=True):
        keys = seen[r, c].nonzero().squeeze(-1)
        order = positions[r, keys].argsort()
        past = row.ids[r, keys[order]].tolist()
        length = int(positions[r, c]) + 1
        assert past == list(samples[owner].input_ids[:length])
    assert (row.targets == batch.targets).all() and (row.owners == batch.owners).all()
    for i, sample in enumerate(samples):
        at = row.last_rows[i], row.last[i]
        assert row.ids[at] == sample.prompt_ids[-1]
        assert positions[at] == len(sample.prompt_ids) - 1


def test_what_only_some_begin_with_alike_is_there_once() -> None:
    batch = PromptBatch.of(SAMPLES, range(len(SAMPLES)), "cpu")
    row = packed(batch, CHEAP_ATTENTION)
    tokens = {s.input_ids[:end] for s in SAMPLES for end in range(1, len(s.input_ids) + 1)}
    assert row.ids.shape == (1, len(tokens))


def test_nothing_is_packed_where_attention_would_cost_more_than_it_saves() -> None:
    others = [Sample((i, 2, 3, 4), (5,)) for i in range(4)]
    batch = PromptBatch.of(others, range(4), "cpu")
    assert packed(batch, TokenCost(1.0, 1000.0)) is batch


def test_models_with_a_window_are_not_packed(tmp_path) -> None:
    model = make_model("mistral")
    folders = {}
    for window in (None, 2):
        config = copy.deepcopy(model.config)
        config.sliding_window = window
        base = type(model)(config).double().eval()
        base.load_state_dict(model.state_dict())
        sides = [
            str(save(side, tmp_path / f"{window}-{name}"))
            for name, side in (("base", base), ("expert", perturbed(base)))
        ]
        resident = ResidentModel(open_pair(*sides, lambda *_: None), torch.float64, "cpu")
        resident.move_to(0.0)
        batch = PromptBatch.of(SAMPLES, range(len(SAMPLES)), "cpu")
        references = References([batch], [Targets()], {}, None)
        recordings = Recordings(resident, references, ("logprob",))
        whole = Portion(0, 0, batch.size, 8)
        folders[window] = recordings.receiver(0.0, whole).batch
        assert recordings.receiver(0.0, whole, packs=False).batch is batch
    assert folders[None].n_rows < batch.n_rows
    assert folders[2] is batch


def test_activations_of_packed_and_plain_runs_are_kept_apart(tmp_path) -> None:
    """The donor's run serves one batch: layers are swapped in packed rows, neurons screened not."""
    base = make_model("llama")
    both = {"base": base, "expert": perturbed(base)}
    sides = {name: str(save(side, tmp_path / name)) for name, side in both.items()}
    prompts = tmp_path / "p.jsonl"
    lines = [{"prompt": "abcdefgh" + end, "response": "ij"} for end in "klmnop"]
    prompts.write_text("\n".join(json.dumps(line) for line in lines))

    def run(size: int) -> ScoreFile:
        return score(
            ScoreRequest(
                **sides,
                prompts=prompts,
                out=tmp_path / f"{size}.safetensors",
                estimand=("activation_gain",),
                kinds=("layer", "neuron"),
                dtype="float64",
                exact_budget=0.0,
                batch_size=size,
            ),
            Quiet(),
        )

    together, alone = run(6), run(1)  # a single prompt has nothing to share
    for key, tensor in alone.tensors.items():
        torch.testing.assert_close(together.tensors[key], tensor, rtol=1e-5, atol=1e-7)
