"""Options and arguments of a command, made of the fields of what it asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from mergekit_wp.errors import UserError, spelled
from mergekit_wp.options import Declared, Request, declared

R = TypeVar("R", bound=Request)
Command = TypeVar("Command", bound=Callable[..., Any])


class _Written(click.ParamType[Any]):
    """What the field itself reads: names with commas, or "auto"."""

    def __init__(self, field: Declared) -> None:
        self.field = field
        self.name = field.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            found = self.field.plain(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if self.field.option.aliases and found not in self.field.choices:
            self.fail(f"'{value}' is not one of {', '.join(self.field.choices)}", param, ctx)
        return found


class OnceEach(click.Command):
    """Refuses what must be given and is given twice, of which click takes the last.

    Other options may be given again to override a line that a user keeps.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        left = super().parse_args(ctx, args)
        for parameter, times in Counter(given).items() if not left else ():  # else that is said
            once = isinstance(parameter, click.Option) and not parameter.multiple
            if once and parameter.required and times > 1:
                raise UserError(f"{parameter.opts[0]} is given {times} times; give it once")
        return left


def options_of(
    *requests: type[Request],
    exclude: Collection[str] = (),
    optional: Collection[str] = (),
    required: Collection[str] = (),
    several: Collection[str] = (),
) -> Callable[[Command], Command]:
    """A decorator that gives a command the options and arguments of some requests.

    Args:
        requests: of fields of one name the first one's counts.
        exclude: names of parameters to leave out.
        optional: names of parameters that the command itself asks for where they are needed.
        required: names of parameters that only Python can do without.
        several: names of arguments that may be given more than once.
    """
    found: dict[str, Declared] = {}
    for request in requests:
        for field in declared(request).values():
            found.setdefault(field.name, field)
    for name in exclude:
        del found[name]

    spelt = {field.name: field.flag for field in found.values()}

    def decorate(command: Command) -> Command:
        for field in sorted(found.values(), key=_rank)[::-1]:
            needed = field.name in required or (field.required and field.name not in optional)
            command = _parameter(field, needed, spelt, field.name in several)(command)
        return command

    return decorate


def flags(command: click.Command) -> dict[str, str]:
    """What a user types, by parameter: an option's flag, an argument's name in ``--help``.

    Messages of the library name options by their fields, see `errors.option`.
    """
    return {str(each.name): _typed(each) for each in command.params}


def _typed(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Option):
        return (
            parameter.opts[0]
            if parameter.opts[0].startswith("--")
            else max(parameter.opts, key=len)
        )
    return str(parameter.name).upper()


def given(model: type[Request], options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request that a command was given; what is another's is left out."""
    fields = declared(model)
    found: dict[str, Any] = {}
    for path, field in fields.items():
        value = options.get(field.name)
        if value is None or (value == () and field.required):
            continue
        outer, _, inner = path.rpartition(".")
        (found.setdefault(outer, {}) if outer else found)[inner or path] = value
    return found


def _rank(field: Declared) -> int:
    """Arguments, then what must be given or stands in for it, then the rest."""
    if field.positional:
        return 0
    return 1 if field.required or field.option.instead_of else 2


def _parameter(
    field: Declared, required: bool, spelt: Mapping[str, str], several: bool
) -> Callable[[Command], Command]:
    if field.positional:
        many = several or field.element is not None
        nargs: dict[str, Any] = {"nargs": -1} if many else {}
        return click.argument(field.name, required=required, type=_type(field), **nargs)
    help_text = spelled(str(field.info.description), spelt)
    default = None if required or field.required else field.info.default
    attributes: dict[str, Any] = {}
    if field.type is bool:
        attributes["is_flag"] = True
    else:
        if field.repeated:
            attributes["multiple"] = True
        elif field.option.auto and default is None:
            default = "auto"
        elif field.element is not None:
            default = (",".join(default),) if default else None
            attributes |= {"multiple": True, "callback": _joined}
        attributes |= {"type": _type(field), "metavar": field.metavar}
        if default not in (None, ()):
            attributes |= {"default": default, "show_default": True}
        elif field.option.default is not None:
            help_text += f"  [default: {spelled(field.option.default, spelt)}]"
    names = [field.flag, *([f"--{field.option.also}"] if field.option.also else [])]
    names += ["-o"] if field.flag == "--out" else []
    return click.option(*names, field.name, required=required, help=help_text, **attributes)


def _joined(
    ctx: click.Context, param: click.Parameter, value: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Names with commas, in one option or over several of them: none is dropped."""
    return tuple(name for names in value if names is not None for name in names) or None


def _type(field: Declared) -> Any:
    """What click checks and shows; the rest is the request's to check."""
    kind = field.type if not field.repeated else field.element
    if kind is Path:
        file, folder = field.option.path != "folder", field.option.path != "file"
        exists = field.option.exists
        return click.Path(path_type=Path, exists=exists, file_okay=file, dir_okay=folder)
    if field.repeated:
        return str
    if field.option.auto or field.option.aliases or field.element is not None:
        return _Written(field)
    if field.choices:
        return click.Choice(field.choices)
    if kind in (int, float):
        return _number(field, kind)
    return kind


def _number(field: Declared, kind: type) -> Any:
    low = [field.bound(name) for name in ("ge", "gt")]
    high = [field.bound(name) for name in ("le", "lt")]
    if not any(bound is not None for bound in (*low, *high)):
        return kind
    span = click.IntRange if kind is int else click.FloatRange
    return span(
        min=low[0] if low[1] is None else low[1],
        max=high[0] if high[1] is None else high[1],
        min_open=low[1] is not None,
        max_open=high[1] is not None,
    )
