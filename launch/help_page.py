"""Writes docs/configs.md: `python -m launch.help_page docs/configs.md`."""

import sys
from pathlib import Path

from launch.compose import compose_node
from launch.groups import find_options
from launch.help import configs_page


def page() -> str:
    """The page, from the dataclasses and conf/ as they are now."""
    return configs_page(find_options(), compose_node([]))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
