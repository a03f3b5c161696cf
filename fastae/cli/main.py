"""The command line, `fastae -h`. Errors: one line, exit code 2."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib import import_module
from io import TextIOWrapper
from typing import Any, NoReturn

import click

import fastae

# command -> its module, imported when the command is called for; `bench` lives above fastae
COMMANDS = {
    "train": "fastae.cli.train",
    "encode": "fastae.cli.apply",
    "reconstruct": "fastae.cli.apply",
    "sample": "fastae.cli.apply",
    "score": "fastae.cli.apply",
    "info": "fastae.cli.apply",
    "explain": "fastae.cli.analysis",
    "profile": "fastae.cli.analysis",
    "verify": "fastae.cli.verify",
    "bench": "fastae_bench.cli",
}
ERRORS = (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError, MemoryError)
# Arguments of functions that a command line spells in another way; the others are options of the same name
SPELLED = {
    "x": "DATA", "source": "DATA", "kind": "--scale", "validation_data": "--validation",
    "set_backend: name": "--backend",
}  # fmt: skip
_ARGUMENT = re.compile(r"^(?:(?P<function>[\w.]+): )?(?P<name>\w+):? (?=must )")
_ALLOCATION = re.compile(r"tried to allocate (\d+) bytes")


def main() -> NoReturn:
    """The entry point: runs the command and turns errors into one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal in ASCII shows ? for what it has not
    try:
        sys.exit(cli.main(standalone_mode=False))
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except click.ClickException as error:
        _fail(error.format_message())
    except ERRORS as error:
        _fail(str(error) or type(error).__name__)


def _fail(message: str) -> NoReturn:
    if asked := _ALLOCATION.search(message):
        message = f"there is not enough memory: {int(asked[1]) / 1e9:,.1f} GB are needed at once"
    print("fastae: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


class Commands(click.Group):
    """A group of the COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(COMMANDS[cmd_name]), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; its errors name options, where functions name their arguments."""
        try:
            return super().invoke(ctx)
        except ERRORS as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            known = command.params if command else []
            options = {p.name or "": p.opts[0] for p in known if isinstance(p, click.Option)}
            if len(error.args) == 1:  # the text: of an OSError of the system's there are more
                error.args = (_spelled(str(error), options),)
            raise


def _spelled(message: str, options: Mapping[str, str]) -> str:
    found = _ARGUMENT.match(message)
    if found is None:
        return message
    name = found["name"]
    option = SPELLED.get(f"{found['function']}: {name}") or SPELLED.get(name) or options.get(name)
    return message if option is None else f"{option} {message[found.end() :]}"


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=True,
)
@click.version_option(fastae.__version__)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Dense autoencoders on fused kernels.

    DATA is a .npy, .npz or .csv file, an MNIST IDX file (plain or gzip), or a named set: mnist5k, digits.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
