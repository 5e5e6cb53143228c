"""safetensors files written tensor by tensor and hashed on the way, and read into tensors that exist.

`safetensors.torch.save_file` cannot hash what it writes nor tell ENOSPC from other failures, and checkpoints are as
large as memory allows, so nothing here holds a second copy of more than one tensor (on a CPU, of none). The format: 8
bytes little-endian header length, JSON header `{name: {dtype, shape, data_offsets}}` padded with spaces to a multiple
of 8, then the tensors' bytes in the header's order, widest dtypes first so that each is aligned.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from activation_store.errors import UserError

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """Size and xxh3-64 (hex) of a file's bytes."""

    n_bytes: int
    xxh3_64: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> WrittenFile:
    """Writes `tensors` to `path` in safetensors format and syncs it to disk. Raises OSError (a full disk: ENOSPC)."""
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    header = _header(ordered)
    digest = xxhash.xxh3_64()
    n_bytes = 0
    with path.open("wb") as file:
        for piece in (len(header).to_bytes(8, "little"), header):
            digest.update(piece)
            n_bytes += file.write(piece)
        for tensor in ordered.values():
            data = _bytes_of(tensor)
            for start in range(0, len(data), _CHUNK_BYTES):
                # Hash and write alternate in pieces that fit the cache: memory is read once.
                piece_view = data[start : start + _CHUNK_BYTES]
                digest.update(piece_view)
                n_bytes += file.write(piece_view)
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(n_bytes, digest.hexdigest())


def read_tensors_into(path: Path, targets: Mapping[str, Tensor], *, widen: bool = False) -> None:
    """Copies every tensor of `path` into the one of the same name in `targets`, bit for bit.

    widen: bfloat16 may be read into float32 (exact). Raises UserError when names, shapes or dtypes differ otherwise:
    the file belongs to another model.
    """
    with safe_open(path, framework="pt") as file, torch.no_grad():
        names = set(file.keys())
        if names != set(targets):
            odd = sorted(names.symmetric_difference(targets))[0]
            where = "lacks" if odd in targets else "has an unknown"
            raise UserError(f"{path} {where} tensor {odd}; it was written by another version or for another model")
        for name, target in targets.items():
            source = file.get_tensor(name)
            widened = widen and (source.dtype, target.dtype) == (torch.bfloat16, torch.float32)
            if source.shape != target.shape or (source.dtype != target.dtype and not widened):
                raise UserError(
                    f"{path}: {name} is {source.dtype} {tuple(source.shape)}, the model's is {target.dtype} "
                    f"{tuple(target.shape)}; it was written for another model"
                )
            target.copy_(source)


def hash_file(path: Path) -> WrittenFile:
    """Size and xxh3-64 of a file. Raises OSError."""
    digest = xxhash.xxh3_64()
    n_bytes = 0
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(_CHUNK_BYTES)
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            digest.update(view[:count])
            n_bytes += count
    return WrittenFile(n_bytes, digest.hexdigest())


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes; a view of its memory when it is contiguous on a CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs for 3.11 lack Buffer
