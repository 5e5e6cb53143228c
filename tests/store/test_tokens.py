"""Packing: every piece starts with BOS at position 0, nothing is lost, nothing crosses a document."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from activation_store.text import Document
from activation_store.tokens import PackedContexts, pack_tokens
from tests.tiny import BOS_ID, sentences, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def ids_of(text: str) -> list[int]:
    return TOKENIZER.backend_tokenizer.encode(text, add_special_tokens=False).ids


def pieces_of(contexts: PackedContexts) -> list[tuple[int, list[int]]]:
    """(document, token ids) of every piece, in row order; a piece begins where position is 0."""
    pieces: list[tuple[int, list[int]]] = []
    for ids, documents, positions, valid in zip(
        contexts.token_ids_NC, contexts.document_ids_NC, contexts.positions_NC, contexts.valid_NC, strict=True
    ):
        for token, document, position, real in zip(
            ids.tolist(), documents.tolist(), positions.tolist(), valid.tolist(), strict=True
        ):
            if not real:
                assert document == -1
                assert position > 0
                continue
            if position == 0:
                pieces.append((document, []))
            assert pieces[-1][0] == document
            assert position == len(pieces[-1][1])
            pieces[-1][1].append(token)
    return pieces


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 4), max_size=6),
    context=st.integers(2, 40),
    bos=st.sampled_from([None, BOS_ID]),
)
def test_all_tokens_are_kept_in_order(lengths: list[int], context: int, bos: int | None) -> None:
    texts = [sentences(length, seed=i) for i, length in enumerate(lengths)]
    documents = [Document(10 + i, text, "") for i, text in enumerate(texts)]
    contexts = pack_tokens(documents, TOKENIZER, context_length=context, bos_token_id=bos)
    assert contexts.token_ids_NC.dtype == contexts.positions_NC.dtype == torch.int64
    # Every row begins a piece and padding only follows.
    assert (contexts.positions_NC[:, 0] == 0).all()
    assert (contexts.valid_NC[:, 1:] <= contexts.valid_NC[:, :-1]).all()
    found: dict[int, list[list[int]]] = {}
    for document, ids in pieces_of(contexts):
        found.setdefault(document, []).append(ids)
    body = context - (bos is not None)
    for document in documents:
        ids = ids_of(document.text)
        wanted = [([] if bos is None else [bos]) + ids[i : i + body] for i in range(0, len(ids), body)]
        # A full piece has its own row, so a short tail may come before it; each piece is there once.
        assert sorted(found.get(document.index, [])) == sorted(wanted)
    assert contexts.tokens == sum(len(ids) for _, ids in pieces_of(contexts))


@pytest.mark.parametrize(("at_most", "starts"), [(1, [4]), (2, [2, 6]), (3, [1, 4, 6]), (8, list(range(8)))])
def test_contexts_are_spread_over_the_document(at_most: int, starts: list[int]) -> None:
    text = sentences(60, seed=3)
    ids = ids_of(text)
    body = len(ids) // 8 - 1
    full = len(ids) // body
    assert full == 8
    contexts = pack_tokens(
        [Document(0, text, "")], TOKENIZER, context_length=body + 1, bos_token_id=BOS_ID, contexts_per_document=at_most
    )
    assert len(contexts) == at_most
    assert contexts.valid_NC.all()
    assert [row[1:].tolist() for row in contexts.token_ids_NC] == [ids[s * body : (s + 1) * body] for s in starts]


def test_short_documents_give_what_they_have() -> None:
    documents = [Document(i, sentences(2, seed=i), "") for i in range(5)]
    contexts = pack_tokens(documents, TOKENIZER, context_length=256, bos_token_id=BOS_ID, contexts_per_document=3)
    assert len(contexts) == 1
    assert [document for document, _ in pieces_of(contexts)] == [0, 1, 2, 3, 4]


def test_rows_are_cut_to_whole_contexts() -> None:
    contexts = pack_tokens([Document(0, sentences(40, seed=0), "")], TOKENIZER, context_length=32, bos_token_id=BOS_ID)
    assert [len(contexts.first_tokens(n)) for n in (0, 1, 32, 33, 64)] == [0, 1, 1, 2, 2]
    assert len(contexts.first_tokens(10**6)) == len(contexts)
    assert [len(batch) for batch in contexts[:7].batches(3)] == [3, 3, 1]


def test_no_room_beside_bos() -> None:
    with pytest.raises(ValueError, match="context_length=1 leaves no room"):
        pack_tokens([Document(0, "a b", "")], TOKENIZER, context_length=1, bos_token_id=BOS_ID)


def test_a_document_longer_than_the_models_window_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(TOKENIZER, PreTrainedTokenizerFast)
    pack_tokens([Document(0, sentences(300, seed=0), "")], TOKENIZER, context_length=32, bos_token_id=BOS_ID)
    assert caplog.text == ""
