"""The circuit that `trace` finds, held against the compiled one."""

from __future__ import annotations

import math
from pathlib import Path

import mergekit_wp as wp
from benchmarks.compiled.methods import scored
from benchmarks.compiled.pairs import Pair, State
from benchmarks.compiled.truth import Truth
from benchmarks.components import Component
from mergekit_wp.engine.paths import Place
from mergekit_wp.files.circuitfile import TraceFile
from mergekit_wp.files.scorefile import write
from mergekit_wp.terms import ROLES, Kind

TARGET_KINDS: tuple[Kind, ...] = ("head", "neuron")
#: targets of a pair, and suppliers of each that are measured exactly
TARGETS, SUPPLIERS = 8, 16


def traced(pair: Pair, folder: Path) -> TraceFile | None:
    """What `mergekit-wp trace` finds at its own rules.

    None where no component's activations bring anything alone, so that it has no target.
    """
    for who, state in pair.states.items():
        pair.save(folder / who, state)
    file = folder / "scores.safetensors"
    found = scored(pair, folder, ("gain", "activation_gain"), math.inf)
    if not any((found.scores("activation_gain", "kl", kind) > 0).any() for kind in TARGET_KINDS):
        return None
    write(found, file)
    return wp.trace(
        file,
        prompts=pair.prompts,
        targets=TARGETS,
        suppliers=SUPPLIERS,
        dtype="float64",
        progress=False,
    )


def places_written(state: State, component: Component, width: int) -> set[int]:
    """Dimensions of the residual stream that a head or neuron writes."""
    part = "mlp.down_proj" if component.kind == "neuron" else "self_attn.o_proj"
    weight = state[f"model.layers.{component.layer}.{part}.weight"]
    size = 1 if component.kind == "neuron" else width
    cut = weight[:, component.index * size : (component.index + 1) * size]
    return set(cut.any(1).nonzero().flatten().tolist())


def places_read(state: State, component: Component, width: int) -> set[int]:
    """Dimensions that a neuron or a head with its keys and values reads."""
    prefix = f"model.layers.{component.layer}"
    if component.kind == "neuron":
        return set(
            state[f"{prefix}.mlp.up_proj.weight"][component.index].nonzero().flatten().tolist()
        )
    rows = slice(component.index * width, (component.index + 1) * width)
    found: set[int] = set()
    for x in "qkv":
        weight = state[f"{prefix}.self_attn.{x}_proj.weight"][rows]
        found |= set(weight.any(0).nonzero().flatten().tolist())
    return found


def compiled_edges(pair: Pair, truth: Truth) -> set[tuple[str, str]]:
    """Heads and neurons of which a later one reads what they write differently in the expert."""
    width = pair.config.head_dim
    moving = truth.active | truth.passing
    nodes = [c for c in truth.live if c.kind != "kv_group"]
    states = list(pair.states.values())

    def every(of: object, component: Component) -> set[int]:
        return set().union(*(of(state, component, width) for state in states))  # type: ignore[operator]

    written = {c.name: every(places_written, c) for c in nodes if c.name in moving}
    read = {c.name: every(places_read, c) for c in nodes if c.name in moving}
    return {
        (source.name, target.name)
        for source in nodes
        for target in nodes
        if source.name in written
        and target.name in read
        and Place(target.layer, target.kind, 0).reads(
            Place(source.layer, source.kind, 0), parallel=False
        )
        and written[source.name] & read[target.name]
    }


def compiled_roles(pair: Pair, truth: Truth) -> dict[str, str]:
    """Carriers have changed weights; of the others that pass the change on, executors write the
    output and routers do not."""
    width = pair.config.head_dim
    read_out = set(pair.states["base"]["lm_head.weight"].any(0).nonzero().flatten().tolist())
    roles = {}
    for component in truth.live:
        if component.kind == "kv_group":
            continue
        if component.name in truth.active:
            roles[component.name] = "carrier"
        elif component.name in truth.passing:
            out = places_written(pair.states["base"], component, width)
            roles[component.name] = "executor" if out & read_out else "router"
    return roles


def judged(pair: Pair, truth: Truth, circuit: TraceFile) -> dict[str, object]:
    """Edges by activations among traced targets, and roles, both found and compiled."""
    edges, roles = compiled_edges(pair, truth), compiled_roles(pair, truth)
    targets = {node.name for node in circuit.nodes if node.target}
    found = {(e.source, e.target) for e in circuit.strong if e.via == "activations"}
    wanted = {(source, target) for source, target in edges if target in targets}
    named = {n.name: n.role for n in circuit.nodes if n.kind != "kv_group" and n.role in ROLES}
    return {
        "found": len(found),
        "wanted": len(wanted),
        "both": len(found & wanted),
        "roles": [(roles.get(name, "none"), role) for name, role in named.items()],
    }
