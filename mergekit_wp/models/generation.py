"""How a model is asked, and its greedy answers to a batch of prompts."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationMixin

from mergekit_wp.architectures.computation import RopeBorders
from mergekit_wp.errors import UserError
from mergekit_wp.files.untrusted import parse_json
from mergekit_wp.models import hub
from mergekit_wp.models.encoding import set_clock
from mergekit_wp.prompts import together

# what a model calls the keys and values it keeps, where it takes and gives them: since
# transformers 5.24, and before
_CACHES = ("cache", "past_key_values")
# all that a tokenizer may be made of, and what of the config decides its class
_READ = ("*token*", "vocab*", "merges*", "*.model", "*.tiktoken", "*.jinja", "*/*.jinja")
_CONFIG_READ = ("model_type", "tokenizer_class", "architectures", "transformers_version")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class TextInterface:
    """How a model is asked: it belongs to the model, as its weights do.

    Attributes:
        tokenizer: of transformers, with the chat template.
        ends: tokens that end an answer, see `end_tokens`.
    """

    tokenizer: Any
    ends: tuple[int, ...]

    @classmethod
    def of(cls, folder: str | Path, tokenizer: Any) -> TextInterface:
        """That of a model's folder, with its tokenizer, or another's where it has none.

        Raises:
            UserError: a generation config that cannot be read.
        """
        return cls(tokenizer, tuple(end_tokens(folder, tokenizer)))

    @classmethod
    def read(cls, folder: str | Path, name: str) -> TextInterface | None:
        """That of a model's folder, None where there is no tokenizer.

        Raises:
            UserError: a tokenizer or a generation config that cannot be read.
        """
        tokenizer = read_tokenizer([Path(folder)], name)
        return None if tokenizer is None else cls.of(folder, tokenizer)

    def differences(self, other: TextInterface) -> list[str]:
        """What differs in words, nothing where both ask alike."""
        alike = same_files(self.tokenizer, other.tokenizer)
        pairs: dict[str, tuple[object, object]] = {
            "tokens": (None, None) if alike else (self.tokens, other.tokens),
            "chat template": (self.tokenizer.chat_template, other.tokenizer.chat_template),
            "end tokens": (self.end_texts(), other.end_texts()),
        }
        return [what for what, (one, another) in pairs.items() if one != another]

    @cached_property
    def tokens(self) -> tuple[dict[str, int], dict[str, Any]]:
        """The vocabulary, and all else that decides how a text becomes tokens."""
        return _tokens(self.tokenizer)

    def digest(self) -> str:
        """sha256 of all that decides how a model is asked."""
        vocabulary, own = self.tokens
        content = [sorted(vocabulary.items()), own, self.tokenizer.chat_template, self.ends]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def end_texts(self) -> list[str]:
        """The end tokens as they are written."""
        return [str(self.tokenizer.convert_ids_to_tokens(token)) for token in self.ends]


def read_tokenizer(places: Sequence[Path], name: str) -> Any | None:
    """The tokenizer of the first of these folders that has one, None where none has.

    Its chat template's clock is that of `set_clock`.

    Raises:
        UserError: it cannot be loaded.
    """
    has = [place for place in places if any((place / file).exists() for file in _TOKENIZER_FILES)]
    if not has:
        return None
    try:
        # one vocabulary in memory for all that have it; each has a clock and a template of its own
        found = copy.copy(_loaded(_Files(_digest(has[0]), has[0])))
    except Exception as error:  # tokenizers raise whatever they like
        raise UserError(
            f"the tokenizer of '{name}' cannot be loaded: {hub.reason(error)}"
        ) from error
    set_clock(found)
    return found


@dataclass(frozen=True)
class _Files:
    """The files of a tokenizer: those of one content are one, wherever they are."""

    digest: str
    folder: Path = field(compare=False)


def _digest(folder: Path) -> str:
    """sha256 of all that transformers makes a tokenizer of, by the files' names."""
    files = {file for pattern in _READ for file in folder.glob(pattern) if file.is_file()}
    digest = hashlib.sha256()
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder)} {len(content)} ".encode() + content)
    config = folder / "config.json"
    if config.is_file():
        config_of = parse_json(config.read_bytes())
        digest.update(json.dumps([config_of.get(key) for key in _CONFIG_READ]).encode())
    return digest.hexdigest()


@lru_cache(maxsize=4)
def _loaded(files: _Files) -> Any:
    # said outright: by default transformers asks on the terminal about a folder's own code
    return AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False)


def same_files(one: Any, other: Any) -> bool:
    """Whether two tokenizers were read from files of one content: their tokens are the same."""
    return one.is_fast and other.is_fast and one.backend_tokenizer is other.backend_tokenizer


def _tokens(tokenizer: Any) -> tuple[dict[str, int], dict[str, Any]]:
    """All that decides how a text becomes tokens, as far as a tokenizer says it."""
    own: dict[str, Any] = {}
    if tokenizer.is_fast:
        own = json.loads(tokenizer.backend_tokenizer.to_str())
        for key in ("truncation", "padding"):  # of the last batch that it was saved after
            own.pop(key)
    return tokenizer.get_vocab(), own


def end_tokens(folder: str | Path, tokenizer: Any) -> list[int]:
    """Tokens that end a model's answers: its tokenizer's, and those by which transformers stops.

    These stand in the generation config, or where there is none in the config. Nothing else of a
    generation config is read: answers are greedy, whatever it says of sampling.

    Raises:
        UserError: a generation config that is no JSON, or whose eos_token_id is no token.
    """
    ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    file = Path(folder, "generation_config.json")
    if not file.is_file():
        file = Path(folder, "config.json")
    if not file.is_file():
        return sorted(ends)
    try:
        config = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is no JSON object; remove it, or copy it again from the model")
    stated = config.get("eos_token_id")
    if stated is None and isinstance(text := config.get("text_config"), dict):
        stated = text.get("eos_token_id")
    tokens = stated if isinstance(stated, list) else [] if stated is None else [stated]
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool):
            raise UserError(
                f"{file} has eos_token_id = {json.dumps(stated)}; expected a token's number, a "
                "list of them, or null"
            )
    return sorted(ends.union(tokens))


@torch.no_grad()
def greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Sequence[int],
    device: str | torch.device,
    at_once: int | None = None,
) -> list[list[int]]:
    """Greedy continuations, each ending with its end token if it got there.

    Prompts go together padded on the left behind an attention mask, until every one has ended.
    Where padding would make NaN, or the length changes all positions (`RopeBorders`), those of one
    length do; every answer is that of its prompt alone.

    Args:
        model: a causal LM of transformers.
        prompts: token ids.
        max_new_tokens: longest continuation.
        ends: tokens that end one.
        device: the model's.
        at_once: prompts in a batch; all where None.

    Raises:
        UserError: a model that keeps no keys and values.
    """
    borders = RopeBorders.of(model.config)
    # transformers' own attention takes its softmax in float32, where the float64 mask is infinite
    unpadded = model.dtype == torch.float64 and model.config._attn_implementation == "eager"

    def alike(length: int) -> tuple[object, ...]:
        first, last = borders.side(length), borders.side(length + max_new_tokens - 1)
        return first, length if unpadded or first != last else None

    found: dict[int, list[int]] = {}
    for members in together([len(p) for p in prompts], at_once or len(prompts), alike):
        rows = _continued(model, [prompts[i] for i in members], max_new_tokens, ends, device)
        found |= dict(zip(members, rows, strict=True))
    return [found[i] for i in range(len(prompts))]


def _continued(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Sequence[int],
    device: str | torch.device,
) -> list[list[int]]:
    """As `greedy`, of prompts that go together."""
    width = max(len(p) for p in prompts)
    anew = _forgets_at(model)
    ids = torch.tensor([[*[0] * (width - len(p)), *p] for p in prompts], device=device)
    mask = torch.tensor([[*[0] * (width - len(p)), *[1] * len(p)] for p in prompts], device=device)
    stop = torch.tensor(list(ends), device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    rows: list[list[int]] = [[] for _ in prompts]
    cache: dict[str, Any] = {}
    step = ids
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        # by number: of a slice, torch multiplies the whole vocabulary with each prompt by itself
        last = torch.tensor([step.shape[1] - 1], device=device)
        output = model(
            input_ids=step,
            attention_mask=mask,
            position_ids=positions[:, -step.shape[1] :],
            use_cache=True,
            logits_to_keep=last,
            **cache,
        )
        cache = {name: value for name, value in output.items() if name in _CACHES}
        if not cache:  # the next step would see its last token alone
            raise UserError(
                f"{type(model).__name__} gives no cache ({' or '.join(_CACHES)}) with its answer, "
                "so it cannot generate here"
            )
        chosen = output.logits[:, -1].argmax(-1)
        over = done.tolist()
        for row, token in enumerate(chosen.tolist()):
            if not over[row]:
                rows[row].append(token)
        done |= torch.isin(chosen, stop)
        if done.all():
            break
        step = chosen.unsqueeze(-1)
        ids = torch.cat([ids, step], -1)
        mask = torch.cat([mask, mask.new_ones((len(prompts), 1))], -1)
        if ids.shape[1] - 1 in anew:
            step, cache = ids, {}
    return rows


def _forgets_at(model: Any) -> frozenset[int]:
    """Lengths after which a model reads all of its text again: what it keeps is turned otherwise.

    Phi-3 and its kin say so by a preparation of their own; what has none goes on with what it has.
    """
    steps = RopeBorders.of(model.config).steps
    plain = GenerationMixin.prepare_inputs_for_generation
    own = steps and type(model).prepare_inputs_for_generation is not plain
    return steps if own else frozenset()
