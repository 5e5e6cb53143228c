"""Several pieces in one row are computed as if each were alone, for every family.

Pieces are longer than the sliding window of the families that have one (tests.tiny.SLIDING_WINDOW).
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from activation_store.hooks import CaptureHooks, forward_logits, forward_replaced
from activation_store.subject import Subject
from tests.tiny import ARCHITECTURES, SLIDING_WINDOW

Load = Callable[[str], Subject]
# Two rows of pieces, among them one of a single token and one that fills its row.
ROWS = ((11, 1, 17, 9), (38,))
SLIDING = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3")


def packed() -> tuple[Tensor, Tensor]:
    ids_NC = torch.randint(3, 300, (2, 38), generator=torch.Generator().manual_seed(7))
    positions_NC = torch.stack([torch.cat([torch.arange(n) for n in pieces]) for pieces in ROWS])
    return ids_NC, positions_NC


def pieces(x_NC: Tensor) -> list[Tensor]:
    return [piece for row, lengths in zip(x_NC, ROWS, strict=True) for piece in row.split(lengths)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_equals_separate(architecture: str, load: Load) -> None:
    subject = load(architecture)
    ids_NC, positions_NC = packed()
    captured = CaptureHooks(subject, input_hook="mlp_in").capture(ids_NC, positions_NC)
    logits_NCV = forward_logits(subject, ids_NC, positions_NC)
    together = zip(*map(pieces, (ids_NC, captured.mlp_in_NCLD, captured.mlp_out_NCLD, logits_NCV)), strict=True)
    for ids_C, mlp_in_CLD, mlp_out_CLD, logits_CV in together:
        alone = CaptureHooks(subject, input_hook="mlp_in").capture(ids_C[None], torch.arange(len(ids_C))[None])
        with torch.no_grad():
            alone_logits_CV = subject.model(ids_C[None]).logits[0]
        torch.testing.assert_close(mlp_in_CLD, alone.mlp_in_NCLD[0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(mlp_out_CLD, alone.mlp_out_NCLD[0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(logits_CV, alone_logits_CV, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_pieces_would_differ_if_they_saw_one_another(architecture: str, load: Load) -> None:
    subject = load(architecture)
    ids_NC, positions_NC = packed()
    right, wrong = (forward_logits(subject, ids_NC, p) for p in (positions_NC, torch.arange(38).expand(2, -1)))
    assert (right - wrong)[0, 12:].abs().max() > 0.01
    torch.testing.assert_close(right[1], wrong[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", SLIDING)
def test_sliding_windows_matter_at_these_lengths(architecture: str, load: Load) -> None:
    """Another first token changes what follows within the window, and nothing beyond it: the window is really on.

    All layers of Mistral slide, and hand information on by one window each; of the others only the first is looked at.
    """
    subject = load(architecture)
    layers = 3 if architecture == "mistral" else 1
    ids_NC = packed()[0][1:]
    other_NC = ids_NC.clone()
    other_NC[0, 0] += 1
    positions_NC = torch.arange(38)[None]
    a, b = (
        CaptureHooks(subject, input_hook="mlp_in", layer_stop=layers).capture(x, positions_NC).mlp_out_NCLD
        for x in (ids_NC, other_NC)
    )
    difference_C = (a - b).abs().amax(dim=(0, 2, 3))
    reach = layers * (SLIDING_WINDOW - 1) + 1
    assert difference_C[: SLIDING_WINDOW - 1].min() > 1e-6
    assert difference_C[reach:].max() == 0


def test_a_replaced_forward_is_packed_the_same_way(load: Load) -> None:
    subject = load("gemma2")
    ids_NC, positions_NC = packed()

    def halve(layer: int, mlp_in_NCD: Tensor, own_mlp_out_NCD: Tensor) -> Tensor:
        return own_mlp_out_NCD / 2 + mlp_in_NCD / 10

    def run(ids: Tensor, positions: Tensor) -> Tensor:
        return forward_replaced(subject, ids, positions, input_hook="resid_mid", layers=range(1, 3), replace=halve)

    together = pieces(run(ids_NC, positions_NC))
    for ids_C, logits_CV in zip(pieces(ids_NC), together, strict=True):
        alone = run(ids_C[None], torch.arange(len(ids_C))[None])[0]
        torch.testing.assert_close(logits_CV, alone, atol=1e-4, rtol=1e-5)
