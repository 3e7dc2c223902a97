"""The tables of README.md from the files of the benchmark, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from benchmarks.mechanism.paths import BEHAVIORS, RANKINGS, Study
from mergekit_wp.files import circuitfile
from mergekit_wp.files.manifest import SetPoint
from mergekit_wp.files.scorefile import ScoreFile, read
from mergekit_wp.mechanism.stability import compared
from mergekit_wp.report.mechanism import agreement_cells, agreement_label, circuit_sentences
from mergekit_wp.report.verification import area, curve
from mergekit_wp.report.weights_vs_activations import comparisons
from mergekit_wp.report.words import KIND_WORDS


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def everything(study: Study) -> str:
    """All tables."""
    file = read(study.scores)
    parts = [depths(file), both_sides(file), fidelity(file), sets(study), circuit(study, file)]
    parts += [anchors(study)] if study.builtin else []
    parts += [stability(study)]
    return "\n".join(line for part in parts for line in part)


def depths(file: ScoreFile) -> Iterator[str]:
    """Where the positive score lies."""
    yield "### Where the positive score lies\n"
    rows = []
    for estimand in file.manifest.estimands:
        for criterion in file.manifest.criteria:
            for kind in ("head", "neuron"):
                positive = file.scores(estimand, criterion, kind).clamp(min=0).double().numpy()
                layers = positive.sum(-1)
                third = np.arange(len(layers)) * 3 // len(layers)
                parts = [layers[third == i].sum() / layers.sum() for i in range(3)]
                ordered = np.sort(positive.ravel())[::-1].cumsum()
                half = int(np.searchsorted(ordered, ordered[-1] / 2)) + 1
                score = f"{estimand}/{criterion}"
                spread = f"{half:,} of {positive.size:,}"
                rows.append((score, KIND_WORDS[kind], *(f"{p:.0%}" for p in parts), spread))
    head = ("score", "kind", "early third", "middle third", "late third", "half of it sits in")
    yield from markdown(head, rows)


def fidelity(file: ScoreFile) -> Iterator[str]:
    """How scores to first order agree with exact swaps."""
    yield "### Fidelity\n"
    rows = [
        (key, found.method, f"{found.pearson:.3f}", f"{found.largest_missed:.4f}")
        for key, found in file.manifest.fidelity.items()
        if found.pearson is not None and found.largest_missed is not None
    ]
    yield from markdown(("score", "how", "Pearson with exact swaps", "largest missed"), rows)


def both_sides(file: ScoreFile) -> Iterator[str]:
    """Weights against activations."""
    yield "### Weights against activations\n"
    rows = [
        (
            f"{found.weights}/{found.criterion}",
            KIND_WORDS[row.kind],
            row.depth,
            f"{row.n:,}",
            "–" if row.spearman is None else f"{row.spearman:.2f}",
            "–" if row.overlap is None else f"{row.overlap:.2f}",
            f"{row.weights_only:,}",
            f"{row.activations_only:,}",
        )
        for found in comparisons(file)
        for row in found.rows
        if row.kind != "kv_group"
    ]
    head = ("score", "kind", "depth", "n", "rank corr.", "overlap", "weights only", "act. only")
    yield from markdown(head, rows)


def _point(point: SetPoint) -> str:
    return f"{point.value:.2f} [{point.low:.2f}, {point.high:.2f}]"


def sets(study: Study) -> Iterator[str]:
    """Sets of weights by every ranking."""
    yield "### Sets of weights chosen by different rankings, kl on held-out prompts\n"
    rows, behavior = [], []
    for estimand in RANKINGS:
        found = read(study.verified(estimand)).manifest.verification
        assert found is not None
        for direction in ("restoration", "knockout"):
            for measure, into in (("kl", rows), ("behavior", behavior)):
                for name in ("top", "random", "bottom"):
                    points = curve(found, direction, measure, name)
                    if points:
                        listed = [_point(p) for p in points]
                        into.append((estimand, direction, name, *listed, f"{area(points):.2f}"))
    head = ("ranked by", "", "set", "1%", "5%", "20%", "area")
    yield from markdown(head, rows)
    yield "Answers that keep to their instruction, 0 at the base and 1 at the expert:\n"
    yield from markdown(head, behavior)


def circuit(study: Study, file: ScoreFile) -> Iterator[str]:
    """Nodes with roles, and the strongest edges."""
    trace = circuitfile.read(study.trace, file)
    yield "### Circuit\n"
    yield from (f"- {sentence}" for sentence in circuit_sentences(trace))
    yield ""
    arriving = {n.name: {e.source for e in trace.strong if e.target == n.name} for n in trace.nodes}
    rows = [
        (
            node.name,
            node.role or "–",
            *(f"{m.value:+.3f} ± {m.se:.3f}" for m in (node.gain, node.activation, node.direct)),
            str(len(arriving[node.name])) if node.target else "–",
            "–" if node.accounted is None else f"{node.accounted:.2f}",
            "–" if node.suppliers_for_half is None else f"{node.suppliers_for_half:,}",
        )
        for node in sorted(trace.nodes, key=lambda n: -n.activation.value)
    ]
    head = ("component", "role", "gain", "activation", "direct", "suppliers", "accounted", "half")
    yield from markdown(head, rows)
    strongest = [
        (e.source, e.target, e.via, f"{e.supply.value:+.4f} ± {e.supply.se:.4f}")
        for e in trace.strong[:12]
    ]
    yield from markdown(("from", "to", "by", "supply"), strongest)


def anchors(study: Study) -> Iterator[str]:
    """The layer that separates best of those that are usable, behaviour by behaviour."""
    yield "### Anchors\n"
    rows = []
    for name in BEHAVIORS:
        found = json.loads((study.work / f"anchor-{name}.json").read_text())
        layers, chosen = found["layers"], found["usable_layer"]
        usable = sum(layer["usable"] for layer in layers)
        steering = max(layers, key=lambda x: x["steering"]["value"])
        row = [name, f"{usable} of {len(layers)}"]
        if chosen is None:
            row += ["none", "–", "–", "–"]
        else:
            at = layers[chosen]
            row += [str(chosen), f"{at['separation']:.1f}", f"{at['stability']['value']:.2f}"]
            row.append(_estimate(at["steering"]))
        row.append(f"{_estimate(steering['steering'])} (layer {steering['layer']})")
        rows.append(row)
    head = ("behaviour", "usable", "layer", "separation", "stability", "steering", "best steering")
    yield from markdown(head, rows)


def _estimate(found: dict[str, float]) -> str:
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def stability(study: Study) -> Iterator[str]:
    """Rankings across halves, prompts, behaviours and training seeds."""
    yield "### Stability of the rankings\n"
    file = read(study.verified("share"))
    rows = [
        (
            agreement_label(a).split(", ")[0],
            f"{a.estimand}/{a.criterion}",
            KIND_WORDS[a.kind],
            *agreement_cells(a),
        )
        for a in file.manifest.stability
        if a.kind in ("head", "neuron")
    ]
    yield from markdown(("against", "score", "kind", "rank correlation", "overlap"), rows)
    if not study.builtin:
        return
    yield "Behaviours with each other, share/kl:\n"
    files = {name: read(study.shares(name)) for name in BEHAVIORS}
    pairs = []
    for i, one in enumerate(BEHAVIORS):
        for two in BEHAVIORS[i + 1 :]:
            found = {a.kind: a for a in compared(files[one], files[two], study.work / two, 0)}
            shown = (agreement_cells(found[kind]) for kind in ("head", "neuron"))
            pairs.append((one, two, *(cell for kind in shown for cell in kind)))
    head = ("", "", "heads", "overlap", "neurons", "overlap")
    yield from markdown(head, pairs)
