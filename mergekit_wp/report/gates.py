"""What a gates file says: how the objective went, and what each expert's gates became."""

from __future__ import annotations

import json
from collections.abc import Iterator

from mergekit_wp.files.gatesfile import GatesFile, as_scores
from mergekit_wp.report import words
from mergekit_wp.report.ranking import Selection, leaders, rank, select
from mergekit_wp.report.table import ScoreFormat
from mergekit_wp.terms import SLICED_KINDS

#: a gate counts as closed below, as open above
CLOSED, OPEN = 0.05, 0.95


def facts(file: GatesFile) -> list[tuple[str, str]]:
    """What was fitted, on what, and where it came: (label, text)."""
    manifest = file.manifest
    found = [("base", words.clean(manifest.base.reference))]
    for expert in manifest.experts:
        name, behavior = words.clean(expert.model.reference), words.clean(expert.behavior)
        found.append(("expert", f"{name}: {behavior}, {words.count(expert.n_prompts, 'prompt')}"))
    for guard in manifest.guards:
        prompts = words.count(guard.n_prompts, "prompt")
        found.append(("guard", f"{words.clean(guard.behavior)}, {prompts}"))
    if manifest.guards:
        found.append(
            ("weight", f"all experts together 1, all guards together {manifest.guard_weight:g}")
        )
    found.append(
        (
            "fitted",
            f"from {words.clean(manifest.start)}, {manifest.prompts_a_step} prompts of each a "
            f"step, rate {manifest.rate:g}, penalty {manifest.penalty:g}, gates up to "
            f"{manifest.upper:g}, seed {manifest.seed}, {words.clean(manifest.created)}",
        )
    )
    held_out = any(moment.held_out for moment in manifest.history)
    which = "held-out prompts" if held_out else "fitted prompts"
    for step in dict.fromkeys((0, manifest.best_step)):
        moment = next(m for m in manifest.history if m.step == step)
        values = (moment.held_out or moment.fitted) if held_out else moment.fitted
        told = ", ".join(f"{words.clean(k)} {v:.2f}" for k, v in (values or {}).items())
        found.append(("objective", f"after {step} steps, recovered on {which}: {told}"))
    return found


def portrait(file: GatesFile, expert: int) -> list[str]:
    """How one expert's gates are spread, kind by kind."""
    said = []
    for kind, gates in file.gates(expert).items():
        n = gates.numel()
        closed, opened = int((gates < CLOSED).sum()), int((gates > OPEN).sum())
        kinds = "other tensors" if kind == "tensor" else words.KIND_WORDS[kind]
        said.append(
            f"{kinds}: mean gate {float(gates.double().mean()):.2f}; {words.percent(closed / n)} "
            f"closed (under {CLOSED:g}), {words.percent(opened / n)} open (over {OPEN:g})"
        )
    return said


def render(file: GatesFile, top: int) -> Iterator[str]:
    """Lines of text for the terminal."""
    yield f"gates of {words.count(len(file.manifest.experts), 'expert')}"
    for label, text in facts(file):
        yield f"  {label:<12}{text}"
    for e, expert in enumerate(file.manifest.experts):
        yield ""
        yield words.clean(expert.model.reference)
        yield from (f"  {said}" for said in portrait(file, e))
        scores = as_scores(file, e)
        [listed, *_] = leaders(scores, "path", "kl", select(scores).kinds, top)
        form = ScoreFormat([row.score for row in listed.rows])
        yield f"  highest: {', '.join(f'{r.name} {form(r.score)}' for r in listed.rows)}"


def to_json(file: GatesFile) -> Iterator[str]:
    """One JSON object with ``manifest`` and ``gates``, piece by piece."""
    yield f'{{"manifest": {file.manifest.model_dump_json()}, "gates": ['
    first = True
    for e, expert in enumerate(file.manifest.experts):
        scores = as_scores(file, e)
        kinds = (*SLICED_KINDS, "tensor")
        for row in rank(scores, Selection(("path",), ("kl",), kinds), fine=True).rows():
            entry = {
                "expert": expert.model.reference,
                "kind": row.kind,
                "layer": row.layer,
                "index": row.index,
                "name": row.name,
                "gate": row.score,
            }
            yield ("\n" if first else ",\n") + json.dumps(entry)
            first = False
    yield "\n]}\n"
