"""The `layerloom` command: takes the words apart, composes the config, calls one stage, turns errors into one line."""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType

from activation_store.errors import OwnError, PeersLostError, UserError, os_error_line
from launch.arguments import Arguments, parse_arguments
from launch.verbs import VERBS
from trainer.parallel.launcher import adopt_launcher, is_first_process, process_count

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. 0: done; 1: some points of a sweep failed, or damage found; 2: a user's mistake; 130: Ctrl-C.

    Of several processes of one job (a mesh), the first one speaks where all would say the same.
    """
    words = sys.argv[1:] if argv is None else argv
    # Options may come before the verb; what is wrong with the words is told below.
    verb = next((word for word in words if word in VERBS), "")
    if verb == "harvest":
        # Each process harvests what no other has claimed: any number of them, launched in any way.
        return _told(words, speaks=True)
    adopt_launcher()
    if process_count() == 1:
        return _told(words, speaks=True)
    if verb and not VERBS[verb].on_a_mesh:
        if is_first_process():
            told = f"{verb} is for one process, and {process_count()} were started; start it without torchrun or srun"
            print(f"layerloom: {told}", file=sys.stderr)
        return EXIT_USER_ERROR
    sys.excepthook = _end_at_once
    code = _told(words, speaks=is_first_process())
    if code != 0:
        _end(code)
    return code


def _told(words: Sequence[str], *, speaks: bool) -> int:
    """Runs one verb and tells what went wrong in one line, if this process `speaks` for all or has met it alone."""

    def say(text: str, *, always: bool = False) -> None:
        if speaks or always:
            print(f"layerloom: {text}", file=sys.stderr)

    try:
        return _run(parse_arguments(words))
    except PeersLostError as error:
        if error.tell:
            say(str(error), always=True)
        return EXIT_USER_ERROR
    except UserError as error:
        say(str(error), always=isinstance(error, OwnError))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `layerloom --help | head`: nobody reads on, and the interpreter must not flush into the closed pipe at exit.
        sys.stdout = None
        return 0
    except OSError as error:
        # A folder that may not be written, a disk or a network that failed: nothing that a traceback would explain.
        say(os_error_line(error), always=True)
        return EXIT_USER_ERROR


def _end(code: int) -> None:
    """Ends a process of several at once: a thread that waits for the others would keep it, and it them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_at_once(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The hook for what nobody caught: its traceback, and then the end, which the other processes notice."""
    traceback.print_exception(kind, error, trace)
    _end(1)


def _run(arguments: Arguments) -> int:
    if arguments.version:
        return _print_version()
    # Hydra takes a third of a second to import, torch much more: neither before the words are known to be right.
    from launch.compose import compose_node, to_config
    from launch.groups import find_options

    composed = compose_node(arguments.overrides, arguments.config_dir, verb=arguments.verb)
    if arguments.help:
        from launch.help import help_text

        print(help_text(arguments.verb, find_options(arguments.config_dir), composed))
        return 0
    if arguments.show_config:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(composed.node), end="")
        return 0
    from launch import stages

    config = to_config(composed)
    return int(getattr(stages, VERBS[arguments.verb].handler)(config, arguments))


def _print_version() -> int:
    from importlib.metadata import version

    print(f"layerloom {version('layerloom')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
