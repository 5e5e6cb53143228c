"""Harvesting a small real subject: right rows, every refusal, and the same bytes after any interruption."""

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from activation_store.config import Dtype, Loader, StoreConfig, StoreDtype, SubjectConfig, TextConfig
from activation_store.documents import DocumentIndex
from activation_store.errors import UserError
from activation_store.harvest import harvest
from activation_store.hooks import CaptureHooks
from activation_store.manifest import read_commits
from activation_store.store import ActivationStore
from activation_store.subject import load_subject
from activation_store.text import stream_documents
from activation_store.verify import verify_store
from tests.store.harvesting import Configs, harvest_in_child
from tests.store.test_shards import tree
from tests.tiny import BOS_ID, sentences

# Of 12 contexts of 24 tokens in 3 layers: six or seven windows in most tests.
WINDOW_BYTES = 12 * 24 * 3 * 16 * 2 * 4


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: fsync is free, and what is killed is killed in the middle of work."""
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as path:
        yield Path(path)


@pytest.fixture
def configs(folder: Path, tiny_llama: Path, tiny_text: Path) -> Configs:
    return (
        SubjectConfig(path=str(tiny_llama), cache_dir=str(folder / "cache")),
        TextConfig(
            path=str(tiny_text),
            context_length=24,
            contexts_per_document=4,
            held_out_documents=5,
            documents_per_block=6,
        ),
        StoreConfig(
            path=str(folder / "store"),
            tokens=1500,
            held_out_tokens=150,
            chunk_rows=16,
            shard_rows=96,
            batch_contexts=5,
            window_bytes=WINDOW_BYTES,
            claim_seconds=0.4,
        ),
    )


def changed(
    configs: Configs, subject: dict | None = None, text: dict | None = None, store: dict | None = None
) -> Configs:
    return (
        replace(configs[0], **(subject or {})),
        replace(configs[1], **(text or {})),
        replace(configs[2], **(store or {})),
    )


@pytest.mark.parametrize(("start", "stop"), [(0, None), (1, 2)])
def test_rows_are_what_the_subject_computes_on_each_document_alone(
    configs: Configs, start: int, stop: int | None
) -> None:
    configs = changed(configs, store={"dtype": StoreDtype.float32, "layer_start": start, "layer_stop": stop})
    summary = harvest(*configs, device="cpu")
    store = ActivationStore.open(configs[2].path)
    assert 1500 <= summary.rows == store.n_rows < 1500 + 24
    assert store.layers == tuple(range(3))[start:stop]
    subject = load_subject(configs[0], device=torch.device("cpu"))
    hooks = CaptureHooks(subject, input_hook="resid_mid", layer_start=start, layer_stop=stop)
    index = DocumentIndex(store)
    assert store.n_rows == sum(len(index.rows(document)) for document in index.names)
    for document in list(index.names)[::4]:
        rows = index.read(document)
        assert set(rows.document_ids.tolist()) == {document}
        first_of_piece = torch.nonzero(rows.positions == 0).flatten().tolist()
        for begin, end in zip(first_of_piece, [*first_of_piece[1:], len(rows)], strict=True):
            piece = slice(begin, end)
            assert rows.token_ids[begin] == BOS_ID
            assert rows.positions[piece].tolist() == list(range(end - begin))
            alone = hooks.capture(rows.token_ids[None, piece], rows.positions[None, piece])
            torch.testing.assert_close(rows.mlp_in[piece], alone.mlp_in_NCLD[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(rows.mlp_out[piece], alone.mlp_out_NCLD[0], rtol=1e-4, atol=1e-5)


def test_held_out_documents_are_whole_and_apart(configs: Configs) -> None:
    summary = harvest(*configs, device="cpu")
    store = ActivationStore.open(configs[2].path)
    held_out = store.held_out()
    assert held_out is not None
    # 150 tokens over 5 documents in contexts of 24: two contexts of each that has them.
    assert set(held_out[:].document_ids.tolist()) == set(range(5))
    counts = torch.bincount(held_out[:].document_ids)
    assert counts.max() <= 48
    assert 150 <= held_out.n_rows == summary.held_out_rows <= 240
    assert store[:].document_ids.min() >= 5
    names = {document.name for document in stream_documents(configs[1], held_out=True)}
    committed = {document.name for commit in read_commits(held_out.path) for document in commit.documents}
    assert committed == names
    trained = {document.name for commit in read_commits(store.path) for document in commit.documents}
    assert not trained & names
    assert store.manifest.special_token_ids[:3] == [0, 1, 2]
    assert (store[:].positions.numpy()[store.used_rows()] > 0).all()


def test_complete_store_is_left_alone(
    configs: Configs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harvest(*configs, device="cpu")
    printed = capsys.readouterr().err
    assert "rows x 3 layers x 16 x 2 in float16" in printed
    assert "free)" in printed
    assert "tok/s" in printed

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the subject was loaded")

    monkeypatch.setattr("activation_store.harvest.load_subject", refuse)
    before = tree(Path(configs[2].path))
    # What does not change the rows may differ.
    again = harvest(*changed(configs, subject={"license": "MIT"}, text={"license": "CC0"}), device="cpu")
    assert again.skipped
    assert tree(Path(configs[2].path)) == before


def test_another_config_is_refused_naming_the_difference(configs: Configs, tmp_path: Path, tiny_text: Path) -> None:
    harvest(*configs, device="cpu")
    before = tree(Path(configs[2].path))
    more_text = tmp_path / "text"
    shutil.copytree(tiny_text, more_text)
    (more_text / "more.txt").write_text("one more document")
    model = AutoModelForCausalLM.from_pretrained(configs[0].path)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    other = tmp_path / "other"
    shutil.copytree(configs[0].path, other)
    model.save_pretrained(other)
    cases: list[tuple[Configs, str]] = [
        (changed(configs, store={"dtype": StoreDtype.float32}), "store.dtype: float16 there, float32 asked for"),
        (changed(configs, text={"seed": 7}), "text.seed: 0 there, 7 asked for"),
        (changed(configs, subject={"dtype": Dtype.bfloat16}), "subject.dtype: float32 there, bfloat16 asked for"),
        (changed(configs, store={"layer_stop": 2}), "store.layer_stop: 3 there, 2 asked for"),
        (changed(configs, store={"tokens": 9000}), "store.tokens: 1500 there, 9000 asked for.*not extended"),
        (changed(configs, text={"path": str(more_text)}), "text.fingerprint: 40 files.* 41 files"),
        (changed(configs, subject={"path": str(other)}), "subject.fingerprint: .* asked for"),
    ]
    for asked, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            harvest(*asked, device="cpu")
        assert "\n" not in str(caught.value)
    assert tree(Path(configs[2].path)) == before


def test_text_that_ends_too_soon_completes_the_store(configs: Configs, capsys: pytest.CaptureFixture[str]) -> None:
    configs = changed(configs, store={"tokens": 50_000, "held_out_tokens": 0})
    summary = harvest(*configs, device="cpu")
    assert f"the text ended after {summary.rows:,} rows, before store.tokens=50,000" in capsys.readouterr().err
    store = ActivationStore.open(configs[2].path)
    assert store.held_out() is None
    assert store.manifest.documents == 35
    assert harvest(*configs, device="cpu").skipped


def test_a_window_needs_only_its_own_documents(configs: Configs) -> None:
    """Windows of a longer harvest are, bit for bit, those of a shorter one; the last one of the shorter may be cut."""
    harvest(*configs, device="cpu")
    longer = changed(configs, store={"path": configs[2].path + "_longer", "tokens": 2500})
    harvest(*longer, device="cpu")
    short, long = (list(read_commits(Path(path))) for path in (configs[2].path, longer[2].path))
    assert 2 < len(short) < len(long)
    for a, b in zip(short[:-1], long, strict=False):
        assert a.files == b.files
        assert torch.equal(a.sums.in_sum_LD, b.sums.in_sum_LD)


@pytest.mark.parametrize("dtype", [StoreDtype.bfloat16, StoreDtype.float16])
def test_16_bit_stores_round_what_a_float32_store_holds(configs: Configs, dtype: StoreDtype) -> None:
    exact = changed(configs, store={"path": configs[2].path + "_exact", "dtype": StoreDtype.float32})
    rounded = changed(configs, store={"dtype": dtype})
    harvest(*exact, device="cpu")
    harvest(*rounded, device="cpu")
    torch_dtype = getattr(torch, dtype.value)
    wanted, found = ActivationStore.open(exact[2].path)[:], ActivationStore.open(rounded[2].path)[:]
    assert torch.equal(found.mlp_in, wanted.mlp_in.to(torch_dtype).float())
    assert torch.equal(found.mlp_out, wanted.mlp_out.to(torch_dtype).float())


def test_what_is_known_at_the_start_is_refused_before_anything_is_written(configs: Configs, tmp_path: Path) -> None:
    elsewhere = tmp_path / "not_a_store"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("mine")
    cases: list[tuple[Configs, str]] = [
        (changed(configs, subject={"path": "/no/such/model"}), "/no/such/model"),
        (changed(configs, text={"path": "/no/such/text"}), "text.path=/no/such/text does not exist"),
        (changed(configs, text={"held_out_documents": 40}), "none is left to train on"),
        (changed(configs, text={"context_length": 1000}), "text.context_length=1000 is more than the 512"),
        (changed(configs, store={"layer_stop": 4}), "store.layer_stop=4 is not a range of the subject's 3"),
        (changed(configs, store={"shard_rows": 100}), "shard_rows=100 is not a multiple of .*chunk_rows=16; use 96"),
        (changed(configs, store={"tokens": 10**13}), r"needs .* bytes; .*disk has .* bytes\) free; use fewer"),
        (changed(configs, store={"path": str(elsewhere)}), r"exists and is not a store \(it holds thesis.tex\)"),
    ]
    for asked, message in cases:
        with pytest.raises(UserError, match=message):
            harvest(*asked, device="cpu")
    assert not Path(configs[2].path).exists()
    assert [path.name for path in elsewhere.iterdir()] == ["thesis.tex"]


def poisoned(configs: Configs, folder: Path, tiny_text: Path, value: float) -> tuple[Configs, int, str]:
    """A subject whose embedding of '~' is `value` everywhere, and texts of which one, in a late block, has a '~'."""
    shutil.copytree(configs[0].path, folder / "poisoned")
    model = AutoModelForCausalLM.from_pretrained(configs[0].path)
    subject = load_subject(configs[0], device=torch.device("cpu"))
    (token,) = subject.tokenizer("~", add_special_tokens=False)["input_ids"]
    model.model.embed_tokens.weight.data[token] = value
    model.save_pretrained(folder / "poisoned")
    shutil.copytree(tiny_text, folder / "text")
    bad = list(stream_documents(configs[1], held_out=False))[14]
    (folder / "text" / bad.name).write_text(sentences(20, seed=0).replace("the", "~the"))
    asked = changed(configs, subject={"path": str(folder / "poisoned")}, text={"path": str(folder / "text")})
    return asked, bad.index, bad.name


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            float("nan"),
            "is not finite in the subject itself; committed windows stay: use other text",
        ),
        (
            1e6,
            "reaches .*, more than store.dtype=float16 can hold; committed windows stay: use store.dtype=bfloat16",
        ),
    ],
)
def test_a_non_finite_activation_names_document_and_layer(
    configs: Configs, folder: Path, tiny_text: Path, value: float, message: str
) -> None:
    asked, index, name = poisoned(configs, folder, tiny_text, value)
    with pytest.raises(UserError, match=rf"mlp_in of layer 0 in document {index} \({name}\) {message}"):
        harvest(*asked, device="cpu")
    store = Path(asked[2].path)
    commits = list(read_commits(store))
    # Those before it stay; the window that has it is not begun.
    assert commits
    assert not any(document.index == index for commit in commits for document in commit.documents)
    assert verify_store(store).ok
    assert shard_files(store) == {key for commit in commits for key in commit.files}
    # The same text in bfloat16 has room for it.
    if value == 1e6:
        roomy = changed(asked, store={"dtype": StoreDtype.bfloat16, "path": asked[2].path + "_bfloat16"})
        assert harvest(*roomy, device="cpu").rows > 1000


def shard_files(store: Path) -> set[str]:
    return {
        str(path.relative_to(store))
        for array in store.iterdir()
        if (array / "c").is_dir()
        for path in (array / "c").rglob("*")
        if path.is_file()
    }


def wait_for(condition: Callable[[], bool], process: ForkServerProcess) -> bool:
    """Until the condition holds (True) or the process ends."""
    while process.is_alive():
        if condition():
            return True
        time.sleep(0.005)
    return condition()


def kill_until_complete(configs: Configs, delays: Iterable[float]) -> list[int]:
    """Kills a harvest once its first block is there, then the given seconds after it began to write, again and again.

    Returns the commits after each kill.
    """
    store = Path(configs[2].path)
    commits: list[int] = []
    for delay in [None, *delays]:
        process = start_writing(configs)
        if delay is None:
            # Between the first commit and the last, however fast the machine is.
            assert wait_for((store / "commits" / "00000000.json").exists, process)
        else:
            time.sleep(delay)
        process.kill()
        process.join()
        if (store / "manifest.json").exists():
            # Everything committed is there and readable, whatever else lies about.
            assert verify_store(store).ok
            read = ActivationStore.open(store, allow_incomplete=True)
            assert torch.isfinite(read[:].mlp_in).all()
            commits.append(len(list(read_commits(store))))
            assert commits == sorted(commits)
    process = harvest_in_child(configs)
    process.join()
    assert process.exitcode == 0
    return commits


def start_writing(configs: Configs) -> ForkServerProcess:
    """A harvest that has loaded its subject and begun to change files."""
    store = Path(configs[2].path)
    before = file_names(store)
    process = harvest_in_child(configs)
    wait_for(lambda: file_names(store) != before, process)
    return process


def file_names(store: Path) -> set[str]:
    """All shard files; os.walk does not mind a folder that is removed meanwhile."""
    return {f"{folder}/{name}" for folder, _, names in os.walk(store) for name in names if "/c" in folder}


def check_killed(configs: Configs, kills: int, span: float, seed: int) -> None:
    slow = changed(
        configs,
        text={"documents_per_block": 2},
        store={"tokens": 1500, "held_out_tokens": 60, "batch_contexts": 1, "shard_rows": 32},
    )
    plain = changed(slow, store={"path": slow[2].path + "_plain"})
    process = start_writing(plain)
    started = time.monotonic()
    process.join()
    seconds = time.monotonic() - started
    assert process.exitcode == 0
    rng = np.random.default_rng(seed)
    commits = kill_until_complete(slow, rng.uniform(0, seconds * span, kills))
    whole = len(list(read_commits(Path(plain[2].path))))
    assert any(0 < count < whole for count in commits), f"no kill came in the middle: {commits} of {whole}"
    assert tree(Path(slow[2].path)) == tree(Path(plain[2].path))


def test_a_killed_harvest_resumes_to_the_same_bytes(configs: Configs) -> None:
    check_killed(configs, kills=2, span=0.8, seed=0)


@pytest.mark.slow
def test_a_harvest_killed_many_times_resumes_to_the_same_bytes(configs: Configs) -> None:
    check_killed(configs, kills=12, span=0.35, seed=1)


def test_ctrl_c_says_how_to_continue(configs: Configs, folder: Path) -> None:
    store = Path(configs[2].path)
    store_words = {"tokens": 1500, "held_out_tokens": 60, "batch_contexts": 1}
    slow = changed(configs, text={"documents_per_block": 2}, store=store_words)
    process = harvest_in_child(slow, stderr=folder / "stderr")
    assert wait_for((store / "commits" / "00000001.json").exists, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join()
    printed = (folder / "stderr").read_text()
    assert process.exitcode == 130, printed
    assert f"interrupted; what is committed stays. Continue with: layerloom harvest store.path={store}" in printed
    commits = list(read_commits(store))
    assert shard_files(store) == {key for commit in commits for key in commit.files}


def test_a_full_disk_keeps_the_commits(configs: Configs, tmp_path: Path) -> None:
    """Files of a few bytes take whole pages: the disk is large enough for the rows, and fills nevertheless."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk: mounting a tmpfs needs root ({mounted.stderr.decode().strip()})")
    try:
        small = {"path": str(disk / "store"), "shard_rows": 16, "held_out_tokens": 0}
        asked = changed(configs, text={"documents_per_block": 3}, store=small)
        with pytest.raises(
            UserError, match=r"disk of .* is full .*committed windows stay.*layerloom harvest"
        ) as caught:
            harvest(*asked, device="cpu")
        assert "\n" not in str(caught.value)
        commits = list(read_commits(disk / "store"))
        assert commits
        assert verify_store(disk / "store").ok
        # Whole shards of a window without a commit may stay: they are what the next worker would write there.
        assert shard_files(disk / "store") >= {key for commit in commits for key in commit.files}
        assert not list(disk.rglob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        harvest(*asked, device="cpu")
        plain = changed(asked, store={"path": configs[2].path})
        harvest(*plain, device="cpu")
        assert tree(disk / "store") == tree(Path(plain[2].path))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"disk of .* is full .*committed windows stay.*layerloom harvest"),
        (errno.EIO, r"harvest stopped: Input/output error; committed windows stay.*layerloom harvest"),
    ],
)
def test_a_write_that_fails_keeps_the_commits(
    configs: Configs, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    store = Path(configs[2].path)
    asked = changed(configs, text={"documents_per_block": 3}, store={"held_out_tokens": 0})
    left = [80]
    write = os.write

    def failing(descriptor: int, data: memoryview) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(number, os.strerror(number))
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr("activation_store.storage.os.write", failing)
        with pytest.raises(UserError, match=message) as caught:
            harvest(*asked, device="cpu")
    assert "\n" not in str(caught.value)
    commits = list(read_commits(store))
    assert commits
    assert shard_files(store) >= {key for commit in commits for key in commit.files}
    assert not list(store.rglob("*.partial"))
    summary = harvest(*asked, device="cpu")
    plain = changed(asked, store={"path": configs[2].path + "_plain"})
    harvest(*plain, device="cpu")
    assert tree(store) == tree(Path(plain[2].path))
    assert summary.bytes == sum(path.stat().st_size for path in store.rglob("c/**/*") if path.is_file())


def test_a_store_without_rows_may_be_begun_anew(configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise UserError("no rows today")

    with monkeypatch.context() as patch:
        patch.setattr("activation_store.work.capture_rows", unreachable)
        with pytest.raises(UserError, match="no rows today"):
            harvest(*configs, device="cpu")
    asked = changed(configs, store={"layer_stop": 2, "dtype": StoreDtype.float32, "tokens": 600})
    harvest(*asked, device="cpu")
    plain = changed(asked, store={"path": configs[2].path + "_plain"})
    harvest(*plain, device="cpu")
    assert tree(Path(asked[2].path)) == tree(Path(plain[2].path))


def test_a_place_that_cannot_be_written_is_refused(
    configs: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"store.path=.*/file is a file; give a folder"):
        harvest(*changed(configs, store={"path": str(tmp_path / "file")}), device="cpu")
    with pytest.raises(UserError, match=r"cannot be made: .*/file is a file"):
        harvest(*changed(configs, store={"path": str(tmp_path / "file/store")}), device="cpu")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"cannot be written: no permission"):
        harvest(*changed(configs, store={"path": str(tmp_path / "new/store")}), device="cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"column": "body"}, "text.column=body is not a column of owner/name; the columns are text"),
        ({"held_out_documents": 30}, "none is left to train on"),
    ],
)
def test_a_stream_is_looked_at_before_anything_is_written(
    configs: Configs, monkeypatch: pytest.MonkeyPatch, text: dict[str, object], message: str
) -> None:
    rows = Dataset.from_dict({"text": [sentences(3, seed=i) for i in range(30)]}).to_iterable_dataset()
    monkeypatch.setattr("activation_store.text._load_hub", lambda cfg: rows)
    asked = changed(configs, text={"path": "owner/name", "loader": Loader.hub, **text})
    with pytest.raises(UserError, match=message):
        harvest(*asked, device="cpu")
    assert not Path(configs[2].path).exists()


def test_small_blocks_need_room_for_their_last_chunks(configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = changed(
        configs, text={"documents_per_block": 1}, store={"chunk_rows": 1024, "shard_rows": 1024, "window_bytes": 1}
    )
    monkeypatch.setattr("activation_store.plan.free_bytes", lambda _: 2_000_000)
    with pytest.raises(UserError, match="its disk has"):
        harvest(*padded, device="cpu")
