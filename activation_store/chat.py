"""Chats as text: conversations in a column of messages, written out by the tokenizer's chat template."""

from collections.abc import Mapping
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from activation_store.config import ChatSpecialTokens, TextConfig
from activation_store.errors import UserError
from activation_store.subject import Subject

Messages = list[dict[str, str]]


def messages_of(value: Any, column: str, name: str) -> Messages:
    """A conversation as the templates want it. Raises UserError for anything but a list of {role, content}."""
    if not isinstance(value, list) or not all(_is_message(message) for message in value):
        shown = type(value).__name__
        raise UserError(
            f"text.column={column} of {name} holds {shown}, not a list of messages {{role, content}}; name a column of "
            "conversations, or set text.chat=false"
        )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def chat_token_ids(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, *, bos_token_id: int | None, name: str
) -> list[int]:
    """Token ids of a conversation; without the BOS that the template begins with, if pieces get one anyway.

    Raises UserError for a tokenizer without a template, or a conversation that its template refuses.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "text.chat=true wants a subject whose tokenizer has a chat template, and this one has none; give an "
            "instruct model, or text.chat=false"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, ValueError) as error:
        raise UserError(f"{name}: the subject's chat template refuses it ({str(error).splitlines()[0]})") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[1:] if bos_token_id is not None and ids[:1] == [bos_token_id] else ids


def untrained_token_ids(subject: Subject, text: TextConfig) -> list[int]:
    """Ids whose rows are not trained on: the special tokens; of kept chats only BOS and padding."""
    if text.chat_special_tokens is ChatSpecialTokens.mask:
        return sorted(subject.special_token_ids)
    kept = (subject.tokenizer.bos_token_id, subject.tokenizer.pad_token_id)
    return sorted({number for number in kept if number is not None})
