"""Model -> folder -> equations by hand, and back into a model; folders that are damaged or not ours."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from activation_store.errors import UserError
from tests.publish.hand import hand_features, hand_reconstruction, random_layers, write_folder
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.spec import ModelSpec
from trainer.publish.fold import DTYPES
from trainer.publish.fold_model import fold_layer
from trainer.publish.layout import CROSS_LAYER, PER_LAYER, LayoutConfig
from trainer.publish.load import load_published
from trainer.publish.verify import compare, require_passed

B, L, D, F = 37, 4, 6, 13


def scaled_model(
    kind: str = "topk", span: str = "cross_layer", *, skip: bool = False, seed: int = 0
) -> CrossLayerTranscoder:
    """A model with random weights, a scaling that matters, and a calibrated threshold."""
    k = 5 if kind in {"topk", "batchtopk"} else 1
    model = CrossLayerTranscoder(ModelSpec(n_layers=L, d_model=D, n_features=F, span=span, kind=kind, k=k, skip=skip))
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(generator=rng)
    model.set_scaling(
        3 * torch.randn(L, D, generator=rng),
        torch.rand(L, D, generator=rng) + 0.2,
        torch.randn(L, D, generator=rng),
        torch.rand(L, D, generator=rng) + 0.2,
    )
    model.threshold_LF.copy_(2 * torch.rand(L, F, generator=rng))
    return model.eval()


def rows(seed: int = 1) -> Tensor:
    return 3 * torch.randn(B, L, D, generator=torch.Generator().manual_seed(seed))


def write_model(folder: Path, model: CrossLayerTranscoder, dtype: str = "float32") -> Path:
    kind = CROSS_LAYER if model.spec.span == "cross_layer" else PER_LAYER
    config = LayoutConfig(kind, "org/model", "hook_resid_mid", "hook_mlp_out", "layerloom/test")
    return write_folder(folder, config, [fold_layer(model, s, DTYPES[dtype]) for s in range(L)])


MODELS = [
    ("relu", "cross_layer", False),
    ("jumprelu", "cross_layer", False),
    ("topk", "cross_layer", False),
    ("batchtopk", "cross_layer", False),
    ("jumprelu", "per_layer", False),
    ("topk", "per_layer", True),
    ("relu", "per_layer", True),
]


@pytest.mark.parametrize(("kind", "span", "skip"), MODELS)
def test_files_reconstruct_as_the_model_does(tmp_path: Path, kind: str, span: str, skip: bool) -> None:
    model, x_BLD = scaled_model(kind, span, skip=skip), rows()
    folder = write_model(tmp_path / "published", model)
    own = model.reconstruct(x_BLD).double().numpy()
    assert np.abs(own).max() > 1
    np.testing.assert_allclose(hand_reconstruction(folder, x_BLD), own, rtol=1e-4, atol=1e-4)
    codes = model.encode(x_BLD, rule="inference")
    for s, features_BF in enumerate(hand_features(folder, x_BLD)):
        np.testing.assert_allclose(features_BF, codes.to_dense(s).detach().numpy(), rtol=1e-4, atol=1e-4)

    loaded = load_published(folder)
    assert not loaded.training
    np.testing.assert_allclose(loaded.reconstruct(x_BLD).numpy(), own, rtol=1e-4, atol=1e-4)
    comparison = compare(folder, model, x_BLD, source="test")
    assert comparison.passed
    assert comparison.max_relative_error < 2e-6
    assert comparison.rows == B
    assert comparison.active == sum(len(codes[s].values) for s in range(L))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 5e-2), ("float16", 5e-3)])
def test_half_precision(tmp_path: Path, dtype: str, tolerance: float) -> None:
    """Matrices are rounded, biases and thresholds are not; differing selections lie within rounding of thresholds."""
    model, x_BLD = scaled_model("topk"), rows()
    folder = write_model(tmp_path / "published", model, dtype)
    tensors = load_file(folder / "W_enc_1.safetensors")
    assert {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()} == {
        "W_enc_1": dtype,
        "b_enc_1": "float32",
        "b_dec_1": "float32",
        "threshold_1": "float32",
    }
    comparison = compare(folder, model, x_BLD, source="test")
    assert comparison.passed
    assert 1e-4 < comparison.max_relative_error < tolerance
    own = model.reconstruct(x_BLD).double().numpy()
    median = np.median(np.abs(hand_reconstruction(folder, x_BLD) - own))
    assert median < tolerance * own.std()


@pytest.mark.parametrize("name", ["W_enc_2", "b_enc_2", "W_dec_2", "b_dec_2", "threshold_2"])
def test_comparison_sees_a_wrong_tensor(tmp_path: Path, name: str) -> None:
    model = scaled_model("topk")
    folder = write_model(tmp_path / "published", model)
    file = folder / ("W_dec_2.safetensors" if name == "W_dec_2" else "W_enc_2.safetensors")
    tensors = load_file(file)
    tensors[name] = tensors[name] * (1.5 if name == "threshold_2" else 1.02)
    save_file(tensors, file)
    comparison = compare(folder, model, rows(), source="test")
    assert not comparison.passed
    with pytest.raises(UserError, match=r"not published.*relative error"):
        require_passed(comparison, folder)


def test_flips_within_rounding_are_counted_and_pass(tmp_path: Path) -> None:
    """An entry exactly on its threshold is off by one rule; moving the threshold down by one step selects it."""
    model, x_BLD = scaled_model("topk"), rows()
    pre_BF = model.pre_activations(1, x_BLD[:, 1])
    model.threshold_LF[1, 4] = pre_BF[pre_BF[:, 4] > 0.1, 4].min()
    folder = write_model(tmp_path / "published", model)
    tensors = load_file(folder / "W_enc_1.safetensors")
    tensors["threshold_1"][4] *= 1 - 1e-6
    save_file(tensors, folder / "W_enc_1.safetensors")
    comparison = compare(folder, model, x_BLD, source="test")
    assert comparison.flipped == 1
    assert comparison.unexplained == 0
    assert comparison.passed
    assert comparison.flip_error > 1e-3
    assert "1 of " in comparison.summary()


def test_an_uncalibrated_threshold_is_refused() -> None:
    model = scaled_model("topk")
    model.threshold_LF.fill_(torch.nan)
    with pytest.raises(UserError, match=r"not calibrated.*layerloom train"):
        fold_layer(model, 0, torch.float32)


def test_what_float16_cannot_hold_is_refused() -> None:
    model = scaled_model("topk")
    model.source_layers[1].W_dec.data[3, 0, 0] = 1e6
    assert fold_layer(model, 1, torch.bfloat16).W_dec_FSD.isfinite().all()
    with pytest.raises(UserError, match=r"W_dec of layer 1 is not finite in float16.*float32"):
        fold_layer(model, 1, torch.float16)


def _folder(tmp_path: Path, kind: str = CROSS_LAYER, *, relu: bool = False) -> Path:
    config = LayoutConfig(kind, "org/model", "hook_resid_mid", "hook_mlp_out", "layerloom/test")
    return write_folder(tmp_path / "published", config, random_layers(kind, L, F, D, relu=relu))


@pytest.mark.parametrize("kind", [CROSS_LAYER, PER_LAYER])
@pytest.mark.parametrize("relu", [False, True])
def test_load_folders_of_others(tmp_path: Path, kind: str, relu: bool) -> None:
    folder = _folder(tmp_path, kind, relu=relu)
    expected = hand_reconstruction(folder, rows())
    np.testing.assert_allclose(load_published(folder).reconstruct(rows()).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_thresholds_of_a_loaded_folder_are_those_of_the_file(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    model = load_published(folder)
    for i in range(L):
        thresholds = load_file(folder / f"W_enc_{i}.safetensors")[f"threshold_{i}"]
        assert torch.equal(model.inference_threshold(i), thresholds)
        assert not torch.equal(thresholds.log().exp(), thresholds)  # what it would be otherwise


def test_files_and_keys_are_exactly_those_of_the_layout(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    files = {f"{side}_{i}.safetensors" for side in ("W_enc", "W_dec") for i in range(L)} | {"config.yaml"}
    assert {file.name for file in folder.iterdir()} == files
    for i in range(L):
        shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / f"W_enc_{i}.safetensors").items()}
        assert shapes == {f"W_enc_{i}": (F, D), f"b_enc_{i}": (F,), f"b_dec_{i}": (D,), f"threshold_{i}": (F,)}
        assert load_file(folder / f"W_dec_{i}.safetensors")[f"W_dec_{i}"].shape == (F, L - i, D)


def test_keys_of_per_layer_transcoders(tmp_path: Path) -> None:
    config = LayoutConfig(PER_LAYER, "org/model", "hook_resid_mid", "hook_mlp_out", "layerloom/test")
    folder = write_folder(tmp_path / "published", config, random_layers(PER_LAYER, L, F, D, skip=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "layer_2.safetensors").items()}
    assert shapes == {
        "W_enc": (F, D),
        "W_dec": (F, D),
        "b_enc": (F,),
        "b_dec": (D,),
        "activation_function.threshold": (F,),
        "W_skip": (D, D),
    }


def _edit(folder: Path, file: str, name: str, tensor: Tensor | None) -> None:
    tensors = load_file(folder / file)
    tensors.pop(name)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / file)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.yaml"):
        load_published(tmp_path)
    folder = _folder(tmp_path)
    (folder / "W_dec_1.safetensors").rename(tmp_path / "kept")
    with pytest.raises(UserError, match=r"W_dec_1\.safetensors is missing"):
        load_published(folder)
    (tmp_path / "kept").rename(folder / "W_dec_1.safetensors")
    _edit(folder, "W_enc_2.safetensors", "threshold_2", torch.full((F,), -0.5))
    with pytest.raises(UserError, match="layer 2 has a threshold below 0"):
        load_published(folder)
    _edit(folder, "W_enc_2.safetensors", "threshold_2", None)
    with pytest.raises(UserError, match="layer 2 lacks threshold"):
        load_published(folder)
    _edit(folder, "W_enc_2.safetensors", "b_dec_2", None)
    with pytest.raises(UserError, match="layer 2 lacks one of"):
        load_published(folder)
    (folder / "config.yaml").write_text("model_kind: something\n")
    with pytest.raises(UserError, match="model_kind is 'something'"):
        load_published(folder)
