"""The verbs: what each does, which groups and keys it reads, and the function that carries it out (imported lazily)."""

from dataclasses import dataclass

_TRAIN_GROUPS = (
    "subject",
    "text",
    "store",
    "source",
    "model",
    "activation",
    "optim",
    "schedule",
    "train",
    "parallel",
    "engine",
    "kernels",
    "log",
)
STORE_ACTIONS = ("info", "verify", "repair", "merge", "remove")
CHECKPOINT_ACTIONS = ("info", "convert", "verify")


@dataclass(frozen=True)
class Verb:
    """`handler` names a function of `launch.stages`. A strict verb refuses overrides of what it would not read; one on
    a mesh may run as several processes. `words`: what comes behind the verb, for the usage line.
    """

    summary: str
    groups: tuple[str, ...]
    keys: tuple[str, ...]
    handler: str
    strict: bool = False
    on_a_mesh: bool = False
    words: str = ""


VERBS: dict[str, Verb] = {
    "harvest": Verb(
        "runs the subject over text and writes its activations to a zarr store",
        ("subject", "text", "store", "source", "launch", "preset"),
        ("device",),
        "harvest",
    ),
    "train": Verb(
        "trains a transcoder on a store, on the subject itself (source=live), or on a store that is filled and emptied "
        "meanwhile (source=rolling); a run that was stopped continues",
        (*_TRAIN_GROUPS, "launch", "preset"),
        ("run", "device"),
        "train",
        on_a_mesh=True,
    ),
    "evaluate": Verb(
        "measures a run on held-out documents (its other settings come from the run's config.yaml); under torchrun "
        "with parallel.feature=N each process holds a part of the transcoder",
        ("eval", "parallel", "launch", "preset"),
        ("run", "device"),
        "evaluate",
        strict=True,
        on_a_mesh=True,
    ),
    "publish": Verb(
        "writes a run as a folder that circuit-tracer loads, checks it and adds a model card",
        ("publish", "launch", "preset"),
        ("run", "output", "device"),
        "publish",
        strict=True,
    ),
    "sweep": Verb(
        "trains a grid of runs on one store and writes one table of the results",
        (*_TRAIN_GROUPS, "eval", "launch", "sweep", "preset"),
        ("output", "device"),
        "sweep",
    ),
    "store": Verb(
        "looks after a store: `store info FOLDER` describes it, `store verify FOLDER` checks every byte, `store repair "
        "FOLDER` harvests what is damaged again, `store merge FOLDER FOLDER output=FOLDER` joins stores, `store remove "
        "FOLDER confirm=true` deletes one",
        ("store",),
        ("output", "confirm", "device", "subject.path", "subject.cache_dir", "text.path"),
        "store",
        strict=True,
        words=f"{'|'.join(STORE_ACTIONS)} FOLDER ...",
    ),
    "checkpoint": Verb(
        "looks at checkpoints: `checkpoint info FOLDER` describes one, `checkpoint verify FOLDER` checks every byte, "
        "`checkpoint convert FOLDER output=FOLDER` writes one as plain safetensors files (FOLDER: a run, one of its "
        "checkpoints, or a URL)",
        (),
        ("run", "output"),
        "checkpoint",
        strict=True,
        words=f"{'|'.join(CHECKPOINT_ACTIONS)} FOLDER",
    ),
    "tune": Verb(
        "measures when this machine computes a layer faster by dense products; train uses what it finds",
        ("store", "model", "activation", "train", "kernels", "tune", "launch", "preset"),
        ("device",),
        "tune",
    ),
    "demo": Verb(
        "harvest, train, evaluate and publish in one go; stages that are done are skipped",
        (*_TRAIN_GROUPS, "eval", "publish", "launch", "preset"),
        ("run", "output", "device"),
        "demo",
    ),
}
