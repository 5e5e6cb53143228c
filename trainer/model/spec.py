"""The shape and behaviour of a transcoder, as plain data."""

from dataclasses import asdict, dataclass
from typing import Any

KINDS = ("relu", "jumprelu", "topk", "batchtopk")
CHOICES = {
    "span": ("cross_layer", "per_layer"),
    "kind": KINDS,
    "scope": ("layer", "all_layers"),
    "score": ("activation", "decoder_norm"),
    "decoder_init": ("uniform", "zeros"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """What a CrossLayerTranscoder is made of. Names and defaults are those of the configs `model` and `activation`.

    Raises:
        ValueError: a value out of range, saying what was given and what is wanted.
    """

    n_layers: int
    d_model: int
    n_features: int
    span: str = "cross_layer"
    skip: bool = False
    kind: str = "topk"
    k: int = 16
    scope: str = "layer"
    score: str = "activation"
    threshold_init: float = 0.03
    bandwidth: float = 1.0
    encoder_init_scale: float = 1.0
    decoder_init: str = "uniform"

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        for name, choices in CHOICES.items():
            if str(getattr(self, name)) not in choices:
                raise ValueError(f"{name}={getattr(self, name)} is unknown; use one of {', '.join(choices)}")
        if self.is_topk and not 1 <= self.k <= self.n_features:
            raise ValueError(f"k={self.k} must lie between 1 and n_features={self.n_features}")
        if self.kind == "jumprelu" and (self.threshold_init <= 0 or self.bandwidth <= 0):
            raise ValueError(
                f"threshold_init={self.threshold_init}, bandwidth={self.bandwidth}: jumprelu wants both above 0"
            )

    @property
    def is_topk(self) -> bool:
        """Whether a budget k selects (topk, batchtopk)."""
        return self.kind in {"topk", "batchtopk"}

    def targets(self, source_layer: int) -> range:
        """Target layers that the features of `source_layer` write to."""
        stop = self.n_layers if self.span == "cross_layer" else source_layer + 1
        return range(source_layer, stop)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `ModelSpec(**d)` is the inverse."""
        return {name: str(v) if isinstance(v, str) else v for name, v in asdict(self).items()}
