"""The tokenizer of a GGUF file, the same whichever version of transformers read it."""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, models, processors
from transformers import PreTrainedTokenizerFast

# Token types of GGUF: text, control tokens such as BOS, and tokens that users of the tokenizer added.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def plain_tokenizer(tokenizer: Any, reader: Any) -> PreTrainedTokenizerFast:
    """What transformers made of a file, freed of its family's class, with the special tokens and BOS rule of the file.

    The classes that transformers picks bring rules of their own, which differ between its versions (for SmolLM2, 4.57's
    LlamaTokenizerFast adds BOS, which the file does not, and takes BOS for EOS), and write a copy of the GGUF file as
    `tokenizer.model`.
    """
    special = {}
    for kind, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (number := metadata(reader, f"tokenizer.ggml.{key}_token_id")) != "":
            special[f"{kind}_token"] = tokenizer.convert_ids_to_tokens(int(number))
    backend = tokenizer.backend_tokenizer
    if metadata(reader, "tokenizer.ggml.model") == "llama" and isinstance(backend.model, models.Unigram):
        _make_merging(backend, reader, special.get("unk_token"))
    adds_bos = metadata(reader, "tokenizer.ggml.add_bos_token")
    if adds_bos is True and "bos_token" in special:
        bos = (special["bos_token"], tokenizer.convert_tokens_to_ids(special["bos_token"]))
        backend.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    elif adds_bos is False:
        backend.post_processor = processors.Sequence([])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **special)


def metadata(reader: Any, key: str) -> Any:
    """The value of a GGUF metadata field, "" if the file has none."""
    field = reader.get_field(key)
    return "" if field is None else field.contents()


def merging_model(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], unk: str | None) -> models.BPE:
    """The BPE model of a SentencePiece vocabulary: of all neighbours, those merge first whose union scores highest."""
    ids = {token: number for number, token in enumerate(tokens)}
    texts = [number for number, kind in enumerate(types) if kind == _NORMAL]
    texts.sort(key=lambda number: -scores[number])
    merges = [
        (tokens[number][:cut], tokens[number][cut:])
        for number in texts
        for cut in range(len(tokens[number]) - 1, 0, -1)
        if tokens[number][:cut] in ids and tokens[number][cut:] in ids
    ]
    return models.BPE(vocab=ids, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True)


def _make_merging(backend: Any, reader: Any, unk: str | None) -> None:
    """Mends Gemma's tokenizers as transformers 4.57 makes them: Unigram, which takes the ranks of merges for scores and
    cuts words to pieces, without the tokens that are matched before all others."""
    tokens, scores, types = (metadata(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type"))
    backend.model = merging_model(tokens, scores, types, unk)
    by_type: dict[int, list[AddedToken]] = {_CONTROL: [], _USER_DEFINED: []}
    for token, kind in zip(tokens, types, strict=True):
        if kind in by_type:
            by_type[kind].append(AddedToken(token, normalized=False, special=kind == _CONTROL))
    backend.add_special_tokens(by_type[_CONTROL])
    backend.add_tokens(by_type[_USER_DEFINED])
