"""Root config of every `layerloom` verb: the groups of conf/, and the keys shared by the verbs."""

from dataclasses import dataclass, field

from trainer.config import EvalConfig, PublishConfig, RunConfig


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """How a verb runs on this machine."""

    # CPU threads for torch; 0: every core this process may use.
    threads: int = 0


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """A grid of training runs on one store (`layerloom sweep sweep=NAME`)."""

    # Override key -> values; every combination is one point.
    params: dict[str, list[str]] = field(default_factory=dict)
    # Evaluate every point (needs the subject); otherwise the table holds the training metrics alone.
    evaluate: bool = True


@dataclass(kw_only=True, slots=True)
class TuneConfig:
    """`layerloom tune`: measures when this machine computes a layer faster by dense products."""

    # Layers and d_model of the transcoder; 0: those of the store at store.path.
    n_layers: int = 0
    d_model: int = 0
    # About how long it may take.
    seconds: float = 40.0


@dataclass(kw_only=True, slots=True)
class LayerloomConfig(RunConfig):
    """Everything a verb may read. `RunConfig` (trainer.config) is the part that lies beside every checkpoint."""

    eval: EvalConfig = field(default_factory=EvalConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    # Folder that publish, sweep and `store merge` write.
    output: str = "runs/demo/published"
    # Really delete what `store remove` names.
    confirm: bool = False
