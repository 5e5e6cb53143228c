"""The dense step that everything is measured against: what a careful dense trainer would do.

One matmul per source layer for all its targets, torch.topk, gradients by hand into kept buffers, the exact global norm,
fused torch Adam. With bf16, the products take bf16 operands; parameters, sums over layers and Adam stay in fp32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from activation_store.batch import ActivationBatch
from benchmarks.models import new_model
from trainer.model.spec import ModelSpec


def clip_and_update(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Exact global norm, clip at 1, Adam."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    torch._foreach_mul_(gradients, torch.clamp(1.0 / norm, max=1.0))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class DenseStep:
    """A TopK training step of a batch of scaled rows; a call returns the loss."""

    def __init__(
        self, spec: ModelSpec, batch: ActivationBatch, *, lr: float, device: torch.device, bf16: bool = False
    ) -> None:
        model = new_model(spec, device, backend="reference")
        self.k, self.dtype = spec.k, torch.bfloat16 if bf16 else torch.float32
        self.layers = [
            (layer.W_enc.detach(), layer.b_enc.detach(), layer.W_dec.detach().flatten(1))
            for layer in model.source_layers
        ]
        self.b_dec = torch.zeros(spec.n_layers * spec.d_model, device=device)
        self.parameters = [*(p for layer in self.layers for p in layer), self.b_dec]
        self.gradients = [torch.empty_like(p) for p in self.parameters]
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, fused=True)
        self.x_BLD, self.y_BC = batch.mlp_in.to(device), batch.mlp_out.to(device).flatten(1)

    def __call__(self) -> float:
        codes = []
        error_BC = self.b_dec - self.y_BC
        for s, (W_enc, b_enc, W_dec) in enumerate(self.layers):
            pre_BF = self._product(self.x_BLD[:, s], W_enc.t()).add_(b_enc)
            values_Bk, ids_Bk = torch.topk(pre_BF, self.k, dim=1, sorted=False)
            a_BF = pre_BF.zero_().scatter_(1, ids_Bk, values_Bk.relu_())
            self._add_product(error_BC[:, -W_dec.shape[1] :], a_BF, W_dec)
            codes.append(a_BF)
        n_tokens = self.x_BLD.shape[0]
        # A norm by row, then a sum in float64: one float32 sum of 10^7 squares would be off by 1e-3.
        loss = float(torch.linalg.vector_norm(error_BC, dim=1).double().square().sum()) / n_tokens
        self._backward(error_BC.mul_(2 / n_tokens), codes)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        clip_and_update(self.parameters, self.optimizer)
        return loss

    def _backward(self, grad_BC: Tensor, codes: list[Tensor]) -> None:
        grad_low_BC = grad_BC.to(self.dtype)
        for s, (_, _, W_dec) in enumerate(self.layers):
            grad_W_enc, grad_b_enc, grad_W_dec = self.gradients[3 * s : 3 * s + 3]
            suffix_BC = grad_low_BC[:, -W_dec.shape[1] :]
            self._product(codes[s].t(), suffix_BC, out=grad_W_dec)
            grad_pre_BF = self._product(suffix_BC, W_dec.t()).mul_(codes[s] > 0)
            self._product(grad_pre_BF.t(), self.x_BLD[:, s], out=grad_W_enc)
            torch.sum(grad_pre_BF, dim=0, dtype=torch.float32, out=grad_b_enc)
        torch.sum(grad_BC, dim=0, out=self.gradients[-1])

    def _product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a b in the step's dtype; into `out` (fp32) if given."""
        if self.dtype == torch.float32:
            return torch.mm(a, b, out=out)
        product = torch.mm(a.to(self.dtype), b.to(self.dtype))
        return product if out is None else out.copy_(product)

    def _add_product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        if self.dtype == torch.float32:
            out.addmm_(a, b)
        else:
            out.add_(self._product(a, b))
