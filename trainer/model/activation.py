"""Selection: which entries (token, feature) of each source layer are active under the training rule.

Only entries with pre > 0 are candidates; a = pre where selected, else 0. Score: pre, or pre times the decoder norm.

    relu       pre > 0
    jumprelu   pre > theta (and the band |pre - theta| < eps / 2, of value 0 where inactive, for theta's gradient)
    topk       per token the k largest scores of a layer, or the k * L largest over all layers
    batchtopk  the k * B largest of a layer, or the k * L * B largest over all layers, over the microbatch

Ties: the smallest (token, layer, feature). Layers are encoded one at a time; selection over all layers keeps the best
entries so far, which is exact because the order is total. For the same reason, where features or tokens are spread over
devices, each finds the best of its own and the collectives cut these to the best of all.

Legend: B tokens, L layers, F features, K = k * L entries of a token.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from trainer.kernels.batch_threshold import Candidates
from trainer.kernels.encode_topk import Selection
from trainer.kernels.selection import topk_rows
from trainer.model.collectives import Collectives
from trainer.model.layer import SourceLayer
from trainer.model.runtime import Runtime

T = TypeVar("T")


def one_ahead(begun: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results in order, each asked for when the next one has been begun: while a GPU works on that, the host waits
    for the sizes of the one before.
    """
    previous: Callable[[], T] | None = None
    for result in begun:
        if previous is not None:
            yield previous()
        previous = result
    if previous is not None:
        yield previous()


def begin_layer(
    kind: str,
    layer: SourceLayer,
    x_BD: Tensor,
    k: int,
    norm_F: Tensor | None,
    max_density: float,
    runtime: Runtime,
    running_threshold: Tensor,
    collectives: Collectives,
) -> Callable[[], Selection | None]:
    """Selection within one layer by the rule `kind`; None: relu or jumprelu with a share above `max_density`.

    What a GPU can do before the host knows the size of a result is begun; calling what it returns does the rest.
    running_threshold: of batchtopk, 0-dim; where the selection spans devices, they look above it first.
    """
    if kind == "topk":
        begun = layer.begin_topk(x_BD, min(k, layer.n_features), norm_F, runtime)
        return lambda: cut_to_best(begun(), norm_F, k, layer.n_features, collectives)
    if kind == "batchtopk":
        alone = collectives.partitioning.size * collectives.data_size == 1
        return lambda: _batchtopk_over_layers(
            [layer],
            x_BD[:, None],
            k,
            [norm_F],
            runtime,
            math.nan if alone else float(running_threshold),
            collectives,
        )[0]
    # A device with more than this many alone has more than the limit of all of them.
    most = min(1.0, max_density * collectives.partitioning.size)
    return lambda: _select_above(layer, x_BD, most, runtime)


def _select_above(layer: SourceLayer, x_BD: Tensor, max_density: float, runtime: Runtime) -> Selection | None:
    """Entries above 0 or theta."""
    if layer.log_threshold is None:
        return layer.select_above(x_BD, 0.0, 0.0, max_density, runtime)
    bandwidth = layer.spec.bandwidth if torch.is_grad_enabled() else 0.0
    return layer.select_above(x_BD, layer.theta(), bandwidth, max_density, runtime)


def cut_to_best(
    found: Selection, norm_F: Tensor | None, k: int, n_features: int, collectives: Collectives
) -> Selection:
    """Per token the k best entries over all devices, of each device's k best among its `n_features`."""
    if collectives.partitioning.size == 1:
        return found
    width, counts_B = min(k, n_features), found.offsets.diff()
    scores_N = found.values if norm_F is None else found.values * norm_F[found.feature_ids]
    kept_BK = collectives.cut_rows(_padded(found, scores_N, width, float("-inf")), counts_B[:, None], k)
    if kept_BK is None:
        return found
    filled_BK = torch.arange(width, device=counts_B.device) < counts_B[:, None]
    kept_BK &= filled_BK
    kept_N = kept_BK[filled_BK]
    offsets = functional.pad(kept_BK.sum(dim=1).cumsum(0), (1, 0))
    return Selection(offsets, found.feature_ids[kept_N], found.values[kept_N])


# Share of the running threshold that a batch's own seldom falls below.
_HINT_SHARE = 0.8


def select_all_layers(
    kind: str,
    layers: Sequence[SourceLayer],
    x_BLD: Tensor,
    k: int,
    norms: Sequence[Tensor | None],
    runtime: Runtime,
    running_threshold: float,
    collectives: Collectives,
) -> list[Selection]:
    """Selection with one budget over all layers. running_threshold (or NaN): of batchtopk, where to look first; the
    selection does not depend on it.
    """
    if kind == "topk":
        return _topk_over_layers(layers, x_BLD, k * len(layers), norms, runtime, collectives)
    return _batchtopk_over_layers(layers, x_BLD, k * len(layers), norms, runtime, running_threshold, collectives)


def _batchtopk_over_layers(
    layers: Sequence[SourceLayer],
    x_BLD: Tensor,
    k_total: int,
    norms: Sequence[Tensor | None],
    runtime: Runtime,
    running_threshold: float,
    collectives: Collectives,
) -> list[Selection]:
    n_tokens, n_features = x_BLD.shape[0], layers[0].n_features
    n = k_total * n_tokens * collectives.data_size
    # Entries far below the running threshold hardly win: a floor spares work. Where too few reach it, all over again.
    floor = _HINT_SHARE * running_threshold if running_threshold > 0 else float("-inf")
    best = _best_over_layers(layers, x_BLD, n, norms, runtime, floor)
    total = collectives.count_all(sum(found.scores.numel() for found in best))
    if floor > 0 and total < n:
        best = _best_over_layers(layers, x_BLD, n, norms, runtime, float("-inf"))
        total = collectives.count_all(sum(found.scores.numel() for found in best))
    masks = collectives.cut_batch(best, n, total, n_tokens, n_features)
    if masks is not None:
        best = [found.keep(mask) for found, mask in zip(best, masks, strict=True)]
    return [_as_selection(found, n_tokens, n_features) for found in best]


def _best_over_layers(
    layers: Sequence[SourceLayer],
    x_BLD: Tensor,
    n: int,
    norms: Sequence[Tensor | None],
    runtime: Runtime,
    floor: float,
) -> list[Candidates]:
    """The n best entries with score >= floor. The lists are cut when they are full; seldom, once there is a floor."""
    best: list[Candidates] = []
    for s, layer in enumerate(layers):
        wanted = min(n, x_BLD.shape[0] * layer.n_features)
        best.append(layer.select_candidates(x_BLD[:, s], wanted, floor, norms[s], runtime))
        room = n if layer is layers[-1] or floor == float("-inf") else 2 * n
        if sum(found.scores.numel() for found in best) > room:
            masks = runtime.kernels.batch_threshold(best, n, layer.n_features)
            best = [found.keep(mask) for found, mask in zip(best, masks, strict=True)]
            floor = _smallest(best)
    return best


def _smallest(best: Sequence[Candidates]) -> float:
    """The smallest score; infinity where there is none, and NaN stays NaN."""
    return min((float(found.scores.min()) for found in best if found.scores.numel()), default=float("inf"))


def _as_selection(found: Candidates, n_tokens: int, n_features: int) -> Selection:
    # The positions ascend. Counting them (torch.bincount) would make the host wait for a GPU.
    firsts = torch.arange(n_tokens + 1, device=found.positions.device) * n_features
    offsets = torch.searchsorted(found.positions, firsts)
    return Selection(offsets, found.positions % n_features, found.values)


def _topk_over_layers(
    layers: Sequence[SourceLayer],
    x_BLD: Tensor,
    k_total: int,
    norms: Sequence[Tensor | None],
    runtime: Runtime,
    collectives: Collectives,
) -> list[Selection]:
    n_tokens = x_BLD.shape[0]
    scores_BK = x_BLD.new_zeros(n_tokens, 0)
    values_BK, places_BK = scores_BK, torch.zeros(n_tokens, 0, dtype=torch.int64, device=x_BLD.device)
    n_features = layers[0].n_features
    width = min(k_total, n_features)
    begun = (layer.begin_topk(x_BLD[:, s], width, norms[s], runtime) for s, layer in enumerate(layers))
    for s, found in enumerate(one_ahead(begun)):
        scores_N = found.values if norms[s] is None else found.values * norms[s][found.feature_ids]  # type: ignore[index]
        # Columns stay in order of (layer, feature), so that the tie rule of topk_rows is that of the contract.
        scores_BK = torch.cat([scores_BK, _padded(found, scores_N, width, float("-inf"))], dim=1)
        values_BK = torch.cat([values_BK, _padded(found, found.values, width, 0.0)], dim=1)
        places_BK = torch.cat([places_BK, _padded(found, found.feature_ids + s * n_features, width, -1)], dim=1)
        columns_BK = topk_rows(scores_BK, k_total, floor=float("-inf"))
        scores_BK, values_BK, places_BK = (t.gather(1, columns_BK) for t in (scores_BK, values_BK, places_BK))
    if collectives.partitioning.size > 1:
        places_BK = _cut_places(scores_BK, places_BK, k_total, len(layers), n_features, collectives)
    return [_layer_part(places_BK, values_BK, s, n_features) for s in range(len(layers))]


def _cut_places(
    scores_BK: Tensor, places_BK: Tensor, k_total: int, n_layers: int, n_features: int, collectives: Collectives
) -> Tensor:
    """The places with -1 where an entry is not among the k_total best of its token over all devices."""
    # Empty columns go to the end, so that the layer of every other follows from the counts.
    order_BK = torch.where(places_BK < 0, n_layers * n_features, places_BK).argsort(dim=1, stable=True)
    layers_BK = places_BK // n_features
    counts_BL = torch.stack([(layers_BK == s).sum(dim=1) for s in range(n_layers)], dim=1)
    kept_BK = collectives.cut_rows(scores_BK.gather(1, order_BK), counts_BL, k_total)
    if kept_BK is None:
        return places_BK
    return torch.where(torch.zeros_like(kept_BK).scatter(1, order_BK, kept_BK), places_BK, -1)


def _padded(found: Selection, entries_N: Tensor, width: int, fill: float) -> Tensor:
    """(B, width) table of a selection's entries, in order, filled up on the right."""
    n_tokens = found.offsets.numel() - 1
    if entries_N.numel() == n_tokens * width:
        return entries_N.view(n_tokens, width)
    filled_BW = torch.arange(width, device=entries_N.device) < found.offsets.diff()[:, None]
    return entries_N.new_full((n_tokens, width), fill).masked_scatter(filled_BW, entries_N)


def _layer_part(places_BK: Tensor, values_BK: Tensor, s: int, n_features: int) -> Selection:
    """The entries of layer s of a table of places = layer * F + feature."""
    mine_BK = (places_BK >= s * n_features) & (places_BK < (s + 1) * n_features)
    offsets = functional.pad(mine_BK.sum(dim=1).cumsum(0), (1, 0))
    return Selection(offsets, places_BK[mine_BK] - s * n_features, values_BK[mine_BK])
