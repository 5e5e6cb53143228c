"""Where the MLP of each model family begins and ends: one table entry a family.

In every family a layer's MLP reads the residual stream through a norm, and what comes out is added to the stream:

    resid_mid --norm--> mlp_in --mlp--[--post_norm]--> mlp_out,    resid_post = resid_mid + mlp_out

so that four names say it all. A family with a parallel residual (GPT-NeoX) feeds attention and MLP from the same
stream, and has no `resid_mid`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from activation_store.config import InputHook
from activation_store.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ArchitectureSpec:
    """The names of a family's modules, and what circuit-tracer calls its hook points."""

    # The list of decoder layers, from the causal LM.
    layers: str
    # Within a layer: the norm before the MLP (its input is resid_mid), the MLP (its input is mlp_in), and the norm
    # after the MLP, if the family has one. The output of the last of them is mlp_out.
    norm: str
    mlp: str
    post_norm: str = ""
    # The config's flag that says that attention and MLP run in parallel, so that resid_mid does not exist.
    parallel_residual_flag: str = ""
    # feature_input_hook (by our hook) and feature_output_hook of circuit-tracer's config.yaml.
    circuit_input_hooks: Mapping[str, str] = field(
        default_factory=lambda: {"resid_mid": "hook_resid_mid", "mlp_in": "mlp.hook_in"}
    )
    circuit_output_hook: str = "hook_mlp_out"

    def layer_list(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers of a causal LM of this family."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList), f"{self.layers} is a {type(layers).__name__}, not a ModuleList"
        return layers

    def mlp_path(self, layer: nn.Module, input_hook: InputHook | str) -> list[nn.Module]:
        """The modules between `input_hook` and mlp_out, in order: the first reads the hook, the last writes mlp_out."""
        names = (
            [self.norm, self.mlp, self.post_norm] if input_hook == InputHook.resid_mid else [self.mlp, self.post_norm]
        )
        return [layer.get_submodule(name) for name in names if name]

    def check_hook(self, input_hook: InputHook | str, config: Any) -> None:
        """Raises UserError if a subject with this (transformers) config does not have `input_hook`."""
        if input_hook not in tuple(InputHook):
            raise UserError(f"store.input_hook={input_hook} is not a hook point; use one of {', '.join(InputHook)}")
        parallel = bool(self.parallel_residual_flag) and getattr(config, self.parallel_residual_flag)
        if input_hook == InputHook.resid_mid and parallel:
            raise UserError(
                f"store.input_hook=resid_mid does not exist in this {config.model_type} subject: attention and MLP "
                f"read the same stream ({self.parallel_residual_flag}=true); use store.input_hook=mlp_in"
            )


_LLAMA = ArchitectureSpec(layers="model.layers", norm="post_attention_layernorm", mlp="mlp")
# circuit-tracer's nnsight backend knows only the mlp.* hooks of Qwen 3.
_QWEN3 = ArchitectureSpec(
    layers="model.layers", norm="post_attention_layernorm", mlp="mlp", circuit_output_hook="mlp.hook_out"
)
_GEMMA = ArchitectureSpec(
    layers="model.layers", norm="pre_feedforward_layernorm", mlp="mlp", post_norm="post_feedforward_layernorm"
)

# By `model_type` of the transformers config. SmolLM and SmolLM2 are `llama`. docs/subjects.md says how to add one.
ARCHITECTURES: dict[str, ArchitectureSpec] = {
    "gpt2": ArchitectureSpec(layers="transformer.h", norm="ln_2", mlp="mlp"),
    "gpt_neox": ArchitectureSpec(
        layers="gpt_neox.layers",
        norm="post_attention_layernorm",
        mlp="mlp",
        parallel_residual_flag="use_parallel_residual",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    # The multimodal wrapper, of which only the language model is used.
    "gemma3": ArchitectureSpec(
        layers="model.language_model.layers",
        norm="pre_feedforward_layernorm",
        mlp="mlp",
        post_norm="post_feedforward_layernorm",
    ),
}


def architecture_spec(model_type: str) -> ArchitectureSpec:
    """The entry of a transformers `model_type`. Raises UserError that says how to add one."""
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        raise UserError(
            f"subject architecture {model_type!r} is not one of {', '.join(ARCHITECTURES)}; add an entry to "
            "ARCHITECTURES in activation_store/architectures.py: the path of its layers, and in a layer the norm "
            "before the MLP, the MLP, and the norm after it if there is one (docs/subjects.md)"
        ) from None
