"""Tasks of EleutherAI's lm-evaluation-harness (the extra ``[eval]``), one score per document."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from mergekit_wp.architectures.computation import RopeBorders
from mergekit_wp.errors import UserError
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.prompts.harness import load_task
from mergekit_wp.tasks.task import ItemScore
from mergekit_wp.terms import Split

#: IFEval's first metric in the harness is its strict prompt-level accuracy, as is usual
_OUTPUT = 2_000
#: tokens that the harness lets a model write where a task states nothing
_HARNESS_TOKENS = 256


@dataclass(frozen=True)
class LmEvalTask:
    """One task of the harness, scored by its first metric.

    Validation documents are the task's validation split, test documents its test split; a task
    that lacks one has no items there.
    """

    name: str
    fingerprint: str
    task: Any
    metric: str
    batch_size: int | None

    @classmethod
    def load(cls, spec: str, batch_size: int | None = None) -> LmEvalTask:
        """Load a task by name, or from its YAML file.

        Raises:
            UserError: lm-eval is not installed; no such task (names close ones); a group; a task
                whose first metric is better when lower; its data cannot be had.
        """
        name, task = load_task(spec)
        metric = _metric(task, name)
        config = json.dumps(task.dump_config(), sort_keys=True, default=str)
        digest = hashlib.sha256(config.encode()).hexdigest()
        return cls(name, digest, task, metric, batch_size)

    def _docs(self, split: Split) -> Any:
        has = self.task.has_test_docs() if split == "test" else self.task.has_validation_docs()
        if not has:
            return ()
        return self.task.test_docs() if split == "test" else self.task.validation_docs()

    def count(self, split: Split) -> int:
        """Documents of a split."""
        return len(self._docs(split))

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
        stated = (self.task.config.generation_kwargs or {}).get("max_gen_toks", _HARNESS_TOKENS)
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
        return [
            ItemScore(str(s["doc_id"]), float(s[self.metric]), str(s["filtered_resps"])[:_OUTPUT])
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
    return str(listed[0]["metric"])
