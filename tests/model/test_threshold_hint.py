"""Selection over all layers may not depend on the running threshold, which tells it where to look first."""

import pytest
import torch

from tests.model.cases import available_backends, make_model


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("k", [7, 100], ids=["a threshold that binds", "fewer candidates than k"])
@pytest.mark.parametrize("score", ["activation", "decoder_norm"])
def test_any_running_threshold_selects_the_same(backend: str, k: int, score: str) -> None:
    model, x_BLD, _ = make_model(kind="batchtopk", scope="all_layers", score=score, dtype=torch.float32, k=k)
    model.backend = backend
    wanted = model.encode(x_BLD)
    scores = torch.cat([codes.values for codes in wanted.layers]).detach()
    for threshold in (-1.0, 1e-6, float(scores.min()), float(scores.median()), float(scores.max()) * 2, torch.inf):
        model.running_threshold_L.fill_(threshold)
        for ours, theirs in zip(model.encode(x_BLD).layers, wanted.layers, strict=True):
            assert torch.equal(ours.offsets, theirs.offsets)
            assert torch.equal(ours.feature_ids, theirs.feature_ids)
            # Other products may be taken on the way: rounding of float32.
            torch.testing.assert_close(ours.values, theirs.values, rtol=1e-5, atol=1e-6)
