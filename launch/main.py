"""The `layerloom` command: takes the words apart, composes the config, calls one stage, turns errors into one line."""

import signal
import sys
from collections.abc import Sequence

from activation_store.errors import UserError, os_error_line
from launch.arguments import Arguments, parse_arguments
from launch.verbs import VERBS

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. 0: done; 1: some points of a sweep failed, or damage found; 2: a user's mistake; 130: Ctrl-C."""
    try:
        return _run(parse_arguments(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"layerloom: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("layerloom: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `layerloom --help | head`: nobody reads on, and the interpreter must not flush into the closed pipe at exit.
        sys.stdout = None
        return 0
    except OSError as error:
        # A folder that may not be written, a disk or a network that failed: nothing that a traceback would explain.
        print(f"layerloom: {os_error_line(error)}", file=sys.stderr)
        return EXIT_USER_ERROR


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
