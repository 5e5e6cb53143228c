"""Every figure of an evaluation, on numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from trainer.evaluation.jackknife import as_json, jackknife
from trainer.evaluation.reconstruction import (
    RuleSums,
    TargetSums,
    density_histogram,
    fvu,
    fvu_per_layer,
    l0,
    l0_per_layer,
    sums_of,
)
from trainer.evaluation.scores import ReplacedScores, ReplacementSums, position_values, score_replaced, score_subject
from trainer.model.features import LayerCodes

CPU = torch.device("cpu")


def test_jackknife_of_equal_documents_is_the_plain_standard_error() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    sums = {"x": torch.tensor(values, dtype=torch.float64), "count": torch.ones(4, dtype=torch.float64)}
    estimate = jackknife(sums, lambda totals: totals["x"] / totals["count"])
    assert float(estimate.value) == pytest.approx(4.0)
    # Deviations -3, -2, 0, 5: s^2 = 38 / 3, se = sqrt(38 / 12).
    assert float(estimate.se) == pytest.approx(math.sqrt(38 / 12), rel=1e-12)
    assert float(estimate.se) == pytest.approx(np.std(values, ddof=1) / 2, rel=1e-12)


def test_jackknife_of_a_ratio_by_hand() -> None:
    # Ratios without document 0, 1, 2: 5/5, 4/4, 3/3 + ... with x = (1, 2, 6), c = (1, 2, 3).
    sums = {"x": torch.tensor([1.0, 2.0, 6.0]).double(), "count": torch.tensor([1.0, 2.0, 3.0]).double()}
    estimate = jackknife(sums, lambda totals: totals["x"] / totals["count"])
    left_out = [8 / 5, 7 / 4, 3 / 3]
    mean = sum(left_out) / 3
    expected = math.sqrt(2 / 3 * sum((value - mean) ** 2 for value in left_out))
    assert float(estimate.value) == pytest.approx(1.5)
    assert float(estimate.se) == pytest.approx(expected, rel=1e-12)


def test_one_document_has_no_standard_error() -> None:
    estimate = jackknife({"x": torch.ones(1, 2), "count": torch.ones(1)}, lambda totals: totals["x"] / totals["count"])
    assert as_json(estimate.value) == [1.0, 1.0]
    assert as_json(estimate.se) == [None, None]


def test_fvu_by_hand() -> None:
    # One layer of one dimension: y = 0, 1, 2, 5 (mean 2: centred squares 4 + 1 + 0 + 9 = 14), errors 1, 0, -1, 2: 6.
    # A second layer with y = 0, 0, 0, 4 (mean 1: 1 + 1 + 1 + 9 = 12) and errors 3, 0, 0, 0: 9.
    y = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [5.0, 4.0]])[:, :, None]
    y_hat = y - torch.tensor([[1.0, 3.0], [0.0, 0.0], [-1.0, 0.0], [2.0, 0.0]])[:, :, None]
    document = torch.tensor([0, 0, 1, 1])
    targets, rule = TargetSums(2, torch.tensor([[7.0], [-3.0]])), RuleSums(2, 2, 5, CPU)
    for rows in (slice(0, 3), slice(3, 4)):
        targets.add(document[rows], y[rows])
        rule.add_residual(document[rows], y[rows], y_hat[rows])
    estimate = jackknife(sums_of(targets, rule), fvu_per_layer)
    assert estimate.value.tolist() == pytest.approx([6 / 14, 9 / 12], rel=1e-12)
    assert float(jackknife(sums_of(targets, rule), fvu).value) == pytest.approx((6 / 14 + 9 / 12) / 2, rel=1e-12)
    # Without document 1: y = 0, 1, centred .5, residual 1. Without document 0: y = 2, 5, centred 4.5, residual 5.
    assert float(estimate.se[0]) == pytest.approx((2 - 5 / 4.5) / 2, rel=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_fvu_agrees_with_numpy_whatever_the_offset(offset: float) -> None:
    rng = np.random.default_rng(0)
    y = (rng.normal(size=(301, 3, 7)) + offset).astype(np.float32)
    y_hat = (y + 0.3 * rng.normal(size=y.shape)).astype(np.float32)
    document = torch.from_numpy(rng.integers(0, 5, 301))
    targets, rule = TargetSums(5, torch.full((3, 7), offset + 0.1)), RuleSums(5, 3, 1, CPU)
    targets.add(document, torch.from_numpy(y))
    rule.add_residual(document, torch.from_numpy(y), torch.from_numpy(y_hat))
    y64, y_hat64 = y.astype(np.float64), y_hat.astype(np.float64)
    expected = ((y64 - y_hat64) ** 2).sum((0, 2)) / ((y64 - y64.mean(0)) ** 2).sum((0, 2))
    np.testing.assert_allclose(jackknife(sums_of(targets, rule), fvu_per_layer).value.numpy(), expected, rtol=1e-10)


def test_l0_and_firings_by_hand() -> None:
    rule = RuleSums(2, 2, 3, CPU)
    targets = TargetSums(2, torch.zeros(2, 1))
    document = torch.tensor([0, 1, 1])
    targets.add(document, torch.zeros(3, 2, 1))
    # Layer 0: row 0 has features 0 and 2, row 2 has feature 2. Layer 1: row 1 has feature 1, and feature 0 at value 0.
    rule.add_active(document, 0, LayerCodes(torch.tensor([0, 2, 2, 3]), torch.tensor([0, 2, 2]), torch.ones(3), 3))
    rule.add_active(
        document, 1, LayerCodes(torch.tensor([0, 0, 2, 2]), torch.tensor([1, 0]), torch.tensor([0.5, 0]), 3)
    )
    sums = sums_of(targets, rule)
    per_layer = jackknife(sums, l0_per_layer)
    assert per_layer.value.tolist() == pytest.approx([1.0, 1 / 3])
    # Layer 0 without document 0: 1 of 2 rows; without document 1: 2 of 1.
    assert float(per_layer.se[0]) == pytest.approx(math.sqrt(0.5 * (0.75**2 * 2)))
    assert float(jackknife(sums, l0).value) == pytest.approx(4 / 3)
    assert rule.firings_LF.tolist() == [[1, 0, 2], [0, 1, 0]]


def test_density_histogram_by_hand() -> None:
    firings = torch.tensor([[0, 1, 10], [100, 99, 0]])  # densities 10^-2, 10^-1, 1 and just below 1, of 100 tokens
    histogram = density_histogram(firings, 100)
    edges, counts = histogram["log10_edges"], histogram["counts"]
    assert edges == [-2.0, -1.75, -1.5, -1.25, -1.0, -0.75, -0.5, -0.25, 0.0]
    assert counts == [1, 0, 0, 0, 1, 0, 0, 2]
    assert density_histogram(torch.tensor([1, 101]), 101)["log10_edges"][0] == -3.0
    assert sum(density_histogram(torch.tensor([1, 1]), 1)["counts"]) == 2


def test_scores_by_hand() -> None:
    # Vocabulary of 2; subject probabilities of token 0: .75, .9, .6; the replaced model's: .5 + tiny, .2, .9.
    p, q = torch.tensor([0.75, 0.9, 0.6]), torch.tensor([0.55, 0.2, 0.9])
    subject_logits, logits = torch.stack([p, 1 - p], 1).log() + 3, torch.stack([q, 1 - q], 1).log() - 1
    target = torch.tensor([0, 0, 1])
    subject = score_subject(subject_logits, torch.arange(3), target)
    replaced = score_replaced(logits, subject_logits, torch.arange(3), target, subject)
    assert subject.ce_P.tolist() == pytest.approx([-math.log(0.75), -math.log(0.9), -math.log(0.4)], rel=1e-6)
    # Right with .75; right but with .9; wrong.
    assert subject.uncertain_P.tolist() == [True, False, False]
    assert replaced.ce_P.tolist() == pytest.approx([-math.log(0.55), -math.log(0.2), -math.log(0.1)], rel=1e-6)
    assert replaced.agree_P.tolist() == [True, False, True]
    expected = [
        a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)) for a, b in zip(p.tolist(), q.tolist(), strict=True)
    ]
    assert replaced.kl_P.tolist() == pytest.approx(expected, rel=1e-5)


def test_scores_do_not_depend_on_the_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(301, 11, generator=generator)
    other = torch.randn(301, 11, generator=generator)
    target = torch.randint(0, 11, (301,), generator=generator)
    place = torch.randperm(301, generator=generator)[:290]
    target = target[place]
    subject = score_subject(logits, place, target)
    scores = score_replaced(other, logits, place, target, subject)
    p, q = logits[place].double().softmax(1), other[place].double().softmax(1)
    torch.testing.assert_close(scores.kl_P, (p * (p / q).log()).sum(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores.ce_P, -q.log()[torch.arange(290), target], rtol=1e-5, atol=1e-6)
    assert torch.equal(scores.agree_P, p.argmax(1) == q.argmax(1))


def test_replacement_block_by_hand() -> None:
    logits = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8], [0.9, 0.1]]).log()
    other = torch.tensor([[0.3, 0.7], [0.6, 0.4], [0.1, 0.9], [0.2, 0.8]]).log()
    target = torch.tensor([0, 0, 0, 0])
    place = torch.arange(4)
    subject = score_subject(logits, place, target)
    sums = ReplacementSums(2, CPU)
    ablated = torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64)
    replaced = score_replaced(other, logits, place, target, subject)
    values = position_values(subject, ReplacedScores(ablated, ablated, replaced.agree_P), replaced)
    sums.add(torch.tensor([0, 0, 0, 1]), values)
    block = sums.report()
    ce_subject = -sum(map(math.log, (0.6, 0.7, 0.2, 0.9))) / 4
    ce_replaced = -sum(map(math.log, (0.3, 0.6, 0.1, 0.2))) / 4
    assert block["ce_subject"] == pytest.approx(ce_subject, rel=1e-6)
    assert block["ce_replaced"] == pytest.approx(ce_replaced, rel=1e-6)
    assert block["ce_ablated"] == pytest.approx(2.5)
    assert block["ce_recovered"] == pytest.approx((2.5 - ce_replaced) / (2.5 - ce_subject), rel=1e-6)
    assert block["top1_agreement"] == pytest.approx(0.5)
    # Uncertain and right: positions 0 and 1; the replaced model agrees at 1 only.
    assert block["top1_agreement_uncertain"] == pytest.approx(0.5)
    # Without document 0 there is no uncertain position.
    assert block["top1_agreement_uncertain_se"] is None
    # Agreement without document 0: 0 of 1; without document 1: 2 of 3.
    assert block["top1_agreement_se"] == pytest.approx(math.sqrt(0.5 * 2 * (1 / 3) ** 2))
