"""The command `mlxlm`. Heavy imports happen inside the verbs, so that help answers at once."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from mlxlm.cli.align import align
from mlxlm.cli.cache_prompt import cache_prompt
from mlxlm.cli.chat import chat
from mlxlm.cli.classify import classify
from mlxlm.cli.convert import convert
from mlxlm.cli.doctor import doctor
from mlxlm.cli.embed import embed
from mlxlm.cli.evaluate import evaluate
from mlxlm.cli.families import families
from mlxlm.cli.fill_mask import fill_mask
from mlxlm.cli.finetune import finetune
from mlxlm.cli.fuse import fuse
from mlxlm.cli.generate import generate
from mlxlm.cli.launch import launch
from mlxlm.cli.plan import plan
from mlxlm.cli.plot import plot
from mlxlm.cli.pretrain import pretrain
from mlxlm.cli.serve import serve
from mlxlm.cli.tokenizer import tokenizer
from mlxlm.errors import MlxlmError, UsageError
from mlxlm.interruption import SAID
from mlxlm.version import __version__

# typer's own or click's, by the version of typer.
_ParserError = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class _Verbs(TyperGroup):
    """Says what the parser of flags refuses as every other mistake is said: in one line."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """The context of all verbs. Raises UsageError for unknown flags before the verb."""
        try:
            return super().make_context(*arguments, **options)
        except _ParserError as error:
            raise _one_line(error) from error

    def invoke(self, ctx: Any) -> Any:
        """Runs a verb. Raises UsageError for an unknown verb, and for unknown, missing or misspelt flags of it."""
        try:
            return super().invoke(ctx)
        except _ParserError as error:
            raise _one_line(error) from error


def _one_line(error: Any) -> Exception:
    """A mistake as the parser says it ("No such option: --promt Did you mean --prompt?") and where help is. A verb
    without arguments stays what it is: a wish for help.
    """
    if type(error).__name__ == "NoArgsIsHelpError":
        return error
    text = " ".join(error.format_message().split()).rstrip(".")
    place = f" ({error.ctx.command_path} --help lists what there is)" if getattr(error, "ctx", None) else ""
    return UsageError(f"{text[:1].lower()}{text[1:]}{place}")


app = typer.Typer(
    name="mlxlm",
    cls=_Verbs,
    help="Run, fine-tune, pretrain and study Transformers on Apple's MLX. Results go to stdout, the rest to stderr.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_VERBS = (
    generate,
    chat,
    embed,
    fill_mask,
    classify,
    finetune,
    align,
    evaluate,
    plot,
    pretrain,
    families,
    convert,
    fuse,
)
for verb in (*_VERBS, cache_prompt, serve, doctor, plan):
    app.command(verb.__name__.replace("_", "-"), no_args_is_help=verb in (fill_mask, classify, convert))(verb)
# What follows the verb that is launched are its flags, with or without a -- before it.
app.command("launch", context_settings={"allow_interspersed_args": False})(launch)
app.add_typer(tokenizer)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mlxlm {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show a traceback for errors; works anywhere in the line."),
) -> None:
    """Options of all verbs; `run` has taken --debug out already, wherever it stood."""


def run() -> None:
    """Entry point: exit status 0 when all went well, 2 for a user's mistake (one line on stderr), 130 for Ctrl-C."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        app(args=[argument for argument in arguments if argument != "--debug"], prog_name="mlxlm")
    except MlxlmError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except SystemExit as stop:
        # typer makes a silent exit of Ctrl-C.
        if isinstance(getattr(stop.__context__, "__cause__", None), KeyboardInterrupt):
            print(SAID, file=sys.stderr)
        raise
    except UnicodeError as error:
        print(f"error: text that can't be read or written in this encoding: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # The reader of our output has gone, as `| head` does; nothing more can be said on stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        # A full disk, a folder without permission: what the operating system refuses is no bug of ours.
        if debug:
            traceback.print_exc()
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
