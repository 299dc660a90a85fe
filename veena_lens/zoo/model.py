"""The small models by the names of their checkpoints."""

from veena_lens.zoo.architecture import Architecture
from veena_lens.zoo.llava import LLAVA
from veena_lens.zoo.qwen2_vl import QWEN2_VL

__all__ = ["ARCHITECTURES"]

ARCHITECTURES: dict[str, Architecture] = {each.name: each for each in (LLAVA, QWEN2_VL)}
