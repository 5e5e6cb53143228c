"""The transcoder and its losses written again, densely, in float64, with autograd; shares no code with trainer.

Everything is spelled out with [B, L, F] tensors and Python loops: slow, and plainly the equations of contracts.md.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Settings:
    """The choices that the equations depend on."""

    kind: str
    scope: str = "layer"
    score: str = "activation"
    per_layer: bool = False
    k: int = 7
    bandwidth: float = 1.0
    tanh_lambda: float = 0.0
    tanh_c: float = 4.0
    l0_lambda: float = 0.0
    l0_target: float = 0.0
    penalty_scale: float = 1.0
    auxk_coefficient: float = 0.0
    auxk_k: int = 0
    pre_act_lambda: float = 0.0
    running: list[float] = field(default_factory=list)


Parameters = dict[str, Tensor]


def pre_activations(p: Parameters, x: Tensor) -> Tensor:
    """(B, L, F)."""
    columns = [x[:, s] @ p[f"layers.{s}.W_enc"].T + p[f"layers.{s}.b_enc"] for s in range(x.shape[1])]
    return torch.stack(columns, dim=1)


def decoder_norms(p: Parameters, n_layers: int) -> Tensor:
    """(L, F), over all targets."""
    return torch.stack([(p[f"layers.{s}.W_dec"] ** 2).sum(dim=(1, 2)).sqrt() for s in range(n_layers)])


def selected(pre: Tensor, norms: Tensor, cfg: Settings) -> Tensor:
    """(B, L, F) bool by brute force: candidates sorted by (score descending, token, layer, feature)."""
    score = (pre * norms if cfg.score == "decoder_norm" else pre).tolist()
    values = pre.tolist()
    b, n_layers, n_features = pre.shape
    chosen = torch.zeros_like(pre, dtype=torch.bool)
    groups: dict[tuple[int, ...], list[tuple[float, int, int, int]]] = {}
    for token in range(b):
        for layer in range(n_layers):
            key = () if cfg.kind == "batchtopk" else (token,)
            key += () if cfg.scope == "all_layers" else (layer,)
            entries = groups.setdefault(key, [])
            for feature in range(n_features):
                if values[token][layer][feature] > 0:
                    entries.append((-score[token][layer][feature], token, layer, feature))
    budget = cfg.k * (n_layers if cfg.scope == "all_layers" else 1) * (b if cfg.kind == "batchtopk" else 1)
    for entries in groups.values():
        for _, token, layer, feature in sorted(entries)[:budget]:
            chosen[token, layer, feature] = True
    return chosen


def activations(p: Parameters, pre: Tensor, cfg: Settings) -> tuple[Tensor, Tensor]:
    """a and the gate H, both (B, L, F); theta's gradients are the stated estimator, written as surrogate terms."""
    if cfg.kind == "relu":
        return torch.relu(pre), (pre > 0).double()
    if cfg.kind == "jumprelu":
        theta = torch.stack([p[f"layers.{s}.log_threshold"].exp() for s in range(pre.shape[1])])
        gate = (pre > theta).double()
        band = ((pre - theta).abs() < cfg.bandwidth / 2).double()
        moved = theta - theta.detach()
        a = pre * gate - ((theta / cfg.bandwidth) * band).detach() * moved
        return a, gate - (band / cfg.bandwidth).detach() * moved
    gate = selected(pre.detach(), decoder_norms(p, pre.shape[1]).detach(), cfg).double()
    return pre * gate, gate


def decode(p: Parameters, a: Tensor, x: Tensor, per_layer: bool, bias: bool = True) -> Tensor:
    """(B, T, D)."""
    outputs = []
    for t in range(a.shape[1]):
        sources = [t] if per_layer else range(t + 1)
        y = sum(a[:, s] @ p[f"layers.{s}.W_dec"][:, t - s] for s in sources)
        if bias:
            y = y + p[f"layers.{t}.b_dec"]
            if f"layers.{t}.W_skip" in p:
                y = y + x[:, t] @ p[f"layers.{t}.W_skip"].T
        outputs.append(y)
    return torch.stack(outputs, dim=1)


def auxiliary(pre: Tensor, dead: Tensor, k: int) -> Tensor:
    """(B, L, F): the k largest positive pre-activations of dead features, per token and layer."""
    gate, values = torch.zeros_like(pre), pre.tolist()
    for token in range(pre.shape[0]):
        for layer in range(pre.shape[1]):
            candidates = [f for f in range(pre.shape[2]) if dead[layer, f] and values[token][layer][f] > 0]
            for feature in sorted(candidates, key=lambda f, v=values[token][layer]: -v[f])[:k]:
                gate[token, layer, feature] = 1.0
    return pre * gate


def loss(p: Parameters, x: Tensor, y: Tensor, dead: Tensor, cfg: Settings) -> dict[str, Tensor]:
    """All terms, and their total, on scaled inputs and targets."""
    n_tokens, n_layers, _ = x.shape
    pre = pre_activations(p, x)
    norms = decoder_norms(p, n_layers)
    a, gate = activations(p, pre, cfg)
    y_hat = decode(p, a, x, cfg.per_layer)
    terms = {"mse": ((y_hat - y) ** 2).sum() / n_tokens}
    penalty = cfg.tanh_lambda * torch.tanh(cfg.tanh_c * norms * a).sum() / n_tokens
    if cfg.l0_lambda:
        penalty = penalty + cfg.l0_lambda * 2 / cfg.l0_target * (gate.sum() / n_tokens - cfg.l0_target) ** 2
    terms["penalty"] = penalty * cfg.penalty_scale
    terms["auxk"] = torch.zeros((), dtype=x.dtype)
    if cfg.auxk_coefficient and dead.any():
        e = (y - y_hat).detach()
        e_hat = decode(p, auxiliary(pre, dead, cfg.auxk_k), x, cfg.per_layer, bias=False)
        ratio = ((e - e_hat) ** 2).sum() / ((e - e.mean(dim=0)) ** 2).sum()
        terms["auxk"] = cfg.auxk_coefficient * y[0].numel() * ratio
    terms["pre_act"] = torch.zeros((), dtype=x.dtype)
    if cfg.pre_act_lambda:
        if cfg.kind == "jumprelu":
            threshold = torch.stack([p[f"layers.{s}.log_threshold"].exp() for s in range(n_layers)])
        elif cfg.kind == "relu":
            threshold = torch.zeros_like(norms)
        else:
            threshold = torch.tensor(cfg.running, dtype=x.dtype)[:, None].expand_as(norms)
            threshold = threshold / norms.detach() if cfg.score == "decoder_norm" else threshold
        short = torch.relu(threshold - pre) * norms * dead
        terms["pre_act"] = cfg.pre_act_lambda * short.sum() / n_tokens
    terms["total"] = sum(terms.values(), torch.zeros((), dtype=x.dtype))
    return {**terms, "y_hat": y_hat, "a": a, "gate": gate, "pre": pre, "norms": norms}
