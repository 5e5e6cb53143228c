"""Scores of a replaced forward pass against the subject's own, per position and summed per document.

Shapes: X rows of logits (positions of a batch), P scored ones among them, V vocabulary, K documents. In nats, with p
the subject's next-token distribution at a position, q the replaced one, and x the token that follows:

    ce_subject = -ln p(x)      ce_replaced = -ln q(x)      kl = sum_v p(v) (ln p(v) - ln q(v))
    top1 agreement = [argmax q = argmax p];  uncertain = [argmax p = x and p(x) < 0.8]
    ce_recovered = (ce_ablated - ce_replaced) / (ce_ablated - ce_subject)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.evaluation.jackknife import Statistic, as_json, jackknife
from trainer.evaluation.reconstruction import slices

_POSITIONS_AT_ONCE = 128
UNCERTAIN_BELOW = 0.8


@dataclass(frozen=True)
class SubjectScores:
    """The subject's own scores at P positions."""

    ce_P: Tensor
    top1_P: Tensor
    uncertain_P: Tensor


@dataclass(frozen=True)
class ReplacedScores:
    """Scores of another forward at the same P positions; `kl_P` in nats, `agree_P` bool."""

    ce_P: Tensor
    kl_P: Tensor
    agree_P: Tensor


def score_subject(logits_XV: Tensor, place_P: Tensor, target_P: Tensor) -> SubjectScores:
    """CE (float64), argmax, and whether the subject is right with confidence below 80%, at rows `place_P` of logits."""
    ce_P = torch.zeros(len(place_P), dtype=torch.float64, device=place_P.device)
    top1_P = torch.zeros_like(place_P)
    for p in slices(len(place_P), _POSITIONS_AT_ONCE):
        logits_pV = logits_XV[place_P[p]]
        log_p = logits_pV.float().log_softmax(1)
        ce_P[p] = -log_p.gather(1, target_P[p][:, None])[:, 0].double()
        top1_P[p] = logits_pV.argmax(1)
    return SubjectScores(ce_P, top1_P, (top1_P == target_P) & (torch.exp(-ce_P) < UNCERTAIN_BELOW))


def score_replaced(
    logits_XV: Tensor, subject_logits_XV: Tensor, place_P: Tensor, target_P: Tensor, subject: SubjectScores
) -> ReplacedScores:
    """CE, KL(subject || replaced) and agreement of the most likely token, at rows `place_P` of both logits."""
    n = len(place_P)
    ce_P, kl_P = (torch.zeros(n, dtype=torch.float64, device=place_P.device) for _ in range(2))
    agree_P = torch.zeros(n, dtype=torch.bool, device=place_P.device)
    for p in slices(n, _POSITIONS_AT_ONCE):
        logits_pV = logits_XV[place_P[p]]
        log_q = logits_pV.float().log_softmax(1)
        log_p = subject_logits_XV[place_P[p]].float().log_softmax(1)
        ce_P[p] = -log_q.gather(1, target_P[p][:, None])[:, 0].double()
        kl_P[p] = (log_p.exp() * (log_p - log_q)).sum(1).double()
        agree_P[p] = logits_pV.argmax(1) == subject.top1_P[p]
    return ReplacedScores(ce_P, kl_P, agree_P)


def position_values(subject: SubjectScores, ablated: ReplacedScores, replaced: ReplacedScores) -> dict[str, Tensor]:
    """What ReplacementSums adds up, at P positions."""
    return {
        "count": torch.ones_like(subject.ce_P),
        "ce_subject": subject.ce_P,
        "ce_ablated": ablated.ce_P,
        "ce_replaced": replaced.ce_P,
        "kl": replaced.kl_P,
        "agree": replaced.agree_P,
        "uncertain": subject.uncertain_P,
        "agree_uncertain": subject.uncertain_P & replaced.agree_P,
    }


class ReplacementSums:
    """Sums per document of the scores of `subject`, `ablated` and `replaced` over one set of positions."""

    NAMES = ("count", "ce_subject", "ce_ablated", "ce_replaced", "kl", "agree", "uncertain", "agree_uncertain")

    def __init__(self, documents: int, device: torch.device) -> None:
        self.sums = {name: torch.zeros(documents, dtype=torch.float64, device=device) for name in self.NAMES}

    def add(self, document_P: Tensor, values: Mapping[str, Tensor]) -> None:
        """Adds the `position_values` of P positions; `document_P` numbers their documents, below `documents`."""
        for name in self.NAMES:
            self.sums[name].index_add_(0, document_P, values[name].double())

    def report(self) -> dict[str, object]:
        """The `replacement` block: each figure and its `_se` (jackknife over documents)."""
        block: dict[str, object] = {}
        for name, statistic in _STATISTICS.items():
            estimate = jackknife(self.sums, statistic)
            block[name] = as_json(estimate.value)
            block[f"{name}_se"] = as_json(estimate.se)
        return block


def _mean_of(numerator: str, denominator: str = "count") -> Statistic:
    def statistic(totals: Mapping[str, Tensor]) -> Tensor:
        return totals[numerator] / totals[denominator]

    return statistic


def ce_recovered(totals: Mapping[str, Tensor]) -> Tensor:
    """(ce_ablated - ce_replaced) / (ce_ablated - ce_subject); not finite where ablating changes nothing."""
    return (totals["ce_ablated"] - totals["ce_replaced"]) / (totals["ce_ablated"] - totals["ce_subject"])


_STATISTICS: dict[str, Statistic] = {
    "ce_subject": _mean_of("ce_subject"),
    "ce_replaced": _mean_of("ce_replaced"),
    "ce_ablated": _mean_of("ce_ablated"),
    "ce_recovered": ce_recovered,
    "kl": _mean_of("kl"),
    "top1_agreement": _mean_of("agree"),
    "top1_agreement_uncertain": _mean_of("agree_uncertain", "uncertain"),
}
