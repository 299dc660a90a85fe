"""Prompts as the processor wants them: chat template or raw text, images matched to their placeholders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from veena_lens.images.files import open_image


@dataclass(frozen=True)
class Prompt:
    """The text of one row, image tokens in it not yet expanded, and its images in order."""

    text: str
    images: tuple[Image.Image, ...]


def prompts_of(
    processor: Any, image_token: str | None, text: Any, images: Any, chat: bool, messages: Any
) -> list[Prompt]:
    """One Prompt a row, images opened. `image_token` None: a model that takes no images.

    Raises: ValueError for both text and messages, image tokens typed by hand, or unequal numbers."""
    if (text is None) == (messages is None):
        raise ValueError("prepare: give text or messages, one of the two.")
    if messages is not None:
        rows = _from_messages(processor, messages, images)
    else:
        texts = [text] if isinstance(text, str) else list(text) if isinstance(text, (list, tuple)) else []
        if not texts or not all(isinstance(t, str) for t in texts):
            raise TypeError("prepare: text must be a string or a list of strings, at least one.")
        listed = _pictures_of(images, len(texts), not isinstance(text, str))
        rows = [_row(processor, image_token, t, mine, chat) for t, mine in zip(texts, listed, strict=True)]
    for i, (found, pictures) in enumerate(rows):
        if pictures and image_token is None:
            raise ValueError(
                f"Row {i} has {len(pictures)} images, and this checkpoint takes none: it has no vision tower or no "
                "image processor."
            )
        video_token = getattr(processor, "video_token", None)
        if image_token and video_token and video_token in found:
            raise ValueError(
                f"Row {i} holds the video token {video_token!r}: give a video's frames as images, or a processor's "
                "video tensors to inputs_from_hf."
            )
        n = found.count(image_token) if image_token else 0
        if n != len(pictures):
            raise ValueError(
                f"Row {i} has {n} image placeholders ({image_token!r}) and {len(pictures)} images: "
                + ("give an image for each." if n > len(pictures) else "put one placeholder for each image.")
            )
    return [Prompt(found, tuple(open_image(p) for p in pictures)) for found, pictures in rows]


def _row(processor: Any, image_token: str | None, text: str, pictures: list[Any], chat: bool) -> tuple[str, list[Any]]:
    if not chat:
        return text, pictures
    if image_token and image_token in text:
        raise ValueError(
            f"The text holds the image token {image_token!r}; the chat template places it for each image in "
            "images=. Leave it out, or write the whole prompt yourself with chat=False."
        )
    content: Any = text
    if image_token is not None:
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
    return _templated(processor, [{"role": "user", "content": content}]), pictures


def _templated(processor: Any, messages: Sequence[Any]) -> str:
    """The conversation as the checkpoint's template writes it. Raises: ValueError without a template."""
    tokenizer = getattr(processor, "tokenizer", processor)
    owner = processor if getattr(processor, "chat_template", None) else tokenizer
    if not getattr(owner, "chat_template", None):
        raise ValueError("This checkpoint has no chat template; use chat=False and write the whole prompt yourself.")
    return owner.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _from_messages(processor: Any, messages: Any, images: Any) -> list[tuple[str, list[Any]]]:
    """Rows of one conversation or several. Raises: ValueError for messages or images that do not fit."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError("prepare: messages must be a conversation (a list of messages) or a list of conversations.")
    several = isinstance(messages[0], (list, tuple))
    conversations = messages if several else [messages]
    listed = _pictures_of(images, len(conversations), several)
    rows = []
    for conversation, given in zip(conversations, listed, strict=True):
        plain, pictures = _split_messages(conversation, given)
        rows.append((_templated(processor, plain), pictures))
    return rows


def _split_messages(conversation: Sequence[Any], given: list[Any]) -> tuple[list[Any], list[Any]]:
    """The conversation with bare image placeholders, and its images: those that stand in it, and for bare
    placeholders the next of `given`. Raises: ValueError for a part of another kind, or images left over."""
    plain, pictures, rest = [], [], list(given)
    for message in conversation:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f"A message is a dictionary with 'role' and 'content', not {message!r}.")
        content = message["content"]
        if not isinstance(content, str):
            kept = []
            for part in content:
                kind = part.get("type")
                if kind not in ("image", "text"):
                    raise ValueError(f"A message holds a part of type {kind!r}; 'image' and 'text' are supported.")
                if kind == "image":
                    found = next((part[k] for k in ("image", "path", "url") if part.get(k) is not None), None)
                    if found is None and rest:
                        found = rest.pop(0)
                    if found is not None:
                        pictures.append(found)
                kept.append({"type": "image"} if kind == "image" else part)
            content = kept
        plain.append({**message, "content": content})
    # A placeholder written into a text part takes what is left; the count is compared after templating.
    return plain, [*pictures, *rest]


def _is_picture(x: Any) -> bool:
    return not isinstance(x, (list, tuple))


def _pictures_of(images: Any, n: int, is_list: bool) -> list[list[Any]]:
    """Pictures row by row, None meaning none. A single prompt takes an image or a flat list; a list of prompts
    one list each, or one image each. Raises: ValueError when their numbers differ."""
    if images is None:
        return [[] for _ in range(n)]
    if not is_list:
        if _is_picture(images):
            return [[images]]
        if len(images) == 1 and isinstance(images[0], (list, tuple)):
            images = images[0]
        if any(isinstance(i, (list, tuple)) for i in images):
            raise ValueError("One prompt takes a flat list of images; give a list of prompts for a list of lists.")
        return [[i for i in images if i is not None]]
    if _is_picture(images):
        images = [images]
    if len(images) != n:
        raise ValueError(f"{len(images)} entries of images for {n} prompts; give one image or list a prompt.")
    rows = [[i] if _is_picture(i) else list(i) for i in images]
    return [[i for i in row if i is not None] for row in rows]
