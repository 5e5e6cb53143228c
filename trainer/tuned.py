"""What `layerloom tune` measured, kept in the user's cache folder, and what a run makes of it.

CACHE/tune/<digest of the machine>.json holds the machine in words and one entry for each shape of model:
{"format", "machine", "entries": [{"shape", "density", "tokens", "timings"}]}.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from activation_store.atomic import read_json, write_json
from activation_store.cache import cache_root
from activation_store.errors import UserError
from activation_store.progress import report
from trainer.config import KernelBackend, KernelsConfig, ParamDtype, Precision, RunConfig
from trainer.kernels.dispatch import Choice, choose, words_of
from trainer.model.break_even import BreakEven, family, limited, shipped_break_even
from trainer.model.spec import ModelSpec
from trainer.reproducibility import hardware_name
from trainer.tune import Measured

_FORMAT = 1
_SHAPE_FIELDS = ("span", "n_layers", "d_model")


@dataclass(frozen=True, slots=True)
class ChosenKernels:
    """How a run computes. config: with the density as a number; line: for the log."""

    name: str
    config: KernelsConfig
    line: str


def choose_kernels(config: RunConfig, spec: ModelSpec, device: torch.device) -> ChosenKernels:
    """Backend and break-even of a run. Raises UserError for a backend that does not run on `device`."""
    choice = choose_backend(config.kernels.backend, device)
    number, dtype = config.kernels.dense_above_density, compute_dtype(config)
    if number is not None:
        found = BreakEven(number, "as asked for")
    else:
        shipped = shipped_break_even(choice.kernels.name, device.type, dtype, spec)
        found = tuned_break_even(machine(device, choice.kernels.name, dtype), spec) or shipped
    name, n_threads = choice.kernels.name, torch.get_num_threads()
    threads = f", {n_threads} thread{'s' * (n_threads > 1)}" if device.type == "cpu" else ""
    line = (
        f"kernels: {words_of(choice, operand_dtype(config))}{threads}; layers with more than {found.density:.3g} of "
        f"their entries active are dense ({found.source})"
    )
    return ChosenKernels(name, replace(config.kernels, dense_above_density=found.density), line)


def choose_backend(backend: KernelBackend, device: torch.device) -> Choice:
    """`trainer.kernels.dispatch.choose` for a user."""
    try:
        return choose(backend.value, device)
    except ValueError as error:
        raise UserError(str(error)) from error


def compute_dtype(config: RunConfig) -> torch.dtype:
    """Of the products' operands."""
    return torch.bfloat16 if config.train.precision is Precision.bf16 else torch.float32


def operand_dtype(config: RunConfig) -> torch.dtype:
    """bfloat16 where anything that is multiplied or gathered is: products, or the parameters themselves."""
    return torch.bfloat16 if config.optim.param_dtype is ParamDtype.bf16 else compute_dtype(config)


def machine(device: torch.device, backend: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a measurement depends on besides the model's shape."""
    return {
        "hardware": hardware_name(device),
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "torch": torch.__version__,
        "backend": backend,
        "dtype": str(dtype).removeprefix("torch."),
    }


def table_file(its_machine: dict[str, Any]) -> Path:
    """Where the measurements of a machine are kept."""
    digest = hashlib.sha256(json.dumps(its_machine, sort_keys=True).encode()).hexdigest()
    return cache_root() / "tune" / f"{digest[:16]}.json"


def save(its_machine: dict[str, Any], spec: ModelSpec, measured: Measured) -> Path:
    """Adds a measurement to the table of the machine, in place of an older one of the same shape."""
    file, shape = table_file(its_machine), _shape(spec)
    entries = [entry for entry in _entries(file) if entry["shape"] != shape]
    entries.append({"shape": shape, **asdict(measured)})
    write_json(file, {"format": _FORMAT, "machine": its_machine, "entries": entries})
    return file


def tuned_break_even(its_machine: dict[str, Any], spec: ModelSpec) -> BreakEven | None:
    """The measurement for this shape, or for the nearest number of features; None if there is none."""
    shape = _shape(spec)
    same = ("family", *_SHAPE_FIELDS)
    entries = [e for e in _entries(table_file(its_machine)) if all(e["shape"][key] == shape[key] for key in same)]
    if not entries:
        return None
    nearest = min(entries, key=lambda e: abs(math.log(e["shape"]["n_features"] / spec.n_features)))
    measured_at = nearest["shape"]["n_features"]
    at = "" if measured_at == spec.n_features else f" at n_features={measured_at}"
    return limited(BreakEven(nearest["density"], f"measured by layerloom tune{at}"))


def _shape(spec: ModelSpec) -> dict[str, Any]:
    values = spec.to_dict()
    return {"family": family(spec), **{name: values[name] for name in (*_SHAPE_FIELDS, "n_features")}}


def _entries(file: Path) -> list[dict[str, Any]]:
    """The entries of a table; none, with a line that says so, if it is damaged or of another version."""
    try:
        table = read_json(file)
        entries: list[dict[str, Any]] = table["entries"]
        if table["format"] != _FORMAT or not all(_is_sound(entry) for entry in entries):
            raise ValueError("its content is not that of this version")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        first_line = " ".join(str(error).split())
        report(f"{file} is damaged ({type(error).__name__}: {first_line}) and passed over; run layerloom tune again")
        return []
    return entries


def _is_sound(entry: dict[str, Any]) -> bool:
    shape, density = entry["shape"], entry["density"]
    counts = [shape[name] for name in ("n_layers", "d_model", "n_features")]
    sound = all(isinstance(count, int) and count > 0 for count in counts) and {"family", "span"} <= shape.keys()
    return sound and isinstance(density, float) and 0 < density <= 1
