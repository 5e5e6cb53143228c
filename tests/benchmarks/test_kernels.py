"""The benchmark of kernels: it calls every op, and sees a backend that is wrong."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import PRECISIONS, measure, section
from benchmarks.layer_ops import OPS, LayerShape, make_inputs
from trainer.kernels.dispatch import REFERENCE, Kernels
from trainer.kernels.encode_topk import Selection

CPU = torch.device("cpu")
SHAPE = LayerShape(41, 10, 127, 30, 7)


def test_every_op_of_the_kernels_is_measured() -> None:
    # begin_topk is encode_topk in two parts.
    assert set(OPS) == {field.name for field in fields(Kernels)} - {"name", "begin_topk"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_table_has_a_row_for_every_op(precision: str) -> None:
    text = section(SHAPE, precision, CPU, ["reference"], list(OPS))
    assert [name for name in OPS if f"| {name} | reference |" not in text] == []
    # What refuses a precision says so; the reference refuses none.
    assert "refused" not in text


def _wrong_decode(y_BC: Tensor, *args: Any) -> None:
    REFERENCE.sparse_decode(y_BC, *args)
    y_BC[3, 2] += 1.0


def _wrong_topk(*args: Any) -> Selection:
    found = REFERENCE.encode_topk(*args)
    return Selection(found.offsets, (found.feature_ids + (found.feature_ids == 5)) % 127, found.values)


def test_a_backend_that_is_wrong_shows_in_the_table() -> None:
    inputs = make_inputs(SHAPE, CPU, torch.float32, torch.float32)
    broken = replace(REFERENCE, name="broken", sparse_decode=_wrong_decode, encode_topk=_wrong_topk)
    assert measure("row_gradients", broken, inputs, 1e9, 1e-3)[-1] == "exact"
    assert float(measure("sparse_decode", broken, inputs, 1e9, 1e-3)[-1]) > 1e-3
    assert "of entries" in measure("encode_topk", broken, inputs, 1e9, 1e-3)[-1]
