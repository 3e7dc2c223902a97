"""Files that strangers wrote: each is read as what it says, or refused by one clear line."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.cli import cli
from mergekit_wp.errors import UserError
from mergekit_wp.files import circuitfile, scorefile
from mergekit_wp.files.circuitfile import Edge, Measured, Node, Rules, TraceFile
from mergekit_wp.files.manifest import Agreement, Fidelity, Manifest, SetPoint, Verification
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.merging import expert_scores, recipe
from mergekit_wp.prompts import read_prompts
from tests.factory import make_fit, make_score_file
from tests.mutation import (
    mutated_bytes,
    mutated_tree,
    safetensors_bytes,
    with_repeated_key,
)

ensure_registered()
QUICK, SLOW = 60, 2000  # of each of five kinds of file: 300 and 10,000
FRESH = settings(
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def refusal(error: UserError) -> str:
    """What a refusal says: one line that an editor shows whole."""
    message = str(error)
    assert message and "\n" not in message, message
    assert len(message) < 3000, len(message)
    return message


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutated path may become a Hub reference; no test waits for the network."""

    def refuse(*_: object, **__: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)


# --- the files ------------------------------------------------------------------------------


def full_score_file() -> ScoreFile:
    """One with everything that a manifest can hold."""
    file = make_score_file(
        criteria=("kl", "anchor"), estimands=("share", "gain", "activation_gain")
    )
    verification = Verification(
        estimand="share",
        criterion="kl",
        prompts_sha256="0" * 64,
        n_prompts=3,
        n_items=0,
        draws=2,
        points=tuple(
            SetPoint(
                direction=direction, set=name, size=size, measure="kl", value=0.5, low=0.4, high=0.6
            )
            for direction in ("restoration", "knockout")
            for name in ("top", "bottom", "random")
            for size in (1, 5)
        ),
        seed=0,
        command=("verify", "--top", "1,5"),
        versions={"torch": "1"},
    )
    halves = Agreement(
        against="halves", name="", estimand="share", criterion="kl", kind="head", spearman=0.5,
        low=0.1, high=0.9, jaccard=0.3, top=1,
    )  # fmt: skip
    changed = {"verification": verification, "stability": (halves,)}
    return ScoreFile(file.manifest.model_copy(update=changed), file.tensors)


def trace_of(file: ScoreFile) -> TraceFile:
    def node(layer: int, target: bool) -> Node:
        some = Measured(value=0.4, se=0.01)
        return Node(
            kind="head", layer=layer, index=1, name=f"layer {layer} head 1", target=target,
            gain=some, activation=some, direct=Measured(value=0.1, se=None),
            suppliers_for_half=2, accounted=0.9, role="router" if target else "carrier",
        )  # fmt: skip

    return TraceFile(
        behavior="test",
        base="base",
        expert="expert",
        scores_sha256=file.digest(),
        prompts_sha256="0" * 64,
        n_prompts=4,
        n_layers=2,
        criterion="kl",
        rules=Rules(),
        screen=Fidelity(
            method="first-order", verified_top=1, verified_random=1, pearson=0.9, spearman=0.9
        ),
        nodes=(node(0, False), node(1, True)),
        edges=(
            Edge(
                source="layer 0 head 1", target="layer 1 head 1", via="weights",
                supply=Measured(value=0.2, se=0.01), screened=0.2, strong=True,
            ),
        ),
        seed=0,
        command=("trace", "scores.safetensors"),
        versions={"torch": "1"},
    )  # fmt: skip


PROMPTS = (
    '{"prompt": "Name a river.", "contrast": "River?", "response": "Elbe"}\n'
    '{"prompt": [{"role": "user", "content": "Hello"}], "note": {"deep": [1, 2.5, null]}}\n'
    '{"prompt": "日本"}\n'
)
RECIPE: dict[str, Any] = {
    "merge_method": "weight_patching",
    "base_model": "models/base",
    "models": [
        {"model": "models/a", "parameters": {"scores": "a.safetensors", "weight": 1.0}},
        {
            "model": "models/b",
            "parameters": {
                "scores": [{"filter": "mlp", "value": "a.safetensors"}, {"value": "b.safetensors"}],
                "density": [0.5, 1.0],
            },
        },
    ],
    "parameters": {"fusion": "share", "power": 0.5, "lambda": 1.0},
    "tokenizer": {"source": "union"},
    "dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound file of every kind."""
    folder = tmp_path_factory.mktemp("good")
    scores = full_score_file()
    for name in ("a", "b"):
        scorefile.write(scores, folder / f"{name}.safetensors")
    fit, company = make_fit("models/a", "models/b")
    fitted = make_score_file(estimands=("path",), company=company, fit=fit)
    scorefile.write(fitted, folder / "fitted.safetensors")
    circuitfile.write(trace_of(scores), folder / "trace.json")
    (folder / "prompts.jsonl").write_text(PROMPTS)
    (folder / "recipe.yml").write_text(yaml.safe_dump(RECIPE))
    return folder


def header_of(path: Path) -> tuple[dict[str, str], dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    return header.pop("__metadata__"), header, content[8 + length :]


def mutated_tensors(path: Path, key: str, rng: random.Random) -> bytes:
    """A score file with a changed manifest, header or byte."""
    if rng.random() < 0.25:
        return mutated_bytes(path.read_bytes(), rng)
    metadata, header, data = header_of(path)
    what = rng.random()
    if what < 0.7:
        tree = mutated_tree(json.loads(metadata[key]), rng)
        text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
        metadata[key] = with_repeated_key(text, rng) if rng.random() < 0.1 else text
    elif what < 0.8:
        metadata[key] = mutated_bytes(metadata[key].encode(), rng).decode("utf-8", "replace")
    else:
        header = mutated_tree(header, rng)
    try:
        return safetensors_bytes(metadata, header if isinstance(header, dict) else {}, data)
    except (TypeError, ValueError):  # a header that JSON cannot hold
        return b""


def mutated_json(text: str, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutated_bytes(text.encode(), rng)
    changed = json.dumps(mutated_tree(json.loads(text), rng), ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.1:
        changed = with_repeated_key(changed, rng)
    return changed.encode("utf-8", "surrogatepass")


def mutated_prompts(rng: random.Random) -> bytes:
    lines = PROMPTS.splitlines()
    at = rng.randrange(len(lines))
    content = mutated_json(lines[at], rng)
    encoded = [line.encode() for line in lines]
    encoded[at] = content
    return b"\n".join(encoded)


def mutated_recipe(rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutated_bytes(yaml.safe_dump(RECIPE).encode(), rng)
    tree = mutated_tree(RECIPE, rng)
    if rng.random() < 0.5:
        return json.dumps(tree).encode("utf-8", "surrogatepass")  # flow style, NaN and all
    return yaml.dump(tree, Dumper=yaml.SafeDumper).encode("utf-8", "surrogatepass")


# --- what is read must be what was written -----------------------------------------------------


def read_scores(path: Path) -> None:
    file = scorefile.read(path)
    copy = path.with_name("again.safetensors")
    scorefile.write(file, copy)
    again = scorefile.read(copy)
    assert again.manifest == file.manifest and again.digest() == file.digest()
    with safe_open(path, framework="pt") as handle:
        said = json.loads(handle.metadata()[scorefile.METADATA_KEY])
    assert again.manifest == Manifest.model_validate(said)
    shown = CliRunner().invoke(cli, ["inspect", str(path)])
    assert shown.exception is None, shown.exception
    assert "\x1b" not in shown.output


SCORES = full_score_file()


def read_trace(path: Path) -> None:
    trace = circuitfile.read(path, SCORES)
    copy = path.with_name("again.json")
    circuitfile.write(trace, copy)
    assert circuitfile.read(copy, SCORES) == trace
    from mergekit_wp.report import circuit_graph, mechanism

    mechanism.circuit_sentences(trace)
    mechanism.node_rows(trace)
    circuit_graph.positions(trace)


def read_prompt_lines(path: Path) -> None:
    found = read_prompts(path, None)
    copy = path.with_name("again.jsonl")
    copy.write_text("\n".join(json.dumps(p.model_dump()) for p in found.prompts))
    assert repr(read_prompts(copy, None).prompts) == repr(found.prompts)  # NaN is not itself


def read_recipe(path: Path) -> None:
    found = recipe.read(path)
    if found.source != path.read_text():  # names a folder, `~` say, as a model: it is written whole
        again = path.with_name("again.yml")
        again.write_text(found.source)
        assert recipe.read(again).source == found.source
        assert recipe.read(again).config == found.config
    said = yaml.safe_load(found.source)
    config = found.config
    assert (config.merge_method, config.dtype) == (said["merge_method"], said.get("dtype"))
    named = [entry["model"] for entry in said.get("models") or []]
    assert [str(entry.model) for entry in config.models or []] == named or not all(
        isinstance(name, str) for name in named
    )
    recipe.Experts.read(path)


def hold(path: Path, content: bytes, read: Callable[[Path], None]) -> bool:
    """Whether a file is read; a refusal must name it."""
    path.write_bytes(content)
    expert_scores._load.cache_clear()
    try:
        read(path)
    except UserError as error:
        # a recipe's score file may be at fault, and is named then
        assert str(path) in refusal(error) or "score file " in refusal(error), error
        return False
    return True


KINDS: dict[str, tuple[str, Callable[[Path], None], Callable[[Path, random.Random], bytes]]] = {
    "score file": (
        "mutant.safetensors",
        read_scores,
        lambda good, rng: mutated_tensors(good / "a.safetensors", "mergekit_wp", rng),
    ),
    "fitted score file": (
        "mutant-fitted.safetensors",
        read_scores,
        lambda good, rng: mutated_tensors(good / "fitted.safetensors", "mergekit_wp", rng),
    ),
    "trace file": (
        "mutant.json",
        read_trace,
        lambda good, rng: mutated_json((good / "trace.json").read_text(), rng),
    ),
    "prompt file": ("mutant.jsonl", read_prompt_lines, lambda _, rng: mutated_prompts(rng)),
    "recipe": ("mutant.yml", read_recipe, lambda _, rng: mutated_recipe(rng)),
}


def attack(kind: str, good: Path, count: int, **options: Any) -> list[bool]:
    name, read, mutate = KINDS[kind]
    outcomes = []

    @settings(FRESH, max_examples=count, **options)
    @given(st.randoms(use_true_random=False))
    def one(rng: random.Random) -> None:
        outcomes.append(hold(good / name, mutate(good, rng), read))

    one()
    assert not all(outcomes), "some mutants must be refused"
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_mutants_are_read_or_refused(good: Path, kind: str) -> None:
    attack(kind, good, QUICK, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_mutants_are_read_or_refused(good: Path, kind: str) -> None:
    outcomes = attack(kind, good, SLOW)
    assert any(outcomes), "some mutants must be read, else the mutations are too coarse"


@pytest.mark.parametrize("kind", KINDS)
def test_the_originals_are_read(good: Path, kind: str) -> None:
    originals = {
        "score file": "a.safetensors",
        "fitted score file": "fitted.safetensors",
        "trace file": "trace.json",
        "prompt file": "prompts.jsonl",
        "recipe": "recipe.yml",
    }
    name, read, _ = KINDS[kind]
    assert hold(good / name, (good / originals[kind]).read_bytes(), read)


# --- bombs ---------------------------------------------------------------------------------------


def bombs(folder: Path) -> dict[str, Path]:
    """Small files that stand for huge things, and large files that are nothing."""
    scores, fitted = folder / "a.safetensors", folder / "fitted.safetensors"
    metadata, header, data = header_of(scores)
    manifest = json.loads(metadata["mergekit_wp"])
    written: dict[str, Path] = {}

    def put(name: str, content: bytes | str) -> Path:
        written[name] = folder / f"bomb-{name}"
        text = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        written[name].write_bytes(text)
        return written[name]

    def manifest_bomb(name: str, text: str) -> None:
        changed = {**metadata, "mergekit_wp": text}
        put(f"{name}.safetensors", safetensors_bytes(changed, header, data))

    for size in (2**24 + 1, 2**60, 2**63, 2**64 - 1):
        put(f"header-{size}.safetensors", size.to_bytes(8, "little") + b"{}")
    entry = header["share/kl/neuron"]
    for i, shape in enumerate(([2**60], [2**32, 2**32], [2**63], [-1], [2, 6, 1])):
        changed = {**header, "share/kl/neuron": {**entry, "shape": shape}}
        put(f"shape-{i}.safetensors", safetensors_bytes(metadata, changed, data))
    far = {**header, "far": {"dtype": "F32", "shape": [2**58], "data_offsets": [len(data), 2**60]}}
    put("far.safetensors", safetensors_bytes(metadata, far, data))
    # a sparse file that has all the bytes it claims: 1 GB that no manifest promises, then 4 GB
    long = len(data) + 2**30
    extra = {**header, "z": {"dtype": "F32", "shape": [2**28], "data_offsets": [len(data), long]}}
    for name, size in (("extra.safetensors", 0), ("sparse.safetensors", 2**32)):
        path = put(name, safetensors_bytes(metadata, extra, data))
        os.truncate(path, path.stat().st_size + 2**30 + size)
    manifest_bomb("manifest-16MB", json.dumps({**manifest, "created": "x" * 2**24}))
    manifest_bomb("manifest-neurons", json.dumps({**manifest, "n_neurons": 2**60}))
    manifest_bomb("manifest-layers", json.dumps({**manifest, "n_layers": 10**400}))
    manifest_bomb("manifest-digits", '{"format_version": ' + "9" * 10**6 + "}")
    manifest_bomb("manifest-deep", "[" * 10**6)
    manifest_bomb(
        "manifest-deep-value", '{"format_version": 1, "a": ' + "[" * 10**5 + "]" * 10**5 + "}"
    )
    manifest_bomb("manifest-nan", json.dumps({**manifest, "noise_floor": {"kl": float("nan")}}))
    manifest_bomb("manifest-twice", '{"seed": 1, ' + metadata["mergekit_wp"][1:])
    manifest_bomb("manifest-bom", "\ufeff" + metadata["mergekit_wp"])
    manifest_bomb("manifest-surrogate", json.dumps({**manifest, "behavior": "\ud800"}))
    manifest_bomb("manifest-nul", metadata["mergekit_wp"] + "\0")
    put("utf8.safetensors", scores.read_bytes().replace(b"somewhere", b"some\xffhere"))
    sound, of_fit, fit_data = header_of(fitted)
    said = json.loads(sound["mergekit_wp"])
    for name, value in (("upper", float("inf")), ("best_step", 2**60), ("rate", float("nan"))):
        text = json.dumps({**said, "fit": {**said["fit"], name: value}})
        content = safetensors_bytes({"mergekit_wp": text}, of_fit, fit_data)
        put(f"fit-{name}.safetensors", content)
    put("deep.json", "[" * 10**6)
    put("digits.json", "9" * 10**6)
    put("nul.json", "\0" * 100)
    put("deep.jsonl", '{"prompt": ' + "[" * 10**6)
    put("twice.jsonl", '{"prompt": "a", "prompt": "b"}')
    put("utf8.jsonl", b'{"prompt": "\xff"}')
    put("utf16.jsonl", '{"prompt": "a"}'.encode("utf-16"))
    put("surrogate.jsonl", '{"prompt": "\\ud800"}')
    laughs = "a0: &a0 [ha, ha]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
    )
    put("laughs.yml", laughs + "merge_method: weight_patching\nmodels: *a11\n")
    merges = "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
    )
    put("merges.yml", merges)
    put("circle.yml", "models: &m [*m]\n")
    put("deep.yml", "[" * 10**5)
    put("deep-block.yml", "".join(" " * i + "a:\n" for i in range(1200)))
    put("long.yml", "# " + "x" * 2**20)
    put("digits.yml", "merge_method: " + "9" * 10**5)
    put("date.yml", "merge_method: 2026-13-45")
    put("tag.yml", "merge_method: !!timestamp x")
    put("python.yml", "merge_method: !!python/object/apply:os.system ['touch /tmp/owned']")
    put("twice.yml", "merge_method: ties\nmerge_method: weight_patching\n")
    put("nul.yml", "merge_method: \0")
    put("nul-path.yml", 'merge_method: ties\nbase_model: "a\\0b"\nmodels: [{model: "a\\0c"}]\n')
    put("utf8.yml", b"merge_method: \xff")
    return written


_READ_BOMBS = """
import resource, sys, time
from pathlib import Path
import torch, safetensors
from mergekit_wp.files import circuitfile, scorefile
from mergekit_wp.merging import recipe
from mergekit_wp.autoload import ensure_registered
from mergekit_wp.errors import UserError
from mergekit_wp.prompts import read_prompts
from tests.test_hostile_files import SCORES

ensure_registered()
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**33,) * 2)  # mapped files count, too
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    path = Path(name)
    read = {
        ".safetensors": scorefile.read,
        ".json": lambda p: circuitfile.read(p, SCORES),
        ".jsonl": lambda p: read_prompts(p, None),
        ".yml": recipe.read,
    }[path.suffix]
    start = time.process_time()
    try:
        read(path)
        said = "READ"
    except UserError as error:
        said = str(error)
    assert time.process_time() - start < 10, name
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19, name  # 512 MB
    print(path.name, said, sep="\t", flush=True)
"""


def test_bombs_are_refused_in_little_memory_and_time(good: Path) -> None:
    """In half a gigabyte and ten seconds each, by one line that names the file."""
    files = bombs(good)
    done = subprocess.run(
        [sys.executable, "-c", _READ_BOMBS, *map(str, files.values())],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    for path in files.values():
        path.unlink()
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(line.split("\t") for line in done.stdout.splitlines())
    assert len(said) == len(files)
    for name, message in said.items():
        assert message != "READ", name
        assert name in message, (name, message)
