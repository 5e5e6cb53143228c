"""Overrides -> one typed config. Hydra's errors become one line: what was given, what is wanted, what to do."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from activation_store.errors import UserError
from launch.arguments import did_you_mean
from launch.config import LayerloomConfig
from launch.groups import CONF_PACKAGE, find_options
from launch.knobs import Knob, knobs
from launch.labels import drop_foreign_labels
from launch.schema import register_schema
from launch.verbs import VERBS

VERSION_BASE = "1.3"
CONFIG_NAME = "config"


@dataclass(frozen=True)
class Composed:
    """A composed config before its conversion, and the option that each group has."""

    node: DictConfig
    choices: dict[str, str]


def compose_config(overrides: Sequence[str], config_dir: Path | None = None, *, verb: str = "") -> LayerloomConfig:
    """The config of one verb, as plain dataclasses.

    Raises UserError (one line) for an unknown group, option, key or value, in `overrides` or in a file of `config_dir`.
    """
    return to_config(compose_node(overrides, config_dir, verb=verb))


def to_config(composed: Composed) -> LayerloomConfig:
    """The one place where a DictConfig becomes dataclasses."""
    try:
        config = OmegaConf.to_object(composed.node)
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error)) from None
    assert isinstance(config, LayerloomConfig)
    return config


def compose_node(overrides: Sequence[str], config_dir: Path | None = None, *, verb: str = "") -> Composed:
    """Composes conf/ and `config_dir` under `overrides`; a sweep's several values are left to the sweeper."""
    parsed = parse_overrides(overrides)
    check_names(parsed, config_dir, verb)
    several = [override for override in parsed if override.is_sweep_override()]
    if several and verb != "sweep":
        word = several[0].input_line
        raise UserError(f"{word}: several values make a sweep; give one, or run: layerloom sweep {word}")
    single = [_word(override) for override in parsed if not override.is_sweep_override()]
    register_schema()
    try:
        with initialize_config_module(CONF_PACKAGE, version_base=VERSION_BASE):
            node = compose(
                CONFIG_NAME, overrides=[*search_path_override(config_dir), *single], return_hydra_config=True
            )
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(_one_line(error)) from None
    choices = {str(group): str(option) for group, option in node.hydra.runtime.choices.items()}
    with open_dict(node):
        del node["hydra"]
    drop_foreign_labels(node, choices, {str(override.key_or_group) for override in parsed}, config_dir)
    return Composed(node, choices)


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Hydra's own parser; a word that it cannot read is a UserError."""
    parser = OverridesParser.create()
    parsed = []
    for word in overrides:
        try:
            parsed.append(parser.parse_override(word))
        except HydraException:
            raise UserError(
                f"{word}: want KEY=VALUE or GROUP=OPTION; put a value with spaces, commas or brackets into quotes: "
                "KEY='\"a value\"'"
            ) from None
    return parsed


def check_names(overrides: Iterable[Override], config_dir: Path | None, verb: str) -> None:
    """Refuses what is not there, with the nearest name that is, and what `verb` would not read."""
    options = find_options(config_dir)
    for override in overrides:
        key = override.key_or_group
        if key.split(".")[0].split("/")[0] == "hydra":
            continue
        if key in options:
            _check_option(override, [option.name for option in options[key]])
        elif not _is_key(key):
            near = did_you_mean(key, [*knobs(), *options])
            raise UserError(f"{override.input_line}: there is no key or group {key}; {near}see: layerloom --help")
        elif override.is_add() or override.is_delete():
            raise UserError(f"{override.input_line}: keys are neither added nor deleted; want {key}=VALUE")
        _check_read(override, verb)


def _check_read(override: Override, verb: str) -> None:
    """A verb that takes its settings from a run refuses those that it would pass over in silence."""
    entry = VERBS.get(verb)
    key = str(override.key_or_group)
    if entry is None or not entry.strict or {key, key.split(".", maxsplit=1)[0]} & {*entry.groups, *entry.keys}:
        return
    reads = ", ".join([*(f"{group}.*" for group in entry.groups if group != "preset"), *entry.keys])
    raise UserError(f"{override.input_line}: layerloom {verb} does not read {key}; it reads {reads}")


def _check_option(override: Override, names: list[str]) -> None:
    values = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
    for value in values:
        if value not in names:
            wanted = f"the options are: {', '.join(names)}"
            raise UserError(
                f"{override.input_line}: {override.key_or_group} has no option {value}; "
                f"{did_you_mean(str(value), names)}{wanted}"
            )


def _is_key(key: str) -> bool:
    return key in knobs() or key.startswith("sweep.params") or _is_free(key)


def _is_free(key: str) -> bool:
    """Whether it is a knob with keys of its own that Layerloom does not know, or one of these."""
    knob = next((knob for knob in knobs().values() if key == knob.key or key.startswith(f"{knob.key}.")), None)
    return knob is not None and isinstance(knob.default, dict) and knob.group != "sweep"


def _word(override: Override) -> str:
    """As Hydra wants it: keys that no dataclass has must be added."""
    return f"++{override.input_line}" if _is_free(override.key_or_group) else str(override.input_line)


def _one_line(error: Exception) -> str:
    """What went wrong, without Hydra's frames: OmegaConf's key and reason, or else Hydra's own words."""
    cause = next((e for e in (error.__cause__, error.__context__) if isinstance(e, OmegaConfBaseException)), error)
    if isinstance(cause, ConfigKeyError):
        key = str(cause.full_key or cause.key)
        return f"{key}: there is no such key; {did_you_mean(key, knobs())}see: layerloom --help"
    if isinstance(cause, ValidationError) and cause.full_key:
        knob = knobs().get(str(cause.full_key))
        return f"{cause.full_key}: {_reason(cause)}" + (f"; want {wanted(knob)}" if knob else "")
    return re.sub(r"\s+", " ", str(error)).strip()


def _reason(error: OmegaConfBaseException) -> str:
    first = str(error.msg or error).splitlines()[0]
    return re.sub(r", expected one of .*", "", first)


def wanted(knob: Knob) -> str:
    """The values that a knob takes, in words."""
    if knob.choices:
        return "one of " + ", ".join(knob.choices)
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    return " or ".join(words.get(part, part) for part in knob.type_name.split(" or "))


def search_path_override(config_dir: Path | None) -> list[str]:
    """Hydra's override that makes the options of `config_dir` known; empty without one."""
    return [f"hydra.searchpath=[{quoted(f'file://{config_dir.resolve()}')}]"] if config_dir else []


def quoted(text: str) -> str:
    """`text` as a value in Hydra's grammar, whatever characters it has."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
