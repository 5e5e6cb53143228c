"""Forward passes of the subject: its own, with ablated MLPs, and with the transcoder in place of its MLPs.

Shapes: N contexts, C tokens of a context, R rows, L covered layers, D d_model, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from activation_store.config import InputHook
from activation_store.hooks import forward_replaced
from activation_store.subject import Subject
from trainer.evaluation.contexts import ContextBatch
from trainer.model.clt import CrossLayerTranscoder


@dataclass(frozen=True)
class SubjectPass:
    """The subject's own logits, and what its covered MLPs read and wrote on the way, in its dtype."""

    logits_NCV: Tensor
    mlp_in_NCLD: Tensor
    mlp_out_NCLD: Tensor


class LayerwiseTranscoder:
    """The inference rule layer by layer, for R rows: each layer's features from its own mlp_in, whatever came before.

    y_hat[t] is complete once the layers up to t have been given, so a layer's mlp_in may depend on it.
    """

    def __init__(self, transcoder: CrossLayerTranscoder, rows: int) -> None:
        self.transcoder = transcoder
        self._y_RTD = transcoder.empty_output(rows)
        self._layer = 0

    def next_layer(self, mlp_in_RD: Tensor) -> Tensor:
        """Takes the next layer's raw mlp_in (R, D); returns its reconstruction (R, D) in raw units."""
        layer, model = self._layer, self.transcoder
        codes = model.encode_layer(layer, mlp_in_RD)
        self._y_RTD = model.decode_into(self._y_RTD, layer, codes, mlp_in_RD)
        self._layer += 1
        return model.target_output(self._y_RTD, layer, mlp_in_RD)


@dataclass(frozen=True)
class ReplacedSubject:
    """A subject whose MLPs in `layers` can be replaced by a transcoder of those layers, or by constants.

    `ablated_LD` is what ablation puts in place of the MLP outputs: the training rows' mean.
    """

    transcoder: CrossLayerTranscoder
    subject: Subject
    input_hook: InputHook
    layers: range
    ablated_LD: Tensor

    def _forward(self, batch: ContextBatch, replace: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        return forward_replaced(
            self.subject,
            batch.token_ids_NC,
            batch.positions_NC,
            input_hook=self.input_hook,
            layers=self.layers,
            replace=replace,
        )

    def forward_subject(self, batch: ContextBatch) -> SubjectPass:
        """One forward that changes nothing and records the covered layers."""
        shape = (*batch.token_ids_NC.shape, len(self.layers), self.subject.d_model)
        mlp_in_NCLD, mlp_out_NCLD = (
            torch.empty(shape, dtype=self.subject.dtype, device=self.subject.device) for _ in range(2)
        )

        def record(layer: int, mlp_in_NCD: Tensor, own_NCD: Tensor) -> Tensor:
            mlp_in_NCLD[:, :, layer - self.layers.start] = mlp_in_NCD
            mlp_out_NCLD[:, :, layer - self.layers.start] = own_NCD
            return own_NCD

        return SubjectPass(self._forward(batch, record), mlp_in_NCLD, mlp_out_NCLD)

    def forward_ablated(self, batch: ContextBatch, kept_NC: Tensor) -> Tensor:
        """Logits (N, C, V) with the mean in place of every covered MLP, except at `kept_NC`."""

        def ablate(layer: int, mlp_in_NCD: Tensor, own_NCD: Tensor) -> Tensor:
            mean_D = self.ablated_LD[layer - self.layers.start].to(own_NCD)
            return torch.where(kept_NC[:, :, None], own_NCD, mean_D)

        return self._forward(batch, ablate)

    def forward_transcoder(self, batch: ContextBatch, kept_NC: Tensor) -> Tensor:
        """Logits (N, C, V) with the transcoder in place of every covered MLP, except at `kept_NC`.

        Features of a layer are those of its mlp_in on this stream, after the replacements before it; they write to
        all their target layers. At kept positions no feature is computed and the subject's own MLP acts.
        """
        if kept_NC.all():
            # No row for the collectives of a mesh to send.
            return self._forward(batch, lambda layer, mlp_in_NCD, own_NCD: own_NCD)
        stream = LayerwiseTranscoder(self.transcoder, int((~kept_NC).sum()))

        def replace(layer: int, mlp_in_NCD: Tensor, own_NCD: Tensor) -> Tensor:
            new_NCD = own_NCD.clone()
            new_NCD[~kept_NC] = stream.next_layer(mlp_in_NCD[~kept_NC]).to(own_NCD)
            return new_NCD

        return self._forward(batch, replace)
