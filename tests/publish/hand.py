"""The published equations written out by hand in float64, from the files, without the package under test."""

from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from trainer.publish.fold import PublishedLayer
from trainer.publish.layout import CROSS_LAYER, LayoutConfig, write_layer

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def random_layers(
    kind: str, n_layers: int, n_features: int, d_model: int, *, seed: int = 0, relu: bool = False, skip: bool = False
) -> list[PublishedLayer]:
    """Weights of order one, with some features always on, some never, and biases that matter."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    layers = []
    for i in range(n_layers):
        span = n_layers - i if kind == CROSS_LAYER else 1
        layers.append(
            PublishedLayer(
                normal(n_features, d_model),
                normal(n_features),
                0.2 * normal(n_features, span, d_model),
                normal(d_model),
                None if relu else 2 * torch.rand(n_features, generator=rng),
                0.3 * normal(d_model, d_model) if skip else None,
            )
        )
    return layers


def write_folder(folder: Path, config: LayoutConfig, layers: list[PublishedLayer]) -> Path:
    """A published folder without card."""
    folder.mkdir(parents=True)
    for i, layer in enumerate(layers):
        write_layer(folder, config.model_kind, i, layer)
    config.write(folder)
    return folder


def hand_features(folder: Path, mlp_in_BLD: Tensor) -> list[Array]:
    """Activations (B, F) of every source layer, pre * (pre > threshold)."""
    features = []
    for i, weights in enumerate(_encoders(folder)):
        x_BD = mlp_in_BLD[:, i].double().numpy()
        pre_BF = np.einsum("bd,fd->bf", x_BD, weights["W_enc"]) + weights["b_enc"]
        threshold_F = weights.get("threshold", np.zeros(1))
        features.append(np.where(pre_BF > threshold_F, pre_BF, 0.0))
    return features


def hand_reconstruction(folder: Path, mlp_in_BLD: Tensor) -> Array:
    """Reconstructions (B, L, D), one term of the double sum after the other."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    encoders, features = _encoders(folder), hand_features(folder, mlp_in_BLD)
    y_BLD = np.zeros(tuple(mlp_in_BLD.shape))
    for target in range(len(encoders)):
        y_BLD[:, target] = encoders[target]["b_dec"]
        if config["model_kind"] == "transcoder_set":
            weights = {name: value.double().numpy() for name, value in load_file(_layer_file(folder, target)).items()}
            y_BLD[:, target] += features[target] @ weights["W_dec"]
            if "W_skip" in weights:
                y_BLD[:, target] += np.einsum("od,bd->bo", weights["W_skip"], mlp_in_BLD[:, target].double().numpy())
            continue
        for source in range(target + 1):
            W_dec = load_file(folder / f"W_dec_{source}.safetensors")[f"W_dec_{source}"].double().numpy()
            y_BLD[:, target] += features[source] @ W_dec[:, target - source]
    return y_BLD


def _layer_file(folder: Path, i: int) -> Path:
    return folder / f"layer_{i}.safetensors"


def _encoders(folder: Path) -> list[dict[str, Array]]:
    """Per layer W_enc, b_enc, b_dec and threshold under these names, float64."""
    encoders: list[dict[str, Array]] = []
    while True:
        i = len(encoders)
        if _layer_file(folder, i).exists():
            values = load_file(_layer_file(folder, i))
            values = {name.removeprefix("activation_function."): value for name, value in values.items()}
        elif (folder / f"W_enc_{i}.safetensors").exists():
            values = load_file(folder / f"W_enc_{i}.safetensors")
            values = {name.removesuffix(f"_{i}"): value for name, value in values.items()}
        else:
            return encoders
        encoders.append({name: value.double().numpy() for name, value in values.items()})
