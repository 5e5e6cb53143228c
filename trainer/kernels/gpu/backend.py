"""The Triton backend: every op of `trainer.kernels.dispatch.Kernels` on CUDA tensors."""

from trainer.kernels.dispatch import Kernels
from trainer.kernels.gpu.batch_threshold import batch_threshold, encode_candidates
from trainer.kernels.gpu.build_csc import build_csc
from trainer.kernels.gpu.encode_jumprelu import encode_jumprelu
from trainer.kernels.gpu.encode_topk import begin_topk, encode_topk
from trainer.kernels.gpu.fused_adam_rows import fused_adam_rows
from trainer.kernels.gpu.sparse_backward import decoder_backward, feature_sums, row_gradients
from trainer.kernels.gpu.sparse_decode import sparse_decode

TRITON = Kernels(
    name="triton",
    encode_topk=encode_topk,
    encode_jumprelu=encode_jumprelu,
    encode_candidates=encode_candidates,
    batch_threshold=batch_threshold,
    build_csc=build_csc,
    sparse_decode=sparse_decode,
    decoder_backward=decoder_backward,
    row_gradients=row_gradients,
    feature_sums=feature_sums,
    fused_adam_rows=fused_adam_rows,
    begin_topk=begin_topk,
)
