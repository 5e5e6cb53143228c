"""Reads the tensors of a checkpoint where they lie: whole, by rows, or a box of one."""

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from activation_store.errors import UserError
from activation_store.files import OpenFile
from activation_store.places import Place, open_file
from trainer.saving.index import INDEX_FILE, MODEL, Chunk, Index, TensorEntry, index_from_json
from trainer.tensor_file import read_whole

# Rows that are read at a time, where they cannot go straight to where they belong.
_BLOCK_BYTES = 1 << 26


class CheckpointReader:
    """Tensors of one checkpoint by name, as global tensors, whatever mesh wrote them. Any number of threads may use it.

    Raises OSError where files cannot be read; checksums are not looked at.
    """

    def __init__(self, folder: Place, index: Index) -> None:
        self._folder, self._index = folder, index
        self._files: dict[str, OpenFile] = {}

    def entries(self, kind: str = MODEL) -> dict[str, TensorEntry]:
        """Dtype, shape and chunks of all tensors of the model, or of the optimizer (kind="optimizer")."""
        return dict(self._index[kind])

    def tensor(self, name: str, *, kind: str = MODEL, rows: slice | None = None) -> Tensor:
        """One tensor, or `rows` (start and stop of dim 0) of it, on the CPU in the dtype that it was saved in.

        Raises UserError for a name that is not there.
        """
        entry = self._entry(name, kind)
        start, stop = (0, entry.shape[0] if entry.shape else 0) if rows is None else (rows.start, rows.stop)
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        target = torch.empty(shape, dtype=entry.dtype)
        offsets = (start, *(0 for _ in shape[1:])) if shape else ()
        for chunk in entry.chunks:
            box = _overlap(chunk.offsets, chunk.sizes, offsets, shape)
            if box is not None:
                begins, lengths = box
                inside = [begin - offset for begin, offset in zip(begins, chunk.offsets, strict=True)]
                part = target
                for dim, (begin, offset, length) in enumerate(zip(begins, offsets, lengths, strict=True)):
                    part = part.narrow(dim, begin - offset, length)
                self.read_box(entry.dtype, chunk, inside, part)
        return target

    def read_box(self, dtype: torch.dtype, chunk: Chunk, offsets: Sequence[int], target: Tensor) -> None:
        """Copies into `target` (any device and strides) the box of its shape that begins at `offsets` of a chunk."""
        if target.numel() == 0:
            return
        if target.ndim == 0:
            offsets, target = (0,), target.unsqueeze(0)
        rest = tuple(chunk.sizes[1:])
        row_bytes = torch.Size(rest).numel() * dtype.itemsize
        block = max(1, _BLOCK_BYTES // row_bytes)
        columns = tuple(slice(o, o + n) for o, n in zip(offsets[1:], target.shape[1:], strict=True))
        straight = target.is_contiguous() and target.device.type == "cpu" and target.dtype == dtype
        straight = straight and tuple(target.shape[1:]) == rest
        for start in range(0, target.shape[0], block):
            rows = target[start : start + block]
            buffer = rows if straight else torch.empty((rows.shape[0], *rest), dtype=dtype)
            begin = chunk.begin + (offsets[0] + start) * row_bytes
            read_whole(self._file(chunk.file), begin, buffer.data_ptr(), rows.shape[0] * row_bytes)
            if not straight:
                rows.copy_(buffer[(slice(None), *columns)])

    def _entry(self, name: str, kind: str) -> TensorEntry:
        entry = self._index[kind].get(name)
        if entry is None:
            raise UserError(f"{self._folder} has no tensor {name} of the {kind}")
        return entry

    def _file(self, name: str) -> OpenFile:
        if name not in self._files:
            self._files[name] = open_file(self._folder / name)
        return self._files[name]


def open_reader(path: Place) -> CheckpointReader:
    """The tensors of the checkpoint in a folder. Raises FileNotFoundError."""
    return CheckpointReader(path, read_index(path))


def read_index(path: Place) -> Index:
    """index.json of a checkpoint. Raises FileNotFoundError."""
    return index_from_json(json.loads((path / INDEX_FILE).read_bytes()))


def _overlap(
    offsets: Sequence[int], sizes: Sequence[int], other_offsets: Sequence[int], other_sizes: Sequence[int]
) -> tuple[list[int], list[int]] | None:
    """Offsets and sizes of what two boxes share; None: nothing."""
    begins = [max(a, b) for a, b in zip(offsets, other_offsets, strict=True)]
    ends = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, other_offsets, other_sizes, strict=True)]
    lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
    return None if any(length <= 0 for length in lengths) else (begins, lengths)
