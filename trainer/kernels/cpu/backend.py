"""The compiled backend of a CPU: float32 in numba, on torch's threads; everything else by the reference."""

from trainer.kernels.cpu import (
    batch_threshold,
    build_csc,
    encode_jumprelu,
    encode_topk,
    fused_adam_rows,
    sparse_backward,
    sparse_decode,
)
from trainer.kernels.dispatch import Kernels

CPU = Kernels(
    name="cpu",
    encode_topk=encode_topk.encode_topk,
    encode_jumprelu=encode_jumprelu.encode_jumprelu,
    encode_candidates=batch_threshold.encode_candidates,
    batch_threshold=batch_threshold.batch_threshold,
    build_csc=build_csc.build_csc,
    sparse_decode=sparse_decode.sparse_decode,
    decoder_backward=sparse_backward.decoder_backward,
    row_gradients=sparse_backward.row_gradients,
    feature_sums=sparse_backward.feature_sums,
    fused_adam_rows=fused_adam_rows.fused_adam_rows,
)
