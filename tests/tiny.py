"""Small real subjects and texts for tests: randomly initialised causal LMs of every family, and plain text documents.

Everything is a function of its arguments, is written by the libraries' own `save_pretrained` and is loaded offline by
`AutoModelForCausalLM` and `AutoTokenizer`.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

# How far sliding-window layers look back: a context longer than this tells a right mask from a wrong one.
SLIDING_WINDOW = 6
MAX_POSITIONS = 512
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
ARCHITECTURES = (
    "gpt2",
    "gpt_neox",
    "gpt_neox_serial",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gemma3",
)

_SUBJECTS = (
    "the senate",
    "a farmer",
    "every state",
    "our navy",
    "the treasury",
    "no nation",
    "this congress",
    "the bank",
)
_VERBS = ("has raised", "will guard", "may refuse", "cannot keep", "shall honor", "built", "measured", "remembers")
_OBJECTS = (
    "the harbor",
    "its debts",
    "a treaty",
    "12 ships",
    "the public lands",
    "peace",
    "an honest tax",
    "1,500 miles",
)
_ENDS = (
    "in the spring",
    "without delay",
    "for the union",
    "at great cost",
    "by law",
    "once more",
    "with care",
    "at last",
)


def sentences(count: int, seed: int) -> str:
    """`count` grammatical sentences drawn from a small fixed vocabulary, in paragraphs of five."""
    rng = random.Random(seed)
    lines = []
    for number in range(count):
        words = " ".join(rng.choice(part) for part in (_SUBJECTS, _VERBS, _OBJECTS, _ENDS))
        lines.append(words[0].upper() + words[1:] + ("." if number % 5 else ".\n"))
    return " ".join(lines)


def tiny_text_folder(path: Path, documents: int = 40, seed: int = 0) -> Path:
    """Write `documents` .txt files of 3 to 40 sentences into `path` and return it."""
    path.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for number in range(documents):
        text = sentences(rng.randint(3, 40), seed=rng.randrange(2**31))
        (path / f"document_{number:04d}.txt").write_text(text, encoding="utf-8")
    return path


def tiny_tokenizer(vocab: int = 320, *, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the spot: ids 0, 1, 2 are <pad>, <bos>, <eos>; any text can be encoded."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([sentences(200, seed=1)], trainer)
    if adds_bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS_ID)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=MAX_POSITIONS
    )


def tiny_subject_folder(
    path: Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    n_layers: int = 3,
    d_model: int = 16,
    vocab: int = 320,
    adds_bos: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Save a randomly initialised causal LM of `architecture` (one of ARCHITECTURES) and its tokenizer in `path`.

    `gpt_neox_serial` is GPT-NeoX without the parallel residual; `gemma3` is the multimodal wrapper. Weights are of
    unit gain and norms have random weights, so that `resid_mid`, `mlp_in` and every layer's output differ clearly.
    d_model must be a multiple of 4.
    """
    tokenizer = tiny_tokenizer(vocab, adds_bos=adds_bos)
    config = _config(architecture, n_layers, d_model, len(tokenizer))
    config.bos_token_id, config.eos_token_id, config.pad_token_id = BOS_ID, EOS_ID, PAD_ID
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        _randomise(model)
    model.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _randomise(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.ndim == 1:  # norms and biases: off their special values of one and zero
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "emb" in name or "wte" in name or "wpe" in name:
                parameter.normal_(std=0.7)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)


def _config(architecture: str, n_layers: int, d_model: int, vocab: int) -> Any:
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": d_model,
        "intermediate_size": 2 * d_model + 4,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
    }
    grouped = {**common, "num_key_value_heads": 1, "head_dim": d_model // 2}
    sliding = {"sliding_window": SLIDING_WINDOW}
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(n_layers)]
    gemma = {**grouped, **sliding, "query_pre_attn_scalar": d_model // 2, "layer_types": kinds}
    builders: dict[str, Callable[[], Any]] = {
        "gpt2": lambda: GPT2Config(
            vocab_size=vocab, n_embd=d_model, n_layer=n_layers, n_head=2, n_positions=MAX_POSITIONS, n_ctx=MAX_POSITIONS
        ),
        "gpt_neox": lambda: GPTNeoXConfig(**common, rotary_pct=0.5, use_parallel_residual=True),
        "gpt_neox_serial": lambda: GPTNeoXConfig(**common, rotary_pct=0.5, use_parallel_residual=False),
        "llama": lambda: LlamaConfig(**grouped),
        "mistral": lambda: MistralConfig(**grouped, **sliding),
        "qwen2": lambda: Qwen2Config(
            **common, **sliding, num_key_value_heads=1, use_sliding_window=True, layer_types=kinds
        ),
        "qwen3": lambda: Qwen3Config(**grouped, **sliding, use_sliding_window=True, layer_types=kinds),
        # A cap so low that attention without it is seen to differ.
        "gemma2": lambda: Gemma2Config(**gemma, attn_logit_softcapping=1.0),
        "gemma3_text": lambda: Gemma3TextConfig(**gemma),
        "gemma3": lambda: Gemma3Config(
            text_config=Gemma3TextConfig(**gemma).to_dict(),
            vision_config=SiglipVisionConfig(
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                image_size=8,
                patch_size=4,
            ).to_dict(),
            mm_tokens_per_image=4,
        ),
    }
    return builders[architecture]()
