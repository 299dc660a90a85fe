"""Make prompts for the processor: apply the chat template or take raw text, and match images to placeholders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import Any, TypeVar, cast

from PIL import Image

from veena_lens.checkpoints.messages import rendered, split_messages
from veena_lens.images.files import read_image

Function = TypeVar("Function", bound=Callable[..., Any])


def with_named_keywords(function: Function) -> Function:
    """Return the function with a TypeError that names the nearest keyword where one is unknown."""
    known = list(signature(function).parameters)

    @wraps(function)
    def checked(*args: Any, **given: Any) -> Any:
        for name in given:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
                raise TypeError(f"{function.__name__}: unknown keyword {name!r}; {hint}")
        return function(*args, **given)

    return cast(Function, checked)


@dataclass(frozen=True)
class Prompt:
    """Hold the text of one row, with one placeholder per image, and its images in order."""

    text: str
    images: tuple[Image.Image, ...]


def prompts_of(
    processor: Any, image_token: str | None, text: Any, images: Any, chat: bool, messages: Any
) -> list[Prompt]:
    """Return one Prompt per row, with its images opened.

    processor: the checkpoint's processor or tokenizer.
    image_token: the placeholder of an image. None: the model takes no images.
    text: one prompt or a list of prompts.
    images: one image, or a list with one entry per prompt.
    chat: whether to apply the chat template to `text`.
    messages: one conversation or a list of them, in place of `text`.

    Raises: ValueError for both text and messages, image tokens in the text, or numbers that do not match; TypeError
    for text that is not a string or a list of strings."""
    if (text is None) == (messages is None):
        raise ValueError("prepare: give text or messages, not both.")
    if messages is not None:
        rows = _from_messages(processor, image_token, messages, images)
    else:
        texts = [text] if isinstance(text, str) else list(text) if isinstance(text, (list, tuple)) else []
        if not texts or not all(isinstance(t, str) for t in texts):
            raise TypeError(f"prepare: text must be a string or a list of strings, not {text!r}.")
        listed = _images_per_row(images, len(texts), not isinstance(text, str), "text")
        rows = [_row(processor, image_token, t, mine, chat) for t, mine in zip(texts, listed, strict=True)]
    for i, (found, row_images) in enumerate(rows):
        if row_images and image_token is None:
            raise ValueError(
                f"Row {i} has {len(row_images)} images, and this checkpoint takes none: it has no vision tower or no "
                "image processor."
            )
        video_token = getattr(processor, "video_token", None)
        if image_token and video_token and video_token in found:
            raise ValueError(
                f"Row {i} holds the video token {video_token!r}: pass a video's frames as images, or a "
                "processor's video tensors to inputs_from_hf."
            )
        n = found.count(image_token) if image_token else 0
        if n != len(row_images):
            raise ValueError(
                f"Row {i} has {n} image placeholders ({image_token!r}) and {len(row_images)} images: "
                + ("give an image for each." if n > len(row_images) else "put one placeholder for each image.")
            )
    return [Prompt(found, tuple(read_image(p) for p in row_images)) for found, row_images in rows]


def _row(
    processor: Any, image_token: str | None, text: str, row_images: list[Any], chat: bool
) -> tuple[str, list[Any]]:
    if not chat:
        return text, row_images
    if image_token and image_token in text:
        raise ValueError(
            f"The text holds the image token {image_token!r}, but the chat template inserts it for each image in "
            "images=. Leave it out, or write the whole prompt yourself with chat=False."
        )
    content: Any = text
    if image_token is not None:
        content = [*({"type": "image"} for _ in row_images), {"type": "text", "text": text}]
    return rendered(processor, [{"role": "user", "content": content}], image_token), row_images


def _from_messages(processor: Any, image_token: str | None, messages: Any, images: Any) -> list[tuple[str, list[Any]]]:
    """Return the rows of one or several conversations. Raises: ValueError for messages or images that do not fit."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError("prepare: messages must be a conversation (a list of messages) or a list of conversations.")
    several = isinstance(messages[0], (list, tuple))
    conversations = messages if several else [messages]
    listed = _images_per_row(images, len(conversations), several, "messages")
    rows = []
    for conversation, given in zip(conversations, listed, strict=True):
        plain, row_images = split_messages(conversation, given)
        rows.append((rendered(processor, plain, image_token), row_images))
    return rows


def _is_image(x: Any) -> bool:
    return not isinstance(x, (list, tuple))


def _images_per_row(images: Any, n: int, is_list: bool, given: str) -> list[list[Any]]:
    """Return the images of each row; None means no image.

    A single prompt takes one image or a flat list; a list of prompts takes one image or one list per prompt.

    Raises: ValueError if the numbers of entries and prompts differ."""
    if images is None:
        return [[] for _ in range(n)]
    if not is_list:
        if _is_image(images):
            return [[images]]
        if len(images) == 1 and isinstance(images[0], (list, tuple)):
            images = images[0]
        if any(isinstance(i, (list, tuple)) for i in images):
            raise ValueError("One prompt takes a flat list of images; pass a list of prompts for a list of lists.")
        return [[i for i in images if i is not None]]
    if _is_image(images):
        images = [images]
    if len(images) != n:
        raise ValueError(
            f"Got `images` for {len(images)} prompt{'s' * (len(images) != 1)} but `{given}` has {n}. Pass one entry "
            "per prompt, e.g. images=[[a], [b]]."
        )
    rows = [[i] if _is_image(i) else list(i) for i in images]
    return [[i for i in row if i is not None] for row in rows]
