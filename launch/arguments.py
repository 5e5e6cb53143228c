"""The command line of `layerloom`, taken apart."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from activation_store.errors import UserError
from launch.verbs import CHECKPOINT_ACTIONS, STORE_ACTIONS, VERBS


@dataclass(frozen=True)
class Arguments:
    """`verb` is empty for `layerloom --help` and `--version` alone.

    `action` and `folders` belong to `store` and `checkpoint`.
    """

    verb: str
    action: str
    folders: tuple[str, ...]
    overrides: tuple[str, ...]
    config_dir: Path | None
    show_config: bool
    help: bool
    version: bool


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`did you mean "x"? `, or nothing when no name is near."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f'did you mean "{near[0]}"? ' if near else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see: layerloom --help")


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Raises UserError for an unknown verb, option or action."""
    parser = _Parser(prog="layerloom", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--config-dir", "-cd", type=Path)
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument("words", nargs="*")
    parsed = parser.parse_intermixed_args(list(argv))
    words: list[str] = list(parsed.words)
    verb = words.pop(0) if words else ""
    if verb and verb not in VERBS:
        raise UserError(f"{verb} is not a verb; {did_you_mean(verb, VERBS)}the verbs are: {', '.join(VERBS)}")
    if not verb and not (parsed.help or parsed.version):
        raise UserError(f"no verb given; the verbs are: {', '.join(VERBS)} (see: layerloom --help)")
    action = ""
    folders: tuple[str, ...] = ()
    if verb == "store" and not parsed.help:
        action, folders, words = _store_words(words)
    if verb == "checkpoint" and not parsed.help:
        action, folders, words = _checkpoint_words(words)
    return Arguments(
        verb=verb,
        action=action,
        folders=folders,
        overrides=tuple(words),
        config_dir=parsed.config_dir,
        show_config=parsed.cfg is not None,
        help=parsed.help,
        version=parsed.version,
    )


def _store_words(words: list[str]) -> tuple[str, tuple[str, ...], list[str]]:
    """`info FOLDER`, `verify store.path=FOLDER`: the action, the folders that stand alone, the overrides."""
    actions = " | ".join(STORE_ACTIONS)
    if not words or words[0] not in STORE_ACTIONS:
        given = f"store {words[0]}" if words else "store alone"
        raise UserError(f"{given} is not a command; want: layerloom store {actions} FOLDER")
    folders = tuple(word for word in words[1:] if "=" not in word)
    overrides = [word for word in words[1:] if "=" in word]
    if words[0] == "merge":
        if len(folders) < 2 or not any(word.startswith("output=") for word in overrides):
            raise UserError("store merge joins several stores; want: layerloom store merge FOLDER FOLDER output=FOLDER")
    elif len(folders) > 1:
        raise UserError(f"store {words[0]} looks at one folder, got {len(folders)}: {' '.join(folders)}")
    return words[0], folders, overrides


def _checkpoint_words(words: list[str]) -> tuple[str, tuple[str, ...], list[str]]:
    """`info FOLDER`, `convert FOLDER output=FOLDER`: the action, the folder if it stands alone, the overrides."""
    actions = " | ".join(CHECKPOINT_ACTIONS)
    if not words or words[0] not in CHECKPOINT_ACTIONS:
        given = f"checkpoint {words[0]}" if words else "checkpoint alone"
        raise UserError(f"{given} is not a command; want: layerloom checkpoint {actions} FOLDER")
    folders = tuple(word for word in words[1:] if "=" not in word)
    overrides = [word for word in words[1:] if "=" in word]
    if len(folders) > 1:
        raise UserError(f"checkpoint {words[0]} looks at one folder, got {len(folders)}: {' '.join(folders)}")
    if words[0] == "convert" and not any(word.startswith("output=") for word in overrides):
        raise UserError(
            "checkpoint convert writes a new folder; want: layerloom checkpoint convert FOLDER output=FOLDER"
        )
    return words[0], folders, overrides
