"""Loading: every form of file gives Hugging Face's own weights, and what does not fit is listed before reading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.cases import BY_NAME, raw_inputs
from tests.checkpoints import tiny
from tests.checkpoints.test_saving import assert_same_model
from tests.odd_inputs import square_tokens
from veena_lens.checkpoints import load_processor, open_checkpoint
from veena_lens.checkpoints.files import fetch_weights, resolve_folder, weight_files
from veena_lens.model.model import HookedVLM

LLAVA = BY_NAME["clip-llama"]


def test_logits_of_a_saved_folder_equal_hugging_face(tmp_path: Path) -> None:
    theirs, folder = tiny.save(LLAVA, tmp_path, torch.float64)
    raw = raw_inputs(LLAVA, torch.float64)
    ours = HookedVLM.from_pretrained(str(folder))
    keep = raw["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_hf(**raw)[keep], theirs(**raw).logits[keep], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickle_files_load_as_plain_weights(sharded: bool, tmp_path: Path) -> None:
    theirs, folder = tiny.save(LLAVA, tmp_path, with_processor=False)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if sharded:
        names = {k: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, k in enumerate(state)}
        for file in set(names.values()):
            torch.save({k: v for k, v in state.items() if names[k] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    else:
        torch.save(state, folder / "pytorch_model.bin")
    assert_same_model(folder, theirs)


def test_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("ran",))

    _, folder = tiny.save(LLAVA, tmp_path, with_processor=False)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as plain weights"):
        HookedVLM.from_pretrained(str(folder))


def test_dtype_is_that_of_the_file_unless_asked(tmp_path: Path) -> None:
    _, folder = tiny.save(LLAVA, tmp_path, torch.bfloat16, with_processor=False)
    kept, asked = (HookedVLM.from_pretrained(str(folder), dtype=d) for d in (None, torch.float32))
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16} and kept.cfg.dtype == torch.bfloat16
    assert {p.dtype for p in asked.parameters()} == {torch.float32}


def test_file_of_mixed_dtypes_gives_a_model_of_the_configured_one(tmp_path: Path) -> None:
    _, folder = tiny.save(LLAVA, tmp_path, torch.bfloat16, with_processor=False)
    tiny.change_weights(folder, lambda state: state.update({k: v.float() for k, v in state.items() if "norm" in k}))
    assert {p.dtype for p in HookedVLM.from_pretrained(str(folder)).parameters()} == {torch.bfloat16}


def test_device_map_places_every_parameter_and_refuses_one_that_does_not_fit(tmp_path: Path) -> None:
    _, folder = tiny.save(LLAVA, tmp_path, with_processor=False)
    auto = HookedVLM.from_pretrained(str(folder), device_map="auto")
    assert auto.device_map is not None and set(auto.device_map.values()) <= {"cpu", 0}
    split = {"": "cpu", "blocks.1": "meta", "unembed": "meta"}
    placed = HookedVLM.from_pretrained(str(folder), device_map=split)
    assert {n.split(".")[0] for n, p in placed.named_parameters() if p.is_meta} == {"blocks", "unembed"}
    assert all(p.is_meta == n.startswith(("blocks.1.", "unembed")) for n, p in placed.named_parameters())
    with pytest.raises(ValueError, match=r"unknown modules \['block.0'\] and no device for"):
        HookedVLM.from_pretrained(str(folder), device_map={"block.0": "cpu"})
    with pytest.raises(ValueError, match="device='cpu' and device_map=.*pass only one"):
        HookedVLM.from_pretrained(str(folder), device="cpu", device_map="auto")


def test_device_map_may_split_a_fused_tensor(tmp_path: Path) -> None:
    _theirs, folder = tiny.save(BY_NAME["qwen2_vl-plain"], tmp_path, with_processor=False)
    split = {"": "cpu", "vision.blocks.1.attn.k": "meta"}
    placed: Any = HookedVLM.from_pretrained(folder, device_map=split)
    assert placed.vision.blocks[1].attn.k.weight.is_meta and not placed.vision.blocks[1].attn.q.weight.is_meta
    assert HookedVLM.from_pretrained(folder, device_map="auto").cfg.device.type == "cpu"


# --- names and folders ------------------------------------------------------------------------------------
def test_embedded_checkpoint_opens_by_name() -> None:
    checkpoint = open_checkpoint("tiny-llava-emotion")
    assert checkpoint.adapter.architecture == checkpoint.cfg.architecture == "LlavaForConditionalGeneration"
    assert checkpoint.cfg.model_name == "tiny-llava-emotion"


@pytest.mark.parametrize("name", ["tiny-llava", "/no/such/folder", "./nothing", "a/b/c"])
def test_unknown_name_says_what_was_tried(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="not a folder, not an embedded .*tiny-llava-emotion.* not a hub id"):
        open_checkpoint(name)


def test_hub_id_that_cannot_be_fetched_says_so() -> None:
    with pytest.raises(FileNotFoundError, match="no folder 'nobody/nothing', and downloading it from the hub failed"):
        open_checkpoint("nobody/nothing")


def test_hub_id_fetches_weights_only_when_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, remote = tiny.save(LLAVA, tmp_path / "remote", max_shard_size="50KB")
    local = tmp_path / "models--me--model" / "snapshots" / "abc123"
    asked: list[tuple[str | None, list[str]]] = []

    def snapshot_download(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((revision, allow_patterns))
        local.mkdir(parents=True, exist_ok=True)
        for file in remote.iterdir():
            if any(file.match(p) for p in allow_patterns):
                shutil.copy(file, local / file.name)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("me/model")
    assert not list(local.glob("*.safetensors"))
    folder = resolve_folder("me/model", "main")
    assert [f.name for f in fetch_weights(folder)] == [f.name for f in weight_files(remote)]
    assert asked[-1][0] == "abc123"  # the commit of the files that were read first
    n = len(asked)
    assert checkpoint.hub_id == "me/model"
    assert_same_model(local, theirs)
    fetch_weights(folder)
    assert len(asked) == n  # nothing is asked for twice


def test_folder_without_configuration_weights_or_shards_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        open_checkpoint(tmp_path)
    _, folder = tiny.save(LLAVA, tmp_path / "sharded", with_processor=False, max_shard_size="50KB")
    gone = weight_files(folder)[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"names files that are missing: {gone.name}"):
        HookedVLM.from_pretrained(str(folder))
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        HookedVLM.from_pretrained(str(folder))


def test_truncated_file_is_named(tmp_path: Path) -> None:
    _, folder = tiny.save(LLAVA, tmp_path, with_processor=False)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="model.safetensors .5,000 bytes. is not a complete safetensors file"):
        HookedVLM.from_pretrained(str(folder))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(model_type="llavaonevision1_5"), "model_type 'llavaonevision1_5' .* unknown to transformers .* Llava"),
        (
            dict(model_type="my_model", auto_map={"AutoConfig": "m.MyConfig"}),
            "needs remote code .m.MyConfig.*never executed",
        ),
        (dict(architectures=["LlavaForConditionalGenaration"]), "near names: LlavaForConditionalGeneration"),
        (dict(architectures=["GPT2LMHeadModel"]), "Known: .*LlamaForCausalLM.*entry-point group .*docs/adapters.md"),
        (dict(architectures=[]), "does not name an architecture"),
        (dict(vision_feature_layer="last"), "cannot read .*config.json"),
    ],
)
def test_configuration_that_cannot_be_used_is_refused(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    _, folder = tiny.save(LLAVA, tmp_path, with_processor=False)
    raw = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=told):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "architecture", "model_type", "told"),
    [
        (
            "qwen3_vl-plain",
            "Qwen3VLMoeForConditionalGeneration",
            "qwen3_vl_moe",
            "No adapter .*'Qwen3VLMoeForConditionalGeneration'.*Known: .*Qwen3VLForCond",
        ),
        (
            "idefics3-plain",
            "Idefics2ForConditionalGeneration",
            "idefics2",
            "'Idefics2ForConditionalGeneration'.*would need a perceiver resampler",
        ),
        (
            "onevision-plain",
            "LLaVAOneVision1_5_ForConditionalGeneration",
            "llavaonevision1_5",
            "model_type 'llavaonevision1_5' .*is unknown to transformers.*LlavaOnevision",
        ),
    ],
)
def test_relative_of_another_build_is_refused_before_its_fields_are_read(
    name: str, architecture: str, model_type: str, told: str, tmp_path: Path
) -> None:
    _, folder = tiny.save(BY_NAME[name], tmp_path, with_processor=False)
    raw = json.loads((folder / "config.json").read_text())
    raw |= dict(architectures=[architecture], model_type=model_type)
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=told):
        HookedVLM.from_pretrained(folder)


def test_remote_code_beside_a_known_model_type_is_left_alone(tmp_path: Path) -> None:
    theirs, folder = tiny.save(LLAVA, tmp_path, with_processor=False)
    raw = json.loads((folder / "config.json").read_text()) | dict(auto_map={"AutoConfig": "m.MyConfig"})
    (folder / "config.json").write_text(json.dumps(raw))
    assert_same_model(folder, theirs)


def test_broken_configuration_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        open_checkpoint(tmp_path)


# --- processors -------------------------------------------------------------------------------------------
def test_processor_tokenizer_or_nothing_is_loaded(tmp_path: Path) -> None:
    _, multimodal = tiny.save(LLAVA, tmp_path / "llava")
    _, text = tiny.save(BY_NAME["text-llama"], tmp_path / "text")
    _, bare = tiny.save(LLAVA, tmp_path / "bare", with_processor=False)
    assert type(load_processor(multimodal)).__name__ == "LlavaProcessor"
    assert not hasattr(load_processor(text), "image_processor") and load_processor(text).bos_token == "<s>"
    assert load_processor(bare) is None
    model = HookedVLM.from_pretrained(str(bare))
    assert model.tokenizer is None and model.processor is None


def test_numbers_that_old_processors_leave_out_come_from_the_model(tmp_path: Path) -> None:
    _, folder = tiny.save(LLAVA, tmp_path)
    file = folder / "processor_config.json"
    raw = json.loads(file.read_text())
    for name in ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy"):
        raw.pop(name)
    file.write_text(json.dumps(raw))
    inputs = HookedVLM.from_pretrained(str(folder)).prepare("how does this person feel ?", tiny.picture())
    assert inputs.count_image_tokens(0, inputs.spans[0].images[0]) == square_tokens(LLAVA.config())


@pytest.mark.parametrize("name", ["clip-llama", "llava-next-llama", "onevision-resampled"])
def test_old_processor_in_memory_is_completed_too(name: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    hf, folder = tiny.save(case, tmp_path)
    old = load_processor(folder)
    whole = HookedVLM.from_hf(hf, processor=load_processor(folder)).prepare("how ?", tiny.picture())
    for number in ("patch_size", "num_image_tokens", "vision_feature_select_strategy"):
        if hasattr(old, number):
            setattr(old, number, None)
    if hasattr(old, "num_additional_image_tokens"):
        old.num_additional_image_tokens = 0
    inputs = HookedVLM.from_hf(hf, processor=old).prepare("how ?", tiny.picture())
    assert torch.equal(inputs.tokens, whole.tokens) and inputs.grids == whole.grids
    assert HookedVLM.from_hf(hf).processor is None


@pytest.mark.parametrize(("name", "what"), [("clip-llama", "processor"), ("text-llama", "tokenizer")])
def test_broken_tokenizer_is_told_of_with_its_folder(name: str, what: str, tmp_path: Path) -> None:
    _, folder = tiny.save(BY_NAME[name], tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"The {what} of .* cannot be loaded"):
        load_processor(folder)
