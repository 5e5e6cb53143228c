"""Where what can be made again is kept for later runs: converted subjects, digests, measurements of the machine."""

import os
from pathlib import Path


def cache_root(chosen: str = "") -> Path:
    """`chosen`, else $LAYERLOOM_CACHE, else $XDG_CACHE_HOME/layerloom, else ~/.cache/layerloom."""
    if folder := chosen or os.environ.get("LAYERLOOM_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "layerloom"
