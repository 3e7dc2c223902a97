"""Options are declared once: on requests, for the command line, for files and for Python alike."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

import mergekit_wp.commands
from mergekit_wp.cli import cli
from mergekit_wp.commands.derive import given, options_of
from mergekit_wp.errors import UserError
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.mechanism.request import TraceRequest, VerifyRequest
from mergekit_wp.options import Request, declared
from mergekit_wp.runs.command import command_of
from mergekit_wp.scoring.request import ScoreRequest

ONE_OR_MORE = "the same, one of them here and several there"
#: options that are not the same in every command that has them, and why
EXCEPTIONS = {
    "--prompts": f"{ONE_OR_MORE}: a source for one expert, EXPERT=SOURCE for each of several",
    "--estimand": f"{ONE_OR_MORE}: `score` makes scores, the others read some",
    "--criterion": f"{ONE_OR_MORE}: `score` makes scores, the others read some",
    "--task": f"{ONE_OR_MORE}: `compare` takes lm-eval's tasks too",
    "--top": f"{ONE_OR_MORE}: `verify` swaps sets of several sizes",
    "--out": "each says what it writes",
    "--dtype": "a merge is evaluated in the recipe's, unless another is wanted",
    "--base": "a score file names it, a merge does not",
}


class Meaning(NamedTuple):
    type: str
    default: Any
    help: str | None


def meaning(option: click.Option) -> Meaning:
    kind = repr(option.type)
    if isinstance(option.type, click.Path):
        kind = f"path {option.type.exists} {option.type.file_okay} {option.type.dir_okay}"
    elif hasattr(option.type, "field"):
        kind = f"{option.type.field.choices} {option.type.field.option.auto}"
    return Meaning(f"{kind} {option.multiple} {option.is_flag}", option.default, option.help)


def commands() -> dict[str, click.Command]:
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def every_option() -> dict[str, dict[str, Meaning]]:
    """By flag, what each command means by it; mergekit's own options are not ours."""
    found: dict[str, dict[str, Meaning]] = defaultdict(dict)
    for name, command in commands().items():
        for option in command.params:
            if name != "merge" and isinstance(option, click.Option):
                found[option.opts[0]][name] = meaning(option)
    return found


def test_an_option_is_the_same_in_every_command() -> None:
    found = every_option()
    assert len(found) > 50
    differing = {flag for flag, meanings in found.items() if len(set(meanings.values())) > 1}
    assert differing == set(EXCEPTIONS)


def test_fixed_spellings() -> None:
    """Those of section 6 of the design: scripts rely on them."""
    found = every_option()
    for command, flags in {
        "score": "prompts out behavior estimand criterion kinds anchor-layer verify max-prompts "
        "batch-size dtype device seed restart",
        "inspect": "top estimand criterion kind json",
        "plot": "out",
    }.items():
        for flag in flags.split():
            assert command in found[f"--{flag}"], f"{command} --{flag}"
    arguments = [p for p in commands()["merge"].params if isinstance(p, click.Argument)]
    assert [(p.name, p.nargs) for p in arguments] == [("what", -1)]  # RECIPE OUT


def test_every_option_says_what_it_does() -> None:
    for flag, meanings in every_option().items():
        for command, said in meanings.items():
            assert said.help and said.help[0] != " ", f"{command} {flag}"


def test_commands_declare_nothing_themselves() -> None:
    for path in Path(mergekit_wp.commands.__file__).parent.glob("*.py"):
        if path.name == "derive.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("option", "argument", "Choice", "IntRange"), path


REQUESTS = [
    ScoreRequest(
        base="a base",
        expert="expert@main",
        prompts="p q.jsonl",
        out="out",
        behavior="two words",
        estimand="gain, share",
        criterion=["logprob", "kl"],
        kinds=("head",),
        anchor_layer=0,
        verify=0,
        share_steps=2,
        max_prompts=3,
        batch_size=4,
        dtype="bfloat16",
        seed=7,
        max_new_tokens=5,
    ),
    ScoreRequest(base="b", expert="e", prompts="p.jsonl", out="out"),
    FitRequest(recipe="r.yml", prompts={"a": "a.jsonl", "b": "b=c.jsonl"}, out="out"),
    FitRequest(
        recipe="r.yml",
        prompts=["a=a.jsonl", ("b", "b.jsonl")],
        out="out",
        guards=["one,two.jsonl", Path("three.jsonl")],
        limit=1.0000001,
        front=(1.05, 1.2),
        start="scores",
        held_out=0,
    ),
    VerifyRequest(file="f", prompts="p", top="1%,3", task="t", checkers="c.py", criterion="kl"),
    TraceRequest(file="f", prompts="p", out="t.json", rules={"own": 0.25, "suppliers": 3}),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: type(r).__name__)
def test_a_stored_command_asks_for_the_same(request_: Request) -> None:
    written = getattr(request_, request_.writes)
    name, *arguments = command_of(request_)
    place = [str(written)] if request_.writes == "file" else ["--out", str(written)]
    context = commands()[name].make_context(name, [*arguments, *place])
    options = context.params
    assert type(request_).of(**given(type(request_), options)) == request_


def test_plain_values_of_python() -> None:
    given = {"base": "b", "expert": "e", "prompts": "p", "out": "o"}
    for names in ("gain,share", ["share", "gain"], ("gain", "share", "gain"), " share , gain,"):
        assert ScoreRequest(**given, estimand=names).estimand == ("share", "gain")
    assert ScoreRequest(**given, batch_size="auto").batch_size is None
    spread = ScoreRequest(**given, device="cpu", device_map="auto", max_memory="cpu=1KiB")
    assert spread.max_memory == {"cpu": 1024}
    assert spread == ScoreRequest(
        **given, device="cpu", device_map="auto", max_memory={"cpu": 1024}
    )
    assert ScoreRequest(**given, device_map="auto").max_memory == {}
    pairs = (("a", Path("x")),)
    for prompts in ({"a": "x"}, ["a=x"], "a=x", [("a", Path("x"))]):
        assert FitRequest(recipe="r", out="o", prompts=prompts).prompts == pairs
    assert FitRequest(recipe="r", out="o", prompts=(), guards="g").guards == (Path("g"),)
    for limits in ("1.05, 1.2", [1.05, 1.2], ("1.05", 1.2)):
        assert FitRequest(recipe="r", prompts=(), front=limits).front == (1.05, 1.2)
    assert FitRequest(recipe="r", prompts=(), front=1.2).front == (1.2,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share_steps": 0}, "share_steps: it should be greater than or equal to 1, not 0"),
        ({"estimand": "gains"}, "estimand: unknown estimand 'gains'; choose from share, gain, kno"),
        ({"estimand": "path"}, "estimand: unknown estimand 'path'"),
        ({"criterion": []}, "criterion: no criterion given; choose from kl, anchor, logprob"),
        ({"kinds": "heads"}, "kinds: unknown kind 'heads'; choose from layer, tensor, head"),
        ({"batch_size": "-1"}, "batch_size: '-1' is neither 'auto' nor a whole number from 1"),
        ({"dtype": "int8"}, "dtype: it should be 'float32', 'float64', 'bfloat16' or 'float16'"),
        ({"share_step": 1}, "there is no option share_step"),
        ({"prompts": None}, "prompts"),
        ({"device": "warp"}, "device 'warp' cannot be used here"),
        ({"max_memory": {"cpu": 1}}, "max_memory says where weights go with device_map=auto"),
        ({"device_map": "auto", "max_memory": ["cpu"]}, "max_memory=cpu: expected DEVICE=SIZE"),
    ],
)
def test_a_bad_value_is_named(options: dict[str, Any], message: str) -> None:
    given = {"base": "b", "expert": "e", "prompts": "p", "out": "o", "device": "cpu"}
    with pytest.raises(UserError) as refused:
        ScoreRequest.of(**given | options)
    assert str(refused.value).startswith(message)


def test_a_command_says_the_flag() -> None:
    options = {"recipe": "r", "prompts": ("a",), "out": "o"}
    with pytest.raises(UserError) as refused:
        FitRequest.of(**given(FitRequest, options))
    error = refused.value
    assert str(error) == "prompts: 'a' names no expert; write EXPERT=SOURCE"
    error.use_flags({field.name: field.flag for field in declared(FitRequest).values()})
    assert str(error) == "--prompts: 'a' names no expert; write EXPERT=SOURCE"
    with pytest.raises(UserError, match="recipe is missing; give it"):
        FitRequest.of(**given(FitRequest, options | {"recipe": None}))


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--criterion", "logprob", "--criterion", "kl"], {"logprob", "kl"}),
        (["--criterion", "logprob,kl"], {"logprob", "kl"}),
        (["--criterion", "kl", "--criterion", "kl"], {"kl"}),
        (["--criterion", "logprob"], {"logprob"}),
    ],
)
def test_a_list_over_several_options_is_whole(arguments: list[str], found: set[str]) -> None:
    seen: list[dict[str, Any]] = []

    @click.command()
    @options_of(ScoreRequest, optional=("base", "expert", "prompts", "out"))
    def command(**options: Any) -> None:
        seen.append(options)

    command.main(arguments, standalone_mode=False)
    command.main([], standalone_mode=False)
    asked = declared(ScoreRequest)["criterion"].plain(seen[0]["criterion"])
    assert set(asked) == found and len(asked) == len(found)
    assert seen[1]["criterion"] == ScoreRequest.model_fields["criterion"].default
