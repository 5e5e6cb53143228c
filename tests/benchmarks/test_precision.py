"""The benchmark of precisions: its options compose, obey the rules, and differ in what they are named for alone."""

from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.precision import OPTIONS, compose
from trainer.rules import check_run_config


@pytest.mark.parametrize("name", OPTIONS)
def test_options_differ_from_fp32_in_what_they_say(name: str, tmp_path: Path) -> None:
    config, fp32 = (asdict(compose(each, tmp_path, ["train.tokens=4096"])) for each in (name, "fp32"))
    check_run_config(compose(name, tmp_path, []))
    assert config["store"]["path"] == fp32["store"]["path"]
    assert config["train"]["tokens"] == 4096
    assert (config.pop("run") == fp32.pop("run")) == (name == "fp32")
    changed = {
        f"{group}.{key}"
        for group in config
        if isinstance(config[group], dict)
        for key in config[group]
        if config[group][key] != fp32[group][key]
    }
    assert changed == {word.split("=")[0] for word in OPTIONS[name]}
