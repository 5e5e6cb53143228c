"""The collectives of trainer/model/collectives.py over a mesh of processes.

docs/parallel.md counts the bytes of each.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.kernels.batch_threshold import Candidates
from trainer.kernels.encode_topk import Selection
from trainer.model.collectives import Collectives, Exchange, IdentityCollectives, Partitioning
from trainer.model.features import LayerCodes
from trainer.parallel.exchange import CodesExchange, CountsExchange
from trainer.parallel.mesh import Mesh
from trainer.parallel.selection import counts_of_best, mark_best, mark_largest
from trainer.parallel.sums import Sum, SumInPlace, SumToOwners, exchange_equal, gather_equal, gather_lists, sum_parts


def collectives_of(mesh: Mesh, *, by_columns: bool) -> Collectives:
    """What a model on this mesh is made with; by_columns: decoders are split by columns, else by rows."""
    return IdentityCollectives() if mesh.size == 1 else MeshCollectives(mesh, by_columns=by_columns)


class MeshCollectives(IdentityCollectives):
    """See Collectives. What an axis of one rank has nothing to do for is the identity's."""

    def __init__(self, mesh: Mesh, *, by_columns: bool) -> None:
        super().__init__()
        self._mesh, self._feature, self._data = mesh, mesh.feature, mesh.data
        self.partitioning = Partitioning(mesh.feature.size, mesh.feature.rank, by_columns)
        self.data_size = mesh.data.size
        # Over both axes; without a data axis (a batch that one feature group has for itself) over the other.
        self._group = mesh.feature.group if mesh.data.size == 1 else None
        if mesh.feature.size > 1:
            # One layer for the numbers to arrive, and with columns one more for the codes.
            self.ahead = 2 if by_columns else 1

    # --- sums ----------------------------------------------------------------------------------------------------

    def sum_features(self, x: Tensor) -> Tensor:
        """See Collectives."""
        return x if self._feature.size == 1 else Sum.apply(x, self._feature, 1)  # type: ignore[no-untyped-call]

    def sum_columns(self, x: Tensor) -> Tensor:
        """See Collectives."""
        return self.sum_features(x) if self.partitioning.columns_split else x

    def sum_to_owners(self, x_F: Tensor) -> Tensor:
        """See Collectives."""
        if not self.partitioning.columns_split:
            return x_F
        owned: Tensor = SumToOwners.apply(x_F, self._feature)  # type: ignore[no-untyped-call]
        return owned

    def sum_data(self, x: Tensor) -> Tensor:
        """See Collectives."""
        return x if self._data.size == 1 else Sum.apply(x, self._data, self._data.size)  # type: ignore[no-untyped-call]

    def combine_output(self, y_BTD: Tensor) -> Tensor:
        """See Collectives."""
        if not self.partitioning.rows_split:
            return y_BTD
        total: Tensor = SumInPlace.apply(y_BTD, self._feature)  # type: ignore[no-untyped-call]
        return total

    @torch.no_grad()
    def gather_columns(self, y_BD: Tensor) -> Tensor:
        """See Collectives."""
        return self._side_by_side(y_BD) if self.partitioning.columns_split else y_BD

    @torch.no_grad()
    def gather_features(self, x_LF: Tensor) -> Tensor:
        """See Collectives."""
        return x_LF if self._feature.size == 1 else self._side_by_side(x_LF)

    @torch.no_grad()
    def any_data(self, x: Tensor) -> Tensor:
        """See Collectives."""
        if self._data.size == 1:
            return x
        flags = x.to(torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._data.group)
        return flags.bool()

    @torch.no_grad()
    def smallest(self, x: Tensor) -> Tensor:
        """See Collectives."""
        found = x.clone()
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self._group)
        return found

    @torch.no_grad()
    def gather_all(self, x_N: Tensor) -> Tensor:
        """See Collectives."""
        return gather_lists(x_N, self._mesh.size, self._group)

    @torch.no_grad()
    def gather_data(self, x_N: Tensor) -> Tensor:
        """See Collectives."""
        return x_N if self._data.size == 1 else gather_lists(x_N, self._data.size, self._data.group)

    def count_all(self, n: int) -> int:
        """See Collectives."""
        total = torch.tensor([n], device=self._mesh_device())
        dist.all_reduce(total, group=self._group)
        return int(total)

    # --- selection -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def cut_rows(self, scores_BK: Tensor, counts_BL: Tensor, k: int) -> Tensor | None:
        """See Collectives."""
        axis, (n_tokens, width) = self._feature, scores_BK.shape
        if axis.size == 1 or width * axis.size <= k:
            return None
        # Each rank decides for its share of the tokens; what fills up the last share has no candidates.
        share = -(-n_tokens // axis.size)
        spare = share * axis.size - n_tokens
        scores_BK = torch.cat([scores_BK, scores_BK.new_full((spare, width), float("-inf"))])
        scores_bGK = exchange_equal(scores_BK, axis).view(axis.size, share, -1).transpose(0, 1)
        layers_bGK = None
        if counts_BL.shape[1] > 1:
            counts_BL = torch.cat([counts_BL, counts_BL.new_zeros(spare, counts_BL.shape[1])])
            counts_bGL = exchange_equal(counts_BL.int(), axis).view(axis.size, share, -1).transpose(0, 1)
            columns_K = torch.arange(width, device=counts_bGL.device, dtype=torch.int64)
            ends_bGL = counts_bGL.cumsum(dim=2)
            layers_bGK = torch.searchsorted(
                ends_bGL, columns_K.expand(*ends_bGL.shape[:2], width).contiguous(), right=True
            )
        best_bG = counts_of_best(scores_bGK, layers_bGK, k)
        counts_B = exchange_equal(best_bG.t().int().contiguous().flatten(), axis)
        return mark_best(scores_BK[:n_tokens], counts_B[:n_tokens])

    @torch.no_grad()
    def cut_batch(
        self, layers: Sequence[Candidates], n: int, total: int, n_tokens: int, n_features: int
    ) -> list[Tensor] | None:
        """See Collectives."""
        if total <= n:
            return None
        first_token = self._data.rank * n_tokens
        all_features, first_feature = n_features * self._feature.size, self._feature.rank * n_features
        ties = [
            ((found.positions // n_features + first_token) * len(layers) + s) * all_features
            + (found.positions % n_features + first_feature)
            for s, found in enumerate(layers)
        ]
        tie_bits = (n_tokens * self._data.size * len(layers) * all_features - 1).bit_length()
        counters = torch.int32 if total < 2**31 else torch.int64
        scores_N = torch.cat([found.scores for found in layers])
        kept_N = mark_largest(scores_N, torch.cat(ties), n, tie_bits, self._sum_all, counters)
        return list(torch.split(kept_N, [found.scores.numel() for found in layers]))

    # --- codes and activations -----------------------------------------------------------------------------------

    def announce(self, selection: Selection | LayerCodes | None) -> Exchange:
        """See Collectives."""
        if self._feature.size == 1:
            return super().announce(selection)
        kind = CodesExchange if self.partitioning.columns_split else CountsExchange
        return kind(selection, self._feature, self._mesh_device())

    def gather_block(self, a_Bf: Tensor) -> list[Tensor]:
        """See Collectives."""
        if not self.partitioning.columns_split:
            return [a_Bf]
        return list(gather_equal(a_Bf.contiguous(), self._feature))

    def sum_block(self, parts: list[Tensor]) -> Tensor:
        """See Collectives."""
        if len(parts) == 1:
            return parts[0]
        return sum_parts(exchange_equal(torch.stack(parts), self._feature))

    def _side_by_side(self, x: Tensor) -> Tensor:
        return torch.cat(list(gather_equal(x.contiguous(), self._feature)), dim=1)

    def _sum_all(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self._group)
        return x

    def _mesh_device(self) -> torch.device:
        assert self._mesh.device_mesh is not None
        kind = self._mesh.device_mesh.device_type
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
