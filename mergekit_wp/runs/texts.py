"""From prompts to token ids, and how many of them go through a model together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_wp.errors import UserError
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.encoding import TextLength, encode_pair, encode_prompt, too_long
from mergekit_wp.models.generation import same_files
from mergekit_wp.models.load import skeleton
from mergekit_wp.models.pair import Pair
from mergekit_wp.prompts import PromptSet, Sample
from mergekit_wp.runs.progress import Progress

#: of plain text, tokens that are read, and those among them that nothing has to predict
PLAIN_TOKENS, PLAIN_PROMPT = 48, 4


@dataclass(frozen=True)
class Encoded:
    """Token ids of all prompts; responses and contrasts by prompt index."""

    prompts: list[list[int]]
    responses: dict[int, list[int]]
    contrasts: dict[int, list[int]]

    def check_vocabulary(self, size: int) -> None:
        """Refuse tokens that the models do not have.

        Raises:
            UserError: names the largest.
        """
        every = [*self.prompts, *self.responses.values(), *self.contrasts.values()]
        largest = max(token for ids in every for token in ids)
        if largest >= size:
            raise UserError(
                f"the tokenizer gives token {largest}; the models have {size} tokens: tokens were "
                "added to it that the embedding has no rows for, or it is of another model"
            )

    def sha256(self) -> str:
        """Hash of all token ids."""
        content = [self.prompts, sorted(self.responses.items()), sorted(self.contrasts.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def encode_texts(tokenizer: Any, prompts: PromptSet, progress: Progress) -> Encoded:
    """Tokenise prompts.

    Args:
        tokenizer: the expert's.
        prompts: with responses or without.
        progress: told of prompts that end within a token.

    Raises:
        UserError: a prompt or response without tokens.
    """
    if prompts.raw:
        return _plain(tokenizer, prompts)
    encoded, within = Encoded([], {}, {}), []
    for i, prompt in enumerate(prompts.prompts):
        try:
            if prompt.response is None:
                encoded.prompts.append(encode_prompt(tokenizer, prompt.prompt))
            else:
                parts = encode_pair(tokenizer, prompt.prompt, prompt.response)
                encoded.prompts.append(parts.prompt)
                encoded.responses[i] = parts.response
                within += [] if parts.as_alone else [str(i + 1)]
            if prompt.usable_contrast:
                assert prompt.contrast is not None
                encoded.contrasts[i] = encode_prompt(tokenizer, prompt.contrast)
        except UserError as error:
            raise UserError(f"{prompts.source}: prompt {i + 1}: {error}") from error
    if any(not ids for ids in encoded.responses.values()):
        raise UserError(
            f"{prompts.source}: a response has no tokens, and the tokenizer has no "
            "end-of-sequence token"
        )
    if within:
        which = f"{len(within)} prompts, the first of them number {within[0]},"
        progress.note(
            f"{prompts.source}: {f'prompt {within[0]}' if len(within) == 1 else which} and the "
            "response share a token or change one another's; their text is tokenised as one, and a "
            "token that the prompt only begins belongs to the response"
        )
    return encoded


def _plain(tokenizer: Any, prompts: PromptSet) -> Encoded:
    """Text that goes through no chat template: its first tokens, and the next ones as response.

    Raises:
        UserError: none of it has more tokens than the prompt takes.
    """
    whole = [list(tokenizer(str(p.prompt)).input_ids)[:PLAIN_TOKENS] for p in prompts.prompts]
    usable = [ids for ids in whole if len(ids) > PLAIN_PROMPT]
    if not usable:
        raise UserError(f"{prompts.source}: the tokenizer makes no tokens of it")
    responses = {i: ids[PLAIN_PROMPT:] for i, ids in enumerate(usable)}
    return Encoded([ids[:PLAIN_PROMPT] for ids in usable], responses, {})


def check_lengths(
    encoded: Encoded, prompts: PromptSet, pair: Pair, max_new_tokens: int, progress: Progress
) -> None:
    """Refuse texts that have more tokens than the models have positions.

    Args:
        encoded: the texts.
        prompts: where they are from.
        pair: the checkpoints.
        max_new_tokens: of answers that a model is to give.
        progress: told of texts beyond what models without such an end were made for.

    Raises:
        UserError: names the prompt, its length and the limit.
    """
    texts = []
    for i, ids in enumerate(encoded.prompts):
        what, response = f"{prompts.source}: prompt {i + 1}", encoded.responses.get(i)
        if response is None:
            texts.append(TextLength(what, len(ids), max_new_tokens))
        else:  # the last token is only ever predicted
            texts.append(TextLength(f"{what} with its response", len(ids) + len(response) - 1))
        if i in encoded.contrasts:
            contrast = f"{prompts.source}: the contrast of prompt {i + 1}"
            texts.append(TextLength(contrast, len(encoded.contrasts[i])))
    for checkpoint in (pair.base, pair.expert):
        model = skeleton(checkpoint.config, checkpoint.name)
        if note := too_long(model, texts, f"'{checkpoint.name}'"):
            progress.note(note)
            return


def find_tokenizer(checkpoints: Iterable[Checkpoint], told: Callable[[str], None]) -> Any:
    """The first checkpoint's tokenizer; said aloud, that of the first that has one.

    Raises:
        UserError: none has one.
    """
    without: list[str] = []
    for checkpoint in checkpoints:
        tokenizer = checkpoint.tokenizer()
        if tokenizer is None:
            without.append(f"'{checkpoint.name}'")
            continue
        if without:
            told(f"{without[0]} has no tokenizer; that of '{checkpoint.name}' is used")
        return tokenizer
    raise UserError(
        f"neither {' nor '.join(without)} has a tokenizer; copy tokenizer.json and "
        f"tokenizer_config.json into the folder of {without[0]}"
    )


def refuse_other_tokens(pair: Pair, tokenizer: Any, progress: Progress) -> None:
    """Refuse a pair whose tokenizers number a token differently.

    Both models are given the same token numbers, and row by row their embeddings are compared.

    Args:
        pair: the checkpoints.
        tokenizer: the one that was found.
        progress: told where the base's cannot be loaded.

    Raises:
        UserError: names the first such token.
    """
    try:
        ours = pair.base.tokenizer()
    except UserError as error:
        progress.note(f"{error}; its tokens are taken to be the expert's")
        return
    if ours is None or same_files(ours, tokenizer):
        return
    theirs = tokenizer.get_vocab()
    differ = [at for at in ours.get_vocab().items() if theirs.get(*at) != at[1]]
    for token, number in sorted(differ):
        other = theirs[token]
        if max(number, other) < pair.vocabulary:
            raise UserError(
                f"token {token!r:.40} is number {number} in the base '{pair.base.name}', but "
                f"{other} in the expert '{pair.expert.name}': their embeddings have other rows; "
                "give both one order of tokens first, as docs/faq.md shows"
            )


def auto_batch_size(samples: Sequence[Sample], vocabulary: int, device: str) -> int:
    """Sequences a forward: bounded by tokens, and by the logits of the response positions."""
    longest = max(len(s.input_ids) for s in samples)
    response = max(1, *(len(s.response_ids) for s in samples), 1)
    tokens = 2048 if device == "cpu" else 16384
    logits = 2**26 if device == "cpu" else 2**29
    return max(1, min(tokens // longest, logits // (response * vocabulary)))


@dataclass(frozen=True)
class Footprint:
    """Memory that sequences take in a forward pass with gradients, the hungriest of all passes.

    Attributes:
        per_token: bytes of activations of a token.
        per_response_token: bytes of its logits besides.
    """

    per_token: int
    per_response_token: int

    @classmethod
    def of(cls, pair: Pair, dtype: torch.dtype) -> Footprint:
        """Of a pair's model: what autograd keeps of every layer, and four copies of the logits."""
        shapes, config = pair.partition.shapes, pair.base.text_config
        size, dims = dtype.itemsize, pair.partition.dims
        kept = cls.per_layer(int(config.hidden_size), dims.n_neurons, size)
        logits = max(shape[0] for shape in shapes.values() if len(shape) == 2)
        return cls(dims.n_layers * kept, 16 * logits)

    @staticmethod
    def per_layer(hidden: int, neurons: int, width: int) -> int:
        """Bytes of a token that autograd keeps of one layer, so many a number."""
        return width * (12 * hidden + 4 * neurons)

    def of_sequences(self, samples: Sequence[Sample], count: int) -> int:
        """Bytes of activations of so many of the longest sequences."""
        longest = max(len(s.input_ids) for s in samples)
        response = max(len(s.response_ids) for s in samples)
        return count * (longest * self.per_token + response * self.per_response_token)

    def fits(self, samples: Sequence[Sample], free: int) -> int:
        """How many sequences fit into half of the free memory, at least one."""
        return max(1, free // 2 // self.of_sequences(samples, 1))
