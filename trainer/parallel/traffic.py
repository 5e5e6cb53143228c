"""The bytes that a rank sends, by kind: for the model's sake in a microbatch, for the feed and for the engine.

docs/parallel.md derives them, and `python -m benchmarks.traffic` counts the real ones beside these. An all-reduce of n
bytes over G ranks counts as 2 (G - 1) / G n (a ring's), an exchange of equal parts as (G - 1) / G n, a gather as
(G - 1) n.
"""

from dataclasses import dataclass

from trainer.config import EngineConfig, EngineKind
from trainer.model.spec import ModelSpec
from trainer.parallel.split import id_bytes

# Bits of a float32 score that a round of batchtopk's search looks at.
_ROUNDS = (11, 11, 9)
_COUNTER_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class AuxK:
    """What AuxK sends by itself. layers: those with dead features. k: `activation.auxk_k`. entries: codes of dead
    features of a token over all layers and ranks, at most k a layer.
    """

    layers: int
    k: int
    entries: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """What the bytes depend on beside the model's shape.

    tokens: of one rank's microbatch (B). entries: selected per token over all layers and ranks (E; of jumprelu those in
    the band too). dense: layers that take the dense path. norms: decoder norms are needed, by a score (1) or by a
    penalty, whose gradient goes back (2), or not (0). auxk: where features are dead. value_bytes: of activations and
    scores.
    """

    data: int
    feature: int
    by_columns: bool
    tokens: int
    entries: float
    largest_count: int = 255
    dense: int = 0
    norms: int = 0
    auxk: AuxK | None = None
    value_bytes: int = 4


def model_bytes(spec: ModelSpec, shares: Shares) -> dict[str, float]:
    """Sent by a rank, on average over the ranks, for each token of its microbatch: by kind."""
    ranks, tokens, value = shares.feature, shares.tokens, shares.value_bytes
    others, n_layers = (ranks - 1) / ranks, spec.n_layers
    sparse = n_layers - shares.dense
    found: dict[str, float] = {}
    if ranks > 1:
        found["numbers of codes"] = 16 * (ranks - 1) * n_layers / tokens
    if shares.by_columns and ranks > 1:
        found["codes"] = _codes_bytes(spec, shares, shares.entries, sparse, shares.largest_count)
        found["gradients of codes"] = others * shares.entries * value
        found["dense activations"] = 3 * others * shares.dense * spec.n_features * value
        found["norms"] = shares.norms * others * n_layers * spec.n_features * value / tokens
    elif ranks > 1:
        found["y_hat"] = 2 * others * n_layers * spec.d_model * value
    found["selection"] = _selection_bytes(spec, shares)
    if shares.auxk is not None:
        found["auxk"] = _auxk_bytes(spec, shares, shares.auxk)
    return {kind: n_bytes for kind, n_bytes in found.items() if n_bytes}


def _codes_bytes(spec: ModelSpec, shares: Shares, entries: float, layers: int, largest_count: int) -> float:
    """Forward: values, ids, and how many each token has."""
    ranks, count = shares.feature, 1 if largest_count < 2**8 else 2
    each = shares.value_bytes + id_bytes(spec.n_features // ranks)
    return (ranks - 1) / ranks * entries * each + (ranks - 1) * layers * count


def _auxk_bytes(spec: ModelSpec, shares: Shares, auxk: AuxK) -> float:
    """Its selection, codes and their gradients (columns) or output (rows), and the error's mean over the data axis."""
    ranks, value, tokens = shares.feature, shares.value_bytes, shares.tokens
    others, width = (ranks - 1) / ranks, min(auxk.k, spec.n_features // ranks)
    columns = spec.d_model // ranks if shares.by_columns else spec.d_model
    found = 2 * (shares.data - 1) / shares.data * spec.n_layers * columns * value / tokens
    if ranks == 1:
        return found
    found += 16 * (ranks - 1) * auxk.layers / tokens
    if width * ranks > auxk.k:
        found += others * auxk.layers * (width * value + _COUNTER_BYTES)
    if not shares.by_columns:
        return found + 2 * others * spec.n_layers * spec.d_model * value
    return found + _codes_bytes(spec, shares, auxk.entries, auxk.layers, width) + others * auxk.entries * value


def _selection_bytes(spec: ModelSpec, shares: Shares) -> float:
    own, over = spec.n_features // shares.feature, spec.n_layers if spec.scope == "layer" else 1
    if spec.kind == "topk":
        width = min(spec.k, own) if spec.scope == "layer" else min(spec.k, own) * spec.n_layers
        places = 0 if spec.scope == "layer" else 4 * spec.n_layers
        each = width * shares.value_bytes + places + _COUNTER_BYTES
        return (shares.feature - 1) / shares.feature * over * each
    if spec.kind == "batchtopk":
        world = shares.data * shares.feature
        counters = sum(2**bits for bits in _ROUNDS) * _COUNTER_BYTES
        rounds: float = 2 * (world - 1) / world * over * counters / shares.tokens
        return rounds
    return 0.0


def feed_bytes(
    n_layers: int, d_model: int, feature: int, *, by_columns: bool, value_bytes: int = 2
) -> dict[str, float]:
    """For each token of the feature group's microbatch, to spread what its ranks have read. value_bytes: as stored."""
    row = (feature - 1) / feature * n_layers * d_model * value_bytes
    return {"mlp_in": row, "mlp_out": row / feature if by_columns else row} if feature > 1 else {}


def engine_bytes(engine: EngineConfig, parameters: int, data: int, microbatches: int) -> dict[str, float]:
    """In a step, over `data` ranks that each have all `parameters` of their part of the model, in float32."""
    once = (data - 1) / data * 4 * parameters
    # How often each parameter's gradient, and then its new value, is sent.
    gradients, values = {
        (EngineKind.plain, 0): (2, 0),
        (EngineKind.accelerate, 0): (2, 0),
        (EngineKind.fsdp, 0): (microbatches, microbatches),
        (EngineKind.deepspeed, 1): (2, 1),
        (EngineKind.deepspeed, 2): (2 * microbatches, 1),
        (EngineKind.deepspeed, 3): (microbatches, microbatches),
    }[engine.kind, engine.zero_stage if engine.kind is EngineKind.deepspeed else 0]
    return {"gradients": gradients * once, "parameters": values * once}
