"""Held-out activations on which a published folder is compared with the run."""

from dataclasses import dataclass

import torch
from torch import Tensor

from activation_store.errors import UserError
from activation_store.manifest import MANIFEST
from activation_store.places import Place
from activation_store.store import ActivationStore

_BLOCKS = 8
_BLOCK_ROWS = 32


@dataclass(frozen=True)
class VerificationRows:
    """Raw `mlp_in_BLD` (float32) of rows that training could use; `source`: "held-out" or "training"."""

    mlp_in_BLD: Tensor
    source: str


def open_run_store(path: Place) -> ActivationStore:
    """The store that a run was trained on. Raises UserError when it is gone, or half written."""
    if not (path / MANIFEST).is_file():
        raise UserError(
            f"the run's store {path} is not there, and publishing checks the written weights on its held-out rows; put "
            "it back, or harvest it again with the run's config"
        )
    return ActivationStore.open(path)


def verification_rows(store: ActivationStore) -> VerificationRows:
    """Up to 256 rows, in eight stretches spread over the store's held-out rows (its training rows if it has none).

    Raises UserError when there are no rows that training could use.
    """
    held_out = store.held_out()
    part = store if held_out is None else held_out
    used = torch.from_numpy(part.used_rows())
    pieces: list[Tensor] = []
    for start in range(0, part.n_rows, max(_BLOCK_ROWS, -(-part.n_rows // _BLOCKS))):
        stop = min(start + _BLOCK_ROWS, part.n_rows)
        pieces.append(part[start:stop].mlp_in[used[start:stop]])
    if sum(map(len, pieces)) == 0:
        raise UserError(f"the store {store.path} has no rows that training could use; harvest more tokens")
    return VerificationRows(torch.cat(pieces), "training" if held_out is None else "held-out")
