"""The command `emo`; also `python -m transformers_emo`. Each of its commands is a module of `commands/`."""

import _thread
import functools
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
import typer.main

from .command_words import EmoGroup, usage_text
from .commands.analysis.report import report
from .commands.analysis.retention import retention
from .commands.analysis.routing import routing
from .commands.cache import cache
from .commands.convert import conversions
from .commands.export import export
from .commands.extract import extract
from .commands.planning.info import info
from .commands.planning.plan import plan
from .commands.push import push
from .commands.run import EPILOG, RunCommand, run
from .commands.select import select
from .commands.shard import shard
from .commands.shared import add_command
from .commands.train import train
from .commands.trying.chat import chat
from .commands.trying.demo import demo
from .commands.write_back import write_back
from .error_text import error_text
from .version import __version__

_INTERRUPTED = 130  # what shells say of a program that Ctrl-C ended
_FROM_THE_START = "Nothing half written has the name of the result: call it again."
_CONTINUED = "What was finished is kept: the same command goes on."
_GO_ON = {  # after Ctrl-C
    "select": _FROM_THE_START,
    "extract": _FROM_THE_START,
    "convert": "Nothing half written has the name of the result: the same command goes on, or begins again.",
    "write-back": _CONTINUED,
    "shard": _CONTINUED,
    "export": _CONTINUED,
    "retention": _CONTINUED,
    "routing": _CONTINUED,
    "report": _CONTINUED,
    "push": "What was sent is not sent again: the same command goes on.",
    "run": "The program was not started: call it again.",
    "chat": "",
    "demo": "",
    "train": "The same command with --resume goes on from the last whole checkpoint.",
}


@dataclass
class _Call:
    """What is known of a call when it fails."""

    command: str = ""
    traceback: bool = False


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"emo {__version__}")
        raise typer.Exit()


def _emo(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    call = ctx.ensure_object(_Call)
    call.command, call.traceback = ctx.invoked_subcommand or "", traceback


# Typer's own handling of errors is not used: `main` tells them in one line.
app = typer.Typer(
    cls=EmoGroup,
    help="EMO for Hugging Face Transformers: choose, load, train and convert experts.",
    callback=_emo,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
add_command(app, select, "select", panel="Subsets of experts")
add_command(app, extract, "extract", panel="Subsets of experts")
add_command(app, write_back, "write-back", panel="Subsets of experts")
add_command(app, info, "info", panel="Before anything runs")
add_command(app, plan, "plan", panel="Before anything runs")
add_command(app, train, "train", panel="Training and programs")
add_command(
    app,
    run,
    "run",
    panel="Training and programs",
    cls=RunCommand,
    options_metavar="[OPTIONS] [--]",
    epilog=EPILOG,
    context_settings={"allow_interspersed_args": False},
)
add_command(app, retention, "retention", panel="What experts learned")
add_command(app, routing, "routing", panel="What experts learned")
add_command(app, report, "report", panel="What experts learned")
add_command(app, chat, "chat", panel="Trying a model")
add_command(app, demo, "demo", panel="Trying a model")
app.add_typer(conversions(), name="convert", rich_help_panel="Checkpoints")
add_command(app, export, "export", panel="Checkpoints")
add_command(app, shard, "shard", panel="Checkpoints")
add_command(app, push, "push", panel="Checkpoints")
add_command(app, cache, "cache", panel="Checkpoints")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments (`Sequence[str]`, *optional*): the command's words; `sys.argv` by default.

    Returns:
        `int`: the exit status: 0; 1 after an error, 2 where the words are no command, 130 after Ctrl-C. What
            went wrong stands on stderr in one line.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["train", "no-such-file.yaml"])
    1

    ```
    """
    call = _Call()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _no_interrupt_is_lost():
            status = _command().main(
                words, prog_name="emo", standalone_mode=False, windows_expand_args=False, obj=call
            )
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = f"emo {call.command}".rstrip() if context is None else context.command_path
        return _fail(command, f"{usage_text(error)} See `{command} --help`.", error.exit_code)
    except Exception as error:
        if call.traceback:
            raise
        return _fail(f"emo {call.command}", error_text(error), 1)
    except KeyboardInterrupt:
        status = _INTERRUPTED
    if status == _INTERRUPTED:
        told = f"stopped by Ctrl-C. {_GO_ON.get(call.command, '')}"
        return _fail(f"emo {call.command}".rstrip(), told, _INTERRUPTED)
    return status or 0


@contextmanager
def _no_interrupt_is_lost() -> Iterator[None]:
    """Interrupt again where Python drops a `KeyboardInterrupt`, as it does while a process forks."""
    before = sys.unraisablehook
    timers: list[threading.Timer] = []

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            before(unraisable)
            return
        # Not here: Python would drop it as well.
        timers.append(threading.Timer(0.1, _thread.interrupt_main))
        timers[-1].daemon = True
        timers[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()


@functools.cache
def _command() -> Any:
    return typer.main.get_command(app)


def _fail(command: str, message: str, status: int) -> int:
    line = f"{command}: {' '.join(message.split())}"
    print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)  # half characters of file names
    return status
