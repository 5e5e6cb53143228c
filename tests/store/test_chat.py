"""Chats: the template's own tokens, one BOS a piece, special tokens masked or kept and recorded."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from activation_store.config import ChatSpecialTokens, SubjectConfig, TextConfig
from activation_store.errors import UserError
from activation_store.harvest import harvest
from activation_store.info import store_info
from activation_store.store import ActivationStore
from activation_store.text import open_documents, stream_documents
from activation_store.tokens import pack_tokens
from tests.store.harvesting import Configs
from tests.store.test_harvest import changed, configs, folder
from tests.tiny import BOS_ID, EOS_ID, sentences

__all__ = ["configs", "folder"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<eos>{{ m.role }}: {{ m.content }}{% endfor %}"
)


@pytest.fixture
def chat(configs: Configs, folder: Path) -> Configs:
    """A subject with a chat template, and conversations for it."""
    subject = folder / "instruct"
    shutil.copytree(configs[0].path, subject)
    tokenizer = AutoTokenizer.from_pretrained(subject)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(subject)
    lines = [
        {"messages": [{"role": "user", "content": sentences(2, i)}, {"role": "bot", "content": sentences(3, i + 99)}]}
        for i in range(30)
    ]
    text = folder / "chats.jsonl"
    text.write_text("\n".join(json.dumps(line) for line in lines))
    return changed(
        (SubjectConfig(path=str(subject)), configs[1], configs[2]),
        text={"path": str(text), "column": "messages", "chat": True},
        store={"path": str(folder / "chat")},
    )


def test_tokens_are_the_template_s_with_one_bos_a_piece(chat: Configs) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat[0].path)
    documents = list(stream_documents(chat[1], held_out=False))[:5]
    for document in documents:
        assert document.messages is not None
        packed = pack_tokens([document], tokenizer, context_length=400, bos_token_id=BOS_ID)
        expected = tokenizer.apply_chat_template(document.messages, tokenize=True, return_dict=False)
        assert packed.token_ids_NC[packed.valid_NC].tolist() == expected
        assert expected.count(BOS_ID) == 1
        assert expected.count(EOS_ID) == 2
        # A subject without BOS gets what the template writes.
        plain = pack_tokens([document], tokenizer, context_length=400, bos_token_id=None)
        assert plain.token_ids_NC[plain.valid_NC].tolist() == expected


@pytest.mark.parametrize("special", ChatSpecialTokens)
def test_special_tokens_are_masked_or_kept(chat: Configs, special: ChatSpecialTokens) -> None:
    asked = changed(chat, text={"chat_special_tokens": special})
    harvest(*asked, device="cpu")
    store = ActivationStore.open(asked[2].path)
    rows = store[:]
    marks = rows.token_ids.numpy() == EOS_ID
    assert marks.sum() > 20
    used = store.used_rows()
    assert used[marks].all() == (special is ChatSpecialTokens.keep)
    assert used[marks].any() == (special is ChatSpecialTokens.keep)
    assert not used[rows.token_ids.numpy() == BOS_ID].any()
    assert (EOS_ID in store.manifest.special_token_ids) == (special is ChatSpecialTokens.mask)
    assert store.manifest.text["chat_special_tokens"] == special.value
    wanted = "kept" if special is ChatSpecialTokens.keep else "masked"
    assert f"special tokens {wanted}" in store_info(asked[2].path)


def test_what_is_no_chat_is_refused(chat: Configs, configs: Configs, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(configs[0].path)
    document = next(iter(stream_documents(chat[1], held_out=False)))
    with pytest.raises(UserError, match="has a chat template, and this one has none"):
        pack_tokens([document], tokenizer, context_length=24, bos_token_id=BOS_ID)
    with pytest.raises(UserError, match="wants a column of messages; use text=chat"):
        open_documents(changed(configs, text={"chat": True})[1])
    other = folder / "other.jsonl"
    other.write_text('{"messages": "hello"}\n' * 9)
    asked = TextConfig(path=str(other), column="messages", chat=True, held_out_documents=1)
    with pytest.raises(UserError, match=r"row \d holds str, not a list of messages"):
        list(stream_documents(asked, held_out=False))
    other.write_text('{"messages": [{"role": "bad", "content": "x"}]}\n' * 9)
    document = next(iter(stream_documents(asked, held_out=False)))
    with pytest.raises(UserError, match=r"other.jsonl row \d: .*refuses it \(no such role\)"):
        pack_tokens([document], AutoTokenizer.from_pretrained(chat[0].path), context_length=24, bos_token_id=BOS_ID)
