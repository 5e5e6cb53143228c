"""Shows whether two commits train bit-identically: fixed seeds, one thread, every activation, a tiny subject and store.

    python benchmarks/compare_commits.py OLD NEW        two commits; `.` is the working tree as it is
    python benchmarks/compare_commits.py HEAD .         has the change at hand kept the arithmetic?

Each commit is checked out into a temporary worktree, harvests its own store of the same subject and text, and trains
one short run per activation through its own command line. What is compared: the store's rows, and every tensor of the
last checkpoint. Exit 0: identical; 1: not. A refactor must be identical; a change of arithmetic says so and is not.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]

# Name -> overrides. Short runs that pass through warm-up, decay, dead features, accumulation and a second epoch.
RUNS: dict[str, list[str]] = {
    "topk": ["activation=topk"],
    "topk all layers, decoder norm": [
        "activation=topk",
        "activation.scope=all_layers",
        "activation.score=decoder_norm",
    ],
    "batchtopk": ["activation=batchtopk"],
    "batchtopk all layers": ["activation=batchtopk", "activation.scope=all_layers"],
    "jumprelu tanh": ["activation=jumprelu", "activation.tanh_lambda=1e-3"],
    "jumprelu target L0": ["activation=jumprelu", "activation.l0_lambda=1e-3", "activation.l0_target=12"],
    "relu": ["activation=relu", "activation.tanh_lambda=1e-3"],
    "per-layer, skip": ["activation=topk", "model=skip_plt"],
}
STORE = [
    "text=files",
    "text.context_length=32",
    "text.held_out_documents=4",
    "text.documents_per_block=8",
    "store=float32",
    "store.tokens=2000",
    "store.held_out_tokens=128",
    "store.chunk_rows=64",
    "store.shard_rows=256",
]
TRAINING = [
    "model.n_features=48",
    "activation.calibration_tokens=512",
    "activation.dead_after_tokens=256",
    "schedule.warmup_steps=4",
    "train.tokens=2560",
    "train.batch_size_tokens=128",
    "train.microbatch_tokens=64",
    "train.checkpoint_every=0",
    "train.eval_every=10",
    "source.pool_rows=512",
]
TOP_K = ["activation.k=4", "activation.auxk_k=8"]


def main() -> int:
    """Prints one line for the store and one for each run; 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--only", nargs="*", metavar="WORD", help="runs whose name has one of these words")
    parser.add_argument("--words", nargs="*", default=[], help="overrides of every run's training")
    arguments = parser.parse_args()
    names = [name for name in RUNS if not arguments.only or any(word in name for word in arguments.only)]
    with tempfile.TemporaryDirectory(prefix="layerloom-compare-") as temporary, ExitStack() as stack:
        work = Path(temporary)
        subject, text = _make_inputs(work / "inputs")
        hashes = []
        for side, commit in (("old", arguments.old), ("new", arguments.new)):
            tree = stack.enter_context(_checkout(commit, work / f"{side}-tree"))
            hashes.append(_hashes(tree, work / side, subject, text, names, arguments.words))
    same = True
    print(f"{'':<32}{arguments.old[:14]:<16}{arguments.new[:14]:<16}")
    for name in hashes[0]:
        old, new = hashes[0][name], hashes[1][name]
        same = same and old == new
        print(f"{name:<32}{old[:14]:<16}{new[:14]:<16}{'identical' if old == new else 'DIFFERENT'}", flush=True)
    return 0 if same else 1


def _make_inputs(folder: Path) -> tuple[Path, Path]:
    """A tiny Llama and a folder of texts, the same for both commits."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny import tiny_subject_folder, tiny_text_folder

    return tiny_subject_folder(folder / "subject", "llama"), tiny_text_folder(folder / "text")


@contextmanager
def _checkout(commit: str, folder: Path) -> Iterator[Path]:
    if commit == ".":
        yield ROOT
        return
    _git("worktree", "add", "--quiet", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def _hashes(tree: Path, work: Path, subject: Path, text: Path, names: list[str], words: list[str]) -> dict[str, str]:
    inputs = [f"subject.path={subject}", f"text.path={text}", *STORE, f"store.path={work / 'store'}"]
    _layerloom(tree, ["harvest", *inputs])
    found = {"store": _store_hash(tree, work / "store")}
    for number, name in enumerate(names):
        run = work / f"run_{number}"
        top_k = TOP_K if "topk" in name or "per-layer" in name else []
        _layerloom(tree, ["train", *inputs, *TRAINING, *RUNS[name], *top_k, *words, f"run={run}"])
        # Commits before checkpoints in parts have one file.
        checkpoints = sorted(run.glob("checkpoints/step_*/model*.safetensors"))
        digest = hashlib.sha256()
        for key, tensor in sorted(load_file(checkpoints[-1]).items()):
            digest.update(f"{key} {tensor.dtype} {tensor.shape} ".encode() + tensor.tobytes())
        found[name] = digest.hexdigest()
    return found


def _store_hash(tree: Path, store: Path) -> str:
    """sha256 of all rows, read by the commit's own reader."""
    code = (
        "import hashlib, sys; from activation_store.store import ActivationStore; "
        "s = ActivationStore.open(sys.argv[1]); r = s[0:s.n_rows]; "
        "print(hashlib.sha256(r.mlp_in.numpy().tobytes() + r.mlp_out.numpy().tobytes()).hexdigest())"
    )
    return _python(tree, ["-c", code, str(store)]).strip()


def _layerloom(tree: Path, words: list[str]) -> None:
    _python(tree, ["-m", "launch.main", *words, "launch.threads=1", "device=cpu"])


def _python(tree: Path, words: list[str]) -> str:
    """Runs Python with the packages of `tree`, and not those that are installed."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{tree}: {' '.join(words)}\nexit {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout


def _git(*words: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *words], check=True)


if __name__ == "__main__":
    sys.exit(main())
