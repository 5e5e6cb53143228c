"""Finding, describing and loading subjects; what is refused, and how."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from activation_store import fingerprint
from activation_store.config import BosRule, SubjectConfig
from activation_store.errors import UserError
from activation_store.subject import SubjectInfo, describe_subject, load_subject
from tests.tiny import ARCHITECTURES, tiny_subject_folder

CPU = torch.device("cpu")
Folder = Callable[[str], Path]


def config(path: Path | str, **values: str) -> SubjectConfig:
    return SubjectConfig(path=str(path), **values)  # type: ignore[arg-type]


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "subject"))


def change_weight(path: Path, name: str = "model.norm.weight") -> None:
    weights = load_file(path / "model.safetensors")
    weights[name][..., 0] += 1.0
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_family_is_described_without_its_weights(
    architecture: str, family: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    info = describe_subject(config(family(architecture), base_model="org/base", license="mit"))
    assert info.architecture == architecture.removesuffix("_serial")
    assert (info.n_layers, info.d_model, info.vocab_size, info.dtype) == (3, 16, 320, "float32")
    assert (info.base_model, info.model_name, info.license) == ("org/base", "org/base", "mit")
    assert info.provenance == f"the local folder {architecture}"
    assert SubjectInfo.from_dict(json.loads(json.dumps(info.to_dict())) | {"later": 1}) == info


def test_the_fingerprint_is_of_the_weights_alone(folder: Path, tmp_path: Path) -> None:
    before = describe_subject(config(folder)).fingerprint
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    (moved / "README.md").write_text("nothing")
    values = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(values | {"transformers_version": "9.9"}))
    assert describe_subject(config(moved)).fingerprint == before
    change_weight(moved)
    changed = describe_subject(config(moved)).fingerprint
    assert changed != before
    (moved / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 0.1}))
    assert describe_subject(config(moved)).fingerprint not in (before, changed)


def test_digests_of_large_files_are_remembered_until_the_file_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "REMEMBERED_BYTES", 0)
    file, cache = folder / "model.safetensors", tmp_path / "cache"
    digest = fingerprint.file_sha256(file, cache)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "_sha256", lambda path: pytest.fail("the file was read again"))
        assert fingerprint.file_sha256(file, cache) == digest
    # Same size and modification time, other bytes: still seen.
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint.file_sha256(file, cache) != digest
    (memo,) = (cache / "digests").iterdir()
    memo.write_text("{")
    assert fingerprint.file_sha256(folder / "model.safetensors", cache) == fingerprint._sha256(file)


def test_a_loaded_subject_is_frozen_and_knows_its_tokens(tiny_llama: Path) -> None:
    subject = load_subject(config(tiny_llama), device=CPU)
    assert not subject.model.training
    assert not any(parameter.requires_grad for parameter in subject.model.parameters())
    assert (subject.n_layers, subject.d_model, subject.max_positions) == (3, 16, 512)
    assert subject.special_token_ids == {0, 1, 2}
    text = "The senate has raised 12 ships."
    assert subject.tokenizer.decode(subject.tokenizer(text, add_special_tokens=False).input_ids) == text


def test_the_bos_rule(tiny_llama: Path, tmp_path: Path) -> None:
    without = tiny_subject_folder(tmp_path / "without", "gpt2", adds_bos=False)
    found = {
        (name, rule): load_subject(config(path, bos=rule), device=CPU).bos_token_id
        for name, path in (("adds", tiny_llama), ("does not", without))
        for rule in BosRule
    }
    assert found == {
        ("adds", "auto"): 1,
        ("adds", "always"): 1,
        ("adds", "never"): None,
        ("does not", "auto"): None,
        ("does not", "always"): 1,
        ("does not", "never"): None,
    }


def test_bos_always_needs_a_bos_token(folder: Path) -> None:
    values = json.loads((folder / "tokenizer_config.json").read_text())
    del values["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"has no BOS token; use subject.bos=never"):
        load_subject(config(folder, bos="always"), device=CPU)
    assert load_subject(config(folder), device=CPU).bos_token_id is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/model", r"/nowhere/model does not exist; give a hub id .*, a local folder, a .gguf file"),
        ("model.gguf", r"model.gguf does not exist"),
        ("", r"subject.path= does not exist"),
        ("a/b/c", r"a/b/c does not exist"),
        ("package://no_such_package_x/a.gguf", r"no_such_package_x is not installed; run: pip install"),
        ("package://gguf/no_such_file.gguf", r"no_such_file.gguf does not exist"),
        (
            "some-owner/some-model",
            r"some-owner/some-model cannot be loaded \(.*\); give a hub id that this machine can",
        ),
    ],
)
def test_a_path_that_is_no_subject_is_one_clear_line(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        describe_subject(config(path))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder without config.json"):
        describe_subject(config(tmp_path))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights"):
        describe_subject(config(folder))


def test_damaged_folders_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(UserError, match=r"cannot be loaded"):
        load_subject(config(folder), device=CPU)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"cannot be loaded"):
        describe_subject(config(folder))


def test_weights_that_are_not_all_there_are_refused(folder: Path) -> None:
    """transformers would draw the missing ones at random and go on."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of its model \(model.layers.1.mlp.up_proj.weight"):
        load_subject(config(folder), device=CPU)


def test_an_architecture_that_nobody_knows_is_refused(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "nobody_knows"}))
    with pytest.raises(UserError, match="nobody_knows") as caught:
        describe_subject(config(folder))
    assert "\n" not in str(caught.value)


_HUB_SCRIPT = """
import sys, torch
from activation_store.config import SubjectConfig
from activation_store.errors import UserError
from activation_store.subject import describe_subject, load_subject

main = describe_subject(SubjectConfig(path="org/tiny"))
branch = load_subject(SubjectConfig(path="org/tiny", revision="v2"), device=torch.device("cpu"))
assert main.fingerprint == "hub:org/tiny@" + "1" * 40, main
assert main.revision == "1" * 40 and main.base_model == main.model_name == "org/tiny", main
assert main.provenance == "org/tiny of the Hugging Face hub, commit " + "1" * 40, main
assert branch.info.fingerprint == "hub:org/tiny@" + "2" * 40, branch.info
print(float(branch.model.model.norm.weight[0]))
try:
    describe_subject(SubjectConfig(path="org/tiny", revision="no-such-branch"))
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_hub_id_and_its_revision(tiny_llama: Path, tmp_path: Path) -> None:
    """Against the hub's own cache on disk, laid out as huggingface_hub does, in a process that is offline."""
    repository = tmp_path / "hub" / "models--org--tiny"
    for name, digit in (("main", "1"), ("v2", "2")):
        commit = digit * 40
        shutil.copytree(tiny_llama, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    change_weight(repository / "snapshots" / ("2" * 40))
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_HUB_SCRIPT)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    weight, refusal = done.stdout.splitlines()
    original = float(load_file(tiny_llama / "model.safetensors")["model.norm.weight"][0])
    assert float(weight) == pytest.approx(original + 1)
    assert refusal.startswith("subject.path=org/tiny cannot be loaded (")
