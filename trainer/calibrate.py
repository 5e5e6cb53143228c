"""Thresholds of the inference rule a = pre * (pre > threshold), calibrated on training rows.

topk and batchtopk: `layer` scope finds, per layer, the score threshold tau under which exactly as many entries of the
calibration rows are active as under the training rule; the threshold of feature i is tau, or tau / ||W_dec,i|| where
the score is weighted by the decoder norm. `feature` scope matches each feature's own firing rate; a feature that is
never active on these rows gets the largest of its pre-activations on them and the layer's threshold. jumprelu: theta.
relu: 0.

On a mesh every rank collects of its own features (and of the batches dealt to it, or the rows that it is given); the
lists of all are put together for the thresholds.

Legend: B tokens, F features, N kept entries.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.dealing import Dealing
from trainer.model.clt import CrossLayerTranscoder


@dataclass(slots=True)
class _Pool:
    """Largest scores of one layer over the batches so far, by group (one group, or one per feature).

    With one group, `groups` stays empty. Holds per batch `factor` times as many entries as were active, which is nearly
    always enough to hold the wanted order statistic of all rows; `cut` (per batch, per group) is the smallest kept
    score where some were dropped.
    """

    groups: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    cuts: list[Tensor] = field(default_factory=list)
    active_G: Tensor | None = None

    def add(self, groups_N: Tensor | None, scores_N: Tensor, cut_G: Tensor, active_G: Tensor) -> None:
        """Entries of one batch."""
        if groups_N is not None:
            self.groups.append(groups_N)
        self.scores.append(scores_N)
        self.cuts.append(cut_G)
        self.active_G = active_G if self.active_G is None else self.active_G + active_G

    def add_nothing(self, like: "_Pool") -> None:
        """No entries, of the dtypes and groups of another pool."""
        assert like.active_G is not None
        self.groups, self.scores = ([t[:0] for t in tensors[:1]] for tensors in (like.groups, like.scores))
        self.cuts = [torch.full_like(like.cuts[0], float("-inf"))]
        self.active_G = torch.zeros_like(like.active_G)

    def of_all(self, gather: Callable[[Tensor], Tensor]) -> "_Pool":
        """What the ranks that `gather` spans have together."""
        assert self.active_G is not None
        n_groups = self.active_G.numel()
        cuts_G = gather(torch.stack(self.cuts).amax(dim=0)).view(-1, n_groups).amax(dim=0)
        active_G = gather(self.active_G).view(-1, n_groups).sum(dim=0)
        groups = [gather(torch.cat(self.groups))] if self.groups else []
        return _Pool(groups, [gather(torch.cat(self.scores))], [cuts_G], active_G)

    def thresholds(self) -> tuple[Tensor, bool]:
        """(G) thresholds that leave exactly the active count above them, and whether nothing dropped mattered."""
        assert self.active_G is not None
        scores_N = torch.cat(self.scores)
        if self.groups:
            groups_N = torch.cat(self.groups)
            order = scores_N.argsort(descending=True)
            scores_N = scores_N[order[groups_N[order].argsort(stable=True)]]
            counts_G = torch.bincount(groups_N, minlength=self.active_G.numel())
        else:
            counts_G = self.active_G.new_tensor([scores_N.numel()])
            scores_N = scores_N.sort(descending=True).values
        scores_N = torch.cat([scores_N, scores_N.new_zeros(1)])
        starts_G, last = counts_G.cumsum(0) - counts_G, scores_N.numel() - 1
        at_G = torch.minimum(self.active_G, counts_G)
        lower_G = scores_N[torch.where(at_G < counts_G, starts_G + at_G, last)]
        upper_G = scores_N[torch.where(at_G > 0, starts_G + at_G - 1, last)]
        middle_G = (upper_G + lower_G) / 2
        # Strictly above the threshold must mean at least `upper`; with nothing active, `lower` itself is excluded.
        thresholds_G = torch.where((at_G > 0) & (middle_G < upper_G), middle_G, lower_G)
        exact = all(bool((cut_G <= lower_G).all()) for cut_G in self.cuts)
        return thresholds_G, exact


@dataclass(slots=True)
class _Pools:
    """Of every layer: one group, and (with threshold_scope=feature) a group per feature."""

    by_layer: list[_Pool]
    by_feature: list[_Pool]
    # The first layer with a score that is not finite.
    broken_layer: float = math.inf


@torch.no_grad()
def calibrate_thresholds(
    model: CrossLayerTranscoder, batches: Iterable[Tensor], scope: str = "layer", *, dealing: Dealing | None = None
) -> None:
    """Set `model.threshold_LF` from raw training rows mlp_in (B, L, D).

    The count is exact where `batches` can be iterated again or the batches are alike (shuffled rows); a one-shot
    iterator over very unlike batches gives the nearest count that one pass can. `dealing`: of the batches over a mesh.

    Raises:
        ValueError: unknown scope, no rows, or scores that are not finite.
    """
    if scope not in {"layer", "feature"}:
        raise ValueError(f"threshold_scope={scope} is unknown; use layer or feature")
    if not model.spec.is_topk:
        for s in range(model.spec.n_layers):
            model.threshold_LF[s] = model.inference_threshold(s)
        return
    dealing = dealing if dealing is not None else Dealing()
    one_shot = iter(batches) is batches
    # What can be read again starts with little; counts of single features vary more than those of a layer.
    factor = 4.0 if one_shot or scope == "feature" else 1.5
    while True:
        pools = _collected(model, batches, factor, scope, dealing)
        # A feature's entries lie on the ranks of the data axis that hold it, a layer's on all.
        by_layer = [pool.of_all(model.collectives.gather_all) for pool in pools.by_layer]
        by_feature = [pool.of_all(model.collectives.gather_data) for pool in pools.by_feature]
        found = [pool.thresholds() for pool in by_layer + by_feature]
        if one_shot or model.collectives.count_all(sum(not exact for _, exact in found)) == 0:
            break
        # Ends: once all scores are kept, nothing was dropped.
        factor *= 4
    for s in range(model.spec.n_layers):
        thresholds_F = model.score_threshold(s, found[s][0])
        if by_feature:
            own_F, active_F = found[len(by_layer) + s][0], by_feature[s].active_G
            assert active_F is not None
            # A feature that never fired on these rows should not fire on the next row that is a little unlike them.
            thresholds_F = torch.where(active_F > 0, own_F, torch.maximum(own_F, thresholds_F))
        model.threshold_LF[s] = thresholds_F.to(model.threshold_LF.device)


def _collected(
    model: CrossLayerTranscoder, batches: Iterable[Tensor], factor: float, scope: str, dealing: Dealing
) -> _Pools:
    """The pools of this rank's batches. Raises ValueError on all ranks alike."""
    n_layers = model.spec.n_layers
    n_by_feature = n_layers if scope == "feature" else 0
    pools, spare = (_Pools(_empty(n_layers), _empty(n_by_feature)) for _ in range(2))
    n_batches = 0
    with dealing.alone(model):
        for mlp_in_BLD, counts in dealing.deal(batches):
            _collect(model, mlp_in_BLD, factor, pools if counts else spare)
            n_batches += 1
    if n_batches == 0:
        raise ValueError("no rows to calibrate thresholds on; give at least one batch of mlp_in")
    broken = int(model.collectives.smallest(model.threshold_LF.new_tensor(min(pools.broken_layer, 1e9))))
    if broken < model.spec.n_layers:
        raise ValueError(
            f"layer {broken} has scores that are not finite on the calibration rows; thresholds want finite weights "
            "and activations, take an earlier checkpoint"
        )
    # A rank whose batches did not count has nothing to add.
    for pool, empty in zip(pools.by_layer + pools.by_feature, spare.by_layer + spare.by_feature, strict=True):
        if pool.active_G is None:
            pool.add_nothing(empty)
    return pools


def _empty(count: int) -> list[_Pool]:
    return [_Pool() for _ in range(count)]


def _collect(model: CrossLayerTranscoder, mlp_in_BLD: Tensor, factor: float, pools: _Pools) -> None:
    """Add one batch's largest scores of every layer to its pools."""
    features = model.encode(mlp_in_BLD, rule="training")
    for s, pool in enumerate(pools.by_layer):
        norm_F = model.decoder_norm(s) if model.spec.score == "decoder_norm" else None
        active = int((features[s].values > 0).sum())
        limit = int(factor * (active + 16))
        with model.running() as runtime:
            x_BD = model.scale_input(s, mlp_in_BLD[:, s])
            found = model.source_layers[s].select_candidates(x_BD, limit, float("-inf"), norm_F, runtime)
        scores_N = found.scores
        if not bool(scores_N.isfinite().all()):
            pools.broken_layer = min(pools.broken_layer, s)
        complete = scores_N.numel() < limit
        cut = scores_N.new_full((1,), float("-inf")) if complete else scores_N.min()[None]
        pool.add(None, scores_N, cut, found.positions.new_tensor([active]))
        if pools.by_feature:
            pre_BF = model.pre_activations(s, mlp_in_BLD[:, s])
            _collect_by_feature(pre_BF, features[s].counts(), factor, pools.by_feature[s])


def _collect_by_feature(pre_BF: Tensor, active_F: Tensor, factor: float, pool: _Pool) -> None:
    """Add the largest pre-activations of every feature to the pool."""
    n_tokens = pre_BF.shape[0]
    sorted_FB = pre_BF.t().sort(dim=1, descending=True).values
    limit_F = (factor * (active_F + 1)).long().clamp_max(n_tokens)
    kept_FB = (torch.arange(n_tokens, device=pre_BF.device) < limit_F[:, None]) & (sorted_FB > 0)
    groups_N = kept_FB.nonzero()[:, 0]
    counts_F = kept_FB.sum(dim=1)
    smallest_F = sorted_FB.gather(1, (limit_F - 1)[:, None])[:, 0]
    dropped_F = (counts_F == limit_F) & (limit_F < n_tokens)
    pool.add(groups_N, sorted_FB[kept_FB], torch.where(dropped_F, smallest_F, float("-inf")), active_F)
