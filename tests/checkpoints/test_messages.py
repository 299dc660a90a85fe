"""Conversations: every form of content reaches the prompt whatever form the template takes, or is refused by name."""

from __future__ import annotations

import base64
import io
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints import tiny
from tests.checkpoints.test_processing import CASE, CFG, FEEL, TEXT_CFG, A, B
from veena_lens.checkpoints import prepare
from veena_lens.checkpoints.messages import rendered

# LLaVA-1.5's on the hub: a content of plain text has no parts to select, and the turn stays empty.
SELECTS_PARTS = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image> ' }}{% endfor %}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PRINTS = "{% for m in messages %}{{ m['role'] + ' : ' }}{{ m['content'] }}{{ ' ' }}{% endfor %}"
ADDS = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% endfor %}"
TRIMS = "{% for m in messages %}{{ m['role'] + ' : ' + (m['content'] | trim) + ' ' }}{% endfor %}"
TEMPLATES = {"either": tiny.LLAVA_TEMPLATE, "parts": SELECTS_PARTS, "prints": PRINTS, "adds": ADDS, "trims": TRIMS}


def forms(text: str, image: bool = False) -> list[Any]:
    """A content that says `text`, in every form."""
    part = {"type": "text", "text": text}
    if image:
        return [[{"type": "image"}, part], [{"type": "image", "text": None}, part]]
    return [text, [part], (part,)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_of_every_turn_is_in_the_prompt_whatever_the_template_takes(name: str) -> None:
    processor = tiny.llava_processor(CASE, template=TEMPLATES[name])
    seen = set()
    for system, ask, said, again in itertools.product(
        forms("this is a person"), forms(FEEL, True), forms("happy"), forms("who ?")
    ):
        roles = ("system", "user", "assistant", "user")
        turns = [{"role": r, "content": c} for r, c in zip(roles, (system, ask, said, again), strict=True)]
        inputs = prepare(processor, CFG, messages=turns, images=A)
        words = processor.tokenizer.decode(inputs.tokens[0][~inputs.image_mask[0]], skip_special_tokens=True)
        for text in ("this is a person", FEEL, "happy", "who ?"):
            assert text in words
        assert "type" not in words and inputs.n_images == [1]
        seen.add(words)
    assert len(seen) == 1  # the form that was given makes no difference
    alone = prepare(processor, CFG, FEEL, [A, B])
    assert alone.n_images == [2] and FEEL in processor.tokenizer.decode(alone.tokens[0])


@pytest.mark.parametrize("template", [tiny.TEXT_TEMPLATE, ADDS, SELECTS_PARTS, PRINTS])
def test_model_of_text_takes_every_form(template: str) -> None:
    tokenizer = tiny.tokenizer(template)
    found = [prepare(tokenizer, TEXT_CFG, messages=[{"role": "user", "content": c}]) for c in forms(FEEL)]
    found.append(prepare(tokenizer, TEXT_CFG, FEEL))
    assert FEEL in tokenizer.decode(found[0].tokens[0])
    assert all(torch.equal(one.tokens, found[0].tokens) for one in found)


@given(
    st.text(min_size=1, max_size=30).filter(lambda t: t.strip() and "<image>" not in t),
    st.sampled_from(list(TEMPLATES)),
)
def test_any_text_survives_its_template(text: str, name: str) -> None:
    prompt = rendered(tiny.tokenizer(TEMPLATES[name]), [{"role": "user", "content": text}], "<image>")
    assert text.strip() in prompt


def test_template_that_loses_text_in_every_form_is_refused() -> None:
    processor = tiny.llava_processor(CASE, template="{% for m in messages %}{{ m['role'] }}{% endfor %}<image>")
    with pytest.raises(ValueError, match="does not take these messages .as given: the prompt lacks 'how does this"):
        prepare(processor, CFG, FEEL, A)
    raising = tiny.llava_processor(CASE, template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="as given: TemplateError: roles must alternate.*chat=False"):
        prepare(raising, CFG, FEEL, A)


def test_thoughts_before_an_earlier_answer_may_be_dropped() -> None:
    dropping = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'].split('</think>')[-1] + ' ' }}{% endfor %}"
    turns = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "<think>what</think>happy"}]
    assert rendered(tiny.tokenizer(dropping), turns, None) == "user : who assistant : happy "


def test_images_are_found_under_every_key() -> None:
    processor, file = tiny.llava_processor(CASE), io.BytesIO()
    A.save(file, "PNG")
    code = base64.b64encode(file.getvalue()).decode()
    uri = f"data:image/png;base64,{code}"
    parts: list[dict[str, Any]] = [{"type": "image", "image": A}, {"type": "image", "url": uri}]
    parts += [{"type": "image_url", "image_url": {"url": uri}}, {"type": "image", "base64": code, "path": None}]
    for part in parts:
        content = [part, {"type": "text", "text": FEEL}]
        inputs = prepare(processor, CFG, messages=[{"role": "user", "content": content}])
        assert inputs.pixel_values is not None
        assert torch.equal(inputs.pixel_values, prepare(processor, CFG, FEEL, A).pixel_values)  # type: ignore[arg-type]


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (user(None), r"Message 0 \(user\): content=None must be text or a list of parts"),
        (user(3), r"content=3 must be text"),
        (user([]), r"content=\[\] must be text or a list of parts, \{'type'"),
        (user({"type": "text", "text": "a"}), "content=.* must be text or a list of parts"),
        (user(["what"]), "a part of its content is 'what'; it must be"),
        (user([None]), "a part of its content is None"),
        (user([{"type": "audio"}]), "part of type 'audio'; it must be 'image' or 'text'"),
        (user([{"text": "what"}]), "part of type None"),
        (user([{"type": "text"}]), "a part of type 'text' has text=None"),
        (user([{"type": "text", "text": 3}]), "has text=3"),
        (user([{"type": "text", "texts": "a", "text": "b"}]), "unknown key 'texts'; did you mean 'text'"),
        (user([{"type": "image", "images": A}]), "unknown key 'images'; did you mean 'image'"),
        (user([{"type": "image", "max_pixels": 3}]), "unknown key 'max_pixels'"),
        ([{"content": "what"}], "must be a dictionary with 'role' and 'content'"),
        ([{"role": None, "content": "what"}], "role=None must be text"),
        ([{"role": 3, "content": "what"}], "role=3 must be text"),
        (["what"], "must be a dictionary with 'role' and 'content'"),
        ([*user("what"), None], "must be a dictionary with 'role' and 'content', not None"),
        ([[]], "A conversation must be a list of messages, at least one"),
        ([user("what"), None], "A conversation must be a list of messages"),
        ({"role": "user", "content": "what"}, "messages must be a conversation"),
    ],
)
def test_odd_messages_are_refused_by_name(messages: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        prepare(tiny.llava_processor(CASE), CFG, messages=messages)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(image=A), "prepare: unknown keyword 'image'; did you mean 'images'"),
        (dict(message=user("what")), "did you mean 'messages'"),
        (dict(chats=False), "did you mean 'chat'"),
        (dict(zzz=1), "unknown keyword 'zzz'; known are .*text, images, chat, answer, messages"),
    ],
)
def test_unknown_keywords_are_refused_with_a_near_name(given: dict[str, Any], told: str) -> None:
    from tests.cases import BY_NAME, native_model

    for call in (
        lambda **k: prepare(tiny.llava_processor(CASE), CFG, **k),
        native_model(BY_NAME["text-llama"]).prepare,
    ):
        with pytest.raises(TypeError, match=told):
            call(text=FEEL, **given)
