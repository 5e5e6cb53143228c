"""How tables of numbers that the optimizer changes are stored: in float32, bfloat16, or 8 bit.

A format holds a table (rows, columns) and is worked on a block of rows at a time, so that a float32 copy of a whole
table never exists:

    values = format.read(rows)        float32
    ...                               change them in place
    format.write(rows, values, bits)  rounded stochastically

8 bit: each row is cut into blocks of at most 256 numbers; a block has its largest magnitude in float32, and each number
its share of it as a small float: for moments with a sign, sign + 4 bits of exponent + 3 of mantissa; for those without,
5 + 3. The spacing is 6% to 12% of the number throughout, down to 2e-5 (3e-10) of the block's largest. Adam divides one
moment by the root of the other, so what matters is the error relative to the number itself, small ones included; and
a code is a shift of the number's own bits, without a search. (torchao.optim was looked at: its Adam asks for
torch.compile and with it a C++ compiler; run without, it copies the whole state in 8 bytes a number; and its quantiser,
a binary search in a table, rounds to nearest, which freezes a moment whose changes are below half a spacing.)
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from trainer.stochastic_rounding import round_to_bfloat16

BLOCK = 256
# Bits of a float32 below the three of the mantissa that an 8-bit number keeps; the bits of 1.0.
_DROPPED = 20
_ONE = 0x3F800000


class TableFormat(Protocol):
    """A stored table. `rounds`: whether `write` uses its random bits."""

    rounds: bool

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by suffix ("" for a table that is one tensor)."""

    def read(self, rows: slice) -> Tensor:
        """(rows, columns) in float32, to be changed in place and given to `write`."""

    def write(self, rows: slice, values: Tensor, random_16: Tensor) -> None:
        """Stores what `read` gave, with 16 random bits for each value (int32, of the values' shape) if it `rounds`."""


class Float32Table:
    """A float32 tensor as it is; read gives a view."""

    rounds = False

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def tensors(self) -> dict[str, Tensor]:
        """See TableFormat."""
        return {"": self._table}

    def read(self, rows: slice) -> Tensor:
        """See TableFormat."""
        return self._table[rows]

    def write(self, rows: slice, values: Tensor, random_16: Tensor) -> None:
        """Nothing is left to do: `values` are the table."""


class Bfloat16Table:
    """A bfloat16 tensor, written with stochastic rounding."""

    rounds = True

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def tensors(self) -> dict[str, Tensor]:
        """See TableFormat."""
        return {"": self._table}

    def read(self, rows: slice) -> Tensor:
        """See TableFormat."""
        return self._table[rows].float()

    def write(self, rows: slice, values: Tensor, random_16: Tensor) -> None:
        """See TableFormat."""
        self._table[rows] = round_to_bfloat16(values, random_16)


class BlockTable:
    """8 bit in blocks (see the module). `codes`: (rows, columns) uint8; `scales`: (rows, blocks) float32.

    signed=False is for numbers that are never negative; one that is not 0 is never rounded to 0 there, since Adam
    divides by it.
    """

    rounds = True

    def __init__(self, n_rows: int, n_columns: int, *, signed: bool, device: torch.device) -> None:
        self.codes = torch.zeros(n_rows, n_columns, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(n_rows, block_count(n_columns), device=device)
        self._signed = signed
        self._largest_code = 127 if signed else 255
        self._values = _values_of_codes(self._largest_code).to(device)
        # Even blocks: 576 columns are three of 192 rather than two of 256 and one of 64.
        self._block = -(-n_columns // block_count(n_columns))

    def tensors(self) -> dict[str, Tensor]:
        """See TableFormat."""
        return {".codes": self.codes, ".scales": self.scales}

    def read(self, rows: slice) -> Tensor:
        """See TableFormat."""
        codes = self.codes[rows]
        values = self._values.index_select(0, codes.reshape(-1).int()).view(codes.shape)
        for block, scales in self._each_block(values, self.scales[rows]):
            block.mul_(scales)
        return values

    def write(self, rows: slice, values: Tensor, random_16: Tensor) -> None:
        """See TableFormat."""
        shares, scales = values.abs(), self.scales[rows]
        for block, largest in self._each_block(shares, scales):
            torch.amax(block, dim=1, keepdim=True, out=largest)
            block.div_(largest.clamp_min(torch.finfo(torch.float32).tiny))
        codes = shares.view(torch.int32).add_(random_16, alpha=1 << (_DROPPED - 16)).sub_(_ONE)
        codes = codes.bitwise_right_shift_(_DROPPED).add_(self._largest_code).clamp_(0, self._largest_code)
        if self._signed:
            codes.add_(values < 0, alpha=128)
        else:
            codes = torch.maximum(codes, values > 0)
        self.codes[rows] = codes

    def _each_block(self, values: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the columns of each block, with the column of its scales."""
        for n, start in enumerate(range(0, values.shape[1], self._block)):
            yield values[:, start : start + self._block], scales[:, n : n + 1]


def block_count(n_columns: int) -> int:
    """Blocks of a row."""
    return -(-n_columns // BLOCK)


def _values_of_codes(largest: int) -> Tensor:
    """(256) the number that each code stands for: 1.0 for the largest, 0 for code 0, negative above 127 if signed."""
    codes = torch.arange(largest + 1, dtype=torch.int32)
    values = ((codes - largest << _DROPPED) + _ONE).view(torch.float32)
    values[0] = 0.0
    return values if largest == 255 else torch.cat([values, -values])
