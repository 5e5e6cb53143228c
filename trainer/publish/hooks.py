"""Hook points by circuit-tracer's names, and which of its backends know them."""

from dataclasses import dataclass

from activation_store.architectures import architecture_spec
from activation_store.errors import UserError

NNSIGHT, TRANSFORMERLENS = "nnsight", "transformerlens"

# Backends of circuit-tracer 0.5.0 by architecture and input hook, the one to recommend first; each was run on a small
# model of the family except Gemma through TransformerLens, which takes it by its hub name alone (nnsight refuses the
# multimodal wrapper). A pair that is missing
# exists in neither backend: TransformerLens gives every GPT-NeoX a parallel residual, which has no resid_mid.
_BACKENDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("gpt2", "resid_mid"): (TRANSFORMERLENS,),
    ("gpt2", "mlp_in"): (TRANSFORMERLENS,),
    ("gpt_neox", "mlp_in"): (TRANSFORMERLENS,),
    ("llama", "resid_mid"): (NNSIGHT, TRANSFORMERLENS),
    ("llama", "mlp_in"): (NNSIGHT, TRANSFORMERLENS),
    ("mistral", "resid_mid"): (TRANSFORMERLENS,),
    ("mistral", "mlp_in"): (TRANSFORMERLENS,),
    ("qwen2", "resid_mid"): (TRANSFORMERLENS,),
    ("qwen2", "mlp_in"): (TRANSFORMERLENS,),
    ("qwen3", "resid_mid"): (TRANSFORMERLENS,),
    ("qwen3", "mlp_in"): (NNSIGHT, TRANSFORMERLENS),
    ("gemma2", "resid_mid"): (NNSIGHT, TRANSFORMERLENS),
    ("gemma2", "mlp_in"): (TRANSFORMERLENS,),
    ("gemma3_text", "resid_mid"): (NNSIGHT, TRANSFORMERLENS),
    ("gemma3_text", "mlp_in"): (NNSIGHT, TRANSFORMERLENS),
    ("gemma3", "resid_mid"): (TRANSFORMERLENS,),
    ("gemma3", "mlp_in"): (TRANSFORMERLENS,),
}


@dataclass(frozen=True)
class Hooks:
    """feature_input_hook and feature_output_hook of config.yaml, and the backends that know them, best first."""

    feature_input: str
    feature_output: str
    backends: tuple[str, ...]


def circuit_hooks(architecture: str, input_hook: str) -> Hooks:
    """Names for a subject's model_type and our input hook.

    Raises UserError for a pair that circuit-tracer does not know, and for an architecture that Layerloom does not.
    """
    spec = architecture_spec(architecture)
    backends = _BACKENDS.get((architecture, input_hook))
    name = spec.circuit_input_hooks.get(input_hook)
    if backends is None or name is None:
        known = [hook for kind, hook in _BACKENDS if kind == architecture]
        wanted = f"harvest and train with store.input_hook={known[0]}" if known else "no hook of it can be published"
        raise UserError(f"circuit-tracer knows no {input_hook} hook of {architecture} subjects; {wanted}")
    return Hooks(name, spec.circuit_output_hook, backends)
