"""Digests of weight files, remembered so that a large subject is read only once."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from activation_store.atomic import read_json, write_json
from activation_store.errors import UserError

# Smaller files are read anew every time.
REMEMBERED_BYTES = 16 * 2**20
# Keys of config.json that do not change what the model computes.
_IRRELEVANT_KEYS = ("_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


def file_sha256(path: Path, cache: Path) -> str:
    """The sha256 of a file, in hex; of a large one from `cache` if size, times and inode are as they were then."""
    stat = path.stat()
    if stat.st_size < REMEMBERED_BYTES:
        return _sha256(path)
    identity = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    memo = cache / "digests" / f"{name}.json"
    try:
        known = read_json(memo)
        if known["identity"] == identity:
            return str(known["sha256"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        pass  # not known yet, or a memo that is of no use: the file itself decides
    digest = _sha256(path)
    with contextlib.suppress(OSError):  # a read-only cache costs time, nothing else
        write_json(memo, {"identity": identity, "sha256": digest})
    return digest


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a saved model, sorted: safetensors if there are any, else PyTorch's. UserError if none."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise UserError(
        f"subject.path={folder} holds no weights (*.safetensors or pytorch_model*.bin); give a folder that does"
    )


def folder_fingerprint(folder: Path, cache: Path) -> str:
    """Identifies the weights of a saved model and how they are computed with: another value when either changes.

    It does not depend on where the folder lies or which version of transformers wrote it.
    """
    config = {key: value for key, value in read_json(folder / "config.json").items() if key not in _IRRELEVANT_KEYS}
    whole = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in weight_files(folder):
        whole.update(f"{file.name} {file_sha256(file, cache)}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
