"""Processors load from the files of every release, with torchvision and without, and give their own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.cases import BY_NAME, QWEN, TILED, Case
from tests.checkpoints import tiny, tiny_processors
from tests.checkpoints.test_processing import FEEL, A, message
from tests.odd_inputs import IMAGE_TOKEN
from veena_lens.checkpoints import load_processor

ONEVISION = "onevision-resampled"
FORMS: list[tuple[str, str, str]] = []
ALONE = "class named by config.json alone"
for _torchvision in ("as installed", "missing"):
    FORMS += [(ONEVISION, form, _torchvision) for form in ("hub", "without numbers", ALONE, "saved again")]
    for _family in QWEN:
        _forms = ("hub", "video settings beside", "transformers 5", ALONE)
        FORMS += [(f"{_family}-plain", form, _torchvision) for form in _forms]
for _family in TILED:
    FORMS += [(f"{_family}-plain", form, "as installed") for form in ("hub", "saved again", "without numbers", ALONE)]


def rewrite(file: Path, **changes: Any) -> None:
    """Change values of a JSON file; None drops one."""
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def sized_settings(case: Case, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Qwen's settings of images with their areas as a size, and of videos."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    size = settings.get("size") or dict(shortest_edge=settings["min_pixels"], longest_edge=settings["max_pixels"])
    bare = {k: v for k, v in settings.items() if k not in ("min_pixels", "max_pixels", "processor_class")}
    return bare | dict(size=size), bare | dict(size=size, video_processor_type=tiny_processors.video_class(case.family))


def write(case: Case, form: str, folder: Path) -> Path:
    """The folder of a release's form."""
    tiny.write_processor(case, folder)
    case.config().save_pretrained(folder)
    if case.has("any size"):
        (folder / "config.json").write_text(json.dumps(dict(model_type=case.family)))
        pictures, video = sized_settings(case, folder)
    numbers = folder / "processor_config.json"
    if form == "saved again":
        load_processor(folder).save_pretrained(folder / "again")
        case.config().save_pretrained(folder / "again")
        return folder / "again"
    if form == "without numbers":
        numbers.unlink()
        if case.family == "onevision":
            numbers.write_text(json.dumps({"processor_class": "LlavaOnevisionProcessor"}))
    elif form == "video settings beside":
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    elif form == "transformers 5":
        (folder / "preprocessor_config.json").unlink()
        name = f"{tiny_processors.NAMES[case.family]}Processor"
        parts = dict(processor_class=name, image_processor=pictures, video_processor=video)
        numbers.write_text(json.dumps(parts))
        template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
        (folder / "chat_template.json").unlink()
        (folder / "chat_template.jinja").write_text(template)
    elif form == ALONE:
        if case.family == "onevision":
            numbers.unlink()
        for file in (numbers, folder / "preprocessor_config.json", folder / "tokenizer_config.json"):
            if file.exists():
                rewrite(file, processor_class=None)
    return folder


@pytest.mark.parametrize(("name", "form", "torchvision"), FORMS)
def test_processor_files_of_every_release_load(
    name: str, form: str, torchvision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = BY_NAME[name]
    folder = write(case, form, tmp_path)
    if torchvision == "missing":
        monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: False)
    found = load_processor(folder)
    config = case.config()
    if case.has("tiles"):
        kinds = dict(idefics3=transformers.Idefics3Processor, smolvlm=transformers.SmolVLMProcessor)
        assert isinstance(found, kinds[case.family]) and found.image_seq_len == 4
        raw = found(text=[f"<image> {FEEL}"], images=[[A]], return_tensors="pt")
        assert raw["pixel_values"].shape == (1, 10, 3, 16, 16) and int((raw["input_ids"] == IMAGE_TOKEN).sum()) == 40
        return
    classes = tiny_processors.CLASSES if torchvision == "as installed" else tiny_processors.IMAGE_ONLY
    assert type(found) is classes[case.family]
    text = found.apply_chat_template(message(FEEL, 1), add_generation_prompt=True)
    raw = found(text=[text], images=[tiny.picture(75, 50, 1) if name == ONEVISION else A], return_tensors="pt")
    if name == ONEVISION:
        numbers = (found.num_image_tokens, found.vision_feature_select_strategy, found.vision_aspect_ratio)
        assert numbers == (16, "full", "anyres_max_2"), "as the model's configuration says"
        assert (found.image_token, found.video_token) == ("<image>", "<video>")
        assert found.chat_template == tiny_processors.ONEVISION_TEMPLATE
        assert found.image_processor.image_grid_pinpoints == config.image_grid_pinpoints
        assert raw["pixel_values"].shape == (1, 7, 3, 28, 28)
    else:
        size = found.image_processor.size
        assert (size["shortest_edge"], size["longest_edge"]) == (128, 1920)
        assert found.image_processor.patch_size == 4
        assert found.chat_template == tiny_processors.QWEN_TEMPLATES[case.family]
        assert raw["image_grid_thw"].tolist() == [[1, 8, 10]]
