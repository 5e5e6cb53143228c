"""Documents from local files through `datasets`: order, names, held-out ones, and what a user can get wrong."""

import json
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import IterableDataset, config

from activation_store.config import Loader, TextConfig
from activation_store.errors import UserError
from activation_store.text import Document, _read_stream, open_documents, stream_documents

TEXTS = [f"speech {i}\nsecond line of {i}" for i in range(12)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a local path went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # The files would be looked up again were `datasets` told that it is online.
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


def text_folder(path: Path) -> Path:
    path.mkdir()
    for number, text in enumerate(TEXTS):
        (path / f"{number:02d}.txt").write_text(text)
    return path


def jsonl_file(path: Path) -> Path:
    path.write_text("\n".join(json.dumps({"body": text, "year": 1900}) for text in TEXTS))
    return path


def parquet_file(path: Path) -> Path:
    pq.write_table(pa.table({"body": TEXTS, "year": [1900] * 12}), path)
    return path


def all_documents(cfg: TextConfig) -> list[Document]:
    return [*stream_documents(cfg, held_out=True), *stream_documents(cfg, held_out=False)]


@pytest.fixture(params=["text", "glob", "jsonl", "parquet"])
def text(request: pytest.FixtureRequest, tmp_path: Path) -> TextConfig:
    if request.param in ("text", "glob"):
        folder = text_folder(tmp_path / "speeches")
        return TextConfig(path=str(folder if request.param == "text" else folder / "*.txt"), held_out_documents=5)
    make = jsonl_file if request.param == "jsonl" else parquet_file
    return TextConfig(path=str(make(tmp_path / f"d.{request.param}")), column="body", held_out_documents=5)


def test_documents_come_in_seeded_order(text: TextConfig) -> None:
    documents = all_documents(text)
    assert [document.index for document in documents] == list(range(12))
    assert sorted(document.text for document in documents) == sorted(TEXTS)
    assert [document.text for document in documents] != TEXTS
    assert all_documents(text) == documents
    assert len(list(stream_documents(text, held_out=True))) == 5
    text.seed = 1
    assert [document.text for document in all_documents(text)] != [document.text for document in documents]


def test_start_skips_documents_of_the_part(text: TextConfig) -> None:
    for held_out in (True, False):
        whole = list(stream_documents(text, held_out=held_out))
        assert list(stream_documents(text, held_out=held_out, start=2)) == whole[2:]
        assert list(stream_documents(text, held_out=held_out, start=99)) == []


def test_names_say_where_a_document_came_from(text: TextConfig) -> None:
    for document in all_documents(text):
        number = TEXTS.index(document.text)
        assert document.name in (f"{number:02d}.txt", f"d.jsonl row {number}", f"d.parquet row {number}")


def test_fingerprint_sees_added_documents(tmp_path: Path) -> None:
    cfg = TextConfig(path=str(text_folder(tmp_path / "a")), held_out_documents=5)
    moved = TextConfig(path=str(text_folder(tmp_path / "b")), held_out_documents=5)
    before = open_documents(cfg).fingerprint
    assert open_documents(moved).fingerprint == before
    (tmp_path / "a" / "more.txt").write_text("one more")
    assert open_documents(cfg).fingerprint != before


def test_a_stream_is_shuffled_held_out_and_skipped() -> None:
    """The code of hub streams, on a stream of local rows."""
    cfg = TextConfig(path="owner/name", column="body", held_out_documents=5, shuffle_buffer=4)
    rows = IterableDataset.from_generator(lambda: ({"body": text} for text in TEXTS))
    whole = list(_read_stream(cfg, rows, 0, None))
    assert sorted(document.text for document in whole) == sorted(TEXTS)
    assert [document.text for document in whole] != TEXTS
    assert list(_read_stream(cfg, rows, 3, 7)) == whole[3:7]
    assert whole[2].name == "owner/name document 2"


def test_a_stream_of_many_files_is_read_from_many_places() -> None:
    """Neighbouring documents come from all over the text, and none is lost or comes twice."""
    cfg = TextConfig(path="owner/name", held_out_documents=0, shuffle_buffer=32)
    files = [[f"{file} {row}" for row in range(10 + file % 3)] for file in range(40)]
    rows = IterableDataset.from_generator(
        lambda files: ({"text": text} for file in files for text in file), gen_kwargs={"files": files}
    )
    found = [document.text for document in _read_stream(cfg, rows, 0, None)]
    assert sorted(found) == sorted(text for file in files for text in file)
    assert len({text.split()[0] for text in found[:32]}) >= 16
    assert [document.text for document in _read_stream(cfg, rows, 100, 120)] == found[100:120]


def test_bytes_that_are_not_utf8_do_not_stop_a_harvest(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "a")
    (folder / "00.txt").write_bytes(b"caf\xe9 speech")
    texts = [document.text for document in all_documents(TextConfig(path=str(folder), held_out_documents=0))]
    assert "caf\ufffd speech" in texts


def bad_texts(tmp_path: Path) -> dict[str, tuple[TextConfig, str]]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    folder = text_folder(tmp_path / "mixed")
    jsonl_file(folder / "x.jsonl")
    speeches = str(text_folder(tmp_path / "speeches"))
    table = str(jsonl_file(tmp_path / "d.jsonl"))
    return {
        "missing": (TextConfig(path=str(tmp_path / "no.txt")), "no.txt does not exist; give a file, a folder"),
        "empty": (TextConfig(path=str(tmp_path / "empty")), "matches no .*files"),
        "glob": (TextConfig(path=str(tmp_path / "*.pq")), "matches no .*files"),
        "mixed": (TextConfig(path=str(folder)), "files with .jsonl, .txt; set text.loader"),
        "column": (TextConfig(path=table), "text.column=text is not a column of .*; the columns are body, year"),
        "broken": (TextConfig(path=str(tmp_path / "broken.jsonl")), "cannot be read as jsonl: .*"),
        "damaged": (TextConfig(path=str(tmp_path / "broken.parquet")), "cannot be read as parquet: .*"),
        "no rows": (TextConfig(path=str(tmp_path / "none.jsonl")), "none.jsonl has no documents"),
        "numbers": (
            TextConfig(path=str(tmp_path / "numbers.jsonl"), held_out_documents=1),
            "text.column=text of numbers.jsonl row . holds int, not text",
        ),
        "held out": (TextConfig(path=speeches, held_out_documents=12), "has 12 documents and .*=12 .*none is left"),
        "package": (TextConfig(path="package://not_there/x.txt"), "not_there is not installed; run: pip install"),
    }


@pytest.mark.parametrize(
    "case",
    ["missing", "empty", "glob", "mixed", "column", "broken", "damaged", "no rows", "numbers", "held out", "package"],
)
def test_bad_text_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    cfg, message = bad_texts(tmp_path)[case]
    with pytest.raises(UserError, match=message) as caught:
        all_documents(cfg)
    assert "\n" not in str(caught.value)


def test_a_stream_that_ends_too_soon_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS))
    monkeypatch.setattr("activation_store.text._load_hub", lambda cfg: rows)
    cfg = TextConfig(path="owner/name", loader=Loader.hub, held_out_documents=12)
    assert len(list(stream_documents(cfg, held_out=True))) == 12
    with pytest.raises(UserError, match="none is left to train on"):
        list(stream_documents(cfg, held_out=False))
