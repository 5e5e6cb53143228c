"""circuit-tracer's layout on disk: names of files and keys, written and read one layer at a time (docs/publish.md).

Cross-layer transcoder: W_enc_{i}.safetensors with W_enc_{i} (F, D), b_enc_{i} (F), b_dec_{i} (D), threshold_{i} (F),
and W_dec_{i}.safetensors with W_dec_{i} (F, L - i, D). Per-layer transcoders: layer_{i}.safetensors with W_enc (F, D),
W_dec (F, D), b_enc, b_dec, activation_function.threshold (F), W_skip (D, D). Both: config.yaml.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from activation_store.errors import UserError
from trainer.publish.fold import PublishedLayer
from trainer.tensor_file import write_tensors

CROSS_LAYER = "cross_layer_transcoder"
PER_LAYER = "transcoder_set"
CONFIG_FILE = "config.yaml"
_THRESHOLD = "activation_function.threshold"


@dataclass(frozen=True)
class LayoutConfig:
    """config.yaml: what circuit-tracer reads beside the weights."""

    model_kind: str
    model_name: str
    feature_input_hook: str
    feature_output_hook: str
    scan: str

    def write(self, folder: Path) -> None:
        """Writes config.yaml into `folder`."""
        (folder / CONFIG_FILE).write_text(yaml.safe_dump(asdict(self), sort_keys=False), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "LayoutConfig":
        """Reads config.yaml of `folder`. Raises UserError if it is not one of this layout."""
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise UserError(f"{folder} holds no {CONFIG_FILE}; wanted a folder written by `layerloom publish`")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        kind = values.get("model_kind") if isinstance(values, dict) else None
        if kind not in (CROSS_LAYER, PER_LAYER):
            raise UserError(f"{path}: model_kind is {kind!r}; wanted {CROSS_LAYER} or {PER_LAYER} of circuit-tracer")
        names = ("model_name", "feature_input_hook", "feature_output_hook", "scan")
        return cls(model_kind=kind, **{name: str(values.get(name, "")) for name in names})


def layer_files(kind: str, n_layers: int) -> list[str]:
    """Names of all weight files of `n_layers` layers."""
    if kind == PER_LAYER:
        return [f"layer_{i}.safetensors" for i in range(n_layers)]
    return [name for i in range(n_layers) for name in (f"W_enc_{i}.safetensors", f"W_dec_{i}.safetensors")]


def write_layer(folder: Path, kind: str, i: int, layer: PublishedLayer) -> int:
    """Writes source layer `i` and returns the bytes written."""
    if kind == PER_LAYER:
        tensors = {
            "W_enc": layer.W_enc_FD,
            "W_dec": layer.W_dec_FSD[:, 0],
            "b_enc": layer.b_enc_F,
            "b_dec": layer.b_dec_D,
            _THRESHOLD: layer.threshold_F,
            "W_skip": layer.W_skip_DD,
        }
        return _save(folder / f"layer_{i}.safetensors", tensors)
    encoder = {
        f"W_enc_{i}": layer.W_enc_FD,
        f"b_enc_{i}": layer.b_enc_F,
        f"b_dec_{i}": layer.b_dec_D,
        f"threshold_{i}": layer.threshold_F,
    }
    written = _save(folder / f"W_enc_{i}.safetensors", encoder)
    return written + _save(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": layer.W_dec_FSD})


def read_layer(folder: Path, kind: str, i: int) -> PublishedLayer:
    """Source layer `i` on the CPU, in the dtypes of the file. Raises UserError if tensors are missing."""
    if kind == PER_LAYER:
        values = _load(folder / f"layer_{i}.safetensors")
        prefix, W_dec = "", values.get("W_dec")
        W_dec_FSD = None if W_dec is None else W_dec[:, None]
    else:
        values = _load(folder / f"W_enc_{i}.safetensors")
        prefix, W_dec_FSD = f"_{i}", _load(folder / f"W_dec_{i}.safetensors").get(f"W_dec_{i}")
    found = [values.get(name + prefix) for name in ("W_enc", "b_enc", "b_dec")]
    W_enc, b_enc, b_dec = found
    if W_enc is None or b_enc is None or b_dec is None or W_dec_FSD is None:
        raise UserError(f"{folder}: layer {i} lacks one of W_enc, W_dec, b_enc, b_dec; it has {', '.join(values)}")
    threshold = values.get(_THRESHOLD if kind == PER_LAYER else f"threshold_{i}")
    return PublishedLayer(W_enc, b_enc, W_dec_FSD, b_dec, threshold, values.get("W_skip"))


def count_layers(folder: Path, kind: str) -> int:
    """Number of source layers in `folder`. Raises UserError unless they are 0..L-1 with all their files."""
    pattern = re.compile(r"layer_(\d+)\.safetensors" if kind == PER_LAYER else r"W_enc_(\d+)\.safetensors")
    found = {int(match[1]) for file in folder.iterdir() if (match := pattern.fullmatch(file.name))}
    missing = [name for name in layer_files(kind, max(found, default=0) + 1) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is not whole: {missing[0]} is missing; publish (or download) it again")
    return len(found)


def _save(path: Path, tensors: "dict[str, Tensor | None]") -> int:
    return write_tensors(path, {name: tensor for name, tensor in tensors.items() if tensor is not None}).n_bytes


def _load(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: torch.as_tensor(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
