"""A run that is killed on a mesh and continued: on the same mesh the same bits, on any other the same run."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from activation_store.object_storage import ObjectStorage, ObjectStorageOptions
from tests.parallel import resume_cases as cases
from tests.parallel.processes import Processes
from tests.store.s3 import BUCKET, s3_server
from tests.training.runs import ACTIVATIONS, assert_same_bits, checkpoint_tensors, records, tiny_run
from trainer.checkpoint import Checkpointer
from trainer.config import DecoderSplit, RunConfig

_EVERY_STEP = {"train.log_every": 1}


def _mesh(data: int, feature: int, split: str = "columns") -> dict[str, Any]:
    return {"parallel.data": data, "parallel.feature": feature, "parallel.decoder_split": split}


@pytest.mark.parametrize(("mesh", "activation"), [((4, 1), "batchtopk"), ((2, 2), "jumprelu")], ids=["data4", "2x2"])
def test_on_the_same_mesh_the_bits_are_the_same(
    tiny_store: RunConfig, four_ranks: Processes, tmp_path: Path, mesh: tuple[int, int], activation: str
) -> None:
    overrides = {**ACTIVATIONS[activation], **_EVERY_STEP, **_mesh(*mesh)}
    whole = tiny_run(tiny_store, tmp_path / "whole", overrides)
    assert four_ranks.run(cases.resumed, whole) == [None] * 4
    again = tiny_run(tiny_store, tmp_path / "again", overrides)
    four_ranks.run(cases.train_until, again, 8)
    assert four_ranks.run(cases.resumed, again) == [5] * 4
    assert_same_bits(checkpoint_tensors(again.run), checkpoint_tensors(whole.run))
    assert records(again.run) == records(whole.run)


def test_any_mesh_and_engine_continues_any_other(tiny_store: RunConfig, four_ranks: Processes, tmp_path: Path) -> None:
    """In float64, where meshes, splits and engines differ by rounding alone."""
    overrides = {**ACTIVATIONS["topk_all_layers"], **_EVERY_STEP}
    whole = tiny_run(tiny_store, tmp_path / "whole", {**overrides, **_mesh(2, 2)})
    four_ranks.run(cases.in_double, cases.resumed, whole)
    killed = tiny_run(tiny_store, tmp_path / "killed", {**overrides, **_mesh(2, 2)})
    four_ranks.run(cases.in_double, cases.train_until, killed, 8)
    others = [(1, 4, "rows", "plain"), (4, 1, "columns", "fsdp"), (2, 2, "rows", "accelerate"), (1, 1, "auto", "plain")]
    for data, feature, split, engine in others:
        run = Path(shutil.copytree(killed.run, tmp_path / f"{data}x{feature}"))
        config = tiny_run(tiny_store, run, {**overrides, **_mesh(data, feature, split), "engine.kind": engine})
        if data * feature == 1:
            assert cases.in_double(cases.resumed, config) == 5
        else:
            assert four_ranks.run(cases.in_double, cases.resumed, config) == [5] * 4
        _same_run(config, whole)
        newest = Checkpointer(config.run).newest_good()
        assert newest is not None
        assert newest.state["written_by"]["decoder_split"] == split.replace("auto", "columns")


def test_a_mesh_goes_on_from_a_url_past_a_damaged_checkpoint(
    tiny_store: RunConfig, two_ranks: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ranks write in the background, to an S3 server on a socket; the newest is then cut by a byte."""
    overrides = {**ACTIVATIONS["topk"], **_EVERY_STEP, **_mesh(1, 2), "kernels.backend": "reference"}
    whole = tiny_run(tiny_store, tmp_path / "whole", overrides)
    two_ranks.run(cases.resumed, whole)
    with s3_server() as endpoint:
        url = f"s3://{BUCKET}/mesh"
        remote = tiny_run(tiny_store, tmp_path / "remote", {**overrides, "train.checkpoint_path": url})
        two_ranks.run(cases.with_object_store, endpoint, cases.train_until, remote, 12)
        for name, value in cases.s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        storage = ObjectStorage(url, ObjectStorageOptions(cache_bytes=0))
        newest = "step_00000010/model_00001.safetensors"
        storage.put(newest, storage.get(newest)[:-1])
        # Decided before: auto, which would take rows, keeps the columns.
        remote.parallel.decoder_split = DecoderSplit.auto
        answers = two_ranks.run(cases.with_object_store, endpoint, cases.resumed, remote)
        assert [found for found, _ in answers] == [5, 5]
        said = [line for _, lines in answers for line in lines if "damaged" in line]
        assert len(said) == 1, said
        assert "decoders by columns, as before the checkpoint" in "".join(answers[0][1])
        assert "step_00000010 is damaged (model_00001.safetensors" in said[0]
        assert_same_bits(checkpoint_tensors(remote.run, remote), checkpoint_tensors(whole.run))
    assert records(remote.run) == records(whole.run)
    assert not (tmp_path / "remote/checkpoints").exists()


def _same_run(found: RunConfig, wanted: RunConfig) -> None:
    losses = [[line["loss"] for line in records(each.run) if "loss" in line] for each in (found, wanted)]
    assert len(losses[1]) == 12
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    tensors, expected = (checkpoint_tensors(each.run) for each in (found, wanted))
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("W_dec"):
            assert tensors[name] == pytest.approx(tensor, rel=1e-7, abs=1e-9), name
    newest = [Checkpointer(each.run).newest_good() for each in (found, wanted)]
    assert newest[0] is not None
    assert newest[1] is not None
    # The position, in what any mesh can share; `source` has an entry for each rank.
    data, expected_data = ({**each.state["data"], "source": None} for each in newest if each is not None)
    assert data == expected_data
    assert newest[0].state["data"]["source"] == [{}] * found.parallel.data * found.parallel.feature
    assert newest[0].state["written_by"]["data"] == found.parallel.data
