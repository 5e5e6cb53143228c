"""Every knob with its type, choices and documentation, read from the config dataclasses themselves.

The comment above a field is its documentation: `layerloom --help` and docs/configs.md print it from here, so that there
is one source. A comment stands for the fields that follow it without a comment or blank line of their own.
"""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

from launch.config import LayerloomConfig


@dataclass(frozen=True)
class Knob:
    """One leaf of the config: `key` is dotted (`store.path`), `group` is its first part or empty."""

    key: str
    group: str
    type_name: str
    choices: tuple[str, ...]
    default: Any
    comment: str
    # The comment stands above an earlier field and covers this one too.
    shares_comment: bool


@cache
def knobs() -> dict[str, Knob]:
    """All knobs by dotted key, in the order of the dataclasses; the keys shared by the verbs come last."""
    found = list(_walk(LayerloomConfig, ""))
    found.sort(key=lambda knob: knob.group == "")
    return {knob.key: knob for knob in found}


@cache
def group_summaries() -> dict[str, str]:
    """First sentence of the docstring of each group's dataclass, by group."""
    summaries = {}
    for field in dataclasses.fields(LayerloomConfig):
        kind = typing.get_type_hints(LayerloomConfig)[field.name]
        if dataclasses.is_dataclass(kind):
            summaries[field.name] = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
    return summaries


def _walk(config_class: type, group: str) -> Iterator[Knob]:
    hints = typing.get_type_hints(config_class)
    comments = _comments(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _walk(kind, f"{group}{field.name}.")
            continue
        comment, shared = comments.get(field.name, ("", False))
        type_name, choices = _describe_type(kind)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        yield Knob(f"{group}{field.name}", group.rstrip("."), type_name, choices, default, comment, shared)


def _describe_type(kind: Any) -> tuple[str, tuple[str, ...]]:
    """`("int or null", ())`, or the members of an enum as choices."""
    if isinstance(kind, types.UnionType):
        names = [_describe_type(part)[0] if part is not types.NoneType else "null" for part in typing.get_args(kind)]
        return " or ".join(names), ()
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return kind.__name__, tuple(member.name for member in kind)
    if typing.get_origin(kind) is list and dataclasses.is_dataclass(typing.get_args(kind)[0]):
        names = [field.name for field in dataclasses.fields(typing.get_args(kind)[0])]
        return f"list of {{{', '.join(names)}}}", ()
    return (kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)), ()


def _comments(config_class: type) -> dict[str, tuple[str, bool]]:
    """Field name -> (comment, whether it stands above an earlier field), for the class and those it inherits from."""
    found: dict[str, tuple[str, bool]] = {}
    for base in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(base):
            found.update(_own_comments(base))
    return found


def _own_comments(config_class: type) -> dict[str, tuple[str, bool]]:
    source = textwrap.dedent(inspect.getsource(config_class))
    lines = source.splitlines()
    tree = ast.parse(source).body[0]
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, tuple[str, bool]] = {}
    previous: tuple[str, int] = ("", -1)
    for node in tree.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        above = node.lineno - 2
        block: list[str] = []
        while lines[above].lstrip().startswith("#"):
            block.insert(0, lines[above].strip().removeprefix("#").strip())
            above -= 1
        follows = previous[1] == node.lineno - 1
        comment = " ".join(block) if block else (previous[0] if follows else "")
        found[node.target.id] = (comment, not block and bool(comment))
        previous = (comment, node.end_lineno or node.lineno)
    return found
