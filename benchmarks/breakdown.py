"""Where the time of a step goes: every op of the kernels timed inside the real step, next to its floor.

The floor of a part is what the machine needs at the least, measured in the same run: torch.mm of the encoder's product
into a kept buffer; for all else the bytes that the part must read and write, at the best rate of a copy, an update in
place and a read that no cache holds. Gathered rows count every time they are gathered, as in the cost model; where a
cache serves some, a part can be faster than its floor; so can the encoder where a backend excludes entries by a product
in bf16 first. On CUDA the clock waits for the device after every op, which
adds some microseconds to each.

Legend: B tokens, D d_model, F features, C columns of a decoder row, N entries of a layer.
"""

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from statistics import median
from typing import Any

import torch

from activation_store.batch import ActivationBatch
from benchmarks.measure import product_seconds, seconds_of, stream_rate, synchronize, table, typical_seconds
from benchmarks.steps import Mode, Shape, build_step
from trainer.kernels.dispatch import Kernels
from trainer.kernels.encode_topk import Selection, pre_activations
from trainer.model.clt import CrossLayerTranscoder
from trainer.parallel.plain import PlainEngine

# Which part each op belongs to. `encode` is timed as a whole, all layers in a row as a step runs them on one device,
# with jumprelu's theta and, where scores count them, decoder norms. The product is timed by itself and taken from it:
# what is left is the selection, nothing where a backend encodes faster than torch.
OP_PARTS = {
    "encode_topk": "encode",
    "begin_topk": "encode",
    "encode_jumprelu": "encode",
    "encode_candidates": "encode",
    "batch_threshold": "encode",
    "build_csc": "index",
    "sparse_decode": "decode",
    "decoder_backward": "backward: decoder",
    "row_gradients": "backward: encoder",
    "feature_sums": "backward: encoder",
    "fused_adam_rows": "backward and optimizer, fused",
}
PARTS = (
    "encoder product",
    "selection",
    "index",
    "decode",
    "backward: decoder",
    "backward: encoder",
    "backward and optimizer, fused",
    "gradient norm",
    "optimizer",
    "rest",
)


class Clock:
    """Seconds by part, of one step after another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.now: dict[str, float] = defaultdict(float)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added to the part."""

        def call(*args: Any, **options: Any) -> Any:
            synchronize(self._device)
            start = time.perf_counter()
            result = function(*args, **options)
            synchronize(self._device)
            self.now[part] += time.perf_counter() - start
            return result

        return call

    def timed_kernels(self, kernels: Kernels) -> Kernels:
        """The backend with every op timed, but those of `encode`; one that is in no part is an error of this table."""
        parts = {field.name: OP_PARTS[field.name] for field in fields(kernels) if field.name != "name"}
        ops = {name: self.timed(part, getattr(kernels, name)) for name, part in parts.items() if part != "encode"}
        return replace(kernels, **ops)


def breakdown(mode: Mode, shape: Shape, batch: ActivationBatch, *, calls: int) -> dict[str, tuple[float, float]]:
    """Part -> (median seconds, floor), and `step` for the whole."""
    device = batch.mlp_in.device
    clock = Clock(device)
    step = build_step(
        mode, shape, batch, make_model=_timed_model(clock), make_engine=lambda *args: _timed_engine(clock, *args)
    )
    step()
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(calls):
        clock.now.clear()
        found["step"].append(seconds_of(step, device))
        for part in {*OP_PARTS.values(), "gradient norm", "optimizer"}:
            found[part].append(clock.now[part])
    seconds = {part: median(values) for part, values in found.items()}
    # The timed methods refer to the engine that they are of: without this, its memory would stay beside the next one's.
    del step
    gc.collect()
    encode = seconds.pop("encode")
    seconds["encoder product"] = min(encode, _encoder_seconds(mode, shape, batch))
    seconds["selection"] = encode - seconds["encoder product"]
    whole = seconds.pop("step")
    seconds["rest"] = whole - sum(seconds.values())
    floors = _floors(mode, shape, batch)
    parts = {part: (seconds.get(part, 0.0), floors.get(part, 0.0)) for part in PARTS}
    return {**parts, "step": (whole, sum(floor for _, floor in parts.values()))}


def breakdown_table(mode: Mode, shape: Shape, batch: ActivationBatch, *, calls: int) -> str:
    """The markdown of `breakdown`, without the parts that the mode has not."""
    found = breakdown(mode, shape, batch, calls=calls)
    whole = found["step"][0]
    rows = [
        [part, f"{seconds * 1e3:.1f}", f"{100 * seconds / whole:.0f}%", f"{floor * 1e3:.1f}" if floor else "-"]
        for part, (seconds, floor) in found.items()
        if seconds or floor or part == "selection"
    ]
    return f"Mode `{mode.name}`:\n\n{table(['part', 'ms', 'share', 'floor, ms'], rows)}"


def _timed_model(clock: Clock) -> type[CrossLayerTranscoder]:
    class TimedTranscoder(CrossLayerTranscoder):
        """With timed kernels and selection."""

        @property
        def kernels(self) -> Kernels:
            return clock.timed_kernels(super().kernels)

        def select(self, *args: Any, **options: Any) -> Iterator[Selection | None]:
            select = super().select
            return iter(clock.timed("encode", lambda: list(select(*args, **options)))())

    return TimedTranscoder


def _timed_engine(clock: Clock, *args: Any) -> PlainEngine:
    engine = PlainEngine(*args)
    engine.gradient_norm = clock.timed("gradient norm", engine.gradient_norm)  # type: ignore[method-assign]
    engine.update = clock.timed("optimizer", engine.update)  # type: ignore[method-assign]
    return engine


def _dtype(mode: Mode) -> torch.dtype:
    return torch.bfloat16 if mode.bf16 else torch.float32


def _encoder_seconds(mode: Mode, shape: Shape, batch: ActivationBatch) -> float:
    """Seconds of all layers' pre-activations as plain torch makes them, with bias and conversions; on CUDA, where the
    selection adds the bias, of their products."""
    x_BD, device = batch.mlp_in[:, 0], batch.mlp_in.device
    if device.type == "cuda":
        return _product_floor(mode, shape, batch)
    weight_FD, bias_F = torch.randn(shape.n_features, shape.d_model, device=device), x_BD.new_zeros(shape.n_features)
    once = typical_seconds(lambda: pre_activations(x_BD, weight_FD, bias_F, _dtype(mode)), device, calls=3)
    return shape.n_layers * once


def _product_floor(mode: Mode, shape: Shape, batch: ActivationBatch) -> float:
    """Seconds of all layers' torch.mm into a kept buffer."""
    x_BD = batch.mlp_in[:, 0].to(_dtype(mode))
    weight_FD = torch.randn(shape.n_features, shape.d_model, device=x_BD.device).to(x_BD.dtype)
    return shape.n_layers * product_seconds(x_BD, weight_FD)


def _floors(mode: Mode, shape: Shape, batch: ActivationBatch) -> dict[str, float]:
    """Seconds that each part takes at the least. Entries: K per token and layer."""
    n_layers, d_model, n_features, n_tokens, k = shape
    product, rate = _product_floor(mode, shape, batch), stream_rate(batch.mlp_in.device)
    entries, spans = n_tokens * k, n_layers * (n_layers + 1) // 2
    # Values gathered, of rows of all targets and of encoder rows; parameters of each kind. In units of four bytes.
    gathered_C, gathered_D = entries * spans * d_model, entries * n_layers * d_model
    decoder, encoder = n_features * spans * d_model, n_features * n_layers * d_model
    # Rows that are active at all, at most once each.
    touched = min(decoder, gathered_C)
    # With products in bf16 half the bytes are gathered, from a rounded copy that is made first: four bytes read, two
    # written.
    copied = 0.0
    if mode.bf16:
        gathered_C, gathered_D, copied = gathered_C / 2, gathered_D / 2, 1.5 * touched
    values = {
        # Ids and tokens in, order, tokens and offsets out: eight bytes, twice four.
        "index": n_layers * (2 * (2 * entries) + 2 * (2 * entries) + 2 * n_features),
        # Active rows, and the output twice.
        "decode": copied + gathered_C + 2 * n_tokens * spans * d_model,
    }
    if mode.fused:
        # The gradient of the output and inputs by entry; parameter and moments in and out.
        values["backward and optimizer, fused"] = gathered_C + gathered_D + 6 * (decoder + encoder)
    else:
        values |= {
            "backward: decoder": gathered_C + touched + decoder,
            "backward: encoder": gathered_D + encoder,
            "gradient norm": shape.parameters,
            # Parameter, moments and gradient in; parameter and moments out.
            "optimizer": 7 * shape.parameters,
        }
    return {"encoder product": product} | {part: 4 * count / rate for part, count in values.items()}
