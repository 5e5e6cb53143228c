"""What the feed gives a rank is its part of the microbatches that one process would see."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from activation_store.errors import AgreedError
from activation_store.shuffle import ShuffledBatches
from activation_store.store import ActivationStore
from tests.parallel.processes import Processes
from trainer.config import RunConfig
from trainer.model.collectives import Partitioning
from trainer.parallel.feed import Feed
from trainer.parallel.mesh import mesh_of

_CPU = torch.device("cpu")
_TOKENS = 96


def _batches(store: str, **options: Any) -> ShuffledBatches:
    return ShuffledBatches(ActivationStore.open(store), batch_size_tokens=_TOKENS, seed=3, pool_rows=256, **options)


def _fed(
    store: str, data: int, feature: int, by_columns: bool, decoded: bool, start: int, count: int
) -> list[tuple[Tensor, Tensor, int, float]]:
    """What this rank gets: mlp_in, mlp_out, and the feed's position and epochs after each."""
    mesh = mesh_of(data, feature, _CPU)
    source = _batches(store, rank=mesh.rank, ranks=mesh.size, start_batch=start, decoded=decoded)
    partitioning = Partitioning(feature, mesh.feature.rank, by_columns)
    given = []
    with Feed(source, mesh, partitioning, device=_CPU) as feed:
        for _ in range(count):
            batch = next(feed)
            given.append((batch.mlp_in.clone(), batch.mlp_out.clone(), feed.position, feed.epochs))
            # One rank is slower than the others: they must not run away, nor hang when all stop.
            time.sleep(0.02 if mesh.rank == mesh.size - 1 else 0)
    # Two microbatches ahead; stored as float16, decoded to float32. docs/parallel.md has the formula.
    rows, itemsize = _TOKENS // data, 4 if decoded else 2
    columns = 16 / feature if by_columns else 16
    expected = (count + 2) * rows * (feature - 1) / feature * 3 * (16 + columns) * itemsize
    assert feed._spread.received == expected
    return given


@pytest.mark.parametrize(
    ("data", "feature", "by_columns", "decoded"),
    [(2, 2, True, False), (1, 4, True, True), (4, 1, True, False), (2, 2, False, False)],
)
def test_ranks_get_their_part_of_the_serial_microbatches(
    tiny_store: RunConfig, four_ranks: Processes, data: int, feature: int, by_columns: bool, decoded: bool
) -> None:
    results = four_ranks.run(_fed, tiny_store.store.path, data, feature, by_columns, decoded, 3, 4)
    with _batches(tiny_store.store.path, start_batch=3) as serial:
        for n in range(4):
            whole = next(serial)
            for rank, given in enumerate(results):
                mlp_in, mlp_out, position, epochs = given[n]
                rows = slice(rank // feature * _TOKENS // data, (rank // feature + 1) * _TOKENS // data)
                width = 16 // feature if by_columns else 16
                first = rank % feature * width if by_columns else 0
                assert torch.equal(mlp_in, whole.mlp_in[rows])
                assert torch.equal(mlp_out, whole.mlp_out[rows][:, :, first : first + width])
                assert mlp_in.transpose(0, 1).is_contiguous()
                assert (position, epochs) == (serial.position, serial.epochs)


class _Damaged(ShuffledBatches):
    """A source of which the fifth microbatch cannot be read."""

    def __next__(self) -> Any:
        if self.position == 5:
            raise OSError(5, "Input/output error", "store/mlp_in/c/0/0/0")
        return super().__next__()


def _read_until_damage(store: str) -> tuple[int, str]:
    mesh = mesh_of(2, 2, _CPU)
    kind = _Damaged if mesh.rank == 2 else ShuffledBatches
    source = kind(ActivationStore.open(store), batch_size_tokens=_TOKENS, rank=mesh.rank, ranks=4)
    with Feed(source, mesh, Partitioning(2, mesh.feature.rank), device=_CPU) as feed:
        for _ in range(5):
            next(feed)
        with pytest.raises(AgreedError) as error:
            next(feed)
    return feed.position, str(error.value)


def test_what_one_rank_cannot_read_ends_all_at_the_same_microbatch(
    tiny_store: RunConfig, four_ranks: Processes
) -> None:
    wanted = (5, "store/mlp_in/c/0/0/0: Input/output error")
    assert four_ranks.run(_read_until_damage, tiny_store.store.path) == [wanted] * 4
