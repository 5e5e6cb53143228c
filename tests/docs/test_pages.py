"""Pages that are made from the code are current, and links between pages lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from launch.compose import compose_config
from launch.help_page import page
from trainer.rows import harvest_settings
from trainer.run_folder import FREE_FIELDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_configs_page_is_current() -> None:
    assert (ROOT / "docs/configs.md").read_text(encoding="utf-8") == page(), "run: make docs"


@pytest.mark.parametrize("file", PAGES, ids=[file.name for file in PAGES])
def test_links_and_named_pages_exist(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    linked = [(file.parent / target).resolve() for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)]
    named = [ROOT / name for name in re.findall(r"\bdocs/[a-z_]+\.md\b", text)]
    assert [path for path in (*linked, *named) if not path.exists()] == []


def test_the_tour_of_the_readme_trains_on_what_it_harvests() -> None:
    """Its command lines compose, in their order, and what train compares with a store is what was harvested there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    tour = text.split("## A short tour")[1].split("\n## ")[0]
    lines = re.findall(r"^    layerloom ((?:harvest|train|sweep|evaluate|publish) [^#\n]*)", tour, re.MULTILINE)
    harvested = {}
    compared = 0
    for verb, *words in map(shlex.split, lines):
        config = compose_config(words, verb=verb)
        if verb == "harvest":
            harvested[config.store.path] = (config.subject, harvest_settings(config), config.text.path)
        elif verb in ("train", "sweep"):
            wanted = harvested[config.store.path]
            assert (config.subject, harvest_settings(config), config.text.path) == wanted, verb
            compared += 1
    assert compared == 2


def test_train_page_names_what_may_differ_between_calls() -> None:
    text = (ROOT / "docs/train.md").read_text(encoding="utf-8")
    told = text.split("What weights do not depend on may differ between calls")[1].split("Anything else")[0]
    words = set(re.findall(r"\w+", told))
    assert [field for field in FREE_FIELDS if not set(field.split(".")) <= words] == []
