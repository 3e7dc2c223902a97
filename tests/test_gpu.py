"""What only a GPU can show. On a machine with one, `tests.models.DEVICE` also takes the tests
against naive patching there, and commands, whose default device is the GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mergekit.io.tasks import LoaderCache
from transformers import LlamaConfig

from mergekit_wp.joint.cache import keep_weights
from mergekit_wp.models.checkpoint import Checkpoint as OpenCheckpoint
from mergekit_wp.models.memory import peak_on_gpus
from mergekit_wp.models.pair import open_pair
from mergekit_wp.models.placement import DISK
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from tests.merging import Checkpoint, Family, add, llama_config, random_state
from tests.models import make_model, perturbed, save, save_tokenizer
from tests.test_merge_command import done, write
from tests.test_resident import elsewhere, world
from tests.test_scoring import Quiet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
torch.set_num_threads(1)
#: float32 elementwise work, where a GPU may contract a product and a sum
ROUNDING = 1e-6


@pytest.fixture(autouse=True)
def fresh_loaders() -> Iterator[None]:
    LoaderCache.loaders.clear()
    yield


# --- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["share", "winner", "gate", "topk"])
@pytest.mark.parametrize(
    "options",
    [
        ("--cuda",),
        ("--cuda", "--low-cpu-memory"),
        ("--cuda", "--lazy-unpickle"),
        ("--cuda", "--read-to-gpu"),
        ("--multi-gpu",),
        ("--multi-gpu", "--low-cpu-memory"),
        ("--gpu-rich",),
    ],
    ids="_".join,
)
def test_a_merge_on_a_gpu_is_the_cpus(
    tmp_path: Path, fusion: str, options: tuple[str, ...]
) -> None:
    family = Family.make(tmp_path, llama_config())
    recipe = family.recipe({"density": 0.7}, {"weight": 0.5}, parameters={"fusion": fusion})
    path = write(recipe, tmp_path / "recipe.yml")
    plain = done(path, tmp_path / "plain")
    LoaderCache.loaders.clear()
    torch.cuda.reset_peak_memory_stats()
    before = peak_on_gpus()
    found = done(path, tmp_path / "out", *options)
    assert peak_on_gpus() > before, "nothing was merged on the GPU"
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor, rtol=ROUNDING, atol=ROUNDING)


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float64])
def test_threads_read_what_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype
) -> None:
    config = llama_config(hidden_size=64)
    kept = Checkpoint.save(tmp_path / "base", config, random_state(config, 0), stored).state
    monkeypatch.setattr("mergekit_wp.models.checkpoint._PIECE", 16)
    checkpoint = OpenCheckpoint(str(tmp_path / "base"))
    most = max(len(checkpoint.pieces(name)) for name in kept)
    assert most >= 64, "more pieces than threads"
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for name, tensor in kept.items():
            found = checkpoint.tensor(name, dtype, "cuda")
            assert found.is_cuda and torch.equal(found.cpu(), tensor.to(dtype)), name


# --- scoring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "olmo2", "qwen3_moe"])
def test_weights_kept_elsewhere_change_no_bit(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = world(tmp_path, family) | {"device": "cuda"}
    whole = score(ScoreRequest(**given, out=tmp_path / "a.safetensors"), Quiet())
    elsewhere(monkeypatch, DISK, "cpu", "cuda")
    said = Quiet()
    request = ScoreRequest(
        **given, out=tmp_path / "b.safetensors", device_map="auto", max_memory={"0": 1}
    )
    spread = score(request, said)
    assert said.notes[0].startswith("weights: ") and said.notes[0].count(" on ") == 3
    assert "GiB of weights were fetched" in said.notes[-1]
    for key, tensor in whole.tensors.items():
        assert torch.equal(spread.tensors[key], tensor), key


def test_limits_are_held(tmp_path: Path) -> None:
    """The map is accelerate's: what fits stays on the GPU, the rest goes to main memory."""
    given = world(tmp_path, "llama-tied") | {"device": "cuda", "estimand": ("share",)}
    said, alone = Quiet(), Quiet()
    limits = {"0": 16_000, "cpu": 2**30}
    spread = score(
        ScoreRequest(**given, out=tmp_path / "a", device_map="auto", max_memory=limits), said
    )
    assert "on cuda" in said.notes[0] and "on cpu" in said.notes[0], said.notes
    whole = score(ScoreRequest(**given, out=tmp_path / "b"), alone)
    for key, tensor in whole.tensors.items():
        assert torch.equal(spread.tensors[key], tensor), key


@pytest.fixture
def wide_vocabulary(tmp_path: Path) -> dict[str, object]:
    """A pair whose logits take far more memory than its weights."""
    config = LlamaConfig(
        vocab_size=32_768,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    base = random_state(config, 0, 0.1)
    Checkpoint.save(tmp_path / "base", config, base, torch.float32)
    expert = add(base, random_state(config, 1, 0.02))
    Checkpoint.save(tmp_path / "expert", config, expert, torch.float32)
    save_tokenizer(tmp_path / "base")
    save_tokenizer(tmp_path / "expert")
    lines = [{"prompt": p, "response": "abcdabcd"} for p in ("abcd", "dcba", "bcda", "cdab") * 8]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return {
        "base": str(tmp_path / "base"),
        "expert": str(tmp_path / "expert"),
        "prompts": tmp_path / "p.jsonl",
        "estimand": ("gain", "share"),
        "kinds": ("head", "layer"),
        "share_steps": 2,
        "dtype": "float32",
        "verify": 0,
        "device": "cuda",
    }


def test_a_full_gpu_is_no_end(tmp_path: Path, wide_vocabulary: dict[str, object]) -> None:
    """The allocator itself says that there is no memory left."""
    peaks, files = {}, {}
    for size in (32, 4):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        out = tmp_path / f"{size}.safetensors"
        files[size] = score(ScoreRequest(**wide_vocabulary, batch_size=size, out=out), Quiet())
        peaks[size] = torch.cuda.max_memory_reserved()
    assert peaks[32] > 2 * peaks[4]
    _, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((peaks[32] + peaks[4]) / 2 / total)
    said = Quiet()
    try:
        out = tmp_path / "full.safetensors"
        found = score(ScoreRequest(**wide_vocabulary, batch_size=32, out=out), said)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any(note.startswith("out of memory; going on with") for note in said.notes), said.notes
    for key, tensor in files[32].tensors.items():
        torch.testing.assert_close(found.tensors[key], tensor, rtol=1e-3, atol=1e-5)


# --- experts together -----------------------------------------------------------------------------


def test_weights_that_are_kept_for_a_gpu_are_pinned_and_the_same(tmp_path: Path) -> None:
    base = make_model("llama-tied")
    folders = [save(model, tmp_path / str(i)) for i, model in enumerate((base, perturbed(base)))]
    pair = open_pair(*map(str, folders), lambda *_: None)
    read = {name: pair.delta(name, torch.float32, "cuda") for name in pair.changed}
    keep_weights([pair], 2**30, "cuda", lambda _: None)
    kept = [*pair.base.kept.values(), *pair.expert.kept.values()]
    assert kept and all(tensor.is_pinned() for tensor in kept)
    for name, delta in read.items():
        assert torch.equal(pair.delta(name, torch.float32, "cuda"), delta)
