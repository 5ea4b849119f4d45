"""Rows of a data set as documents: their text, or a chat as the tokenizer's chat template writes it.

A chat is a list of messages (`messages` with role and content, `conversations` with from and
value), or a question and its answer (`instruction`, `input` and `output`, and what other data sets
call these). Where the tokenizer has no template, the contents are joined by blank lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nmsparse_deploy.data.table_rows import Row
from nmsparse_deploy.errors import UsageError, first_line

TEXT = "text"
"""The field that is read where none is named."""
LISTS = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "question", "query", "input")
MATERIAL = ("input", "context")
"""What a question may come with."""
ANSWERS = ("output", "completion", "response", "answer")
IMAGES = ("image", "images", "video", "videos")
FIELDS = (TEXT, "system", *LISTS, *QUESTIONS, *MATERIAL, *ANSWERS)
"""All that is read of a row where no field is named."""
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
"""What ShareGPT and its kin call the roles; any other name stays."""
TEMPLATE = "chats by the tokenizer's chat template"
JOINED = "chats joined by blank lines: the tokenizer has no chat template"
DAY = (
    "{%- macro strftime_now(format) -%}"
    "{{ {'%Y-%m-%d': '2024-07-26', '%d %B %Y': '26 July 2024'}.get(format, '26 Jul 2024') }}"
    "{%- endmacro +%}"
)
"""Put before templates that write the date into a chat: a sample is the same every day."""

Message = dict[str, object]


@dataclass(frozen=True)
class Document:
    """One row as text."""

    text: str
    chat: bool


def document(row: Row, field: str | None, tokenizer: Any) -> Document:
    """Return a row as text: its `field`, or where none is named its field `text`, or its chat.

    Raises `UsageError`, with the place of the row, for what is missing or of another type.
    """
    if field is not None and isinstance(row.values.get(field), list):
        return Document(_written(_listed(row, field), tokenizer, row.place), True)
    if field is not None or TEXT in row.names:
        return Document(row.text(field or TEXT), False)
    return Document(_written(_chat(row), tokenizer, row.place), True)


def note(tokenizer: Any) -> str:
    """Say how chats become text, for the record."""
    return TEMPLATE if getattr(tokenizer, "chat_template", None) else JOINED


def _chat(row: Row) -> list[Message]:
    system = row.values.get("system")
    before: list[Message] = (
        [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    )
    listed = next((name for name in LISTS if name in row.names), None)
    if listed is not None:
        messages = _listed(row, listed)
        return messages if messages[0]["role"] == "system" else [*before, *messages]
    asked = next((name for name in QUESTIONS if name in row.names), None)
    if asked is None:
        raise UsageError(
            f"{row.place} has no field '{TEXT}' and no chat (messages, conversations, or instruction "
            f"and output); it has {row.fields()}.",
            "name the field: FILE#FIELD",
        )
    answered = next((name for name in ANSWERS if name in row.names), None)
    if answered is None:
        raise UsageError(
            f"{row.place} has the field '{asked}' and no answer to it ({', '.join(ANSWERS)}); it has "
            f"{row.fields()}.",
            "name the field: FILE#FIELD",
        )
    parts = [asked, *(name for name in MATERIAL if name in row.names and name != asked)]
    if isinstance(row.values[asked], list):  # messages on both sides
        question = _listed(row, asked)
    else:
        given = [row.text(name) for name in parts if name == asked or row.values[name] is not None]
        question = [{"role": "user", "content": "\n\n".join(filter(None, given))}]
    if isinstance(row.values[answered], list):
        return [*before, *question, *_listed(row, answered)]
    return [*before, *question, {"role": "assistant", "content": row.text(answered)}]


def _listed(row: Row, field: str) -> list[Message]:
    value = row.values[field]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UsageError(
            f"{row.place} holds {type(value).__name__} in '{field}', where a list of messages is "
            "wanted."
        )
    if not value:
        raise UsageError(f"{row.place} has no message in '{field}'.")
    pictured = any(name in row.names for name in IMAGES)
    return [
        _message(message, f"{row.place}, message {number} of '{field}',", pictured)
        for number, message in enumerate(value, start=1)
    ]


def _message(message: object, place: str, pictured: bool) -> Message:
    if not isinstance(message, Mapping):
        raise UsageError(
            f"{place} is of type {type(message).__name__}, where an object with role and content is "
            "wanted."
        )
    there = {str(name): value for name, value in message.items() if value is not None}
    role = there.pop("role", None) or there.pop("from", None)
    content = there.pop("content", there.pop("value", None))
    if content is None and ("tool_calls" in there or "function_call" in there):
        content = ""
    for names, value in ((("role", "from"), role), (("content", "value"), content)):
        if value is None:
            has = ", ".join(map(str, message)) or "nothing"
            null = " that is not null" if any(name in message for name in names) else ""
            raise UsageError(f"{place} has no '{names[0]}' or '{names[1]}'{null}; it has {has}.")
    if not isinstance(role, str):
        raise UsageError(f"{place} has a role of type {type(role).__name__}.")
    text = _content(content, place)
    if pictured:  # placeholders of images that are not looked at
        text = text.replace("<image>", "").replace("<video>", "").strip()
    return {**there, "role": ROLES.get(role.lower(), role), "content": text}


def _content(content: object, place: str) -> str:
    """Return a message's text; of a list of parts those that are text, and no image."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UsageError(f"{place} has a content of type {type(content).__name__}.")
    texts = []
    for part in content:
        text = part.get(TEXT) if isinstance(part, Mapping) else part
        if isinstance(text, str):
            texts.append(text)
        elif not isinstance(part, Mapping) or part.get("type") in (None, TEXT):
            raise UsageError(
                f"{place} has a part of its content that is neither text nor an image."
            )
    return "\n".join(texts)


def _written(messages: list[Message], tokenizer: Any, place: str) -> str:
    """Write a chat by the tokenizer's template, or join it."""
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(str(message["content"]) for message in messages if message["content"])
    try:
        return _templated(messages, tokenizer)
    except Exception as error:  # a template is a program of its own and fails as it likes
        first, *others = messages
        if first["role"] != "system" or not others:
            raise _unwritten(error, place) from error
    try:  # some templates know no system: it opens the first question then
        opened = f"{first['content']}\n\n{others[0]['content']}"
        return _templated([{**others[0], "content": opened}, *others[1:]], tokenizer)
    except Exception as error:
        raise _unwritten(error, place) from error


def _templated(messages: list[Message], tokenizer: Any) -> str:
    template = tokenizer.get_chat_template()
    template = DAY + template if "strftime_now" in template else template
    written = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    return str(written)


def _unwritten(error: Exception, place: str) -> UsageError:
    return UsageError(
        f"{place} does not fit the tokenizer's chat template: {first_line(error)}.",
        "leave the row out, or give a field of text: FILE#FIELD",
    )
