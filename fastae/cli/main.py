"""The command line, `fastae -h`. Errors: one line, exit code 2."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NoReturn

import click

import fastae

# command -> its module, imported when the command is called for; `bench` lives above fastae
COMMANDS = {
    "train": "fastae.cli.train",
    "encode": "fastae.cli.apply",
    "reconstruct": "fastae.cli.apply",
    "score": "fastae.cli.apply",
    "info": "fastae.cli.apply",
    "explain": "fastae.cli.analysis",
    "profile": "fastae.cli.analysis",
    "verify": "fastae.cli.verify",
    "bench": "fastae_bench.cli",
}


def main() -> NoReturn:
    """The entry point: runs the command and turns errors into one line and exit code 2."""
    try:
        sys.exit(cli.main(standalone_mode=False))
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except click.ClickException as error:
        _fail(error.format_message())
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError, MemoryError) as error:
        _fail(str(error) or type(error).__name__)


def _fail(message: str) -> NoReturn:
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


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(fastae.__version__)
def cli() -> None:
    """Dense autoencoders on fused kernels.

    DATA is a .npy, .npz or .csv file, an MNIST IDX file (plain or gzip), or a named set: mnist5k, digits.
    """
