"""The layouts of keys that files were ever written in, by family: ours in memory, and what other releases wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

Rename = Callable[[str], str]


def _sub(*pairs: tuple[str, str]) -> Rename:
    def rename(key: str) -> str:
        for pattern, new in pairs:
            found = re.sub(pattern, new, key)
            if found != key:
                return found
        return key

    return rename


HEAD = (r"^lm_head\.", "language_model.lm_head.")
TEXT = (r"^model\.language_model\.", "language_model.model.")
LLAVA: dict[str, Rename] = {
    "in memory": lambda key: key,
    "save_pretrained of transformers 5": _sub(
        HEAD, TEXT, (r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1")
    ),
    "hub files of 2023 to 2025": _sub(
        HEAD, TEXT, (r"^model\.vision_tower\.", "vision_tower.vision_model."), (r"^model\.(multi_modal|image_)", r"\1")
    ),
    "some releases of 4.5x": _sub((r"^model\.vision_tower\.", "model.vision_tower.vision_model.")),
    "5.10 to 5.23, text nested": _sub((r"^model\.language_model\.", "model.language_model.model.")),
}
QWEN: dict[str, Rename] = {
    "in memory": lambda key: key,
    "hub files": _sub((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
    "text at the root alone": _sub((r"^model\.language_model\.", "model.")),
}
GEMMA: dict[str, Rename] = {
    "in memory": lambda key: key,
    "hub files": _sub(
        HEAD, TEXT, (r"^model\.vision_tower\.", "vision_tower.vision_model."), (r"^model\.multi_modal", "multi_modal")
    ),
    "some releases of 4.5x": LLAVA["some releases of 4.5x"],
}
LAYOUTS: Mapping[str, Mapping[str, Rename]] = dict(
    llava=LLAVA, qwen=QWEN, gemma=GEMMA, tiles={"in memory": LLAVA["in memory"]}
)
