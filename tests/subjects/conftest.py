"""Loaded tiny subjects of every family, one of each a session."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from activation_store.config import SubjectConfig
from activation_store.subject import Subject, load_subject
from tests.tiny import tiny_subject_folder


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny subject of an architecture, by its name in tests.tiny. Read only."""
    root = tmp_path_factory.mktemp("families")

    def folder(architecture: str) -> Path:
        path = root / architecture
        return path if path.exists() else tiny_subject_folder(path, architecture)

    return folder


@pytest.fixture(scope="session")
def load(family: Callable[[str], Path]) -> Callable[[str], Subject]:
    """The loaded tiny subject (float32, CPU) of an architecture."""
    loaded: dict[str, Subject] = {}

    def subject(architecture: str) -> Subject:
        if architecture not in loaded:
            cfg = SubjectConfig(path=str(family(architecture)))
            loaded[architecture] = load_subject(cfg, device=torch.device("cpu"))
        return loaded[architecture]

    return subject
