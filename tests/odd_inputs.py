"""What processors would emit for the rows of a case: token ids, masks, pixels, and what they say about images.

A row is a string of words. A number is that many text tokens, drawn at random; any other word is an image or a video,
written in the way of the family's processor:

* LLaVA: "i" is an image. Gemma: "i" is an image between its marks, "b" its bare tokens (two of them touch).
* LLaVA-1.6 and OneVision: "i40x75" is an image of 40 rows of 75 pixels, "v3" a video of three frames.
* Qwen: "i4x6" is an image of 4 x 6 patches, "v3x4x6" a video of three such frames, between their start and end tokens.
* Idefics3 and SmolVLM: "i" is an image that is not cut, "i9x5" one of which only 9 x 5 pixels are real, "t2x3" one cut
  into 2 x 3 tiles, "b" the bare tokens of an image without markers.

Text is drawn first and pixels after it, except in the families of any resolution, whose pixels are drawn in their turn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

PAD, IMAGE_TOKEN, VIDEO_TOKEN = 0, 127, 126
GEMMA_START, GEMMA_END = 120, 121
QWEN_IMAGE, QWEN_VIDEO, QWEN_START, QWEN_END = 120, 121, 122, 123
FAKE, NEWLINE, WHOLE, FIRST_TILE = 120, 121, 122, 100  # tile (r, c) is called 100 + 4 r + c


def numbers(word: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", word)]


def images_of(row: str) -> list[str]:
    """The words of a row that are not text."""
    return [word for word in row.split() if not word.isdigit()]


def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def text(n: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, 100, (n,), generator=generator).tolist()


def padded(rows: list[list[int]], padding: str) -> dict[str, Tensor]:
    """Rows of ids as a batch, pads on the left or right."""
    length = max(map(len, rows))
    tokens, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
    for i, ids in enumerate(rows):
        at = slice(length - len(ids), length) if padding == "left" else slice(0, len(ids))
        tokens[i, at], mask[i, at] = torch.tensor(ids), 1
    return dict(input_ids=tokens, attention_mask=mask)


def written(case: Any, generator: torch.Generator, write: Callable[[str, str], list[int]]) -> dict[str, Tensor]:
    """The batch of the case's rows; `write(word, row)` gives the tokens of an image."""
    rows: list[list[int]] = []
    for row in case.rows:
        ids: list[int] = []
        for word in row.split():
            ids += text(int(word), generator) if word.isdigit() else write(word, row)
        rows.append(ids)
    return padded(rows, case.padding)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(2)


# --- one square of pixels per image ------------------------------------------------------------------------
def square_tokens(config: Any) -> int:
    """Image tokens of one image of LLaVA-1.5, counted as Hugging Face counts features."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    is_clip = vision.model_type == "clip_vision_model"
    return patches + is_clip - (config.vision_feature_select_strategy == "default")


def squares(case: Any, config: Any, generator: torch.Generator) -> Tensor:
    side = config.vision_config.image_size
    return draw((sum(len(images_of(row)) for row in case.rows), 3, side, side), generator)


def one_square(case: Any, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """LLaVA-1.5, and models of text alone."""
    generator = seeded()
    raw = written(case, generator, lambda word, row: [IMAGE_TOKEN] * square_tokens(config))
    if case.has_images:
        raw["pixel_values"] = squares(case, config, generator).to(dtype)
    return raw


def between_marks(case: Any, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gemma-3; a model of text gets no types, and no batch without an image."""
    generator = seeded()

    def write(word: str, row: str) -> list[int]:
        image = [IMAGE_TOKEN] * config.mm_tokens_per_image
        return [GEMMA_START, *image, GEMMA_END] if word == "i" else image

    raw = written(case, generator, write)
    if case.has_images:
        raw["pixel_values"] = squares(case, config, generator).to(dtype)
        raw["token_type_ids"] = (raw["input_ids"] == IMAGE_TOKEN).long()
    return raw


# --- any resolution ----------------------------------------------------------------------------------------
def token_counter(config: Any) -> Any:
    """Hugging Face's processor as far as it counts tokens."""
    is_first = config.model_type == "llava_next"
    counter = object.__new__(transformers.LlavaNextProcessor if is_first else transformers.LlavaOnevisionProcessor)
    counter.image_processor = SimpleNamespace(image_grid_pinpoints=config.image_grid_pinpoints)
    counter.patch_size = config.vision_config.patch_size
    counter.num_additional_image_tokens = 0  # the class token of LLaVA-1.6, which is dropped again
    counter.num_image_tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    counter.vision_aspect_ratio = getattr(config, "vision_aspect_ratio", None)
    return counter


def any_resolution(case: Any, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """LLaVA-1.6 and OneVision, tokens counted by Hugging Face's own processors.

    Images of OneVision that share a row are one tile each where their numbers are passed on."""
    generator, counter = seeded(), token_counter(config)
    side = config.vision_config.image_size
    grid = side // config.vision_config.patch_size
    has_numbers = case.has("videos") and case.says_numbers
    sizes: list[list[int]] = []
    tiles, videos = [], []

    def write(word: str, row: str) -> list[int]:
        if word[0] == "v":
            frames = int(word[1:])
            videos.append(draw((frames, 3, side, side), generator))
            return [VIDEO_TOKEN] * (frames * math.ceil(grid / 2) ** 2 + 1)
        height, width = numbers(word)
        sizes.append([height, width])
        several = has_numbers and sum(w[0] == "i" for w in images_of(row)) > 1
        pins = config.image_grid_pinpoints
        best = transformers.image_processing_utils.select_best_resolution((height, width), pins)
        n = 1 if several else 1 + math.ceil(best[0] / side) * math.ceil(best[1] / side)
        tiles.append(draw((n, 3, side, side), generator))
        return [IMAGE_TOKEN] * (
            grid**2 + 1 if several else counter._get_number_of_features(height, width, side, side)
        )  # fmt: skip

    raw = written(case, generator, write)
    if tiles:
        most = max(map(len, tiles))
        same = [torch.cat([t, t.new_zeros(most - len(t), *t.shape[1:])]) for t in tiles]
        raw |= dict(pixel_values=torch.stack(same).to(dtype), image_sizes=torch.tensor(sizes))
        if has_numbers:  # rows without an image are left out, as the processor does
            counts = [sum(word[0] == "i" for word in images_of(row)) for row in case.rows]
            raw["batch_num_images"] = torch.tensor([n for n in counts if n])
    if videos:
        raw["pixel_values_videos"] = torch.stack(videos).to(dtype)
    return raw


# --- any size ----------------------------------------------------------------------------------------------
def any_size(case: Any, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Qwen; before each frame of Qwen3-VL's videos, between marks of its own, stand two text tokens (a time stamp)."""
    generator, vision = seeded(), config.vision_config
    merge, width = vision.spatial_merge_size, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    grids: dict[str, list[list[int]]] = {"i": [], "v": []}

    def write(word: str, row: str) -> list[int]:
        t, h, w = numbers(word) if word[0] == "v" else [1, *numbers(word)]
        grids[word[0]].append([t, h, w])
        n = h * w // merge**2
        if word[0] == "i":
            return [QWEN_START, *[QWEN_IMAGE] * n, QWEN_END]
        if not case.has("deepstack"):
            return [QWEN_START, *[QWEN_VIDEO] * (t * n), QWEN_END]
        frame = [QWEN_START, *[QWEN_VIDEO] * n, QWEN_END]
        return sum(([*text(2, generator), *frame] for _ in range(t)), [])

    raw = written(case, generator, write)
    raw["mm_token_type_ids"] = (raw["input_ids"] == QWEN_IMAGE).long() + 2 * (raw["input_ids"] == QWEN_VIDEO).long()
    for letter, pixels, key in (
        ("i", "pixel_values", "image_grid_thw"),
        ("v", "pixel_values_videos", "video_grid_thw"),
    ):
        if grids[letter]:
            raw[key] = torch.tensor(grids[letter])
            raw[pixels] = draw((int(raw[key].prod(-1).sum()), width), generator).to(dtype)
    if case.has("windows") and grids["v"] and case.seconds:
        seconds = [case.seconds[i % len(case.seconds)] for i in range(len(grids["v"]))]
        raw["second_per_grid_ts"] = torch.tensor(seconds)
    return raw


# --- tiles -------------------------------------------------------------------------------------------------
def tile_tokens(config: Any) -> int:
    """Image tokens of one tile of Idefics3."""
    return (config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor) ** 2


def tiled_image(config: Any, rows: int, columns: int, n_name: int = 1) -> list[int]:
    """The tokens of one image as Idefics3's processor writes them; (0, 0) is an image that is not cut."""

    def tile(name: int) -> list[int]:
        return [FAKE, *[7] * (n_name - 1), name, *[IMAGE_TOKEN] * tile_tokens(config)]

    out = []
    for r in range(rows):
        for c in range(columns):
            out += tile(FIRST_TILE + 4 * r + c)
        out.append(NEWLINE)
    return [*out, *[NEWLINE] * (rows > 0), *tile(WHOLE), FAKE]


def in_tiles(case: Any, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Idefics3 and SmolVLM: pixels [rows tiles 3 height width], a mask of the real ones."""
    generator, side = seeded(), config.vision_config.image_size

    def cut(word: str) -> tuple[int, int]:
        return (numbers(word)[0], numbers(word)[1]) if word[0] == "t" else (0, 0)

    def sizes(word: str) -> list[list[int]]:
        """(height, width) of the real pixels of each tile."""
        r, c = cut(word)
        return [numbers(word) if word[0] == "i" and len(word) > 1 else [side, side]] * (r * c + 1)

    def write(word: str, row: str) -> list[int]:
        bare = [IMAGE_TOKEN] * tile_tokens(config)
        return bare if word == "b" else tiled_image(config, *cut(word), n_name=case.n_name)

    raw = written(case, generator, write)
    tiles = [[size for word in images_of(row) for size in sizes(word)] for row in case.rows]
    most = max(map(len, tiles))
    if not most:
        return raw
    pixels = torch.zeros(len(tiles), most, 3, side, side, dtype=torch.float64)
    real = torch.zeros(len(tiles), most, side, side, dtype=torch.long)
    for i, mine in enumerate(tiles):
        for j, (height, width) in enumerate(mine):
            pixels[i, j, :, :height, :width] = draw((3, height, width), generator)
            real[i, j, :height, :width] = 1
    raw["pixel_values"] = pixels.to(dtype)
    return raw | dict(pixel_attention_mask=real) if case.has_mask else raw
