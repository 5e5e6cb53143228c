"""`layerloom demo`: harvest, train, evaluate and publish, one after another.

Each stage's own function knows whether its result is there and still matches its config, and then returns at once; no
second record is kept here.
"""

import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from activation_store.atomic import read_json
from activation_store.config import SourceKind
from activation_store.errors import UserError
from activation_store.gguf import convert_gguf
from activation_store.harvest import harvest
from activation_store.packages import resolve_package_path
from activation_store.places import stored_bytes
from activation_store.progress import human_bytes, human_seconds, report
from activation_store.store import ActivationStore
from activation_store.subject import SubjectInfo, cache_folder
from launch.config import LayerloomConfig
from launch.usage import Usage
from trainer.build import model_spec
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.inputs import evaluation_is_current
from trainer.evaluation.table import format_table
from trainer.publish.export import publish
from trainer.publish.hooks import circuit_hooks
from trainer.publish.rules import check_expressible, check_options, check_output
from trainer.run_folder import RunFolder
from trainer.sample import reference_path
from trainer.train import train

_PROMPT = "The capital of France is"


@dataclass(frozen=True)
class StageUsage:
    """What a stage took."""

    name: str
    seconds: float
    peak_bytes: int


def run_demo(config: LayerloomConfig) -> list[StageUsage]:
    """Runs the stages that are not done yet and ends with the table, the picture and the line to type next.

    Raises UserError before anything is written if a folder is in the way or an option is wrong.
    """
    run, output = Path(config.run), Path(config.output)
    check_options(config.publish)
    check_output(output, run)
    RunFolder(run).check(config)
    on_disk = config.source.kind is SourceKind.disk
    usages = [_stage("harvest", lambda: _harvest(config))] if on_disk else []
    usages += [_stage("train", lambda: _train(config)), _stage("evaluate", lambda: _evaluate(config))]
    reason = why_not_published(config)
    if reason:
        report(f"\n== publish: left out ==\n{reason}")
    else:
        usages.append(_stage("publish", lambda: _publish(config)))
    _conclude(config, usages, published=not reason)
    return usages


def why_not_published(config: LayerloomConfig) -> str:
    """Why circuit-tracer's layout cannot hold this transcoder; empty if it can. Looks at the store's manifest."""
    store = ActivationStore.open(reference_path(config, config.run))
    subject = SubjectInfo.from_dict(store.manifest.subject)
    try:
        check_expressible(
            model_spec(config.model, config.activation, store.n_layers, store.d_model), store.layers, subject
        )
        circuit_hooks(subject.architecture, config.store.input_hook)
    except UserError as error:
        return str(error)
    return ""


def _stage(name: str, work: Callable[[], None]) -> StageUsage:
    report(f"\n== {name} ==")
    with Usage() as usage:
        work()
    report(f"{name} took {human_seconds(usage.seconds)}, peak memory {human_bytes(usage.peak_bytes)}")
    return StageUsage(name, usage.seconds, usage.peak_bytes)


def _harvest(config: LayerloomConfig) -> None:
    harvest(config.subject, config.text, config.store, device=config.device)


def _train(config: LayerloomConfig) -> None:
    train(config)


def _evaluate(config: LayerloomConfig) -> None:
    if evaluation_is_current(config.run, config.eval):
        report(f"{RunFolder(config.run).evaluation_file} is there and is that of the newest checkpoint")
        return
    evaluate(Path(config.run), config.eval, device=config.device, show_table=False)


def _publish(config: LayerloomConfig) -> None:
    publish(Path(config.run), Path(config.output), config.publish, device=config.device)


def _conclude(config: LayerloomConfig, usages: list[StageUsage], *, published: bool) -> None:
    """The short table, where everything lies, what each stage took, and what to type next."""
    folder = RunFolder(config.run)
    store = ActivationStore.open(reference_path(config, config.run))
    lines = ["", "== result ==", format_table(read_json(folder.evaluation_file), first_layer=store.layers[0]), ""]
    lines += [f"{'stage':<10}{'time':>14}{'peak memory':>14}"]
    lines += [f"{u.name:<10}{human_seconds(u.seconds):>14}{human_bytes(u.peak_bytes):>14}" for u in usages]
    lines += ["", f"store      {store.path} ({human_bytes(stored_bytes(store.path))})"]
    lines += [f"run        {config.run}", f"picture    {folder.plots / 'summary.png'}"]
    if published:
        lines += [f"published  {config.output}", "", "next:", f"  {next_command(config)}"]
    print("\n".join(lines), flush=True)


def next_command(config: LayerloomConfig) -> str:
    """The line that draws an attribution graph with the published transcoder."""
    store = ActivationStore.open(reference_path(config, config.run))
    subject = SubjectInfo.from_dict(store.manifest.subject)
    backend = circuit_hooks(subject.architecture, config.store.input_hook).backends[0]
    graphs = str(Path(config.output).with_name("graphs"))
    # circuit-tracer takes a relative path for a repository of the hub.
    published = str(Path(config.output).resolve())
    words = [_command("circuit-tracer"), "attribute", "-m", _loadable(config), "-t", published, "-p", _PROMPT]
    words += ["-o", f"{graphs}/france.pt", "--slug", "france", "--graph_file_dir", graphs, "--backend", backend]
    return f"mkdir -p {shlex.quote(graphs)} && {shlex.join(words)}"


def _loadable(config: LayerloomConfig) -> str:
    """What transformers loads as the subject: its hub id, its folder, or the folder of a converted GGUF file."""
    path = resolve_package_path(config.subject.path)
    if path.is_file():
        return str(convert_gguf(path, cache_folder(config.subject)).folder)
    return str(path.resolve()) if path.is_dir() else config.subject.path


def _command(name: str) -> str:
    """How to call a command of this environment from here: by its name if the shell finds it."""
    beside = Path(sys.executable).with_name(name)
    if shutil.which(name) or not beside.exists():
        return name
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)
