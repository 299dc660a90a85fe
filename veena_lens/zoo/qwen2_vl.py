"""Build the small Qwen2-VL and its processor, as Hugging Face builds and saves them, and its fast form for training.

Images of about 96 x 96 pixels in patches of 8, merged two by two, give 6 x 6 tokens; other shapes of about that area
give other grids. The text decoder may start from the small LLaVA's, so that mainly the image has to be learned.
"""

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from veena_lens.checkpoints.image_only import ImageOnlyQwen2VLProcessor
from veena_lens.zoo.architecture import Architecture, ChatFormat, Packed, Run, Stage, Teacher
from veena_lens.zoo.llava import LLAVA
from veena_lens.zoo.tokenizer import QWEN_TEMPLATE, build_qwen_tokenizer

__all__ = ["QWEN2_VL", "batched_tower"]

_PATCH_SIZE, _MERGE = 8, 2
_TOKEN = _PATCH_SIZE * _MERGE
# Squares of any size become 96 x 96: both bounds are between the neighbouring squares of 80 and 112 pixels.
_MIN_PIXELS, _MAX_PIXELS = 90 * 90, 100 * 100
# Rows and columns of the images that are not square, and their share in training.
_OTHER_GRIDS, _OTHER_SHARE = ((5, 7), (7, 5), (4, 8), (8, 4)), 0.1


def build_processor() -> ImageOnlyQwen2VLProcessor:
    """Return the processor: images to about 96 x 96, mean and deviation one half; text through the small tokenizer."""
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": _MIN_PIXELS, "longest_edge": _MAX_PIXELS},
        patch_size=_PATCH_SIZE,
        merge_size=_MERGE,
        temporal_patch_size=2,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return ImageOnlyQwen2VLProcessor(image_processor, build_qwen_tokenizer(), chat_template=QWEN_TEMPLATE)


def build_model(processor: ImageOnlyQwen2VLProcessor, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """Return an untrained model that fits the processor; the same seed gives the same weights."""
    tokenizer: Any = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in _SPECIAL_NAMES}
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 4, 4]),
        bos_token_id=None,
        eos_token_id=ids["im_end"],
        pad_token_id=ids["endoftext"],
    )
    vision = dict(
        depth=4,
        embed_dim=128,
        hidden_size=192,
        num_heads=4,
        mlp_ratio=4,
        patch_size=_PATCH_SIZE,
        spatial_merge_size=_MERGE,
        temporal_patch_size=2,
    )
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=False,
        **{"eos_token_id": ids["im_end"], "pad_token_id": ids["endoftext"]},
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config).float()
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["im_end"], ids["endoftext"]],
        pad_token_id=ids["endoftext"],
        max_new_tokens=48,
        do_sample=False,
    )
    return model


_SPECIAL_NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")

# A new token starts as the small LLaVA's token with its role; the line end follows "assistant" as ":" did.
_RELATIVES = {
    "<|endoftext|>": "<pad>",
    "<|im_start|>": "<s>",
    "<|im_end|>": "</s>",
    "<|image_pad|>": "<image>",
    "<|video_pad|>": "<image>",
    "<|vision_start|>": ":",
    "<|vision_end|>": ":",
    "Ċ": ":",
}


def start_from(model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Give the decoder the small LLaVA's weights: key and value heads averaged in pairs, biases 0, shared words."""
    known = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).get_vocab()
    theirs = load_file(folder / "model.safetensors")
    prefix = "model.language_model." if "model.language_model.norm.weight" in theirs else "language_model.model."
    ours = model.model.language_model.state_dict()
    for name, value in ours.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = rearrange(theirs[prefix + name], "(head pair width) d -> head pair width d", pair=2, width=24)
            value.copy_(rearrange(heads.mean(1), "head width d -> (head width) d"))
        elif name.endswith("bias"):
            value.zero_()
        elif name != "embed_tokens.weight":
            value.copy_(theirs[prefix + name])
    head = "lm_head.weight" if "lm_head.weight" in theirs else "language_model.lm_head.weight"
    with torch.no_grad():
        for token, row in tokenizer.get_vocab().items():
            source = known.get(_RELATIVES.get(token, token))
            if source is not None:
                model.model.language_model.embed_tokens.weight[row] = theirs[prefix + "embed_tokens.weight"][source]
                model.lm_head.weight[row] = theirs[head][source]


def save_folder(model: Qwen2VLForConditionalGeneration, processor: ImageOnlyQwen2VLProcessor, folder: Path) -> None:
    """Write the files of a Qwen2-VL folder, `vocab.json` and `merges.txt` included."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer: Any = processor.tokenizer
    tokenizer.backend_tokenizer.model.save(str(folder))


def batched_tower(visual: Any, pictures: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch image d_model"]:
    """Return the merged features of images of equal size, several times faster than Hugging Face's tower.

    That tower attends within each image. A still image is the same at both times, so the two halves of the patch
    embedding are added first."""
    batch, _, height, width = pictures.shape
    patches = rearrange(
        pictures, "b c (y my p) (x mx q) -> (b y x my mx) (c p q)", my=_MERGE, mx=_MERGE, p=_PATCH_SIZE, q=_PATCH_SIZE
    )
    hidden = patches @ visual.patch_embed.proj.weight.sum(2).flatten(1).T
    rows, columns = torch.meshgrid(
        torch.arange(height // _PATCH_SIZE), torch.arange(width // _PATCH_SIZE), indexing="ij"
    )
    places = torch.stack([rows, columns]).to(pictures.device)
    places = rearrange(places, "two (y my) (x mx) -> (y x my mx) two", my=_MERGE, mx=_MERGE)
    cos, sin = (table.repeat(batch, 1) for table in visual.rotary_pos_emb(hidden, places))
    for block in visual.blocks:
        attn = block.attn
        q, k, v = rearrange(attn.qkv(block.norm1(hidden)), "n (three h d) -> three n h d", three=3, h=attn.num_heads)
        q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
        q, k, v = (rearrange(each, "(b n) h d -> b h n d", b=batch) for each in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=attn.scaling)
        hidden = hidden + attn.proj(rearrange(mixed, "b h n d -> (b n) (h d)"))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return rearrange(visual.merger(hidden), "(b n) d -> b n d", b=batch)


def tower_features(
    model: Qwen2VLForConditionalGeneration, pixels: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch image d_model"]:
    """Return the merged features that the decoder reads."""
    return batched_tower(model.model.visual, pixels)


def open_teacher(folder: Path) -> Teacher:
    """Return the features that the small LLaVA's decoder reads of an image, 8 x 8 tokens averaged to 6 x 6."""
    sibling: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()

    @torch.no_grad()
    def features(pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch image d_model"]:
        model = sibling.to(pixels.device)
        projected = model.model.multi_modal_projector(LLAVA.tower_features(model, pixels))
        rows, _ = LLAVA.grid(*pixels.shape[2:])
        projected = rearrange(projected.float(), "b (y x) d -> b d y x", y=rows)
        averaged = F.interpolate(
            projected, size=QWEN2_VL.grid(*pixels.shape[2:]), mode="bilinear", antialias=True, align_corners=False
        )
        return rearrange(averaged, "b d y x -> b (y x) d")

    return features


def run(model: Qwen2VLForConditionalGeneration, packed: Packed, pixels: Float[Tensor, "batch 3 height width"]) -> Run:
    """Run the model on a packed batch of images of equal size."""
    features = batched_tower(model.model.visual, pixels)
    embedded = model.model.language_model.embed_tokens(packed.input_ids)
    at_picture = (packed.input_ids == model.config.image_token_id)[..., None]
    embedded = embedded.masked_scatter(at_picture, features.flatten(0, 1).to(embedded.dtype))
    output = model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=packed.attention_mask,
        position_ids=packed.position_ids,
        use_cache=False,
    )
    return Run(output.last_hidden_state, features)


def reshape(pictures: Float[Tensor, "batch 3 height width"], rng: random.Random) -> Float[Tensor, "batch 3 _ _"]:
    """Give one batch in ten another shape: margins in the background colour at the sides or above and below."""
    if rng.random() >= _OTHER_SHARE:
        return pictures
    rows, columns = rng.choice(_OTHER_GRIDS)
    batch, _, side, _ = pictures.shape
    height, width = (side, round(side * columns / rows)) if columns > rows else (round(side * rows / columns), side)
    top, left = rng.randint(0, height - side), rng.randint(0, width - side)
    wider = pictures[:, :, :1, :1].expand(batch, 3, height, width).clone()
    wider[:, :, top : top + side, left : left + side] = pictures
    return F.interpolate(wider, size=(rows * _TOKEN, columns * _TOKEN), mode="bicubic", antialias=True)


QWEN2_VL = Architecture(
    name="tiny-qwen2vl-emotion",
    model_type="qwen2_vl",
    chat=ChatFormat(
        opening="<|im_start|>user\n",
        system_opening="<|im_start|>system\n {text}<|im_end|>\n<|im_start|>user\n",
        before_picture="<|vision_start|>",
        picture="<|image_pad|>",
        after_picture="<|vision_end|>",
        next_turn="\n<|im_start|>user\n ",
        reply="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        has_grid_positions=True,
    ),
    # The lessons of the bundled checkpoint's training in one run; its card lists the steps that it took.
    stages=(
        Stage(name="tower", steps=4000, batch=64, peak_lr=6e-4, head_weight=1.0, imitation=8.0, bfloat16=True),
        Stage(name="alignment", steps=450, batch=8, peak_lr=1e-3, head_weight=0.1),
        Stage(
            name="mix",
            steps=2500,
            batch=8,
            peak_lr=5e-4,
            head_weight=0.05,
            imitation=8.0,
            extra=16,
            early=0.1,
            bfloat16=True,
        ),
    ),
    shares={"tower": 0.5, "alignment": 0.05, "mix": 0.45},
    styles={"avataaars": 0.52, "adventurer": 0.23, "toon-head": 0.13, "big-smile": 0.12},
    head_places=36,
    recoloured=0.3,
    build_processor=build_processor,
    build_model=build_model,
    save_folder=save_folder,
    open_processor=ImageOnlyQwen2VLProcessor.from_pretrained,
    tower_width=lambda model: model.config.vision_config.hidden_size,
    tower_features=tower_features,
    run=run,
    grid=lambda height, width: (height // _TOKEN, width // _TOKEN),
    reshape=reshape,
    start_from=start_from,
    open_teacher=open_teacher,
)
