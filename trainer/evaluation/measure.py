"""The measurement itself: one pass over held-out contexts, any transcoder on any subject.

Shapes: N contexts, C tokens of a context, R rows, K documents, L covered layers, D d_model, F features of a layer,
V vocabulary, P scored positions; d columns that this device decodes.

On a feature axis all ranks run the subject on the same contexts, each with its part of the transcoder, and have the
same result: what is summed here is of a rank's own features and columns until it is put together at the end.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from activation_store.config import InputHook
from activation_store.progress import Progress
from activation_store.statistics import ScalingStatistics
from activation_store.subject import Subject
from activation_store.tokens import PackedContexts
from trainer.evaluation.contexts import NO_TARGET, ContextBatch, Exclusion, context_batches, count_documents
from trainer.evaluation.passes import ReplacedSubject
from trainer.evaluation.reconstruction import RuleSums, TargetSums, slices
from trainer.evaluation.scores import ReplacedScores, ReplacementSums, position_values, score_replaced, score_subject
from trainer.model.clt import CrossLayerTranscoder

_ROWS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """What to measure with.

    `layers` are the subject's layers that the transcoder covers; `statistics` are those of the training rows (mean
    norms for exclusion, mean outputs for ablation), and `special_token_ids` and `outlier_factor` those by which
    training excludes rows. The training rule of batchtopk selects over groups of `selection_rows` rows.
    """

    input_hook: InputHook
    layers: range
    statistics: ScalingStatistics
    special_token_ids: frozenset[int]
    outlier_factor: float = 20.0
    batch_contexts: int = 4
    replacement: bool = True
    selection_rows: int = 1024


@dataclass(frozen=True)
class Measured:
    """Sums per document of everything that evaluation.json reports.

    `rows_K` counts all rows but padding, `excluded_K` the excluded ones among them. `training` is `inference` itself
    where the two rules are one (relu, jumprelu). The replacement sums are None when not measured.
    `tokens_since_active_LF` is the transcoder's own record from training.
    """

    rows_K: Tensor
    excluded_K: Tensor
    targets: TargetSums
    inference: RuleSums
    training: RuleSums
    replacement: ReplacementSums | None
    replacement_all_positions: ReplacementSums | None
    tokens_since_active_LF: Tensor


@torch.no_grad()
def measure(
    transcoder: CrossLayerTranscoder,
    subject: Subject,
    contexts: PackedContexts,
    settings: MeasureSettings,
    *,
    after_batch: Callable[[], None] = lambda: None,
) -> Measured:
    """Runs the subject over `contexts` once, and with its MLPs replaced when asked; sums every figure per document.

    Of a batch, one set of captures and two of logits are in memory at a time. `after_batch` may end it by raising.
    """
    measured = _empty(transcoder, subject, contexts, settings)
    exclusion = Exclusion(settings.statistics, settings.special_token_ids, settings.outlier_factor)
    spliced = ReplacedSubject(
        transcoder, subject, settings.input_hook, settings.layers, settings.statistics.out_mean_LD.to(subject.device)
    )
    groups = RowGroups(settings.selection_rows if transcoder.spec.kind == "batchtopk" else _ROWS_AT_ONCE)
    with Progress("evaluate", total=contexts.tokens, unit="tok") as progress:
        for batch in context_batches(contexts, settings.batch_contexts, subject.device):
            own = spliced.forward_subject(batch)
            excluded_NC = exclusion.excluded(batch, own.mlp_in_NCLD, own.mlp_out_NCLD)
            # Of one mind, for rounding may put a norm on either side of the limit, and all take the same rows.
            excluded_NC = transcoder.collectives.smallest(excluded_NC.to(torch.uint8)).bool()
            measured.rows_K.add_(_count(batch.document_NC[batch.valid_NC], measured.rows_K))
            measured.excluded_K.add_(_count(batch.document_NC[batch.valid_NC & excluded_NC], measured.excluded_K))
            used_NC = ~excluded_NC
            rows = Rows(batch.document_NC[used_NC], own.mlp_in_NCLD[used_NC], own.mlp_out_NCLD[used_NC])
            for group in groups.add(rows):
                _add_rows(measured, transcoder, group)
            if settings.replacement:
                _add_replacement(measured, spliced, batch, own.logits_NCV, excluded_NC)
            progress.advance(int(batch.valid_NC.sum()))
            after_batch()
        for group in groups.rest():
            _add_rows(measured, transcoder, group)
    for rule in dict.fromkeys((measured.inference, measured.training)):
        rule.sum_over(transcoder.collectives)
    return measured


@dataclass(frozen=True)
class Rows:
    """R rows of the subject's own stream with the number of their document."""

    document_R: Tensor
    mlp_in_RLD: Tensor
    mlp_out_RLD: Tensor

    def __len__(self) -> int:
        return len(self.document_R)

    def __getitem__(self, rows: slice) -> "Rows":
        return Rows(self.document_R[rows], self.mlp_in_RLD[rows], self.mlp_out_RLD[rows])


class RowGroups:
    """Regroups rows, in order, into groups of a fixed size; the last one may be smaller."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: list[Rows] = []

    def add(self, rows: Rows) -> Iterator[Rows]:
        """Takes rows in and yields the groups that are full."""
        self._held.append(rows)
        if sum(map(len, self._held)) < self.size:
            return
        (joined,) = self.rest()
        full = len(joined) // self.size * self.size
        for part in slices(full, self.size):
            yield joined[part]
        self._held = [joined[full : len(joined)]]

    def rest(self) -> Iterator[Rows]:
        """Yields what is left, if anything."""
        held, self._held = self._held, []
        if sum(map(len, held)):
            yield Rows(
                torch.cat([rows.document_R for rows in held]),
                torch.cat([rows.mlp_in_RLD for rows in held]),
                torch.cat([rows.mlp_out_RLD for rows in held]),
            )


def _empty(
    transcoder: CrossLayerTranscoder, subject: Subject, contexts: PackedContexts, settings: MeasureSettings
) -> Measured:
    documents, device = count_documents(contexts), subject.device
    spec = transcoder.spec
    inference, training = (RuleSums(documents, spec.n_layers, transcoder.n_features, device) for _ in range(2))
    blocks = [ReplacementSums(documents, device) if settings.replacement else None for _ in range(2)]
    return Measured(
        rows_K=torch.zeros(documents, dtype=torch.float64, device=device),
        excluded_K=torch.zeros(documents, dtype=torch.float64, device=device),
        targets=TargetSums(documents, settings.statistics.out_mean_LD.to(device)),
        inference=inference,
        training=training if spec.is_topk else inference,
        replacement=blocks[0],
        replacement_all_positions=blocks[1],
        tokens_since_active_LF=transcoder.collectives.gather_features(transcoder.tokens_since_active_LF),
    )


def _count(document_R: Tensor, like_K: Tensor) -> Tensor:
    return torch.bincount(document_R, minlength=len(like_K)).to(like_K)


def _add_rows(measured: Measured, transcoder: CrossLayerTranscoder, group: Rows) -> None:
    """Reconstructs a group of rows from the subject's own stream, under both rules."""
    for part in slices(len(group), _ROWS_AT_ONCE):
        rows = group[part]
        measured.targets.add(rows.document_R, rows.mlp_out_RLD)
        mlp_out_RLd = transcoder.local_columns(rows.mlp_out_RLD)
        measured.inference.add_inference(transcoder, rows.document_R, rows.mlp_in_RLD, mlp_out_RLd)
    if measured.training is measured.inference:
        return
    # Selection is over the whole group; what is selected is sparse.
    mlp_out_RLd = transcoder.local_columns(group.mlp_out_RLD)
    measured.training.add_training(transcoder, group.document_R, group.mlp_in_RLD, mlp_out_RLd)


def _add_replacement(
    measured: Measured, spliced: ReplacedSubject, batch: ContextBatch, logits_NCV: Tensor, excluded_NC: Tensor
) -> None:
    """Scores ablation and the transcoder, once keeping excluded positions and once keeping position 0 alone."""
    assert measured.replacement is not None
    assert measured.replacement_all_positions is not None
    scores = _score(spliced, batch, logits_NCV, excluded_NC)
    measured.replacement.add(scores.document_P, scores.values)
    # Most contexts have nothing to exclude but position 0, and need no forwards of their own for the second figure.
    first_NC = ~batch.valid_NC | (batch.positions_NC == 0)
    differs_N = (first_NC != excluded_NC).any(1)
    same_P = ~differs_N[scores.context_P]
    measured.replacement_all_positions.add(
        scores.document_P[same_P], {name: value_P[same_P] for name, value_P in scores.values.items()}
    )
    if differs_N.any():
        scores = _score(spliced, batch.contexts(differs_N), logits_NCV[differs_N], first_NC[differs_N])
        measured.replacement_all_positions.add(scores.document_P, scores.values)


@dataclass(frozen=True)
class _Scores:
    """Values of P positions, with the number of their document and the row of their context in the batch."""

    document_P: Tensor
    context_P: Tensor
    values: dict[str, Tensor]


def _score(spliced: ReplacedSubject, batch: ContextBatch, subject_logits_NCV: Tensor, kept_NC: Tensor) -> _Scores:
    """Scores at the positions that are not kept and have a next token."""
    context_P, column_P = (~kept_NC & (batch.target_NC != NO_TARGET)).nonzero(as_tuple=True)
    place_P = context_P * kept_NC.shape[1] + column_P
    target_P = batch.target_NC[context_P, column_P]
    subject_logits_XV = subject_logits_NCV.flatten(0, 1)
    subject = score_subject(subject_logits_XV, place_P, target_P)

    def against(logits_NCV: Tensor) -> ReplacedScores:
        return score_replaced(logits_NCV.flatten(0, 1), subject_logits_XV, place_P, target_P, subject)

    ablated = against(spliced.forward_ablated(batch, kept_NC))
    replaced = against(spliced.forward_transcoder(batch, kept_NC))
    return _Scores(batch.document_NC[context_P, column_P], context_P, position_values(subject, ablated, replaced))
