"""Labels of a chosen option (model names, licences) are not those of another path that the user gives."""

from collections.abc import Collection
from importlib import resources
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from launch.groups import CONF_PACKAGE

# What is said about `path`, by group.
LABELS = {"subject": ("base_model", "model_name", "license"), "text": ("license",)}


def drop_foreign_labels(
    node: DictConfig, choices: dict[str, str], given: Collection[str], config_dir: Path | None
) -> None:
    """Empties the labels that came with an option of which `path` was replaced, so that no card names a wrong model.

    Kept are those of `given` (keys of overrides) and of the chosen preset.
    """
    preset = _option(config_dir, "preset", choices.get("preset", "none"))
    for group, labels in LABELS.items():
        option = _option(config_dir, group, choices[group])
        own = option.get(group, option)
        if node[group].path == own.get("path"):
            continue
        kept = preset.get(group, {})
        for label in labels:
            if f"{group}.{label}" not in given and label not in kept:
                node[group][label] = ""


def _option(config_dir: Path | None, group: str, name: str) -> DictConfig:
    """The YAML of an option, as it is written; built-in ones come first, as in `launch.groups`."""
    built_in = resources.files(CONF_PACKAGE) / group / f"{name}.yaml"
    text = built_in.read_text(encoding="utf-8") if built_in.is_file() else ""
    if not text and config_dir is not None and (config_dir / group / f"{name}.yaml").is_file():
        text = (config_dir / group / f"{name}.yaml").read_text(encoding="utf-8")
    created = OmegaConf.create(text)
    return created if isinstance(created, DictConfig) else DictConfig({})
