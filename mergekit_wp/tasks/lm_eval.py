"""Tasks of EleutherAI's lm-evaluation-harness (the extra ``[eval]``), one score per document."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from mergekit_wp.architectures.computation import RopeBorders
from mergekit_wp.errors import UserError
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.prompts.harness import load_task
from mergekit_wp.prompts.location import HARNESS, Location
from mergekit_wp.tasks.task import ItemScore
from mergekit_wp.terms import Split

#: IFEval's first metric in the harness is its strict prompt-level accuracy, as is usual
_OUTPUT = 2_000
#: tokens that the harness lets a model write where a task states nothing
HARNESS_TOKENS = 256
#: by this variable a user says that code which models write may be run; Hugging Face's own
_MAY_RUN_CODE = "HF_ALLOW_CODE_EVAL"


@dataclass(frozen=True)
class LmEvalTask:
    """One task of the harness, scored by its first metric.

    Validation documents are the task's validation split, test documents its test split; a task
    that lacks one has no items there. Of a source that names a split of the dataset both are that
    one: then a caller asks for one of the two only.
    """

    name: str
    fingerprint: str
    task: Any
    metric: str
    batch_size: int | None
    source: Location

    @classmethod
    def load(cls, spec: str, batch_size: int | None = None) -> LmEvalTask:
        """Load a task by name, or from its YAML file.

        Args:
            spec: with ``?split=NAME`` documents of another split of the task's dataset, with
                ``sample=N&seed=N`` so many of them.
            batch_size: sequences at once; None for a few.

        Raises:
            UserError: lm-eval is not installed; no such task (names close ones); a group; a task
                whose first metric is better when lower; one that runs what a model writes, where
                nobody has allowed it; its data cannot be had.
        """
        source = Location.parse(spec if spec.startswith(HARNESS) else HARNESS + spec)
        name, task = load_task(source.place.removeprefix(HARNESS))
        metric = _metric(task, name)
        if getattr(task, "UNSAFE_CODE", False) and not _may_run_code():
            raise UserError(
                f"lm-eval task '{name}' runs code that models write; where that is safe, set the "
                f"environment variable {_MAY_RUN_CODE}=1"
            )
        if source.split is not None:
            splits = task.dataset or {}
            if source.split not in splits:
                raise UserError(
                    f"lm-eval task '{name}' has no documents '{source.split}'; its dataset has "
                    f"{', '.join(splits)}"
                )
            task._config.test_split = task._config.validation_split = source.split
        config = json.dumps(task.dump_config(), sort_keys=True, default=str)
        asked = (source.sample, source.seed) if source.sample else ()
        digest = hashlib.sha256(f"{config}{asked or ''}".encode()).hexdigest()
        return cls(name, digest, task, metric, batch_size, source)

    def _docs(self, split: Split) -> Any:
        has = self.task.has_test_docs() if split == "test" else self.task.has_validation_docs()
        if not has:
            return ()
        return self.task.test_docs() if split == "test" else self.task.validation_docs()

    def _chosen(self, split: Split) -> list[int]:
        """Numbers of the documents that are asked."""
        return self.source.drawn(len(self._docs(split)))

    def count(self, split: Split) -> int:
        """Documents of a split."""
        return len(self._chosen(split))

    def question(self, item: str) -> str:
        """A test document as the task words it."""
        return str(self.task.doc_to_text(self._docs("test")[int(item)]))

    def too_long(self, model: Any, _tokenizer: Any) -> None:
        """Refuse answers for which the context has no room; the harness only asserts there is.

        It cuts prompts itself, from the left.

        Raises:
            UserError: an answer may be as long as the context.
        """
        if self.task.OUTPUT_TYPE != "generate_until":
            return
        stated = (self.task.config.generation_kwargs or {}).get("max_gen_toks", HARNESS_TOKENS)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and stated >= context:
            raise UserError(
                f"lm-eval task '{self.name}' lets a model write {stated} tokens, but the model's "
                f"context has {context}; set 'max_gen_toks' in the task's generation_kwargs, in "
                "a YAML file of your own"
            )

    def evaluate(
        self,
        model: Any,
        asked: TextInterface,
        split: Split,
        at_once: AtOnce | None = None,
    ) -> list[ItemScore]:
        """Every document's first metric, by the harness's own evaluation.

        The chat template is applied where the tokenizer has one.

        Raises:
            UserError: the task's answers are longer than the model's context.
            OutOfMemory: there is not even memory for one sequence.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
        from transformers import GenerationConfig

        tokenizer = asked.tokenizer
        # the harness stops at the tokenizer's own end token, and where transformers does
        model.generation_config = GenerationConfig(eos_token_id=list(asked.ends))
        task = copy.copy(self.task)
        task._config = copy.copy(self.task._config)
        if split == "valid":
            # the harness evaluates test documents where there are any
            task._config.test_split = None
        self.too_long(model, tokenizer)

        def run(together: int) -> Any:
            return evaluate(
                lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=together),
                task_dict={"tasks": {self.name: task}, "groups": {}, "group_map": {}},
                bootstrap_iters=0,
                samples={self.name: self._chosen(split)} if self.source.sample else None,
                confirm_run_unsafe_code=_may_run_code(),
                log_samples=True,
                apply_chat_template=bool(tokenizer.chat_template),
            )

        # the harness pads whatever it batches
        size = 1 if RopeBorders.of(model.config) else self.batch_size or 8
        results = at_once.run(run, size) if at_once else run(size)
        assert results is not None
        samples = results["samples"][self.name]
        first = samples[0]["filter"]
        rows = sorted((s for s in samples if s["filter"] == first), key=lambda s: s["doc_id"])
        # a metric may be a function that names its results itself
        metric = self.metric if self.metric in rows[0] else rows[0]["metrics"][0]
        return [
            ItemScore(str(s["doc_id"]), float(s[metric]), str(s["filtered_resps"])[:_OUTPUT])
            for s in rows
        ]


def _metric(task: Any, name: str) -> str:
    listed = task.config.metric_list or []
    if not listed:
        raise UserError(f"lm-eval task '{name}' states no metric in its metric_list")
    if listed[0].get("higher_is_better") is False:
        raise UserError(
            f"lm-eval task '{name}': its first metric, {listed[0]['metric']}, is better when "
            "lower; give a task whose first metric is a score"
        )
    metric = listed[0]["metric"]
    return str(getattr(metric, "__name__", metric))


def _may_run_code() -> bool:
    return os.environ.get(_MAY_RUN_CODE) == "1"
