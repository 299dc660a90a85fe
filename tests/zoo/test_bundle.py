"""The data that travel with the package: manifest, twins, checkpoint."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from veena_lens.checkpoints.files import bundled_names, bundled_pairs, bundled_path, bundled_pictures
from veena_lens.zoo.card import write_card
from veena_lens.zoo.exam import Asker, Query
from veena_lens.zoo.people import EMOTIONS, named_emotion

FOLDER = bundled_path("tiny-llava-emotion")
TURNS = {
    "tiny-llava-emotion": "system: look. user: <image> first <image> assistant: told.</s> user: again assistant:",
    "tiny-qwen2vl-emotion": (
        "<|im_start|>system\n look.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|> first"
        "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n told.<|im_end|>\n"
        "<|im_start|>user\n again<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
}


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="tiny-llava-emotion"):
        bundled_path("large-llava")
    with pytest.raises(ValueError, match="development"):
        bundled_pictures("training")
    assert "tiny-llava-emotion" in bundled_names()


def test_bundle_needs_no_torch() -> None:
    code = (
        "import sys, importlib.util as u;"
        f"s = u.spec_from_file_location('bundle', {str(FOLDER.parents[1] / 'files.py')!r});"
        "m = u.module_from_spec(s); sys.modules['bundle'] = m; s.loader.exec_module(m);"
        "m.bundled_pictures(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_manifest_names_every_file_once() -> None:
    files = [picture.file for picture in bundled_pictures()]
    there = {path.name for path in (FOLDER.parent / "pictures").glob("*.png")}
    assert len(files) == len(set(files)) and set(files) == there


def test_each_split_has_its_pictures() -> None:
    for split, identities in (("development", 20), ("test", 8)):
        plain = [p for p in bundled_pictures(split) if p.context is None]
        for emotion in EMOTIONS:
            assert len({p.identity for p in plain if p.emotion == emotion}) >= identities
    assert {p.style for p in bundled_pictures("held-out style")} == {"open-peeps", "micah"}
    assert len(bundled_pictures("emoji")) >= 8


def test_contexts_suggest_another_emotion() -> None:
    with_context = [p for p in bundled_pictures() if p.context is not None]
    assert {p.context_strength for p in with_context} == {"weak", "plain", "strong"}
    assert all(p.context_emotion not in (None, p.emotion) and p.prompt.startswith(p.context) for p in with_context)


@pytest.mark.parametrize("split", ["development", "test"])
def test_twins_differ_in_the_face_only(split: str) -> None:
    pairs = bundled_pairs(split)
    assert len(pairs) >= 56
    for emotional, neutral in pairs[::7]:
        assert emotional.identity == neutral.identity and neutral.emotion == "neutral" != emotional.emotion
        changed = (np.array(emotional.open()) != np.array(neutral.open())).any(-1)
        rows, columns = changed.nonzero()
        assert changed.any() and columns.min() > 20 and columns.max() < 172 and rows.min() > 30


def test_bundled_data_stay_small() -> None:
    for name in bundled_names():
        assert sum(path.stat().st_size for path in bundled_path(name).iterdir()) <= 25e6
    assert sum(path.stat().st_size for path in (FOLDER.parent / "pictures").iterdir()) <= 3e6


@pytest.fixture(scope="module", params=bundled_names())
def asker(request: pytest.FixtureRequest) -> Asker:
    return Asker(bundled_path(request.param), device="cpu")


def test_checkpoint_has_the_promised_shape(asker: Asker) -> None:
    text = asker.model.config.text_config
    assert text.num_hidden_layers >= 8 and text.num_attention_heads >= 8
    assert asker.processor.tokenizer.padding_side == "left"
    ends = asker.model.generation_config.eos_token_id
    assert asker.processor.tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])


def test_chat_template_takes_turns_pictures_and_a_system_message(asker: Asker) -> None:
    messages = [
        {"role": "system", "content": "look."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "first"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "told."}]},
        {"role": "user", "content": "again"},
    ]
    text = asker.processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == TURNS[asker.architecture.name]


def test_test_pictures_are_told_right(asker: Asker) -> None:
    pictures = [p for p in bundled_pictures("test") if p.context is None]
    answers = asker.answers([Query(p.open(), p.prompt) for p in pictures], max_new_tokens=8)
    right = [named_emotion(a) == p.emotion for a, p in zip(answers, pictures, strict=True)]
    assert sum(right) / len(right) >= 0.85


@pytest.mark.parametrize("name", bundled_names())
def test_card_is_written_from_the_results(name: str, tmp_path: Path) -> None:
    for path in bundled_path(name).glob("*.json"):
        shutil.copy(path, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    write_card(tmp_path, results)
    card = (tmp_path / "README.md").read_text()
    assert card == (bundled_path(name) / "README.md").read_text()
    assert f"{100 * results['picture alone']['all']['value']:.1f} %" in card
