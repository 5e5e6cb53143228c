"""Registers the dataclasses as Hydra's schema: wrong types and unknown keys are refused while a config is composed."""

from hydra.core.config_store import ConfigStore

from launch.config import LayerloomConfig

SCHEMA_NAME = "layerloom_schema"


def register_schema() -> None:
    """Makes `layerloom_schema` known to Hydra; conf/config.yaml starts from it. May be called more than once."""
    ConfigStore.instance().store(name=SCHEMA_NAME, node=LayerloomConfig, provider="layerloom")
