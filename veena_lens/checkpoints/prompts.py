"""Prompts as the processor wants them: chat template or raw text, pictures matched to their placeholders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Prompt:
    """The text of one row, image tokens in it not yet expanded, and its pictures in order."""

    text: str
    images: tuple[Any, ...]


def prompts_of(
    processor: Any, image_token: str | None, text: Any, images: Any, chat: bool, messages: Any
) -> list[Prompt]:
    """One Prompt a row.

    Raises: ValueError for both text and messages, image tokens typed by hand, or unequal numbers."""
    if (text is None) == (messages is None):
        raise ValueError("prepare: give text or messages, one of the two.")
    if messages is not None:
        conversations = messages if messages and isinstance(messages[0], (list, tuple)) else [messages]
        listed = _pictures_of(images, len(conversations), messages is conversations)
        rows = []
        for conversation, given in zip(conversations, listed, strict=True):
            plain, inside = _split_messages(conversation)
            rows.append(Prompt(_templated(processor, plain), tuple(inside) if inside else tuple(given)))
    else:
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(t, str) for t in texts):
            raise TypeError("prepare: text must be a string or a list of strings, at least one.")
        listed = _pictures_of(images, len(texts), not isinstance(text, str))
        rows = [_row(processor, image_token, t, tuple(mine), chat) for t, mine in zip(texts, listed, strict=True)]
    for i, row in enumerate(rows):
        n = row.text.count(image_token) if image_token else 0
        if n != len(row.images):
            raise ValueError(
                f"Row {i} has {n} image placeholders ({image_token!r}) and {len(row.images)} pictures: "
                + ("give a picture for each." if n > len(row.images) else "put one placeholder for each picture.")
            )
    return rows


def _row(processor: Any, image_token: str | None, text: str, images: tuple[Any, ...], chat: bool) -> Prompt:
    if not chat:
        return Prompt(text, images)
    if image_token and image_token in text:
        raise ValueError(
            f"The text holds the image token {image_token!r}; the chat template places it for each picture in "
            "images=. Leave it out, or write the whole prompt yourself with chat=False."
        )
    content: Any = text
    if image_token is not None:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return Prompt(_templated(processor, [{"role": "user", "content": content}]), images)


def _templated(processor: Any, messages: Sequence[Any]) -> str:
    """The conversation as the checkpoint's template writes it. Raises: ValueError without a template."""
    tokenizer = getattr(processor, "tokenizer", processor)
    owner = processor if getattr(processor, "chat_template", None) else tokenizer
    if not getattr(owner, "chat_template", None):
        raise ValueError("This checkpoint has no chat template; use chat=False and write the whole prompt yourself.")
    return owner.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _split_messages(conversation: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The conversation with bare image placeholders, and the pictures that stood in it."""
    plain, pictures = [], []
    for message in conversation:
        content = message["content"]
        if not isinstance(content, str):
            kept = []
            for part in content:
                if part.get("type") == "image":
                    found = next((part[k] for k in ("image", "path", "url") if part.get(k) is not None), None)
                    if found is not None:
                        pictures.append(found)
                    kept.append({"type": "image"})
                else:
                    kept.append(part)
            content = kept
        plain.append({**message, "content": content})
    return plain, pictures


def _is_picture(x: Any) -> bool:
    return isinstance(x, (str, Path, Image.Image)) or not isinstance(x, (list, tuple))


def _pictures_of(images: Any, n: int, is_list: bool) -> list[list[Any]]:
    """Pictures row by row. A single prompt takes a picture or a flat list; a list of prompts one list each, or
    one picture each. Raises: ValueError when their numbers differ."""
    if images is None:
        return [[] for _ in range(n)]
    if not is_list:
        if _is_picture(images):
            return [[images]]
        if len(images) == 1 and isinstance(images[0], (list, tuple)):
            images = images[0]
        if any(isinstance(i, (list, tuple)) for i in images):
            raise ValueError("One prompt takes a flat list of pictures; give a list of prompts for a list of lists.")
        return [list(images)]
    if _is_picture(images):
        images = [images]
    if len(images) != n:
        raise ValueError(f"{len(images)} entries of images for {n} prompts; give one picture or list a prompt.")
    return [[] if i is None else [i] if _is_picture(i) else list(i) for i in images]
