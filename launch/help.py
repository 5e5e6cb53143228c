"""`layerloom --help` and docs/configs.md, both from the config dataclasses and the YAML files of conf/."""

import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launch.compose import Composed
from launch.groups import Option
from launch.knobs import Knob, group_summaries, knobs
from launch.verbs import VERBS

USAGE = "layerloom VERB [GROUP=OPTION ...] [KEY=VALUE ...] [--config-dir DIR] [--cfg job] [--help] [--version]"
_OTHER_SUMMARIES = {"preset": "Named choices over all groups, applied last."}


def help_text(verb: str, options: dict[str, list[Option]], composed: Composed) -> str:
    """The help of one verb (or of all, if empty); values are those of `composed`, `*` marks the chosen options."""
    width = min(shutil.get_terminal_size((110, 24)).columns, 120)
    groups, keys = _reads(verb, options)
    words = f"{verb} {VERBS[verb].words}".rstrip() if verb else "VERB"
    lines = [f"usage: {USAGE.replace('VERB', words)}", ""]
    if verb:
        lines += [f"layerloom {verb}: {VERBS[verb].summary}", ""]
    else:
        lines += ["Verbs", *(f"  {name:<10}{entry.summary}" for name, entry in VERBS.items()), ""]
    lines += [
        "--config-dir DIR adds your own options (DIR/model/mine.yaml is model=mine); "
        "--cfg job prints the resolved config and stops.",
        "",
        "Groups and their options (* chosen)",
    ]
    for group in groups:
        lines += [f"  {group}: {_group_summary(group)}"]
        for option in options.get(group, []):
            mark = "*" if composed.choices.get(group) == option.name else " "
            lines += _hanging(f"   {mark} {option.name:<20} ", option.summary, width)
    lines += ["", "Knobs (KEY=VALUE), with the value that they have now"]
    for knob in knobs().values():
        if knob.group in groups or knob.key in keys:
            lines += _knob_lines(knob, OmegaConf.select(composed.node, knob.key), width)
    return "\n".join(lines)


def configs_page(options: dict[str, list[Option]], composed: Composed) -> str:
    """docs/configs.md."""
    lines = [_PAGE_HEAD]
    for group in _ordered(options):
        lines += [f"## {group}", "", _group_summary(group), "", "| option | |", "|---|---|"]
        for option in options[group]:
            default = " (default)" if composed.choices.get(group) == option.name else ""
            lines.append(f"| `{group}={option.name}`{default} | {option.summary} |")
        own = [knob for knob in knobs().values() if knob.group == group]
        lines += ["", *(_table(own, composed.node) if own else [])]
    lines += ["## Keys shared by the verbs", "", *_table([k for k in knobs().values() if not k.group], composed.node)]
    return "\n".join(lines).rstrip() + "\n"


def _table(own: list[Knob], composed: DictConfig) -> list[str]:
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    for knob in own:
        kind = ", ".join(knob.choices) or knob.type_name
        comment = "as above" if knob.shares_comment else knob.comment.replace("|", "\\|")
        lines.append(f"| `{knob.key}` | {kind} | `{_shown(OmegaConf.select(composed, knob.key))}` | {comment} |")
    return [*lines, ""]


def _reads(verb: str, options: dict[str, list[Option]]) -> tuple[list[str], list[str]]:
    if verb:
        return list(VERBS[verb].groups), list(VERBS[verb].keys)
    return _ordered(options), [knob.key for knob in knobs().values() if not knob.group]


def _ordered(options: dict[str, list[Option]]) -> list[str]:
    known = [*group_summaries(), *_OTHER_SUMMARIES]
    return sorted(options, key=lambda group: known.index(group) if group in known else len(known))


def _group_summary(group: str) -> str:
    return group_summaries().get(group) or _OTHER_SUMMARIES.get(group, "")


def _knob_lines(knob: Knob, value: Any, width: int) -> Iterator[str]:
    kind = "|".join(knob.choices) if knob.choices else knob.type_name
    yield f"  {knob.key}={_shown(value)}  ({kind})"
    comment = "(as above)" if knob.shares_comment else knob.comment
    yield from _hanging(" " * 6, comment, width) if comment else ()


def _hanging(head: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head)) or [head.rstrip()]


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return str(value) or "''"
    if OmegaConf.is_config(value):
        return str(OmegaConf.to_container(value))
    return str(value)


_PAGE_HEAD = """# Configs

`layerloom VERB [GROUP=OPTION ...] [KEY=VALUE ...]`: an option is a YAML file of `conf/GROUP/`, a key is one knob. Later
words win over earlier ones, keys over options, and a `preset` over the options of every group. Unknown names and
values of a wrong type are refused before anything runs.

- `layerloom VERB --help` prints what that verb reads, with the values that the given overrides would give it;
  `--cfg job` prints the whole resolved config.
- Your own options: `--config-dir DIR`, where `DIR/model/mine.yaml` becomes `model=mine`. A file that sets several
  groups at once starts with `# @package _global_` and lies in `DIR/preset/`.
- A value with spaces, commas or brackets wants Hydra's quotes inside the shell's: `text.path='"/data/a b"'`.
- Paths are taken from the folder in which the command runs. Hydra writes no files of its own and changes no folder.

This page is written by `python -m launch.help_page` from the dataclasses (`activation_store/config.py`,
`trainer/config.py`, `launch/config.py`) and from `conf/`; a test keeps it current.
"""
