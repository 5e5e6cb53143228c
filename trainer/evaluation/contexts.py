"""Batches of held-out contexts: documents as numbers, exclusion as in training, and the next token of each position.

Shapes: N contexts of a batch, C tokens of a context, L covered layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from activation_store.statistics import ScalingStatistics, eligible_rows, outlier_rows
from activation_store.tokens import PackedContexts

NO_TARGET = -1


@dataclass(frozen=True)
class ContextBatch:
    """N packed contexts on the device. `document_NC` numbers documents from 0 in order of appearance; padding has
    `valid_NC` False. `target_NC` is the token that follows in the same piece, or NO_TARGET."""

    token_ids_NC: Tensor
    positions_NC: Tensor
    document_NC: Tensor
    valid_NC: Tensor
    target_NC: Tensor

    def contexts(self, keep_N: Tensor) -> "ContextBatch":
        """Some of the contexts, by mask."""
        return ContextBatch(
            self.token_ids_NC[keep_N],
            self.positions_NC[keep_N],
            self.document_NC[keep_N],
            self.valid_NC[keep_N],
            self.target_NC[keep_N],
        )


def context_batches(contexts: PackedContexts, batch_contexts: int, device: torch.device) -> Iterator[ContextBatch]:
    """Batches of `batch_contexts` contexts in order, the last one shorter."""
    ids_NC, positions_NC, valid_NC = contexts.token_ids_NC, contexts.positions_NC, contexts.valid_NC
    _, document_NC = torch.unique(torch.where(valid_NC, contexts.document_ids_NC, -1), return_inverse=True)
    document_NC = document_NC - int(not bool(valid_NC.all()))  # padding was the smallest value, if there is any
    target_NC = next_tokens(ids_NC, positions_NC, valid_NC)
    fields = (ids_NC, positions_NC, document_NC, valid_NC, target_NC)
    for start in range(0, len(ids_NC), batch_contexts):
        yield ContextBatch(*(field[start : start + batch_contexts].to(device) for field in fields))


def count_documents(contexts: PackedContexts) -> int:
    """Distinct documents among the tokens that are not padding."""
    return len(torch.unique(contexts.document_ids_NC[contexts.valid_NC]))


def next_tokens(token_ids_NC: Tensor, positions_NC: Tensor, valid_NC: Tensor) -> Tensor:
    """The token after each one within its piece, NO_TARGET for the last of a piece and for padding."""
    target_NC = torch.full_like(token_ids_NC, NO_TARGET)
    follows = valid_NC[:, 1:] & valid_NC[:, :-1] & (positions_NC[:, 1:] == positions_NC[:, :-1] + 1)
    target_NC[:, :-1] = torch.where(follows, token_ids_NC[:, 1:], NO_TARGET)
    return target_NC


@dataclass(frozen=True)
class Exclusion:
    """Which rows training would not use, by the store's own rules and the statistics of the training rows.

    A row is excluded at position 0, at a special token, or when its norm in some layer exceeds `outlier_factor` times
    the training rows' mean norm there, of `mlp_in` or of `mlp_out`.
    """

    statistics: ScalingStatistics
    special_token_ids: frozenset[int]
    outlier_factor: float

    def excluded(self, batch: ContextBatch, mlp_in_NCLD: Tensor, mlp_out_NCLD: Tensor) -> Tensor:
        """Mask (N, C) of the excluded rows; padding counts as excluded."""
        eligible_NC = eligible_rows(
            batch.token_ids_NC.cpu().numpy(), batch.positions_NC.cpu().numpy(), self.special_token_ids
        )
        norms_NCL2 = torch.stack([_norms(mlp_in_NCLD), _norms(mlp_out_NCLD)], dim=3).cpu()
        means_L2 = torch.stack([self.statistics.input_norm_mean_L, self.statistics.output_norm_mean_L], dim=1)
        outlier_R = outlier_rows(norms_NCL2.flatten(0, 1).numpy(), means_L2.numpy(), self.outlier_factor)
        used_NC = torch.from_numpy(eligible_NC & ~outlier_R.reshape(eligible_NC.shape))
        return ~(used_NC.to(batch.valid_NC.device) & batch.valid_NC)


def _norms(x_NCLD: Tensor) -> Tensor:
    """(N, C, L) norms, float32, one layer at a time (a copy of a 16-bit subject's values is one layer's)."""
    return torch.stack([x_NCD.float().norm(dim=2) for x_NCD in x_NCLD.unbind(2)], dim=2)
