"""Embeddings whose rows mergekit rearranges, drops or borrows, and tokenizers that disagree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.io.tasks import LoaderCache
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from tests.merging import Family, add, llama_config, random_state, scores_for
from tests.models import VOCABULARY, make_model, perturbed, save
from tests.test_inputs import WAYS, Merged, by_ours, by_stock
from tests.test_lora import scored

ensure_registered()
torch.set_num_threads(1)
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def fresh_loaders() -> Iterator[None]:
    LoaderCache.loaders.clear()
    yield


def with_rows(model: PreTrainedModel, rows: torch.Tensor) -> PreTrainedModel:
    """The same model with another embedding."""
    config = LlamaConfig(**(model.config.to_dict() | {"vocab_size": len(rows)}))
    other = LlamaForCausalLM(config).double()
    weights = model.state_dict()
    other.load_state_dict(weights | dict.fromkeys((EMBEDDING, "lm_head.weight"), rows))
    return other.eval()


def rows_of(model: PreTrainedModel) -> torch.Tensor:
    return model.state_dict()[EMBEDDING].clone()


def noise(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 16, generator=generator, dtype=torch.float64)


def add_tokens(folder: Path, *tokens: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)


def renumber(folder: Path, order: list[int]) -> None:
    """Let the token of number ``order[i]`` have number i."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    token = {number: name for name, number in tokenizer["model"]["vocab"].items()}
    tokenizer["model"]["vocab"] = {token[old]: new for new, old in enumerate(order)}
    file.write_text(json.dumps(tokenizer))


def scores_of(base: Path, expert: Path, out: Path, seed: int = 0) -> Path:
    """Random scores, that of the embedding positive; norms over what both have rows for."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (base, expert))
    common = min(len(ours[EMBEDDING]), len(theirs[EMBEDDING]))
    cut = [state | {EMBEDDING: state[EMBEDDING][:common]} for state in (ours, theirs)]
    config = LlamaConfig.from_pretrained(base)
    names = [name for name, _ in LlamaForCausalLM(config).named_parameters()]
    ordered = [{name: state[name] for name in names} for state in cut]
    file = scores_for(*ordered, config, seed=seed)
    file.tensors["share/kl/tensor"][names.index(EMBEDDING)].abs_()
    scorefile.write(file, out)
    return out


def recipe_of(base: Path, experts: dict[Path, Path], **top: Any) -> dict[str, Any]:
    models = [{"model": str(e), "parameters": {"scores": str(s)}} for e, s in experts.items()]
    recipe = {
        "merge_method": "weight_patching",
        "base_model": str(base),
        "models": models,
        "parameters": {"fusion": "gate", "lambda": 0.5},
        "dtype": "float32",
    }
    return recipe | top


def assert_rows(out: Path, base: Path, experts: list[Path]) -> None:
    """Token by token: base plus half of every change; what only one has, all have from it."""
    merged = load_file(out / "model.safetensors")[EMBEDDING]
    row_of: list[dict[str, torch.Tensor]] = []
    for folder in (base, *experts):
        rows = load_file(folder / "model.safetensors")[EMBEDDING]
        vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
        row_of.append({token: rows[i] for token, i in vocabulary.items() if i < len(rows)})
    vocabulary = AutoTokenizer.from_pretrained(out).get_vocab()
    assert len(merged) >= len(vocabulary)
    for token, number in vocabulary.items():
        donor = next(rows[token] for rows in row_of if token in rows)
        start, *ends = (rows.get(token, donor) for rows in row_of)
        want = start + 0.5 * sum(end - start for end in ends)
        torch.testing.assert_close(merged[number], want, rtol=1e-5, atol=1e-6)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(make_model("llama-tied"), tmp_path / "base", torch.float32)


@pytest.fixture
def expert() -> PreTrainedModel:
    return perturbed(make_model("llama-tied"))


TOKENIZERS = pytest.mark.parametrize(
    "setting",
    [
        {"tokenizer": {"source": "union"}},
        {"tokenizer": {"source": "base"}},
        {"tokenizer": {"source": "expert"}},
        {"tokenizer": {"source": "union", "pad_to_multiple_of": 16}},
        {"tokenizer_source": "union"},
    ],
    ids=str,
)


def of(expert: Path, setting: dict[str, Any]) -> dict[str, Any]:
    tokenizer = setting.get("tokenizer")
    if tokenizer and tokenizer["source"] == "expert":
        return {"tokenizer": tokenizer | {"source": str(expert)}}
    return setting


@TOKENIZERS
@WAYS
def test_padded_rows_are_dropped(
    tmp_path: Path, expert: PreTrainedModel, setting: dict[str, Any], merged: Merged
) -> None:
    """What the padding differs by is in the score file's norm and not in what the method sees."""
    start = make_model("llama-tied")
    padded = with_rows(start, torch.cat([rows_of(start), noise(8, 1)]))
    base = save(padded, tmp_path / "base", torch.float32)
    ends = with_rows(expert, torch.cat([rows_of(expert), noise(8, 2)]))
    end = save(ends, tmp_path / "end", torch.float32)
    scores = scores_of(base, end, tmp_path / "s.safetensors")
    merged(recipe_of(base, {end: scores}, **of(end, setting)), tmp_path / "out")
    assert_rows(tmp_path / "out", base, [end])


@TOKENIZERS
@WAYS
def test_experts_with_tokens_of_their_own(
    tmp_path: Path, base: Path, expert: PreTrainedModel, setting: dict[str, Any], merged: Merged
) -> None:
    plain = save(perturbed(make_model("llama-tied"), seed=4), tmp_path / "plain", torch.float32)
    grown = with_rows(expert, torch.cat([rows_of(expert), noise(2, 3)]))
    chat = save(grown, tmp_path / "chat", torch.float32)
    add_tokens(chat, "<im_start>", "<im_end>")
    scores = {
        e: scores_of(base, e, tmp_path / f"{e.name}.safetensors", seed)
        for seed, e in enumerate((chat, plain))
    }
    merged(recipe_of(base, scores, **of(chat, setting)), tmp_path / "out")
    assert_rows(tmp_path / "out", base, [chat, plain])


@WAYS
def test_rows_in_another_order(
    tmp_path: Path, base: Path, expert: PreTrainedModel, merged: Merged
) -> None:
    order = torch.randperm(36, generator=torch.Generator().manual_seed(1)).tolist()
    order += range(36, VOCABULARY)
    plain = save(expert, tmp_path / "plain", torch.float32)
    moved = save(with_rows(expert, rows_of(expert)[order]), tmp_path / "moved", torch.float32)
    renumber(moved, order)
    scores = scores_of(base, plain, tmp_path / "s.safetensors")
    aligned = {"tokenizer": {"source": "union"}}
    merged(recipe_of(base, {moved: scores}, **aligned), tmp_path / "out")
    assert_rows(tmp_path / "out", base, [moved])
    with pytest.raises(UserError, match=f"{EMBEDDING} of .*moved: its difference"):
        merged(recipe_of(base, {moved: scores}), tmp_path / "not-aligned")


@WAYS
def test_a_foreign_embedding_is_refused(
    tmp_path: Path, base: Path, expert: PreTrainedModel, merged: Merged
) -> None:
    scores = scores_of(
        base, save(expert, tmp_path / "e", torch.float32), tmp_path / "s.safetensors"
    )
    other = with_rows(expert, rows_of(expert) + 0.05 * noise(VOCABULARY, 5))
    foreign = save(other, tmp_path / "foreign", torch.float32)
    for tokenizer in ({}, {"tokenizer": {"source": "union"}}):
        with pytest.raises(UserError, match=f"{EMBEDDING} of .*foreign: its difference"):
            merged(recipe_of(base, {foreign: scores}, **tokenizer), tmp_path / "out")


@WAYS
def test_layers_that_are_shifted_and_rounded_are_refused(tmp_path: Path, merged: Merged) -> None:
    """The stored tensor of the name would fit; what is merged is that of another layer."""
    family = Family.make(tmp_path, llama_config(), n_experts=1)
    small = add(family.base.state, random_state(family.config, 3, 1e-4))
    folder = family.experts[0].path
    save_file(small, folder / "model.safetensors", metadata={"format": "pt"})
    scorefile.write(scores_for(family.base.state, small, family.config), family.paths[0])
    sources = [{"model": str(p), "layer_range": [1, 2]} for p in (family.base.path, folder)]
    sources[1]["parameters"] = {"scores": str(family.paths[0])}
    recipe = family.recipe(slices=[{"sources": sources}], dtype="bfloat16")
    del recipe["models"]
    with pytest.raises(UserError, match="shifted layers|layers to keep their numbers"):
        merged(recipe, tmp_path / "out")


def test_other_vocabularies_need_a_tokenizer_setting(
    tmp_path: Path, base: Path, expert: PreTrainedModel
) -> None:
    grown = with_rows(expert, torch.cat([rows_of(expert), noise(2, 3)]))
    chat = save(grown, tmp_path / "chat", torch.float32)
    scores = scores_of(base, chat, tmp_path / "s.safetensors")
    recipe = recipe_of(base, {chat: scores})
    with pytest.raises(UserError, match=r"shape \[42, 16\], .* \[40, 16\]: .* add 'tokenizer: {"):
        by_ours(recipe, tmp_path / "out")
    merged = by_ours(recipe, tmp_path / "cut", "--unsafe-truncate-embeddings")
    assert len(merged[EMBEDDING]) == VOCABULARY


@WAYS
def test_tokens_in_the_bases_padding(
    tmp_path: Path, expert: PreTrainedModel, merged: Merged
) -> None:
    """The base gets the expert's rows for them, so their change is none; it was when scored."""
    start = make_model("llama-tied")
    padded = with_rows(start, torch.cat([rows_of(start), noise(8, 1)]))
    base = save(padded, tmp_path / "base", torch.float32)
    grown = with_rows(expert, torch.cat([rows_of(expert), noise(2, 3)]))
    chat = save(grown, tmp_path / "chat", torch.float32)
    add_tokens(chat, "<im_start>", "<im_end>")
    scores = scores_of(base, chat, tmp_path / "s.safetensors")
    recipe = recipe_of(base, {chat: scores}, tokenizer={"source": "union"})
    merged(recipe, tmp_path / "out")
    assert_rows(tmp_path / "out", base, [chat])


# --- scoring -------------------------------------------------------------------------------------


def way_out(base: Path, expert: Path) -> dict[str, Any]:
    """The recipe of docs/faq.md."""
    page = (Path(__file__).parents[1] / "docs" / "faq.md").read_text()
    text = page.split("is number … in the base")[1].split("```yaml\n")[1].split("```")[0]
    recipe = yaml.safe_load(text.replace("BASE", str(base)).replace("EXPERT", str(expert)))
    assert isinstance(recipe, dict)
    return recipe


def test_pairs_of_other_vocabularies(tmp_path: Path, base: Path, expert: PreTrainedModel) -> None:
    """Refused, and scored the way that docs/faq.md shows; merged by either name."""
    grown = with_rows(expert, torch.cat([rows_of(expert), noise(2, 3)]))
    chat = save(grown, tmp_path / "chat", torch.float32)
    add_tokens(chat, "<im_start>", "<im_end>")
    with pytest.raises(UserError, match=r"has 40 rows for tokens, expert '.*chat' 42 \(model.emb"):
        scored(base, str(chat), tmp_path / "s.safetensors")
    recipe = way_out(base, chat) | {"tokenizer": {"source": "union"}}
    by_stock(recipe, tmp_path / "long-chat")
    weights = [model["parameters"] for model in recipe["models"]]
    recipe["models"][0]["parameters"], recipe["models"][1]["parameters"] = weights[::-1]
    by_stock(recipe, tmp_path / "long-base")
    long_base, long_chat = (load_file(tmp_path / n / "model.safetensors")[EMBEDDING] for n in
                            ("long-base", "long-chat"))  # fmt: skip
    assert torch.equal(long_base[:VOCABULARY], load_file(base / "model.safetensors")[EMBEDDING])
    assert torch.equal(long_base[VOCABULARY:], long_chat[VOCABULARY:])
    assert torch.equal(long_chat, load_file(chat / "model.safetensors")[EMBEDDING])
    scores = tmp_path / "s.safetensors"
    scored(tmp_path / "long-base", str(tmp_path / "long-chat"), scores)
    aligned = {"tokenizer": {"source": "union"}}
    one = by_ours(
        recipe_of(tmp_path / "long-base", {tmp_path / "long-chat": scores}), tmp_path / "1"
    )
    two = by_ours(recipe_of(base, {chat: scores}, **aligned), tmp_path / "2")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_tokens_of_other_numbers_are_not_scored(
    tmp_path: Path, base: Path, expert: PreTrainedModel
) -> None:
    """The same expert in another order of tokens, and the way out of docs/faq.md."""
    order = [1, 0, *range(2, VOCABULARY)]
    moved = save(with_rows(expert, rows_of(expert)[order]), tmp_path / "moved", torch.float32)
    renumber(moved, order)
    message = "token 'a' is number 0 in the base '.*base', but 1 in the expert '.*moved'"
    with pytest.raises(UserError, match=message):
        scored(base, str(moved), tmp_path / "s.safetensors")
    by_stock(way_out(base, moved), tmp_path / "aligned")
    plain = save(expert, tmp_path / "plain", torch.float32)
    one = scored(base, str(tmp_path / "aligned"), tmp_path / "one.safetensors")
    two = scored(base, str(plain), tmp_path / "two.safetensors")
    for key, tensor in one.tensors.items():
        torch.testing.assert_close(tensor, two.tensors[key], rtol=1e-4, atol=1e-6)
