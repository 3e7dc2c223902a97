"""The `mergekit-wp` command: finds the subcommand, and turns mistakes into one line."""

from __future__ import annotations

import importlib
import io
import sys
from difflib import get_close_matches
from typing import TYPE_CHECKING, TextIO

import click

from mergekit_wp.errors import DiskError, UserError
from mergekit_wp.interrupts import Interrupted, listening
from mergekit_wp.version import __version__

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# subcommand -> (module attribute that holds it, line in --help); loaded only when called, so
# that --help does not wait for torch
_COMMANDS = {
    "score": ("mergekit_wp.commands.score:score", "Measure what each component of an expert does."),
    "behaviors": ("mergekit_wp.commands.behaviors:behaviors", "Built-in behaviours and prompts."),
    "prompts": ("mergekit_wp.commands.prompts:prompts", "Look at what a source of prompts gives."),
    "anchor": ("mergekit_wp.commands.anchor:anchor", "Find the layer a behaviour is anchored at."),
    "inspect": ("mergekit_wp.commands.inspect:inspect", "Show a score file as a table or JSON."),
    "plot": ("mergekit_wp.commands.plot:plot", "Draw a score file: PNG, or one HTML page."),
    "verify": ("mergekit_wp.commands.verify:verify", "Swap the leading components together."),
    "stability": (
        "mergekit_wp.commands.stability:stability",
        "Compare the rankings of score files.",
    ),
    "trace": ("mergekit_wp.commands.trace:trace", "Find who supplies the leading components."),
    "fit": ("mergekit_wp.commands.fit:fit", "Fit the gates of all experts jointly, by gradient."),
    "merge": ("mergekit_wp.commands.merge:merge", "Merge experts, or as a recipe says."),
    "compare": ("mergekit_wp.commands.compare:compare", "Compare merge methods, with intervals."),
    "card": ("mergekit_wp.commands.card:card", "Complete a merge's model card for the Hub."),
    "push": ("mergekit_wp.commands.push:push", "Upload a merge to the Hub."),
    "reproduce": ("mergekit_wp.commands.reproduce:reproduce", "Print the command behind a file."),
    "aim": ("mergekit_wp.commands.aim:aim", "Apply Activation-Informed Merging to a merge."),
}


#: what people name that has no name
_PLACES = ("base", "base-model", "expert", "experts", "model", "models", "recipe", "file", "merged")


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click; of a name that there is not, the one that is like it is told."""
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            alike = get_close_matches(args[0], _COMMANDS, n=1)
            meant = f"; did you mean '{alike[0]}'?" if alike else ""
            raise UserError(
                f"there is no command '{args[0]}'{meant} (mergekit-wp --help lists all)"
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run the subcommand; what it refuses is said with its own flags."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            from mergekit_wp.commands.derive import flags

            command = self.get_command(ctx, str(ctx.invoked_subcommand))
            if command is not None:  # else there is no such command, and it is said already
                error.use_flags(flags(command))
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mergekit-wp")
def cli() -> None:
    """Mechanism-aware model merging.

    Put single components of an expert's weights into its base, and measure how much of the expert's
    behaviour comes back; fit how much of every part several experts give to one merge.

    \b
      mergekit-wp merge BASE A B --prompts A=a.jsonl --prompts B=b.jsonl --out merged/
      mergekit-wp compare merged/merge/recipe.yml --task a-items.jsonl --task b-items.jsonl \\
          --out comparison/
      mergekit-wp push merged/ owner/name

    Where in an expert does a behaviour come from?

    \b
      mergekit-wp score BASE EXPERT --prompts prompts.jsonl --out expert.safetensors
      mergekit-wp inspect expert.safetensors

    A score file goes into a mergekit recipe under `merge_method: weight_patching`; the stock
    `mergekit-yaml` runs it too.
    """


def main(arguments: list[str] | None = None) -> None:
    """Entry point.

    Exit status: 0 done, 2 the user's mistake (one line on stderr), 130 and 143 after Ctrl-C and
    SIGTERM, 1 anything else.
    """
    sys.stdout, sys.stderr = _shown(sys.stdout, sys.__stdout__), _shown(sys.stderr, sys.__stderr__)
    try:
        with listening():
            status = cli.main(args=arguments, prog_name="mergekit-wp", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except UserError as error:
        _fail(str(error), 2)
    except DiskError as error:
        _fail(f"{error}; {_way_on(error, 'make room and start')}", 1)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        sys.exit(2)
    except click.NoSuchOption as error:
        _fail(_by_place(error) or error.format_message(), 2)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except Interrupted as error:
        _fail(f"interrupted; {_way_on(error, 'start')}", error.status)
    except (click.Abort, KeyboardInterrupt):  # at a prompt
        _fail("interrupted", 130)
    except Exception as error:
        from safetensors import SafetensorError

        if not isinstance(error, OSError | SafetensorError):
            raise
        _fail(f"{type(error).__name__}: {error}", 1)  # a lost network drive


def _by_place(error: click.NoSuchOption) -> str | None:
    """What to say of a name for what is given by its place."""
    if error.ctx is None or error.option_name.strip("-") not in _PLACES:
        return None
    usage = " ".join(error.ctx.command.collect_usage_pieces(error.ctx)[1:])
    return (
        f"there is no '{error.option_name}': models, recipes and files are given by their place, "
        f"as in {error.ctx.command_path} {usage}"
    )


class _Pipe(io.FileIO):
    """Where output goes; once its reader has gone (``| head``), nowhere: the command goes on."""

    def write(self, data: ReadableBuffer, /) -> int:
        """As many bytes as were written or dropped."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def _shown(stream: TextIO, own: TextIO | None) -> TextIO:
    """A stream that neither a missing character nor a missing reader ends.

    Args:
        stream: where output goes.
        own: the one that the process began with.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    if stream.errors == "strict":  # a console may lack the characters of a name
        stream.reconfigure(errors="replace")
    if stream is not own or stream.isatty():
        return stream
    into = io.BufferedWriter(_Pipe(stream.fileno(), "wb", closefd=False))
    lines = stream.line_buffering
    return io.TextIOWrapper(into, stream.encoding, stream.errors, line_buffering=lines)


def _way_on(error: DiskError | Interrupted, start: str) -> str:
    """What is left of a run that was ended, and how to go on."""
    without = " without --restart" if "--restart" in sys.argv else ""
    left = "nothing half-written is left"
    if error.kept is not None and error.kept.exists():
        left = f"what is done is kept in {error.kept}"
    return f"{left}; {start} the same command again{without}"


def _fail(message: str, status: int) -> None:
    print("mergekit-wp: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
