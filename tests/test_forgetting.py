"""What a merge forgets: plain text and tasks that nothing is chosen by."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from mergekit_wp.comparison.page import html_page
from mergekit_wp.comparison.resampling import Resampled
from mergekit_wp.comparison.rows import Comparison, Row, Trial
from mergekit_wp.comparison.table import markdown_table, records, summary, terminal_table
from mergekit_wp.costs.comparison import _answering
from mergekit_wp.costs.model_size import ModelSize
from mergekit_wp.errors import UserError
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.tasks import plain_text
from mergekit_wp.tasks.plain_text import PlainText
from mergekit_wp.tasks.task import ItemScore
from mergekit_wp.terms import Split
from tests.comparing import NORM, Distance, make_plan, planted, run
from tests.merging import Family, llama_config
from tests.models import save_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    made = Family.make(tmp_path_factory.mktemp("kept"), llama_config(vocab_size=40))
    save_tokenizer(made.base.path)
    return made


def text_file(
    folder: Path, text: str = "one day a fox ran over the hill and far away\n" * 2
) -> Path:
    path = folder / "plain.txt"
    path.write_text(text)
    return path


def test_a_text_scores_what_transformers_says(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows one at a time with labels; the memory of one window is enough."""
    monkeypatch.setattr(plain_text, "WINDOW", 20)
    asked = TextInterface.read(family.base.path, "base")
    assert asked is not None
    model = AutoModelForCausalLM.from_pretrained(family.base.path, dtype=torch.float32)
    task = PlainText.read(text_file(tmp_path))
    ids = asked.tokenizer(task.text).input_ids
    total = count = 0.0
    for start in range(0, len(ids), 20):
        window = torch.tensor([ids[start : start + 20]])
        if (n := window.shape[1] - 1) > 0:
            total -= n * float(model(window, labels=window).loss.detach())
            count += n
    assert len(ids) > 60
    (found,) = task.evaluate(model, asked, "test")
    assert found.score == pytest.approx(total / count, rel=1e-5)
    (alone,) = task.evaluate(model, asked, "test", AtOnce(1, lambda _: None))
    assert alone.score == pytest.approx(found.score, rel=1e-5)
    assert (task.count("test"), task.count("valid")) == (1, 0)


def test_every_window_begins_as_the_text_does(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_text, "WINDOW", 20)
    model = AutoModelForCausalLM.from_pretrained(family.base.path, dtype=torch.float32)
    begin, body = 3, [5 + i % 20 for i in range(45)]

    class Tokenizer:
        bos_token_id = begin

        def __call__(self, _: str) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[begin, *body])

    total = 0.0
    for at in range(0, len(body), 19):
        window = torch.tensor([[begin, *body[at : at + 19]]])
        total -= (window.shape[1] - 1) * float(model(window, labels=window).loss.detach())
    task = PlainText.read(text_file(tmp_path))
    (found,) = task.evaluate(model, TextInterface(Tokenizer(), ()), "test")
    assert found.score == pytest.approx(total / len(body), rel=1e-5)


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_text_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="plain.txt is empty; expected running text"):
        PlainText.read(text_file(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("x.txt", "none.txt"):
        with pytest.raises(UserError, match=f"text file .*{name} cannot be read: "):
            PlainText.read(tmp_path / name)


def test_the_worst_loss_is_of_what_the_base_has() -> None:
    base = Row("base", "base", kept={"wiki": -2.0, "sums": 0.5, "nothing": 0.0})
    row = Row("ties", "peer", kept={"wiki": -2.0 - math.log(2), "sums": 0.4, "nothing": 0.0})
    assert row.losses(base) == {"wiki": pytest.approx(0.5), "sums": pytest.approx(0.2)}
    better = Row("sce", "peer", kept={"wiki": -1.0})
    assert better.losses(base)["wiki"] < 0


def test_what_is_kept_is_measured_on_test_rows_and_chooses_nothing(
    family: Family, tmp_path: Path
) -> None:
    task, other = (Distance(n, planted(family, w)) for n, w in (("near", 0.8), ("other", 0.0)))
    plan = make_plan(family, task, ("task_arithmetic", "ties"))
    text = PlainText.read(text_file(tmp_path))
    plan = replace(plan, keep=(other, text))
    plan.check()
    found = run(plan, tmp_path / "out")
    rows = {row.name: row for row in found.rows}
    assert rows["task_arithmetic"].setting == {"weight": 0.8}
    # each row of the table and TIES at equal perplexity, but no setting that lost
    assert set(other.asked) == {"test"} and len(other.asked) == 3 + 2 + 1
    assert found.equal["ties"].setting != rows["ties"].setting
    assert found.equal["task_arithmetic"].setting == {"weight": 0.8}
    assert set(rows["ties"].kept) == {"other", "plain"} and set(rows["ties"].scores) == {"near"}
    assert rows["base"].kept["other"] == pytest.approx(1, abs=1e-5)
    away = rows["task_arithmetic"].kept["other"]
    assert rows["task_arithmetic"].losses(rows["base"])["other"] == pytest.approx(1 - away)
    resampled = Resampled(found)
    assert "| worst loss | at equal perplexity | cost |" in markdown_table(resampled)
    assert " of other" in terminal_table(resampled) or " of plain" in terminal_table(resampled)
    assert {"other", "plain"} <= set(records(resampled)[0])
    assert run(plan, tmp_path / "out") == found
    nothing = replace(other, counts={"valid": 3, "test": 0})
    with pytest.raises(UserError, match="keep=other has no 'test' items"):
        replace(plan, keep=(nothing,)).check()
    with pytest.raises(UserError, match="two tasks are called 'near'"):
        replace(plan, keep=(task,)).check()


def test_without_what_to_keep_there_is_no_column() -> None:
    rows = (Row("base", "base", scores={"a": [[1.0, 0.0]]}),)
    resampled = Resampled(Comparison(rows, ("a",), False, "base"))
    assert "worst loss" not in markdown_table(resampled) + terminal_table(resampled)


@dataclass(frozen=True)
class Prose(PlainText):
    """A text that is the harder, the further one weight is from the base's."""

    goal: torch.Tensor = field(default_factory=lambda: torch.zeros(1))

    def evaluate(
        self, model: Any, asked: TextInterface, split: Split, at_once: AtOnce | None = None
    ) -> list[ItemScore]:
        assert split == "test", "a text has no validation items"
        return [ItemScore("text", -1 - self.away(model.model.norm.weight))]

    def away(self, weight: torch.Tensor) -> float:
        return 5 * float((weight - self.goal).abs().mean())


@pytest.mark.parametrize("easiest", [0.0, 0.2])
def test_at_equal_perplexity_the_best_setting_within_the_references_is_reported(
    family: Family, tmp_path: Path, easiest: float
) -> None:
    start = family.base.state[NORM]
    task = Distance("near", planted(family, 0.8))
    prose = Prose("prose", "1", "", planted(family, easiest))
    plan = make_plan(family, task, ("weight_patching", "task_arithmetic", "ram"), keep=(prose,))
    found = run(plan, tmp_path)
    rows, base = {row.name: row for row in found.rows}, found.rows[0]

    def ratio(weight: torch.Tensor) -> float:
        return math.exp(prose.away(weight) - prose.away(start))

    tuned = rows["task_arithmetic"]
    assert tuned.setting == {"weight": 0.8} and tuned.tried == len(tuned.trials) == 8
    for trial in tuned.trials:
        at = planted(family, float(trial.setting["weight"]))
        assert trial.perplexity == pytest.approx(ratio(at), rel=1e-4)
    bound = max(1.0, rows["weight_patching"].perplexity(base) or 0)
    assert found.bound == bound
    fit = [t for t in tuned.trials if (t.perplexity or 0) <= bound]
    assert 0 < len(fit) < 8, "the bound leaves out some, the one of 0.8 among them"
    best, equal = max(fit, key=lambda t: t.value), found.equal["task_arithmetic"]
    assert equal.setting == best.setting and equal.setting != {"weight": 0.8}
    away = float((planted(family, float(best.setting["weight"])) - task.goal).abs().mean())
    assert equal.scores["near"][0][0] == pytest.approx(1 / (1 + away), rel=1e-5)
    assert found.equal["weight_patching"].scores == rows["weight_patching"].scores
    text = terminal_table(Resampled(found, 500))
    assert f"no more than {bound:.2f} times the base's perplexity" in text.replace("\n", " ")
    page = html_page(Resampled(found, 500), "merges")
    assert page.count("<svg") == 3 and "Every setting that was tried" in page
    count = len(task.asked)
    again = run(plan, tmp_path)
    assert again == found and len(task.asked) == count, "nothing is measured twice"


def test_a_method_without_parameters_at_equal_perplexity_says_how_near_they_come() -> None:
    rows = tuple(
        Row(name, role, scores={"t": [[1.0, 0.0, 1.0, 1.0]]}, valid=0.7, kept={"prose": -score})
        for name, role, score in (("base", "base", 1.0), ("ours", "ours", 1.0), ("ties", "peer", 2))
    )
    tried = tuple(Trial({"lambda": x}, 0.7, 1 + x) for x in (0.5, 0.25))
    rows = (*rows[:2], replace(rows[2], trials=tried))
    equal = {"ours": replace(rows[1], name="ours (at equal perplexity)")}
    made = Resampled(Comparison(rows, ("t",), False, "ours", 1.0, equal), 500)
    lines = terminal_table(made).splitlines()
    assert lines[-1].startswith("ties") and lines[-1].endswith(" none tried (lowest 1.25)")
    assert lines[-2].startswith("ours") and re.search(r"0\.75 \[0\.\d\d, [01]\.\d\d\]$", lines[-2])
    assert "| at equal perplexity |" in markdown_table(made)
    told = {row["name"]: row["equal"] for row in summary(made)["rows"]}
    assert told["ties"] is None and told["ours"]["value"] == 0.75


def test_text_is_read_by_window_and_what_that_takes_is_estimated() -> None:
    """Eight windows in float32 over a vocabulary of 262,000 are gigabytes; one is not."""
    n, vocabulary, longest = 8, 300, 64
    logits = torch.randn((n, longest, vocabulary), generator=torch.Generator().manual_seed(0))
    windows = [[(7 * i + j) % vocabulary for j in range(longest - i)] for i in range(n)]
    half = logits.bfloat16()
    most = 0

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, _types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal most
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                most = max(most, out.untyped_storage().nbytes())
            return out

    class Model:
        device = "cpu"

        def __call__(self, **_: Any) -> Any:
            return SimpleNamespace(logits=half)

    with Watching():
        found, read = plain_text._log_probability(Model(), windows, n)
    want = -sum(
        float(cross_entropy(own[: len(w) - 1], torch.tensor(w[1:]), reduction="sum"))
        for own, w in zip(half.double(), windows, strict=True)
    )
    assert read == n and found == pytest.approx(want, rel=1e-5)
    assert most <= longest * vocabulary * 4, "one window's in float32 at a time"

    plan: Any = SimpleNamespace(device="cpu", tasks=(), keep=(PlainText("x", "1", "text"),))
    size = ModelSize(2, 8, 8, 64.0, 64.0, 128.0, 8, 8, 262_144, 10**6, True)
    assert _answering(size, 2, plan) == (8 * 2 + 2 * 4) * 256 * 262_144
    plan.keep = ()
    assert _answering(size, 2, plan) < 256 * 262_144
