"""Names what differs between two configs, for errors that refuse to mix them."""

from collections.abc import Mapping
from typing import Any

_MISSING = object()


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One phrase a difference, such as `store.dtype: float16 there, float32 asked for`.

    Nested mappings are compared key by key with dotted names; lists and tuples are equal when their items are.
    The order is that of `old`, then keys that only `new` has.
    """
    differences: list[str] = []
    for key in [*old, *(key for key in new if key not in old)]:
        name = f"{prefix}{key}"
        there, asked = old.get(key, _MISSING), new.get(key, _MISSING)
        if isinstance(there, Mapping) and isinstance(asked, Mapping):
            differences += config_differences(there, asked, f"{name}.")
        elif _plain(there) != _plain(asked):
            differences.append(f"{name}: {_shown(there)} there, {_shown(asked)} asked for")
    return differences


def _plain(value: Any) -> Any:
    """Tuples as lists, for JSON and OmegaConf give lists back."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    if value is _MISSING:
        return "nothing"
    return "''" if value == "" else str(value)
