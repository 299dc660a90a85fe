"""Checkpoints and adapters of hostile or broken files: refused with a sentence, before anything large is built."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cases import BY_NAME
from tests.checkpoints import tiny
from tests.checkpoints.test_lora import CASE as LORA_CASE
from tests.checkpoints.test_lora import build_hf, write
from tests.families import build_hf as family_hf
from veena_lens import HookedVLM
from veena_lens.checkpoints import bundled_path, open_checkpoint, open_lora
from veena_lens.checkpoints.files import did_you_mean
from veena_lens.checkpoints.finite import DTYPES, device_of, dtype_of, require_finite
from veena_lens.checkpoints.quantised import Scheme, find_packed
from veena_lens.config import ConnectorConfig, HookedVLMConfig, RopeConfig

SMALL = BY_NAME["text-llama"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(BY_NAME["clip-llama"], tmp_path_factory.mktemp("saved"))[1]


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "own"))


def change(file: Path, **changes: Any) -> None:
    """Set fields of a JSON file; "a.b" is a field of an object in it."""
    found = json.loads(file.read_text())
    for path, value in changes.items():
        *outer, name = path.split(".")
        inside = found
        for part in outer:
            inside = inside.setdefault(part, {})
        inside[name] = value
    file.write_text(json.dumps(found))


# --- indices and files of other kinds ---------------------------------------------------------------------
def shards(folder: Path, names: Callable[[str], str]) -> None:
    """Move the weights into a shard, and write an index that names it by `names`."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    keys = load_file(folder / "model-00001-of-00001.safetensors")
    named = {key: names("model-00001-of-00001.safetensors") for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))


@pytest.mark.parametrize("to", ["../own/{}", "/{}", "a/{}", "..", ".", "", "a\\{}", "c:{}", "\0"])
def test_index_that_leads_out_of_its_folder_is_refused(to: str, folder: Path) -> None:
    shards(folder, lambda name: to.format(name))
    with pytest.raises(ValueError, match="the files of a checkpoint lie beside their index"):
        HookedVLM.from_pretrained(folder)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": {}}])
def test_index_without_names_is_refused(content: Any, folder: Path) -> None:
    shards(folder, str)
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has no 'weight_map' from keys to file names"):
        HookedVLM.from_pretrained(folder)


def test_a_hub_snapshot_of_links_to_blobs_is_read(folder: Path, tmp_path: Path) -> None:
    shards(folder, str)
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "x", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert HookedVLM.from_pretrained(snapshot).processor is not None


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "generation_config.json", "x.bin"],
)
def test_a_pipe_among_the_files_is_refused_unopened(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match="is not a regular file but a pipe"):
        HookedVLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "processor_config.json", "tokenizer.json"])
def test_a_folder_in_place_of_a_file_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises((ValueError, FileNotFoundError)):
        HookedVLM.from_pretrained(folder)


# --- configurations ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("text_config.num_hidden_layers", 10**5, "a whole number from 0 to 1,000"),
        ("text_config.num_hidden_layers", 10**12, "a whole number from 0 to 1,000"),
        ("text_config.num_hidden_layers", "2", "a whole number"),
        ("text_config.num_hidden_layers", 2.0, "a whole number"),
        ("text_config.num_hidden_layers", True, "a whole number"),
        ("text_config.num_hidden_layers", -1, "a whole number"),
        ("vision_config.num_hidden_layers", 10**9, "a whole number"),
        ("text_config.num_attention_heads", 0, "a whole number from 1"),
        ("text_config.vocab_size", 10**12, "a whole number from 1"),
        ("text_config.hidden_size", 10**10, "a whole number from 1"),
        ("text_config.intermediate_size", [48], "."),
        ("text_config.max_position_embeddings", 10**15, "a whole number"),
        ("vision_config.image_size", 10**9, "a whole number"),
        ("vision_config.patch_size", 0, "a whole number from 1"),
        ("text_config.rms_norm_eps", -1.0, "a finite number from 0 to 1"),
        ("text_config.rms_norm_eps", "small", "a finite number from 0 to 1"),
        ("text_config.rope_parameters", {"rope_theta": 0, "rope_type": "default"}, "a positive finite number"),
        ("text_config.rope_theta", -5.0, "a positive finite number"),
        ("text_config.rope_scaling", {"rope_type": "linear", "factor": 0}, "a positive finite number"),
        ("text_config", [1], "."),
        ("text_config", 3, "."),
        ("vision_config", "big", "."),
        ("architectures", "LlavaForConditionalGeneration", "does not name an architecture"),
        ("architectures", [3], "does not name an architecture"),
        ("architectures", {"a": 1}, "does not name an architecture"),
        ("model_type", ["llava"], "is unknown to transformers"),
        ("model_type", None, "is unknown to transformers"),
        ("auto_map", [1], "."),
        ("quantization_config", "int4", "."),
        ("image_token_index", "five", "."),
        ("dtype", 7, "."),
    ],
)
def test_a_number_that_no_model_has_is_refused_at_once(field: str, value: Any, expected: str, folder: Path) -> None:
    change(folder / "config.json", **{field: value})
    started = time.monotonic()
    if field in (
        "auto_map",
        "dtype",
        "text_config.intermediate_size",
    ):  # some are harmless, or refused as transformers words it
        try:
            open_checkpoint(folder)
        except ValueError as error:
            assert "config.json" in str(error)
        return
    with pytest.raises(ValueError, match=expected) as caught:
        HookedVLM.from_pretrained(folder)
    assert time.monotonic() - started < 5
    assert "config.json" in str(caught.value) or "quantization_config" in str(caught.value)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_many_more_layers_than_the_weights_hold_are_refused_before_they_are_built(part: str, folder: Path) -> None:
    change(folder / "config.json", **{f"{part}.num_hidden_layers": 900})
    with pytest.raises(ValueError, match=r"has \d+ layers in the (decoder|vision tower); the weights beside it have"):
        HookedVLM.from_pretrained(folder)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"a"', "[" * 10**5, '{"a":' * 10**5, '{"model_type": NaN}', "{,}"])
@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "generation_config.json"])
def test_json_of_another_kind_is_refused(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} (holds|is not valid JSON)"):
        HookedVLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: RopeConfig(theta=math.nan), "theta=nan must be a finite number"),
        (lambda: RopeConfig(theta=math.inf), "theta=inf must be a finite number"),
        (lambda: RopeConfig(rope_type="linear", scaling=(("factor", math.nan),)), "factor=nan must be a positive"),
        (lambda: RopeConfig(rope_type="linear", scaling=(("factor", 0.0),)), "factor=0.0 must be a positive"),
        (lambda: ConnectorConfig(d_in=0, d_hidden=1, d_out=1), "d_in=0 must be at least 1"),
        (lambda: small(norm_eps=math.nan), "norm_eps=nan must be a finite number"),
        (lambda: small(norm_eps=-1e-5), "norm_eps=-1e-05 must not be negative"),
        (lambda: small(d_vocab=0), "d_vocab=0 must be at least 1"),
        (lambda: small(d_mlp=2**40), "d_mlp=1099511627776 must be at most"),
        (lambda: small(query_scalar=math.inf), "query_scalar=inf must be a finite number"),
    ],
)
def test_configurations_in_memory_hold_possible_numbers(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


def small(**changes: Any) -> HookedVLMConfig:
    sizes = dict(n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=8, d_vocab=9, n_ctx=9, norm_eps=1e-5)
    return HookedVLMConfig(**(sizes | dict(act_fn="silu", normalization_type="RMS") | changes))  # type: ignore[arg-type]


# --- processors -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_processor.size", {"height": -1, "width": 28}),
        ("image_processor.size", {"shortest_edge": 10**9}),
        ("image_processor.size", {"shortest_edge": 10**9, "longest_edge": 10**9}),
        ("image_processor.crop_size", {"height": "28", "width": 28}),
        ("image_processor.crop_size", 0),
        ("image_processor.image_std", [0.5, 0.0, 0.5]),
        ("image_processor.image_std", [0.5, "0.5", 0.5]),
        ("image_processor.image_mean", [0.5, None, "x"]),
        ("image_processor.rescale_factor", 0),
        ("image_processor.max_pixels", 10**12),
        ("image_processor.image_grid_pinpoints", [[1, 2, 3]]),
        ("patch_size", 0),
        ("num_additional_image_tokens", 10**9),
    ],
)
def test_processor_with_an_impossible_size_or_scale_is_refused(field: str, value: Any, folder: Path) -> None:
    change(folder / "processor_config.json", **{field: value})
    with pytest.raises(ValueError, match=f"processor_config.json: {field}.* is .*; expected"):
        HookedVLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "template", ["{{ [].__class__.mro() }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ 1/0 }}"]
)
def test_template_that_the_sandbox_stops_is_refused(template: str) -> None:
    processor = tiny.llava_processor(BY_NAME["clip-llama"], template=template)
    model = HookedVLM.from_hf(family_hf(BY_NAME["clip-llama"]), processor)
    with pytest.raises(ValueError, match="chat template does not take these messages"):
        model.prepare("how", tiny.picture())


# --- weights ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pickled", [False, True])
def test_weights_that_are_not_finite_are_named(value: float, pickled: bool, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    key = sorted(weights)[3]
    weights[key].view(-1)[-1] = value
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{key} has 1 numbers of .* that are NaN or infinite"):
        HookedVLM.from_pretrained(folder)


def test_large_finite_weights_pass_and_overflow_in_a_narrow_dtype_is_named() -> None:
    large = torch.full((64,), 3e38)
    require_finite(large, "w", "x")
    require_finite(torch.full((64,), 60_000.0, dtype=torch.float16), "w", "x")
    require_finite(torch.tensor([]), "w", "x")
    with pytest.raises(ValueError, match="64 numbers of 64"):
        require_finite(large.half(), "w", "x")


def test_model_in_memory_without_numbers_or_with_wrong_ones_is_refused() -> None:
    theirs = family_hf(SMALL)
    parameter = next(iter(theirs.parameters()))
    with torch.no_grad():
        parameter.view(-1)[0] = math.nan
    with pytest.raises(ValueError, match="has 1 numbers .* that are NaN or infinite"):
        HookedVLM.from_hf(theirs)
    with torch.device("meta"):
        empty = type(theirs)(theirs.config)
    with pytest.raises(ValueError, match="are on the meta device and hold no numbers"):
        HookedVLM.from_hf(empty)


def test_pickled_views_of_one_number_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    key = max(weights, key=lambda name: weights[name].numel())
    weights[key] = torch.zeros(1).expand(weights[key].shape)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is not a plain tensor"):
        HookedVLM.from_pretrained(folder)


@pytest.mark.parametrize("name", list(DTYPES))
def test_names_of_dtypes_mean_the_dtype(name: str) -> None:
    assert dtype_of(name) == dtype_of(f"torch.{name}") == dtype_of(DTYPES[name]) == DTYPES[name]


def test_model_loads_in_a_named_dtype(folder: Path) -> None:
    assert HookedVLM.from_pretrained(folder, dtype="bf16").cfg.dtype == torch.bfloat16
    assert open_checkpoint(folder, dtype="float16").cfg.dtype == torch.float16
    with pytest.raises(ValueError, match="dtype='int4' is not a torch dtype .*; known: float64, .*bf16"):
        HookedVLM.from_pretrained(folder, dtype="int4")
    with pytest.raises(ValueError, match=r"dtype=torch.int8 is not supported"):
        HookedVLM.from_pretrained(folder, dtype=torch.int8)


# --- adapters ---------------------------------------------------------------------------------------------
@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write(tmp_path / "lora", build_hf(LORA_CASE, torch.float32), {"model.language_model.layers.0.self_attn.q_proj": 4})
    return tmp_path / "lora"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(lora_alpha=0), "alpha of lora_alpha is 0; expected a finite number other than 0"),
        (dict(lora_alpha="8"), "alpha of lora_alpha is '8'"),
        (dict(lora_alpha=True), "alpha of lora_alpha is True"),
        (dict(r=0), "rank of r is 0"),
        (dict(r=-4), "rank of r is -4"),
        (dict(alpha_pattern=[1]), "alpha_pattern is "),
        (dict(alpha_pattern={"q_proj": None}), "alpha of q_proj is None"),
        (dict(rank_pattern={"q_proj": 0}), "rank of q_proj is 0"),
        (dict(alpha_pattern={"(a+)+$": 4}), "pattern .* is not supported"),
        (dict(alpha_pattern={"((a|a)*)*b": 4}), "pattern .* is not supported"),
        (dict(rank_pattern={"(.*.*)*x": 4}), "pattern .* is not supported"),
        (dict(rank_pattern={".*.*.*x": 4}), "pattern .* is not supported"),
        (dict(alpha_pattern={"(": 4}), "pattern .* is not supported"),
        (dict(alpha_pattern={"a{1000}": 4}), "pattern .* is not supported"),
        (dict(alpha_pattern={"(?=a)a": 4}), "pattern .* is not supported"),
        (dict(alpha_pattern={"a" * 300: 4}), "pattern .* is not supported"),
    ],
)
def test_adapter_with_an_impossible_number_or_pattern_is_refused(
    changes: dict[str, Any], told: str, adapter: Path
) -> None:
    change(adapter / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=told):
        open_lora(adapter)


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", "model.layers.0.self_attn.q_proj", r".*\.q_proj", r"layers\.\d+\.self_attn", "layers.[0-9].(q|k)_proj$"],
)
def test_patterns_that_peft_writes_are_taken(pattern: str, adapter: Path) -> None:
    change(adapter / "adapter_config.json", alpha_pattern={pattern: 4}, rank_pattern={pattern: 4})
    assert open_lora(adapter).config["alpha_pattern"] == {pattern: 4}


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda key, t: {key: t * math.nan}, "that are NaN or infinite"),
        (lambda key, t: {key: t[:0] if "lora_A" in key else t[:, :0]}, "misshapen .*wanted a product"),
        (lambda key, t: {key + "\nlora": t}, "unknown   .*not the name of a weight"),
        (lambda key, t: {key: t.to(torch.int8)}, "quantised .* stored as torch.int8"),
        (lambda key, t: {} if "lora_A" in key else {key: t}, "lone .* without its lora_A"),
        (lambda key, t: {key: t.flatten()}, "misshapen"),
    ],
    ids=["nan", "rank 0", "newline", "int8", "half", "flat"],
)
def test_adapter_with_impossible_tensors_is_refused(edit: Callable[..., Any], told: str, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({k: v for key, t in load_file(file).items() for k, v in edit(key, t).items()}, file)
    base = adapter.parent / "base"
    tiny.save(LORA_CASE, base, with_processor=False)
    (found,) = [path for path in [base, *base.rglob("*")] if (path / "config.json").is_file()]
    with pytest.raises(ValueError, match=told):
        HookedVLM.from_pretrained(found, lora=adapter)


# --- packed weights ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changed",
    [
        dict(absmax=torch.ones(3)),
        dict(quant_map=torch.ones(15)),
        dict(weight=torch.zeros(10, 1, dtype=torch.uint8)),
        dict(state={"shape": [16, -64], "blocksize": 64}),
        dict(state={"shape": [16], "blocksize": 64}),
        dict(state={"shape": [10**9, 10**9], "blocksize": 64}),
        dict(state=[1]),
    ],
    ids=str,
)
def test_packed_weights_of_other_sizes_are_refused_before_a_kernel_reads_them(changed: Any, tmp_path: Path) -> None:
    from veena_lens.checkpoints.files import WeightFile
    from veena_lens.checkpoints.quantised import Entry

    state = json.dumps(changed.pop("state", {"shape": [16, 64], "blocksize": 64, "quant_type": "nf4"})).encode()
    parts = dict(weight=torch.zeros(512, 1, dtype=torch.uint8), absmax=torch.ones(16), quant_map=torch.ones(16))
    parts |= changed
    tensors = {f"w.weight.{part}" if part != "weight" else "w.weight": t for part, t in parts.items()}
    tensors["w.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(state), dtype=torch.uint8)
    save_file(tensors, tmp_path / "w.safetensors")
    file = WeightFile(tmp_path / "w.safetensors")
    entries = {key: Entry(file, key, shape, dtype) for key, (shape, dtype) in file.shapes().items()}
    with pytest.raises(ValueError, match=r"do not fit: w.weight|holds a list"):
        find_packed(Scheme("bitsandbytes", {}), entries)


def test_embedded_checkpoints_pass_every_check() -> None:
    for name in ("tiny-llava-emotion", "tiny-qwen2vl-emotion"):
        assert open_checkpoint(bundled_path(name)).cfg.n_layers == 8


def test_devices_are_named_as_torch_names_them_and_must_be_there() -> None:
    assert device_of(None) is None
    assert device_of("cpu") == device_of(torch.device("cpu")) == torch.device("cpu")
    assert device_of("meta") == torch.device("meta")
    for absent in ("cuda:99", 99, torch.device("cuda:99")):
        with pytest.raises(ValueError, match=r"device='(cuda:)?99' is not there: this machine \(torch .*\) has cpu"):
            device_of(absent)
    with pytest.raises(ValueError, match="device='gpu' is not a device of torch"):
        device_of("gpu")
    for odd in (1.5, True, ["cpu"]):
        with pytest.raises(TypeError, match="must be a device of torch or its name"):
            device_of(odd)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("tiny-lava", "tiny-llava-emotion"),
        ("Tiny_Qwen2VL_Emotion", "tiny-qwen2vl-emotion"),
        ("llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        ("llava-hf/llava-1.5-7b", "llava-hf/llava-1.5-7b-hf"),
        ("no-such-checkpoint", ""),
        ("/tmp/x", ""),
    ],
)
def test_a_name_near_a_known_one_is_answered_with_it(name: str, meant: str) -> None:
    said = did_you_mean(name)
    assert said.startswith(f" Did you mean {meant}") and said.endswith("?") if meant else said == ""
