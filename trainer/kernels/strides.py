"""How the operands of an op may lie in memory: what it reads as it likes, what it writes by rows."""

from torch import Tensor


def check_written(**tensors: Tensor | None) -> None:
    """Refuse a table that no backend can write in place: columns must be neighbours, and rows must not share memory.

    Raises:
        ValueError: names the argument, its strides and the remedy.
    """
    for name, table in tensors.items():
        if table is not None and not (has_dense_columns(table) and _rows_are_apart(table)):
            raise ValueError(
                f"{name} of shape {tuple(table.shape)} has strides {table.stride()}, but is written row by row: its "
                f"last stride must be 1 and its rows apart; pass a contiguous tensor, and copy it back"
            )


def has_dense_columns(table: Tensor) -> bool:
    """Whether the values of a row are neighbours."""
    return table.numel() == 0 or table.shape[-1] == 1 or table.stride(-1) == 1


def dense_columns(table: Tensor) -> Tensor:
    """The table, copied where the values of a row are not neighbours (a transposed or an expanded tensor)."""
    return table if has_dense_columns(table) else table.contiguous()


def _rows_are_apart(table: Tensor) -> bool:
    return table.numel() == 0 or table.shape[0] == 1 or table.stride(0) >= table.shape[1]
