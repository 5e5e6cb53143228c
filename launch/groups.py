"""The config groups and their options: the YAML files of conf/, and those of a user's own --config-dir."""

from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from activation_store.errors import UserError

CONF_PACKAGE = "conf"


@dataclass(frozen=True)
class Option:
    """One YAML file of a group: `model/clt.yaml` is the option `clt` of the group `model`."""

    group: str
    name: str
    summary: str


def find_options(config_dir: Path | None = None) -> dict[str, list[Option]]:
    """Options by group, the packaged ones first, then those of `config_dir`.

    Raises UserError if `config_dir` is not a folder or has an option of a built-in one's name, which Hydra would pass
    over in silence.
    """
    groups = _options_below(resources.files(CONF_PACKAGE))
    if config_dir is None:
        return groups
    if not config_dir.is_dir():
        raise UserError(f"--config-dir {config_dir} is not a folder; give one with files such as model/mine.yaml")
    for group, options in _options_below(config_dir).items():
        taken = {option.name for option in groups.get(group, [])}
        for option in options:
            if option.name in taken:
                raise UserError(
                    f"{config_dir / group / option.name}.yaml has the name of the built-in option "
                    f"{group}={option.name}, which would hide it; rename the file"
                )
        groups[group] = groups.get(group, []) + options
    return groups


def _options_below(root: Traversable) -> dict[str, list[Option]]:
    groups: dict[str, list[Option]] = {}
    for folder in sorted(root.iterdir(), key=lambda entry: entry.name):
        if not folder.is_dir() or folder.name.startswith(("_", ".")):
            continue
        files = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
        if files:
            groups[folder.name] = [
                Option(folder.name, name.removesuffix(".yaml"), _summary(folder / name)) for name in files
            ]
    return groups


def _summary(file: Traversable) -> str:
    """The comment that the file starts with (`# @package` lines are Hydra's own)."""
    words: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            words.append(line.removeprefix("#").strip())
    return " ".join(words)
