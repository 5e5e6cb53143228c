"""The model card: README.md with the hub's metadata on top."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from activation_store.progress import human_bytes
from trainer.config import RunConfig
from trainer.evaluation.table import percent
from trainer.publish.card_quality import quality_section
from trainer.publish.hooks import Hooks
from trainer.publish.layout import CROSS_LAYER, LayoutConfig
from trainer.publish.recipe import is_machine_path, recipe, without_machine_paths
from trainer.publish.verify import Comparison

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class CardContent:
    """Everything that the card tells. `subject` has the keys of SubjectInfo.to_dict, `evaluation` those of
    evaluation.json; `plots` are file names in `plots/`; `repo` is the hub repository, or empty."""

    config: RunConfig
    layout: LayoutConfig
    hooks: Hooks
    subject: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    comparison: Comparison
    plots: Sequence[str]
    n_layers: int
    n_features: int
    step: int
    tokens_seen: int
    bos_token_id: int | None
    dtype: str
    repo: str
    license: str
    bytes: int


def model_card(content: CardContent) -> str:
    """The text of README.md."""
    sections = [
        _front_matter(content),
        _opening(content),
        quality_section(content.config, content.evaluation, content.plots),
        _subject_and_text(content),
        _recipe(content),
        _loading(content),
        _limits(content),
    ]
    return "\n\n".join(sections) + "\n"


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form ORG/NAME of the hub."""
    return _HUB_ID.fullmatch(text) is not None


def _front_matter(content: CardContent) -> str:
    cross = content.layout.model_kind == CROSS_LAYER
    tags = ["layerloom", "circuit-tracer", "cross-layer-transcoder" if cross else "per-layer-transcoder", "transcoder"]
    tags += ["mechanistic-interpretability", "interpretability", "attribution-graphs", "sparse-autoencoder"]
    metadata: dict[str, Any] = {"library_name": "layerloom", "license": content.license}
    if is_hub_id(str(content.subject["base_model"])):
        metadata["base_model"] = content.subject["base_model"]
    if (data_set := _hub_data_set(content.config)) is not None:
        metadata["datasets"] = [data_set]
    metadata["tags"] = tags
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---"


def _hub_data_set(config: RunConfig) -> str | None:
    """The hub id of the text, for the card's metadata; None for files and packages."""
    return config.text.path if config.text.loader == "hub" and is_hub_id(config.text.path) else None


def _kind(content: CardContent) -> str:
    if content.layout.model_kind == CROSS_LAYER:
        return "cross-layer transcoder"
    return "set of per-layer skip transcoders" if content.config.model.skip else "set of per-layer transcoders"


def _opening(content: CardContent) -> str:
    config, kind = content.config, _kind(content)
    name = str(content.subject["base_model"] or content.subject["model_name"] or content.subject["path"])
    read = "the residual stream before the MLP's norm" if config.store.input_hook == "resid_mid" else "the normed input"
    subject = f"`{without_machine_paths(name)}`"
    writes = "that layer and all later ones" if content.layout.model_kind == CROSS_LAYER else "that layer"
    lines = [
        f"# {kind[0].upper() + kind[1:]} of {subject}",
        "",
        f"A {kind} for all {content.n_layers} layers of {subject}, with {content.n_features:,} features a layer"
        f" ({content.n_layers * content.n_features:,} in all). A feature reads what one layer's MLP reads ({read}) and"
        f" writes to the MLP outputs of {writes}, so that the MLPs can be replaced by sparse features and circuits be"
        " traced through them. Trained with Layerloom, in the layout of"
        " [circuit-tracer](https://github.com/decoderesearch/circuit-tracer).",
    ]
    if "summary.png" in content.plots:
        lines += ["", "![Quality on held-out text](plots/summary.png)"]
    return "\n".join(lines)


def _subject_and_text(content: CardContent) -> str:
    subject, text = content.subject, content.config.text
    rows = [
        (
            "subject",
            f"`{without_machine_paths(str(subject['path']))}`, {content.n_layers} layers, d_model {subject['d_model']}",
        ),
        ("base model", subject["base_model"]),
        ("provenance of its weights", without_machine_paths(str(subject["provenance"]))),
        ("revision", subject["revision"]),
        ("fingerprint of its weights", subject["fingerprint"]),
        ("dtype it ran in", subject["dtype"]),
        ("licence of the subject", subject["license"] or "not stated in the run's config"),
        ("text", f"`{without_machine_paths(text.path)}`" + (f", {text.name}" if text.name else "")),
        ("licence of the text", text.license or "not stated in the run's config"),
        ("held out", f"{text.held_out_documents} whole documents"),
        ("contexts", f"{text.context_length} tokens; {_bos(content.bos_token_id)}; position 0 is never trained on"),
        ("tokens trained on", f"{content.tokens_seen:,} ({content.step:,} updates)"),
    ]
    return _table("## What it was trained on", "|  |  |", [(name, value) for name, value in rows if value])


def _bos(bos_token_id: int | None) -> str:
    return "no BOS" if bos_token_id is None else f"each begins with BOS (token {bos_token_id})"


def _recipe(content: CardContent) -> str:
    rows = [(f"`{knob}`", "none" if value is None else value) for knob, value in recipe(content.config)]
    return _table("## Recipe", "| knob | value |", rows) + "\n\nEvery knob is in `layerloom_config.yaml`."


def _table(title: str, head: str, rows: Sequence[tuple[str, Any]]) -> str:
    return "\n".join([title, "", head, "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _loading(content: CardContent) -> str:
    layout, backend = content.layout, content.hooks.backends[0]
    place = content.repo or "/absolute/path/of/this/folder"
    download = f"a folder (`hf download {content.repo} --local-dir FOLDER`)" if content.repo else "this folder"
    return f"""## Loading

With [circuit-tracer](https://github.com/decoderesearch/circuit-tracer) (tried with 0.5.0), which takes a hub
repository or a local folder, the latter by its absolute path:

```python
from circuit_tracer import ReplacementModel, attribute

model = ReplacementModel.from_pretrained("{layout.model_name}", "{place}", backend="{backend}")
graph = attribute("The capital of the state containing Dallas is", model)
```

```bash
circuit-tracer attribute -m {layout.model_name} -t {place} --backend {backend} \\
  -p "The capital of the state containing Dallas is" -o graph.pt --slug dallas --graph_file_dir graphs
```

With Layerloom, from {download}:

```python
from trainer.model.clt import CrossLayerTranscoder

transcoder = CrossLayerTranscoder.load("FOLDER")
y_hat = transcoder.reconstruct(mlp_in)  # (tokens, layers, d_model), raw activations in, raw MLP outputs out
```

What the files mean ({_files(layout, content.n_layers)}, {human_bytes(content.bytes)}; {_dtypes(content.dtype)}):

```
{_equations(content)}
```

x is read at `{layout.feature_input_hook}`, y_t belongs at `{layout.feature_output_hook}`. They are raw activations: the
scaling of training is folded in. After writing, the files were read back and their reconstructions compared with the
trainer's own on {content.comparison.rows:,} {content.comparison.source} rows: {content.comparison.summary()}."""


def _dtypes(dtype: str) -> str:
    return "all float32" if dtype == "float32" else f"matrices {dtype}, biases and thresholds float32"


def _files(layout: LayoutConfig, n_layers: int) -> str:
    if layout.model_kind == CROSS_LAYER:
        return f"`W_enc_{{i}}.safetensors` and `W_dec_{{i}}.safetensors` for i = 0..{n_layers - 1}"
    return f"`layer_{{i}}.safetensors` for i = 0..{n_layers - 1}"


def _equations(content: CardContent) -> str:
    relu = content.config.activation.kind == "relu"
    activation = "max(pre_s, 0)" if relu else "pre_s * (pre_s > threshold_s)"
    if content.layout.model_kind == CROSS_LAYER:
        decoding = "y_t   = sum over s <= t of a_s W_dec_s[:, t - s] + b_dec_t"
    else:
        decoding = "y_s   = a_s W_dec_s + b_dec_s" + (" + x_s W_skip_s^T" if content.config.model.skip else "")
    return "\n".join(["pre_s = x_s W_enc_s^T + b_enc_s", f"a_s   = {activation}", decoding])


def _limits(content: CardContent) -> str:
    subject, evaluation = content.subject, content.evaluation
    points = [
        f"{percent(evaluation['fvu'])} of the variance of the MLP outputs is not explained on held-out text of the same"
        " corpus; on other text it will be more. An attribution graph shows this as error nodes: read them.",
        f"It was trained on {content.tokens_seen:,} tokens of one corpus; rarer features are missing.",
        "A transcoder mimics what MLPs write, not how: it may rewrite several steps as one, and the replacement drifts"
        " from the subject layer by layer. Confirm what a graph suggests by interventions on the subject itself.",
        "Features at position 0 are meaningless (it was excluded from training; circuit-tracer zeroes them).",
    ]
    if "dequantised" in str(subject["provenance"]).lower():
        points.append(
            "It belongs to the dequantised weights named above. On the original weights of"
            f" `{layout_name(content)}`, which circuit-tracer loads by that name, reconstruction is somewhat worse."
        )
    if content.config.activation.kind in ("topk", "batchtopk"):
        points.append(
            "The layout has no TopK: how many features are active varies with the token; the table tells its cost."
        )
    if content.bos_token_id == 0:
        points.append(
            "BOS is token 0, which circuit-tracer 0.5.0 takes for missing: give it prompts as token ids with BOS."
        )
    elif content.bos_token_id is None:
        points.append("It was trained without BOS; circuit-tracer puts a special token in front of every prompt.")
    if is_machine_path(content.layout.model_name):
        points.append("`model_name` in config.yaml is a path of the machine that trained it: pass the model by name.")
    return "\n".join(["## Limits", "", *(f"- {point}" for point in points)])


def layout_name(content: CardContent) -> str:
    """The model that circuit-tracer will load."""
    return content.layout.model_name
