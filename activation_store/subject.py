"""The subject: the frozen language model whose activations are harvested, from a hub, a folder or a GGUF file."""

import re
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from activation_store.architectures import ArchitectureSpec, architecture_spec
from activation_store.cache import cache_root
from activation_store.config import BosRule, SubjectConfig
from activation_store.errors import UserError
from activation_store.fingerprint import folder_fingerprint
from activation_store.gguf import convert_gguf, quiet_transformers
from activation_store.packages import PACKAGE_PREFIX, resolve_package_path

# A model's name on the hub: NAME or OWNER/NAME.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What transformers, huggingface_hub and safetensors raise over files that are missing, wrong, or out of reach.
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, HfHubHTTPError, SafetensorError)


@dataclass(frozen=True)
class SubjectInfo:
    """What a store, a run and a model card remember of their subject. Plain values; no weights."""

    # As configured; `revision` is the hub commit that it resolved to ("" for local files).
    path: str
    revision: str
    # transformers' model_type, and the sizes of its language model.
    architecture: str
    n_layers: int
    d_model: int
    vocab_size: int
    # Dtype in which the subject runs.
    dtype: str
    # Another value when the weights differ: the hub commit, the GGUF file's sha256, or a digest of config and weights.
    fingerprint: str
    # Where the weights come from, in words.
    provenance: str
    base_model: str
    model_name: str
    license: str

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SubjectInfo":
        """The inverse of `to_dict`; keys of later versions are ignored."""
        return cls(**{name.name: values[name.name] for name in fields(cls)})


@dataclass(frozen=True, eq=False)
class Subject:
    """A loaded subject: evaluation mode, no gradients, on one device."""

    model: nn.Module
    tokenizer: Any
    info: SubjectInfo
    spec: ArchitectureSpec
    device: torch.device
    # The id that begins every piece, None where the BOS rule says that there is none.
    bos_token_id: int | None

    @property
    def text_config(self) -> Any:
        """The transformers config of the language model (of a multimodal wrapper, its text part)."""
        return self.model.config.get_text_config()  # type: ignore[operator, union-attr]

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return self.info.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.info.d_model

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        dtype: torch.dtype = getattr(torch, self.info.dtype)
        return dtype

    @property
    def max_positions(self) -> int | None:
        """Longest context that the subject was made for, in tokens; None if its config does not say."""
        return getattr(self.text_config, "max_position_embeddings", None)

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that are not text: BOS, EOS, padding and every added token marked as special."""
        added = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset(added | set(self.tokenizer.all_special_ids))

    def layer(self, index: int) -> nn.Module:
        """Decoder layer `index`."""
        return self.spec.layer_list(self.model)[index]


@dataclass(frozen=True)
class _Source:
    """What transformers loads, and what is known of it beyond its config."""

    location: str
    revision: str | None = None
    fingerprint: str = ""
    provenance: str = ""
    license: str = ""


def describe_subject(cfg: SubjectConfig) -> SubjectInfo:
    """What is known of a subject without loading its weights.

    A GGUF file is converted if it was not before (about 10 s for 135M parameters). Raises UserError for a path that is
    no subject, an architecture that is not in the table, or a package that is not installed.
    """
    return _describe(cfg)[0]


def load_subject(cfg: SubjectConfig, *, device: torch.device) -> Subject:
    """Loads model and tokenizer in `cfg.dtype` onto `device`. Raises UserError as `describe_subject` does."""
    info, source, config = _describe(cfg)
    place = {"pretrained_model_name_or_path": source.location, "revision": source.revision or "main"}
    # The fast attention kernels know no logit softcapping (Gemma 2) and would silently leave it out.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    try:
        with quiet_transformers():
            model, loading = AutoModelForCausalLM.from_pretrained(
                **place,
                dtype=getattr(torch, info.dtype),
                attn_implementation="eager" if capped else "sdpa",
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(**place)
    except _LOAD_ERRORS as error:
        raise _unloadable(cfg.path, error) from None
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"subject.path={cfg.path} lacks {len(missing)} weights of its model ({', '.join(missing[:3])}, ...); give "
            "a complete causal language model"
        )
    model.eval().requires_grad_(False)
    return Subject(
        model=model.to(device),
        tokenizer=tokenizer,
        info=info,
        spec=architecture_spec(info.architecture),
        device=device,
        bos_token_id=_bos_token_id(cfg, tokenizer),
    )


def cache_folder(cfg: SubjectConfig) -> Path:
    """Where converted subjects and digests are kept."""
    return cache_root(cfg.cache_dir)


def _describe(cfg: SubjectConfig) -> tuple[SubjectInfo, _Source, Any]:
    source = _find(cfg)
    is_hub = source.revision is not None
    try:
        with quiet_transformers():
            if is_hub:
                source = _at_commit(cfg)
            config = AutoConfig.from_pretrained(source.location, revision=source.revision or "main")
    except _LOAD_ERRORS as error:
        raise _unloadable(cfg.path, error) from None
    architecture_spec(config.model_type)
    text = config.get_text_config()
    base_model = cfg.base_model or (cfg.path if is_hub else "")
    info = SubjectInfo(
        path=cfg.path,
        revision=source.revision or "",
        architecture=config.model_type,
        n_layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        vocab_size=text.vocab_size,
        dtype=str(cfg.dtype),
        fingerprint=source.fingerprint,
        provenance=source.provenance,
        base_model=base_model,
        model_name=cfg.model_name or base_model,
        license=cfg.license or source.license,
    )
    return info, source, config


def _find(cfg: SubjectConfig) -> _Source:
    """Tells hub ids, folders and GGUF files apart, and makes a folder of the latter."""
    path = resolve_package_path(cfg.path)
    cache = cache_folder(cfg)
    if path.is_dir() and cfg.path:
        if not (path / "config.json").is_file():
            raise UserError(
                f"subject.path={cfg.path} is a folder without config.json; give the folder of a saved causal LM"
            )
        try:
            fingerprint = folder_fingerprint(path, cache)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise _unloadable(cfg.path, error) from None
        return _Source(str(path), None, fingerprint, f"the local folder {path.name}")
    if path.is_file():
        converted = convert_gguf(path, cache)
        provenance = f"dequantised from {path.name}{_of_package(cfg.path)}, sha256 {converted.sha256}"
        return _Source(str(converted.folder), None, f"gguf-sha256:{converted.sha256}", provenance, converted.license)
    looks_local = cfg.path.endswith(".gguf") or cfg.path.startswith(PACKAGE_PREFIX) or not _HUB_ID.fullmatch(cfg.path)
    if looks_local:
        raise UserError(
            f"subject.path={cfg.path} does not exist; give a hub id (OWNER/NAME), a local folder, a .gguf file, or "
            "package://MODULE/FILE.gguf"
        )
    return _Source(cfg.path, cfg.revision)


def _at_commit(cfg: SubjectConfig) -> _Source:
    """The hub's commit that the revision means now, so that config, weights and tokenizer are of the same one."""
    commit = Path(cached_file(cfg.path, "config.json", revision=cfg.revision)).parent.name
    return _Source(
        location=cfg.path,
        revision=commit,
        fingerprint=f"hub:{cfg.path}@{commit}",
        provenance=f"{cfg.path} of the Hugging Face hub, commit {commit}",
    )


def _of_package(path: str) -> str:
    """` of DISTRIBUTION VERSION` of a file in an installed package, else nothing."""
    if not path.startswith(PACKAGE_PREFIX):
        return ""
    module = path.removeprefix(PACKAGE_PREFIX).partition("/")[0]
    distributions = packages_distributions().get(module)
    return (
        f" of {distributions[0]} {version(distributions[0])}" if distributions else f" of the Python package {module}"
    )


def _bos_token_id(cfg: SubjectConfig, tokenizer: Any) -> int | None:
    bos: int | None = tokenizer.bos_token_id
    if cfg.bos == BosRule.never:
        return None
    if cfg.bos == BosRule.always:
        if bos is None:
            raise UserError(
                f"subject.bos=always, but the tokenizer of {cfg.path} has no BOS token; use subject.bos=never"
            )
        return bos
    first = tokenizer("a").input_ids[:1]
    return bos if bos is not None and first == [bos] else None


def _unloadable(path: str, error: BaseException) -> UserError:
    """One line of what can be many from transformers and the hub."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return UserError(
        f"subject.path={path} cannot be loaded ({reason}); give a hub id that this machine can reach and may read "
        "(HF_TOKEN for gated models), a local folder of a saved causal LM, or a .gguf file"
    )
