"""GGUF files: dequantised once into a folder of transformers, cached by the sha256 of the file.

The cache is `CACHE/gguf/<sha256>-transformers<major>/` (one major version cannot read all that another writes): the
saved model in float32 (dequantised values are exact in it), the tokenizer, and `conversion.json`, which lists all files
with their digests. A conversion is written into a temporary folder and renamed when it is whole, under a lock, so that
a killed one leaves nothing that is ever read.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import enable_progress_bars
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging

from activation_store.architectures import architecture_spec
from activation_store.atomic import free_bytes, fsync_folder, read_json, write_json
from activation_store.errors import UserError
from activation_store.fingerprint import file_sha256
from activation_store.gguf_tokenizer import metadata, plain_tokenizer
from activation_store.progress import Progress, human_bytes, human_seconds, report

_MAGIC = b"GGUF"
_RECORD = "conversion.json"
# Changes when conversions made before must be made anew.
_CONVERSION_VERSION = 2
# What a damaged file makes the readers raise.
_READ_ERRORS = (ValueError, IndexError, KeyError, TypeError, OSError, OverflowError, MemoryError)


@dataclass(frozen=True)
class ConvertedGguf:
    """A GGUF file in the form that transformers loads."""

    folder: Path
    sha256: str
    # What the file says of itself ("" where it does not).
    license: str


def convert_gguf(file: Path, cache: Path) -> ConvertedGguf:
    """The cached conversion of a GGUF file, made now if it is not there or damaged (progress goes to stderr).

    Raises UserError for a file that is not a whole GGUF file, an architecture that is not in the table, or too little
    disk.
    """
    _check_magic(file)
    sha256 = file_sha256(file, cache)
    folder = cache / "gguf" / f"{sha256}-transformers{transformers.__version__.partition('.')[0]}"
    if (record := _intact_record(folder, cache)) is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder.parent / "lock"):
                # Another process may have made it meanwhile; whatever else is left here is of killed conversions.
                if (record := _intact_record(folder, cache)) is None:
                    record = _convert(file, sha256, folder)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the conversion of {file.name} cannot be written to {folder.parent} ({_first_line(error)}); mend "
                "that, or set subject.cache_dir to another folder"
            ) from None
    return ConvertedGguf(folder=folder, sha256=sha256, license=str(record["license"]))


def _check_magic(file: Path) -> None:
    with file.open("rb") as stream:
        head = stream.read(len(_MAGIC))
    if head != _MAGIC:
        raise UserError(
            f"{file} is not a GGUF file (it begins with {head!r}, wanted {_MAGIC!r}); give a .gguf file or a folder"
        )


def _intact_record(folder: Path, cache: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = read_json(folder / _RECORD)
        if record["version"] != _CONVERSION_VERSION:
            return None
        damaged = [n for n, digest in record["files"].items() if file_sha256(folder / n, cache) != digest]
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, KeyError, AttributeError):
        damaged = [_RECORD]
    if damaged:
        report(f"The cached conversion {folder} is damaged ({', '.join(damaged)}); converting again.")
        return None
    return record


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds an advisory lock, which the system releases if this process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("Another process is converting a GGUF file; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(file: Path, sha256: str, folder: Path) -> dict[str, Any]:
    """Writes the conversion of `file` to `folder`, whole or not at all."""
    started = time.monotonic()
    report(f"Converting {file.name} ({human_bytes(file.stat().st_size)}) for transformers, once; reading it.")
    temporary = folder.with_name(f"{folder.name}.partial")
    for leftover in (temporary, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        reader = _open(file)
        wanted = sum(int(tensor.n_elements) for tensor in reader.tensors) * torch.float32.itemsize * 11 // 10
        if (free := free_bytes(folder)) < wanted:
            raise UserError(
                f"converting {file.name} needs {human_bytes(wanted)} in {folder.parent}, which has "
                f"{human_bytes(free)}; free some, or set subject.cache_dir to a folder on another disk"
            )
        _save(file, reader, temporary)
        record = {
            "version": _CONVERSION_VERSION,
            "gguf": file.name,
            "sha256": sha256,
            "license": metadata(reader, "general.license"),
            "files": {path.name: _synced_sha256(path) for path in sorted(temporary.iterdir())},
        }
        write_json(temporary / _RECORD, record)
        os.rename(temporary, folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    report(f"Wrote {folder} in {human_seconds(time.monotonic() - started)}.")
    return record


def _open(file: Path) -> Any:
    try:
        return gguf.GGUFReader(file)
    except _READ_ERRORS as error:
        raise UserError(f"{file} is damaged or cut off ({_first_line(error)}); download it again") from None


def _save(file: Path, reader: Any, folder: Path) -> None:
    """Writes model and tokenizer of `file` to `folder` in the form that every supported transformers loads."""
    names = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with _quick_gguf(file, reader), quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(**names)
            architecture_spec(config.model_type)
            model, loading = AutoModelForCausalLM.from_pretrained(
                **names, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(**names)
        except UserError:
            raise
        except _READ_ERRORS as error:
            raise UserError(f"transformers cannot read {file}: {_first_line(error)}; give another GGUF file") from None
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{file} lacks weights of its model ({', '.join(missing[:3])}); give a whole GGUF file")
    # transformers 5 refuses to save what it believes to be quantised still.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with quiet_transformers():
        model.save_pretrained(folder)
    plain_tokenizer(tokenizer, reader).save_pretrained(folder)


@contextlib.contextmanager
def _quick_gguf(file: Path, reader: Any) -> Iterator[None]:
    """While transformers converts: the file is read once instead of four times, and our own progress is shown.

    transformers opens the same file anew for config, model and tokenizer, and builds the same table of names once a
    submodule; with both remembered a conversion takes less than half the time.
    """

    def counted(tensors: list[Any], **_: Any) -> Iterator[Any]:
        with Progress(f"convert {file.name}", total=len(tensors), unit="tensors") as progress:
            for tensor in tensors:
                yield tensor
                progress.advance(1)

    replacements: list[tuple[ModuleType, str, Callable[..., Any]]] = [
        (gguf, "GGUFReader", lambda *args, **kwargs: reader),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        (modeling_gguf_pytorch_utils, "tqdm", counted),
    ]
    originals = [(module, name, getattr(module, name)) for module, name, _ in replacements]
    _set_all(replacements)
    try:
        yield
    finally:
        _set_all(originals)


def _set_all(attributes: list[tuple[ModuleType, str, Callable[..., Any]]]) -> None:
    for module, name, value in attributes:
        setattr(module, name, value)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the hints and bars of transformers and the hub's tracebacks of every retry; downloads keep their bars."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    hub_verbosity = hub_logging.get_verbosity()
    logging.disable_progress_bar()
    enable_progress_bars()  # downloads, which the line above silences as well
    logging.set_verbosity_error()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if shown:
            logging.enable_progress_bar()


def _synced_sha256(path: Path) -> str:
    """Makes a written file durable and readable for whom the folder is; its sha256."""
    path.chmod(0o666 & path.parent.stat().st_mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
