"""Build the small LLaVA and its processor, as Hugging Face builds and saves them.

Images of 96 pixels in patches of 12 give 64 tokens; the decoder is deep and narrow, because layers and heads are the
object of study.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip import CLIPImageProcessorPil

from veena_lens.zoo.architecture import Architecture, ChatFormat, Packed, Run, Stage
from veena_lens.zoo.drawing import PICTURE_SIZE
from veena_lens.zoo.tokenizer import LLAVA_TEMPLATE, build_llava_tokenizer

__all__ = ["LLAVA"]

_PATCH_SIZE = 12


def build_processor() -> LlavaProcessor:
    """Return the processor: images to 96 x 96 with mean and deviation one half, text through the small tokenizer."""
    image_processor = CLIPImageProcessorPil(
        size={"height": PICTURE_SIZE, "width": PICTURE_SIZE},
        do_center_crop=False,
        crop_size={"height": PICTURE_SIZE, "width": PICTURE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_llava_tokenizer(),
        patch_size=_PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=LLAVA_TEMPLATE,
    )


def build_model(processor: LlavaProcessor, seed: int = 0) -> LlavaForConditionalGeneration:
    """Return an untrained model that fits the processor; the same seed gives the same weights."""
    tokenizer = processor.tokenizer
    special = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=PICTURE_SIZE,
        patch_size=_PATCH_SIZE,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(PICTURE_SIZE // _PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **special,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).float()
    model.generation_config = GenerationConfig(**special, max_new_tokens=48, do_sample=False)
    return model


def save_folder(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write the folder that `AutoProcessor` and `AutoModelForImageTextToText` load."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def tower_features(
    model: LlavaForConditionalGeneration, pixels: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch image d_model"]:
    """Return the patch features that the projector reads."""
    return model.model.vision_tower(pixels).last_hidden_state[:, 1:]


def run(model: LlavaForConditionalGeneration, packed: Packed, pixels: Float[Tensor, "batch 3 height width"]) -> Run:
    """Run the model on a packed batch."""
    output = model.model(
        input_ids=packed.input_ids,
        pixel_values=pixels,
        attention_mask=packed.attention_mask,
        position_ids=packed.position_ids,
        use_cache=False,
    )
    outputs = getattr(output, "image_outputs", None)
    image = output.image_hidden_states if outputs is None else outputs.pooler_output
    image = torch.stack(list(image)) if isinstance(image, (list, tuple)) else image
    return Run(output.last_hidden_state, image.reshape(len(pixels), -1, image.shape[-1]))


LLAVA = Architecture(
    name="tiny-llava-emotion",
    model_type="llava",
    chat=ChatFormat(
        opening="<s>user:",
        system_opening="<s>system: {text} user:",
        picture="<image>",
        next_turn="user: ",
        reply=" assistant:",
        end="</s>",
    ),
    # About as many steps as the bundled checkpoint took.
    stages=(
        Stage(name="tower", steps=2900, batch=64, peak_lr=1e-3, head_weight=1.0),
        Stage(name="alignment", steps=900, batch=8, peak_lr=1e-3, head_weight=0.1),
        Stage(name="mix", steps=2500, batch=8, peak_lr=8e-4, head_weight=0.05),
    ),
    shares={"tower": 0.25, "alignment": 0.2, "mix": 0.55},
    styles={"avataaars": 0.65, "adventurer": 0.17, "toon-head": 0.11, "big-smile": 0.07},
    build_processor=build_processor,
    build_model=build_model,
    save_folder=save_folder,
    open_processor=AutoProcessor.from_pretrained,
    tower_width=lambda model: model.config.vision_config.hidden_size,
    tower_features=tower_features,
    run=run,
    grid=lambda height, width: (height // _PATCH_SIZE, width // _PATCH_SIZE),
)
