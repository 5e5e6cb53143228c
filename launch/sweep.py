"""`layerloom sweep`: a Hydra multirun over a grid, every point a run of its own on one store, and one table of results.

Hydra's own sweeper and launcher do the work, so that `hydra/launcher=submitit_slurm` spreads the points over a cluster.
A point that fails leaves its error in the table and the rest goes on; a second call trains only what is missing.

    output/points/<slug>/   a run folder, with result.json beside the run's own files
    output/multirun.yaml    the sweep as Hydra resolved it
    output/results.parquet, results.csv
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from activation_store.errors import UserError
from activation_store.progress import report
from launch.arguments import Arguments
from launch.compose import CONFIG_NAME, VERSION_BASE, compose_config, parse_overrides, quoted, search_path_override
from launch.config import LayerloomConfig
from launch.groups import CONF_PACKAGE
from launch.labels import LABELS
from launch.stages import prepare
from launch.sweep_point import PointTask, point_slug
from launch.sweep_table import format_results, write_results
from launch.validate import validate
from trainer.rows import open_matching_store
from trainer.run_folder import RunFolder

# A sweep compares runs on one store of one subject, in one folder.
_FIXED = ("subject", "text", "store", "run", "output", "sweep", "preset", "train.fresh")
# Hydra makes no folder and no log file of its own.
_QUIET = (
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
)


def run_sweep(config: LayerloomConfig, arguments: Arguments) -> int:
    """Trains (and evaluates) every point of the grid, then writes the table. 1 if a point failed, else 0."""
    grid = find_grid(config, arguments.overrides)
    points = [
        [f"{key}={value}" for key, value in zip(grid, values, strict=True)]
        for values in itertools.product(*grid.values())
    ]
    constants = [word for word in arguments.overrides if _key(word) not in grid]
    _check_points(points, constants, arguments.config_dir)
    prepare(config, "sweep")
    open_matching_store(config)
    slugs = _check_folders(Path(config.output), list(grid), points, constants, arguments.config_dir)
    report(f"sweep: {len(points)} points ({' x '.join(f'{len(values)} {key}' for key, values in grid.items())})")
    try:
        _multirun(config, grid, constants, arguments.config_dir)
    finally:
        results = write_results(Path(config.output))
    if results is None:
        return 1
    print(format_results(results), flush=True)
    unwritten = len(slugs - set(results["point"]))
    failed = int((results["status"] != "done").sum()) + unwritten
    report(f"wrote {config.output}/results.parquet and results.csv: {len(results)} points, {failed} failed")
    if failed:
        report("the column `error` says why; the same command trains the failed points again and skips the others")
    return 1 if failed else 0


def find_grid(config: LayerloomConfig, overrides: Sequence[str]) -> dict[str, list[str]]:
    """Key -> values: those of `sweep.params`, and of overrides with several values; a single value fixes its key."""
    grid = {key: list(values) for key, values in config.sweep.params.items()}
    for override in parse_overrides(overrides):
        key = str(override.get_key_element())
        if override.is_sweep_override():
            grid[key] = list(override.sweep_string_iterator())
        else:
            grid.pop(key, None)
    for key, values in grid.items():
        if key.startswith(_FIXED):
            raise UserError(
                f"{key} cannot vary within a sweep, which compares runs on one store; run one sweep for each"
            )
        if not values:
            raise UserError(f"sweep.params has no values for {key}; give a list")
    if not grid:
        raise UserError(
            "a sweep needs values: sweep=dictionary_size, or several values of a key: model.n_features=512,1024"
        )
    return grid


def _check_points(points: list[list[str]], constants: list[str], config_dir: Path | None) -> None:
    """Refuses what Hydra could not compose, and a grid of which no point obeys the rules. Writes nothing."""
    problems = []
    for point in points:
        config = compose_config([*constants, *point], config_dir)
        try:
            validate(config, "train")
        except UserError as error:
            problems.append(error)
    if len(problems) == len(points):
        raise problems[0]


def _check_folders(
    output: Path, keys: list[str], points: list[list[str]], constants: list[str], config_dir: Path | None
) -> set[str]:
    """The points' slugs. Refuses an output of which a point was trained with other settings: results would be lost."""
    slugs = set()
    for point in points:
        values = dict(word.split("=", 1) for word in point)
        slug = point_slug({key: values[key] for key in keys})
        slugs.add(slug)
        folder = RunFolder(output / "points" / slug)
        if not folder.exists():
            continue
        try:
            folder.check(compose_config([*constants, *point], config_dir))
        except UserError as error:
            raise UserError(
                f"output={output} holds a sweep with other settings; give another output ({error})"
            ) from None
    return slugs


def _labels(config: LayerloomConfig) -> list[str]:
    """Hydra composes the points by itself: the labels as `launch.compose` leaves them."""
    return [
        f"{group}.{label}={quoted(getattr(getattr(config, group), label))}"
        for group, labels in LABELS.items()
        for label in labels
    ]


def _multirun(
    config: LayerloomConfig, grid: Mapping[str, list[str]], constants: list[str], config_dir: Path | None
) -> None:
    output = Path(config.output).resolve()
    overrides = [
        *search_path_override(config_dir),
        *constants,
        *_labels(config),
        *(f"{key}={','.join(values)}" for key, values in grid.items()),
        f"hydra.sweep.dir={quoted(str(output))}",
        *_QUIET,
    ]
    with initialize_config_module(CONF_PACKAGE, version_base=VERSION_BASE):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        hydra.multirun(
            config_name=CONFIG_NAME,
            task_function=PointTask(output=output, keys=tuple(grid)),
            overrides=overrides,
            with_log_configuration=False,
        )


def _key(word: str) -> str:
    return word.split("=", 1)[0].lstrip("+~")
