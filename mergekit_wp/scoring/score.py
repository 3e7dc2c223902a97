"""The whole way: two checkpoints and a prompt file in, a score file out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

import mergekit_wp
from mergekit_wp.checkpoints import Checkpoint, Pair, ResidentModel, open_pair
from mergekit_wp.errors import UserError
from mergekit_wp.prompts import (
    Prompt,
    PromptFile,
    Sample,
    encode_prompt,
    encode_response,
    read_prompts,
)
from mergekit_wp.scorefile import CriterionName, ScoreFile, read, write
from mergekit_wp.scoring.anchor import MIN_HELD_OUT
from mergekit_wp.scoring.assemble import make_manifest, score_tensors
from mergekit_wp.scoring.blocks import SweepContext
from mergekit_wp.scoring.journal import Journal
from mergekit_wp.scoring.references import (
    References,
    contrast_batches,
    greedy_responses,
    measure_references,
)
from mergekit_wp.scoring.request import DTYPES, Progress, ScoreRequest
from mergekit_wp.scoring.run import SweepRun


def score(request: ScoreRequest, progress: Progress) -> ScoreFile:
    """Run the sweeps and write the score file.

    Raises:
        UserError: any mistake in the inputs, before anything is written.
    """
    prompt_file = read_prompts(request.prompts, request.max_prompts)
    criteria = choose_criteria(request.criteria, prompt_file.prompts)
    _check_request(request, criteria, prompt_file.prompts, progress)
    pair = _open(request, progress)
    tokenizer = _tokenizer(pair, progress)
    texts = _encode(tokenizer, prompt_file.prompts, request.prompts)
    vocabulary = pair.partition.shapes["model.embed_tokens.weight"][0]
    texts.check_vocabulary(vocabulary)
    progress.stage("hashing weights", 1, "pair")
    inputs = _inputs(request, pair, prompt_file, criteria, texts)
    progress.advance(1)
    with Journal(request.out, inputs, request.restart) as journal:
        if journal.resumed:
            progress.note(f"continuing the run in {journal.folder}")
        resident = ResidentModel(pair, DTYPES[request.dtype], request.device)
        samples = [Sample(tuple(ids)) for ids in texts.prompts]
        if any(c != "anchor" for c in criteria):
            samples = _with_responses(request, texts, tokenizer, resident, journal, progress)
        batch_size = request.batch_size or _auto_batch_size(samples, vocabulary, request.device)
        contrasts: tuple[list[int], list[Any]] = ([], [])
        if "anchor" in criteria:
            contrasts = contrast_batches(texts.contrasts, batch_size, request.device)
        progress.stage("base and expert on the prompts", 1, "pair")
        references = measure_references(
            resident, samples, contrasts, criteria, request.anchor_layer, batch_size
        )
        progress.advance(1)
        _warn_of_wrong_sign(references, progress)
        context = SweepContext(resident, references, criteria, batch_size)
        run = SweepRun(request, context, journal, progress)
        run.all()
        result = ScoreFile(
            make_manifest(request, pair, prompt_file, criteria, references, run, journal.created),
            score_tensors(run, pair, references),
        )
        write(result, request.out)
        journal.discard()
    return result


def choose_criteria(
    asked: tuple[CriterionName, ...] | None, prompts: Sequence[Prompt]
) -> tuple[CriterionName, ...]:
    """The criteria to use: ``kl``, and ``anchor`` too when contrasts are given (two or more).

    Raises:
        UserError: the anchor is asked for and contrasts are given but none can be used.
    """
    given = any(p.contrast is not None for p in prompts)
    usable = sum(p.usable_contrast for p in prompts)
    default: tuple[CriterionName, ...] = ("kl", "anchor") if usable >= MIN_HELD_OUT else ("kl",)
    if (asked is None or "anchor" in asked) and given and not usable:
        raise UserError(
            "no usable contrast: every 'contrast' is empty or equal to its prompt; give the same "
            "request without the instruction, or leave 'contrast' out for the base-to-expert anchor"
        )
    return asked or default


def _open(request: ScoreRequest, progress: Progress) -> Pair:
    def compared(done: int, total: int) -> None:
        if done == 1:
            progress.stage("comparing checkpoints", total, "tensor")
        progress.advance(1)

    return open_pair(request.base, request.expert, compared)


def _check_request(
    request: ScoreRequest,
    criteria: Sequence[str],
    prompts: Sequence[Prompt],
    progress: Progress,
) -> None:
    """Refuse what would fail or surprise after hours of work."""
    if request.anchor_layer is not None and "anchor" not in criteria:
        raise UserError(
            "--anchor-layer is set, but the anchor is not scored: add --criterion anchor"
        )
    if request.criteria is None and sum(p.usable_contrast for p in prompts) == 1:
        progress.note("only one prompt has a contrast, too few for an anchor; scoring kl alone")
    try:
        exists = request.out.is_file()
    except OSError as error:  # a name too long, say
        raise UserError(f"{request.out} cannot be written: {error.strerror}") from error
    if exists:
        try:
            read(request.out)
        except UserError as error:
            raise UserError(
                f"--out {request.out} exists and is no score file; choose another name"
            ) from error


@dataclass(frozen=True)
class Encoded:
    """Token ids of everything a prompt file holds; responses and contrasts by prompt index."""

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
            raise UserError(f"the tokenizer gives token {largest}; the models have {size} tokens")

    def sha256(self) -> str:
        """Hash of all token ids."""
        content = [self.prompts, sorted(self.responses.items()), sorted(self.contrasts.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _encode(tokenizer: Any, prompts: Sequence[Prompt], source: Path) -> Encoded:
    encoded = Encoded([], {}, {})
    for i, prompt in enumerate(prompts):
        encoded.prompts.append(encode_prompt(tokenizer, prompt.prompt))
        if prompt.response is not None:
            encoded.responses[i] = encode_response(tokenizer, prompt.response)
        if prompt.usable_contrast:
            assert prompt.contrast is not None
            encoded.contrasts[i] = encode_prompt(tokenizer, prompt.contrast)
    if any(not ids for ids in encoded.responses.values()):
        raise UserError(
            f"prompt file {source}: a response has no tokens, and the tokenizer has no "
            "end-of-sequence token"
        )
    return encoded


def _tokenizer(pair: Pair, progress: Progress) -> Any:
    """The expert's tokenizer, whose behaviour the prompts elicit; else, said aloud, the base's."""
    tokenizer = pair.expert.tokenizer()
    if tokenizer is None:
        tokenizer = pair.base.tokenizer()
        if tokenizer is not None:
            progress.note(f"'{pair.expert.name}' has no tokenizer; using that of the base")
    if tokenizer is None:
        raise UserError(
            f"neither '{pair.expert.name}' nor '{pair.base.name}' has a tokenizer; copy "
            "tokenizer.json and tokenizer_config.json into the expert's folder"
        )
    return tokenizer


def _inputs(
    request: ScoreRequest,
    pair: Pair,
    prompts: PromptFile,
    criteria: Sequence[str],
    texts: Encoded,
) -> dict[str, Any]:
    """All that the results depend on, by the names a user knows."""
    options = request.model_dump(mode="json", exclude={"out", "restart", "prompts", "criteria"})
    return {
        **options,
        "criterion": list(criteria),
        "prompts": prompts.sha256,
        "tokens": texts.sha256(),
        "base weights": pair.base.weights_sha256(),
        "expert weights": pair.expert.weights_sha256(),
        "base config": pair.base.config_hash,
        "expert config": pair.expert.config_hash,
        "mergekit-wp": mergekit_wp.__version__,
    }


def _with_responses(
    request: ScoreRequest,
    texts: Encoded,
    tokenizer: Any,
    resident: ResidentModel,
    journal: Journal,
    progress: Progress,
) -> list[Sample]:
    """Prompts with their responses: the given ones, else the expert's greedy continuations."""
    prompts, responses = texts.prompts, dict(texts.responses)
    missing = [i for i in range(len(prompts)) if i not in responses]
    size = request.batch_size or 32
    chunks = [missing[start : start + size] for start in range(0, len(missing), size)]
    if chunks:
        progress.stage("expert answers", len(missing), "prompt")
    for number, chunk in enumerate(chunks):
        key = f"responses.batch{number:04d}"
        saved = journal.load(key)
        if saved is None:
            resident.move_to(1.0)
            found = greedy_responses(
                resident,
                [prompts[i] for i in chunk],
                request.max_new_tokens,
                _end_tokens(resident.pair.expert, tokenizer),
            )
            saved = {str(i): torch.tensor(ids) for i, ids in zip(chunk, found, strict=True)}
            journal.save(key, saved)
        responses |= {int(i): ids.tolist() for i, ids in saved.items()}
        progress.advance(len(chunk))
    samples = [Sample(tuple(ids), tuple(responses[i])) for i, ids in enumerate(prompts)]
    return samples


def _end_tokens(expert: Checkpoint, tokenizer: Any) -> list[int]:
    """Tokens that end the expert's answers: the tokenizer's and the generation config's."""
    ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    try:
        config = GenerationConfig.from_pretrained(expert.path)
    except OSError:  # a checkpoint without one
        return sorted(ends)
    stated = config.eos_token_id
    ends.update([stated] if isinstance(stated, int) else stated or [])
    return sorted(ends)


def _auto_batch_size(samples: Sequence[Sample], vocabulary: int, device: str) -> int:
    """Sequences a forward: bounded by tokens, and by the logits of the response positions."""
    longest = max(len(s.input_ids) for s in samples)
    response = max(1, *(len(s.response_ids) for s in samples), 1)
    tokens = 2048 if device == "cpu" else 16384
    logits = 2**26 if device == "cpu" else 2**29
    return max(1, min(tokens // longest, logits // (response * vocabulary)))


def _warn_of_wrong_sign(references: References, progress: Progress) -> None:
    for name, reference in references.values.items():
        if float(reference.distance.mean()) < 0:
            progress.note(
                f"warning: criterion '{name}' is lower for the expert than for the base "
                f"({float(reference.expert.mean()):.3g} against {float(reference.base.mean()):.3g})"
                "; its scores say what lowers it"
            )
