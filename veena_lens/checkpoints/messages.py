"""Bring conversations into the form that a checkpoint's chat template takes.

Templates take the content of a message as a list of parts or as plain text. What they do with the other form differs:
some raise an error, some print Python's list, and some leave the turn empty. So a conversation is rendered as given, as
lists of parts and as plain text, and the first form is taken in which all of its text is in the prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

SOURCES = ("image", "path", "url", "base64")  # where a part of type image may name its image
KEYS = {"image": ("type", *SOURCES), "text": ("type", "text")}
PARTS = "{'type': 'text', 'text': ...} or {'type': 'image', 'image': ...}"


def split_messages(conversation: Any, given: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return a conversation with bare image placeholders, and its images in order.

    Args:
        conversation: messages in Hugging Face's format.
        given: images for placeholders that name none, in order; what is left over comes last.

    Raises:
        ValueError: a message, a part of one, or a key is of another kind.
    """
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError(f"A conversation must be a list of messages, at least one, not {conversation!r}.")
    plain, images, rest = [], [], list(given)
    for number, message in enumerate(conversation):
        content = _content_of(number, message)
        if not isinstance(content, str):
            kept = []
            for part in content:
                kind, value = _part(number, part)
                if kind == "image":
                    value = rest.pop(0) if value is None and rest else value
                    images += [] if value is None else [value]
                kept.append({"type": "image"} if kind == "image" else {"type": "text", "text": value})
            content = kept
        plain.append({**message, "content": content})
    # A placeholder in a text part takes a remaining image; the count is compared after templating.
    return plain, [*images, *rest]


def _content_of(number: int, message: Any) -> Any:
    """Return the content of a message. Raises: ValueError for a message of another kind."""
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise ValueError(f"A message must be a dictionary with 'role' and 'content', not {message!r}.")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not role:
        raise ValueError(f"Message {number}: role={role!r} must be text, such as 'user', 'assistant' or 'system'.")
    if not isinstance(content, (str, list, tuple)) or (not isinstance(content, str) and not content):
        raise ValueError(f"Message {number} ({role}): content={content!r} must be text or a list of parts, {PARTS}.")
    return content


def _part(number: int, part: Any) -> tuple[str, Any]:
    """Return (text, the text) or (image, where it comes from or None) of a part.

    Raises: ValueError for a part of another kind, or a key that is not read."""
    if not isinstance(part, Mapping):
        raise ValueError(f"Message {number}: a part of its content is {part!r}; it must be {PARTS}.")
    part, kind = {key: value for key, value in part.items() if value is not None}, part.get("type")
    if kind == "image_url":  # as other interfaces write it
        found = part.get("image_url")
        part, kind = {"type": "image", "url": found.get("url") if isinstance(found, Mapping) else found}, "image"
    if kind not in ("image", "text"):
        raise ValueError(f"A message has a part of type {kind!r}; it must be 'image' or 'text'.")
    for key in part:
        if key not in KEYS[kind]:
            near = get_close_matches(str(key), KEYS[kind], 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it may have {', '.join(KEYS[kind])}."
            raise ValueError(f"Message {number}: a part of type {kind!r} has an unknown key {key!r}{hint}")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"Message {number}: a part of type 'text' has text={part.get('text')!r}; it must be text.")
        return kind, part["text"]
    source = next((part[key] for key in SOURCES if key in part), None)
    return kind, f"data:image/any;base64,{source}" if "base64" in part and source is part["base64"] else source


def rendered(processor: Any, messages: Sequence[Mapping[str, Any]], image_token: str | None) -> str:
    """Return a conversation in the checkpoint's template, ready for an answer.

    Args:
        processor: the checkpoint's processor or tokenizer.
        messages: the conversation, images as bare placeholders.
        image_token: what stands for an image in plain text; None where the model takes no images.

    Raises:
        ValueError: there is no template, or it loses text in every form.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    owner = processor if getattr(processor, "chat_template", None) else tokenizer
    if not getattr(owner, "chat_template", None):
        raise ValueError("This checkpoint has no chat template; use chat=False and write the whole prompt yourself.")
    whole, reasons = [], {}
    for form, content in _forms(messages, image_token):
        try:
            prompt = owner.apply_chat_template(content, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program of its own
            reasons[form] = f"{type(error).__name__}: {error}"
            continue
        lost = _lost_text(prompt, messages)
        if lost is None and (image_token is None or prompt.count(image_token) == _images(messages, image_token)):
            return prompt
        if lost is None:
            whole.append(prompt)
        else:
            reasons.setdefault(form, lost)
    if whole:  # the text is all there; the number of placeholders is compared with that of the images later
        return whole[0]
    told = "; ".join(f"{form}: {reason}" for form, reason in reasons.items())
    raise ValueError(
        f"The checkpoint's chat template does not take these messages ({told}). Change the messages to what it takes, "
        "or use chat=False and write the whole prompt yourself."
    )


def _forms(messages: Sequence[Mapping[str, Any]], image_token: str | None) -> Iterator[tuple[str, list[Any]]]:
    """Yield names of forms and the conversation in each: as given, every content as parts, every content as text."""
    yield "as given", list(messages)
    yield "as lists of parts", [{**m, "content": _parts(m)} for m in messages]
    yield "as plain text", [{**m, "content": _text(m, image_token)} for m in messages]


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _text(message: Mapping[str, Any], image_token: str | None) -> str:
    """Return a content as text: each part on its line, images as their token."""
    parts = _parts(message)
    return "\n".join(part["text"] if part["type"] == "text" else image_token or "<image>" for part in parts)


def _texts(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what the prompt must show; a template may drop the thoughts that come before an earlier answer."""
    for message in messages:
        for part in _parts(message):
            if part["type"] == "text":
                text = part["text"]
                yield (text.rpartition("</think>")[2] if message["role"] == "assistant" else text).strip()


def _lost_text(prompt: str, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Return what is wrong with a prompt: a text that is missing, or Python's own list in its place; else None."""
    texts = Counter(_texts(messages))
    for text, times in texts.items():
        if prompt.count(text) < times:
            return f"the prompt lacks {text[:60]!r}"
    for mark in ("{'type':", '{"type":'):
        if mark in prompt and not any(mark in text for text in texts):
            return "the prompt holds the list of parts itself"
    return None


def _images(messages: Sequence[Mapping[str, Any]], image_token: str) -> int:
    """Return how many placeholders a prompt must hold: those of images, and those in the text itself."""
    parts = [part for message in messages for part in _parts(message)]
    return sum(1 if part["type"] == "image" else part["text"].count(image_token) for part in parts)
