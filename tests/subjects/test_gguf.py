"""GGUF subjects: real files written by the gguf library, converted, cached, damaged."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from activation_store import gguf as conversion
from activation_store.config import SubjectConfig
from activation_store.errors import UserError
from activation_store.gguf import convert_gguf
from activation_store.hooks import forward_logits
from activation_store.subject import describe_subject, load_subject
from tests.tiny import BOS_ID, EOS_ID, PAD_ID

CPU = torch.device("cpu")
HEADS, KV_HEADS, D_MODEL, D_HEAD = 2, 1, 16, 8
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(folder: Path, file: Path, *, adds_bos: bool | None = None, architecture: str = "llama") -> Path:
    """The tiny Llama of `folder` as a float32 GGUF file, by the rules of llama.cpp's converter."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("Tiny")
    writer.add_license("mit")
    writer.add_block_count(3)
    writer.add_context_length(512)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(2 * D_MODEL + 4)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(D_HEAD)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if number < 3 else 1 for number in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_pad_token_id(PAD_ID)
    if adds_bos is not None:
        writer.add_add_bos_token(adds_bos)
    for name, weight in load_file(folder / "model.safetensors").items():
        writer.add_tensor(_gguf_name(name), _permuted(name, weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _gguf_name(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in whole:
        return f"{whole[name]}.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _permuted(name: str, weight: np.ndarray) -> np.ndarray:
    """llama.cpp stores the rotary halves of queries and keys interleaved."""
    heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
    if not heads:
        return weight
    halves = weight.reshape(heads, 2, D_HEAD // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


@pytest.fixture(scope="session")
def tiny_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_llama, tmp_path_factory.mktemp("gguf") / "tiny.gguf", adds_bos=True)


@pytest.fixture
def converted(tiny_gguf: Path, tmp_path: Path) -> tuple[SubjectConfig, Path]:
    """A config with a cache of its own, and the folder of the conversion in it."""
    cfg = SubjectConfig(path=str(tiny_gguf), cache_dir=str(tmp_path))
    return cfg, convert_gguf(tiny_gguf, tmp_path).folder


def test_a_converted_file_computes_what_the_model_computed(
    converted: tuple[SubjectConfig, Path], tiny_llama: Path
) -> None:
    cfg, folder = converted
    subject = load_subject(cfg, device=CPU)
    ids_NC = torch.randint(3, 300, (2, 15), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tiny_llama)(ids_NC).logits
    got = forward_logits(subject, ids_NC, torch.arange(15).expand(2, -1))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    digest = subject.info.fingerprint.removeprefix("gguf-sha256:")
    assert len(digest) == 64
    assert subject.info.provenance == f"dequantised from tiny.gguf, sha256 {digest}"
    assert subject.info.license == "mit"
    assert folder.name.startswith(digest)
    # No copy of the GGUF file, no leftovers.
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "lock"}
    assert not (folder / "tokenizer.model").exists()


def test_the_tokenizer_and_bos_rule_are_the_files_own(
    converted: tuple[SubjectConfig, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    cfg, _ = converted
    tokenizer = load_subject(cfg, device=CPU).tokenizer
    text = "No nation may refuse 1,500 miles.\n"
    original = load_subject(SubjectConfig(path=str(tiny_llama)), device=CPU).tokenizer
    assert tokenizer(text).input_ids == original(text).input_ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS_ID, EOS_ID, PAD_ID)
    assert load_subject(cfg, device=CPU).bos_token_id == BOS_ID
    plain = write_gguf(tiny_llama, tmp_path / "plain.gguf", adds_bos=False)
    subject = load_subject(SubjectConfig(path=str(plain), cache_dir=str(tmp_path)), device=CPU)
    assert subject.bos_token_id is None
    assert subject.tokenizer(text).input_ids == original(text).input_ids[1:]


def test_a_conversion_is_made_once(converted: tuple[SubjectConfig, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, folder = converted
    monkeypatch.setattr(conversion, "_convert", lambda *_: pytest.fail("converted again"))
    first = describe_subject(cfg)
    assert load_subject(cfg, device=CPU).info == first
    moved = Path(shutil.copy(cfg.path, Path(cfg.cache_dir) / "other_name.gguf"))
    assert convert_gguf(moved, Path(cfg.cache_dir)).folder == folder


def test_two_at_once_convert_once(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    original = conversion._convert

    def counting(file: Path, sha256: str, folder: Path) -> dict[str, object]:
        made.append(folder)
        return original(file, sha256, folder)

    monkeypatch.setattr(conversion, "_convert", counting)
    threads = [threading.Thread(target=convert_gguf, args=(tiny_gguf, tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", _cut),
        ("model.safetensors", _flip),
        ("tokenizer.json", Path.unlink),
        ("conversion.json", _cut),
        ("conversion.json", Path.unlink),
    ],
)
def test_a_damaged_cache_is_converted_again(
    name: str, damage: Callable[[Path], object], converted: tuple[SubjectConfig, Path]
) -> None:
    cfg, folder = converted
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / name)
    load_subject(cfg, device=CPU)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_a_failed_conversion_leaves_nothing(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_synced_sha256", full)
        with pytest.raises(
            UserError, match=r"conversion of tiny.gguf cannot be written .*No space left.*subject.cache_dir"
        ):
            convert_gguf(tiny_gguf, tmp_path)
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == ["lock"]
    assert (convert_gguf(tiny_gguf, tmp_path).folder / "model.safetensors").is_file()
    # What the conversion replaced for its own time is back in its place.
    assert gguf.GGUFReader.__name__ == "GGUFReader"


_KILLED = """
import os, signal, sys
from pathlib import Path
from activation_store import gguf
gguf._synced_sha256 = lambda path: os.kill(os.getpid(), signal.SIGKILL)
gguf.convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_killed_conversion_is_never_used(tiny_gguf: Path, tmp_path: Path) -> None:
    """Killed after the model was written and before the record: the next call cleans up and converts."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_KILLED), str(tiny_gguf), str(tmp_path)],
        cwd=Path(__file__).parents[2],
        check=False,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (partial,) = (path for path in (tmp_path / "gguf").iterdir() if path.name != "lock")
    assert partial.name.endswith(".partial")
    assert (partial / "model.safetensors").is_file()
    folder = convert_gguf(tiny_gguf, tmp_path).folder
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {folder.name, "lock"}


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(UserError, match=r"model.gguf is not a GGUF file \(it begins with b'PK"):
        describe_subject(SubjectConfig(path=str(file), cache_dir=str(tmp_path)))


@pytest.mark.parametrize("share", [0.002, 0.1, 0.5, 0.95])
def test_a_gguf_file_that_is_cut_off_is_refused(share: float, tiny_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    data = tiny_gguf.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"cut.gguf is damaged or cut off"):
        describe_subject(SubjectConfig(path=str(file), cache_dir=str(tmp_path)))
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("architecture", "message"), [("falcon", "'falcon' is not one of gpt2"), ("weird", "cannot read")]
)
def test_an_unknown_architecture_is_refused(architecture: str, message: str, tiny_llama: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny_llama, tmp_path / "other.gguf", architecture=architecture)
    with pytest.raises(UserError, match=message):
        describe_subject(SubjectConfig(path=str(file), cache_dir=str(tmp_path)))


def test_too_small_a_disk_is_refused(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "free_bytes", lambda _: 1000)
    with pytest.raises(
        UserError, match=r"converting tiny.gguf needs .* which has 1 kB; free some, or set subject.cache_dir"
    ):
        convert_gguf(tiny_gguf, tmp_path)
