"""Scaling statistics against a direct float64 computation over the used rows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from activation_store.codec import decode
from activation_store.config import StoreDtype
from activation_store.errors import UserError
from activation_store.statistics import ScalingStatistics, decode_array, encode_array
from activation_store.store import ActivationStore
from tests.store.making import SPECIAL_IDS, manifest, random_rows, write_store


@pytest.mark.parametrize("dtype", list(StoreDtype))
def test_statistics_are_those_of_the_used_rows(tmp_path: Path, dtype: StoreDtype) -> None:
    begun = manifest(n_layers=3, d_model=37, dtype=dtype, chunk_rows=16, shard_rows=64)
    blocks = [random_rows(150, begun, 0, outliers=3), random_rows(77, begun, 1, outliers=2)]
    store = write_store(tmp_path, begun, blocks)
    x = np.concatenate([decode(block.mlp_in_NLD).double().numpy() for block in blocks])
    y = np.concatenate([decode(block.mlp_out_NLD).double().numpy() for block in blocks])
    tokens = np.concatenate([block.token_ids_N.numpy() for block in blocks])
    positions = np.concatenate([block.positions_N.numpy() for block in blocks])
    eligible = (positions != 0) & ~np.isin(tokens, SPECIAL_IDS)
    norms = np.stack([np.linalg.norm(x, axis=2), np.linalg.norm(y, axis=2)], axis=2)
    means = norms[eligible].mean(0)
    outlier = (norms > 20 * means).any((1, 2))
    used = eligible & ~outlier
    assert 0 < (outlier & eligible).sum() <= 5
    assert not eligible.all()

    np.testing.assert_array_equal(store.used_rows(), used)
    statistics = store.statistics()
    assert statistics.count == used.sum()
    assert store.manifest.outlier_rows == (outlier & eligible).sum()
    # The norms are rounded to float32 on disk; the sums lose what the outliers (400 x) carry away: 1e-16 x 400^2.
    np.testing.assert_allclose(statistics.input_norm_mean_L, means[:, 0], rtol=1e-7)
    np.testing.assert_allclose(statistics.output_norm_mean_L, means[:, 1], rtol=1e-7)
    np.testing.assert_allclose(statistics.in_mean_LD, x[used].mean(0), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(statistics.out_mean_LD, y[used].mean(0), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(statistics.in_mean_square_LD, (x[used] ** 2).mean(0), rtol=1e-9)
    np.testing.assert_allclose(statistics.out_mean_square_LD, (y[used] ** 2).mean(0), rtol=1e-9)
    np.testing.assert_allclose(store.read_small("norms", 0, len(x)), norms, rtol=1e-6)


def test_statistics_of_a_half_written_store_come_from_its_commits(tmp_path: Path) -> None:
    begun = manifest()
    whole = write_store(tmp_path, begun, [random_rows(40, begun, 0), random_rows(30, begun, 1)])
    begun.status, begun.statistics, begun.blocks, begun.rows = "harvesting", None, [], 0
    begun.save(tmp_path)
    with pytest.raises(UserError, match=r"half written \(70 rows so far\).*layerloom harvest"):
        ActivationStore.open(tmp_path)
    store = ActivationStore.open(tmp_path, allow_incomplete=True)
    assert store.statistics().count == whole.statistics().count
    assert torch.equal(store.statistics().out_mean_LD, whole.statistics().out_mean_LD)
    np.testing.assert_array_equal(store.used_rows(), whole.used_rows())


def test_a_store_without_used_rows_is_refused(tmp_path: Path) -> None:
    begun = manifest()
    rows = random_rows(20, begun, 0)
    rows.positions_N.zero_()
    with pytest.raises(UserError, match="no row to train on"):
        write_store(tmp_path, begun, [rows])


def test_statistics_survive_json_exactly() -> None:
    values = torch.tensor([[0.1, 1e300, -0.0], [2.0**-1074, 1 / 3, 7.0]], dtype=torch.float64)
    assert torch.equal(decode_array(encode_array(values)), values)
    statistics = ScalingStatistics(7, values, values + 1, values * 2, values, values[:, 0], values[:, 1])
    again = ScalingStatistics.from_dict(statistics.to_dict())
    assert again.count == 7
    assert torch.equal(again.out_mean_LD, values * 2)
    assert torch.equal(again.output_norm_mean_L, values[:, 1])
