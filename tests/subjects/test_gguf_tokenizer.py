"""SentencePiece vocabularies as merges, against the algorithm that SentencePiece itself follows."""

from itertools import pairwise
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from activation_store.gguf_tokenizer import merging_model, plain_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
# Scores are minus the rank, as in Gemma's files; single letters come last.
_WORDS = ["ab", "cd", "bc", "abc", "bcd", "aa", "aaa", "abcd", "da", "cdab", "aaaa"]
TOKENS = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], *_WORDS, *"abcd"]
SCORES = [0.0] * 257 + [-float(rank) for rank in range(len(_WORDS) + 4)]
TYPES = [UNKNOWN] + [BYTE] * 256 + [NORMAL] * (len(_WORDS) + 4)


def sentencepiece(text: str) -> list[str]:
    """Greedily merges the pair of neighbours whose union scores highest, the leftmost of equals."""
    score = dict(zip(TOKENS, SCORES, strict=True))
    pieces = list(text)
    while pairs := [(-score[a + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in score]:
        _, at = min(pairs)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


@given(st.text(alphabet="abcd", min_size=1, max_size=12))
@settings(max_examples=300, deadline=None)
def test_merges_are_those_of_sentencepiece(text: str) -> None:
    tokenizer = Tokenizer(merging_model(TOKENS, SCORES, TYPES, "<unk>"))
    assert tokenizer.encode(text).tokens == sentencepiece(text)


def test_what_the_vocabulary_lacks_falls_back_to_bytes() -> None:
    tokenizer = Tokenizer(merging_model(TOKENS, SCORES, TYPES, "<unk>"))
    assert tokenizer.encode("abé").tokens == ["ab", "<0xC3>", "<0xA9>"]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_gemma_file_gives_its_own_tokenizer(adds_bos: bool, tmp_path: Path) -> None:
    """Only metadata, no weights: the tokenizer as transformers reads it from the file, and as it is mended."""
    words = ["▁ab", "ab", "cab", "▁", *"abc"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\n\n", *[f"<0x{b:02X}>" for b in range(256)], *words]
    writer = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma3")
    writer.add_name("Gemma")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * 6 + [0.0] * 256 + [-float(rank) for rank in range(len(words))])
    writer.add_token_types([CONTROL] * 5 + [USER_DEFINED] + [BYTE] * 256 + [NORMAL] * len(words))
    for kind, number in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(adds_bos)
    writer.add_add_space_prefix(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="gemma.gguf")
    plain_tokenizer(read, gguf.GGUFReader(tmp_path / "gemma.gguf")).save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = tokenizer("cab ab\n\nb<eos>é").input_ids
    wanted = ["cab", "▁ab", "\n\n", "b", "<eos>", "<0xC3>", "<0xA9>"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>"] * adds_bos + wanted
    assert tokenizer.decode(ids[adds_bos:]) == "cab ab\n\nb<eos>é"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert special == {0, 1, 2, 3, 4}
