"""docs/layout.md against real folders: every file is on its page, and what is `always` there is there."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.main import main
from tests.job import Job, working_in

PAGE = Path(__file__).parents[2] / "docs/layout.md"


@dataclass(frozen=True)
class Entry:
    """A row of a table."""

    pattern: str
    always: bool

    def matches(self, path: str) -> bool:
        regex = re.escape(self.pattern).replace(r"\*\*", ".+")
        regex = re.sub(r"<any\\ [^>]*>", ".+", regex)
        regex = re.sub(r"<[^>]*>", "[^/]+", regex).replace("N" * 8, r"\d{8}")
        return re.fullmatch(regex, path) is not None


def entries(section: str) -> list[Entry]:
    """The table of one section of the page."""
    text = PAGE.read_text(encoding="utf-8")
    body = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert body is not None, section
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", body[1], re.MULTILINE)
    return [Entry(pattern, always.strip() == "yes") for pattern, always in rows]


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def check(section: str, folder: Path) -> None:
    table, files = entries(section), files_of(folder)
    assert [path for path in files if not any(entry.matches(path) for entry in table)] == []
    assert [e.pattern for e in table if e.always and not any(e.matches(path) for path in files)] == []


def test_the_page_has_its_tables() -> None:
    for section in ("Store", "Run", "Published", "Sweep"):
        assert len(entries(section)) >= 5
    assert Entry("commits/NNNNNNNN.json", True).matches("commits/00000012.json")
    assert not Entry("commits/NNNNNNNN.json", True).matches("commits/12.json")
    assert not Entry("points/<slug>/result.json", True).matches("points/a/b/result.json")


@pytest.mark.slow
@pytest.mark.parametrize(("section", "name"), [("Store", "store"), ("Run", "run"), ("Published", "published")])
def test_a_real_folder_is_as_the_page_says(section: str, name: str, job: Job) -> None:
    check(section, job.folder / name)


@pytest.mark.slow
def test_the_held_out_store_is_as_the_page_says(job: Job) -> None:
    table = [entry for entry in entries("Store") if not entry.pattern.startswith(("held_out", ".harvest"))]
    files = files_of(job.folder / "store/held_out")
    assert files
    assert [path for path in files if not any(entry.matches(path) for entry in table)] == []


@pytest.mark.slow
def test_a_sweep_is_as_the_page_says(job: Job, tmp_path: Path) -> None:
    words = [word for word in job.words if word.split("=")[0] not in ("run", "output", "activation.k")]
    with working_in(job.folder):
        assert main(["sweep", *words, f"output={tmp_path / 'sweep'}", "activation.k=2,3", "sweep.evaluate=false"]) == 0
    check("Sweep", tmp_path / "sweep")
    for point in (tmp_path / "sweep/points").iterdir():
        check("Run", point)
