"""`store verify` names damaged shards, `store info` describes a store, complete or not."""

import re
from pathlib import Path

import pytest

from activation_store.errors import UserError
from activation_store.info import store_info
from activation_store.manifest import read_commits
from activation_store.store import ActivationStore
from activation_store.verify import verify_store
from tests.store.making import manifest, random_rows, write_store


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("key", "damage", "reason"),
    [
        ("mlp_in/c/1/0/0", flip_a_bit, "its checksum differs"),
        ("norms/c/4/0/0", flip_a_bit, "its checksum differs"),
        ("token_ids/c/0", cut_short, r"\d+ bytes, \d+ were committed"),
        ("mlp_out/c/0/0/0", Path.unlink, "missing"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, key: str, damage: object, reason: str) -> None:
    begun = manifest()
    write_store(tmp_path, begun, [random_rows(30, begun, 0), random_rows(20, begun, 1)])
    report = verify_store(tmp_path)
    assert report.ok
    assert report.files == sum(len(commit.files) for commit in read_commits(tmp_path)) == 5 * 7
    assert callable(damage)
    damage(tmp_path / key)
    damaged = verify_store(tmp_path).damaged
    assert len(damaged) == 1
    assert re.fullmatch(rf"{re.escape(str(tmp_path / key))}: {reason}", damaged[0])


def test_damage_in_the_held_out_store_and_lost_commits(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "held_out"):
        begun = manifest()
        write_store(folder, begun, [random_rows(30, begun, 0), random_rows(20, begun, 1)])
    flip_a_bit(tmp_path / "held_out" / "mlp_in" / "c" / "0" / "0" / "0")
    (tmp_path / "commits" / "00000001.json").unlink()
    first, second = verify_store(tmp_path).damaged
    assert first == f"{tmp_path / 'commits/00000001.json'}: missing"
    assert second == f"{tmp_path / 'held_out' / 'mlp_in/c/0/0/0'}: its checksum differs"


def test_info_describes_a_store(tmp_path: Path) -> None:
    begun = manifest(first_layer=2)
    begun.provenance = {"torch": "9.9"}
    write_store(tmp_path, begun, [random_rows(100, begun, 0, outliers=1)])
    write_store(tmp_path / "held_out", manifest(), [random_rows(20, begun, 1)])
    info = store_info(tmp_path)
    assert "100 in 1 window, 7 documents" in info
    assert "mlp_in, mlp_out (rows, 3 layers, 5) float16" in info
    assert "layers      2-4, resid_mid -> mlp_out" in info
    assert "torch 9.9" in info
    assert "held out    complete, 20 rows" in info
    assert " 1 outlier above" in info
    begun.status, begun.statistics = "harvesting", None
    begun.save(tmp_path)
    assert "not final: run the harvest again" in store_info(tmp_path)


@pytest.mark.parametrize("work", [store_info, verify_store])
def test_what_is_no_store_is_refused(tmp_path: Path, work: object) -> None:
    assert callable(work)
    with pytest.raises(UserError, match=r"is not an activation store \(no manifest.json\)"):
        work(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        work(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="format version 99, this Layerloom reads 2"):
        work(tmp_path)


def test_damaged_records_are_named_and_told_how_to_repair(tmp_path: Path) -> None:
    begun = manifest()
    write_store(tmp_path, begun, [random_rows(30, begun, 0), random_rows(20, begun, 1)])
    commit = tmp_path / "commits/00000000.json"
    commit.write_text(commit.read_text()[:100])
    with pytest.raises(UserError, match=rf"{commit} is damaged .*layerloom store repair {tmp_path} harvests") as caught:
        store_info(tmp_path)
    assert "\n" not in str(caught.value)
    (damaged,) = verify_store(tmp_path).damaged
    assert damaged.startswith(f"{commit}: JSONDecodeError")
    (tmp_path / "manifest.json").write_text("[]")
    # No repair mends that one.
    with pytest.raises(UserError, match=rf"manifest.json is damaged .* delete {tmp_path} and harvest again"):
        ActivationStore.open(tmp_path)
    assert any(line.startswith(f"{tmp_path / 'manifest.json'}: ") for line in verify_store(tmp_path).damaged)
