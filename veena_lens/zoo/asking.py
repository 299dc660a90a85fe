"""Asks a saved checkpoint about pictures the way a user would: pictures through its processor, greedy answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import AutoModelForImageTextToText

from veena_lens.zoo.model import architecture_of

__all__ = ["Asker", "Query"]


@dataclass(frozen=True)
class Query:
    picture: Image
    text: str


class Asker:
    """A checkpoint folder opened with its architecture's processor and `AutoModelForImageTextToText`."""

    def __init__(self, folder: Path, device: str | None = None) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.architecture = architecture_of(folder)
        self.processor = self.architecture.open_processor(folder)
        model: Any = AutoModelForImageTextToText.from_pretrained(folder)
        self.model = model.to(self.device).eval()

    def prompt(self, text: str) -> str:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return self.processor.apply_chat_template([message], add_generation_prompt=True)

    @torch.no_grad()
    def answers(self, queries: list[Query], max_new_tokens: int = 8, batch: int = 64) -> list[str]:
        """Greedy answers in the order of the queries; similar lengths share a batch."""
        order = sorted(range(len(queries)), key=lambda i: len(queries[i].text))
        found: dict[int, str] = {}
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            inputs = self.processor(
                images=[queries[i].picture for i in rows],
                text=[self.prompt(queries[i].text) for i in rows],
                padding=True,
                return_tensors="pt",
            ).to(self.device)
            told = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            told = told[:, inputs["input_ids"].shape[1] :]
            texts = self.processor.tokenizer.batch_decode(told, skip_special_tokens=True)
            found.update(zip(rows, (text.strip() for text in texts), strict=True))
        return [found[i] for i in range(len(queries))]

    @torch.no_grad()
    def picture_attention(self, queries: list[Query]) -> list[float]:
        """Per layer, the share of attention which the last prompt token gives to the picture (mean over heads)."""
        kept = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        inputs = self.processor(
            images=[q.picture for q in queries],
            text=[self.prompt(q.text) for q in queries],
            padding=True,
            return_tensors="pt",
        ).to(self.device)
        patterns = self.model(**inputs, output_attentions=True).attentions
        self.model.set_attn_implementation(kept)
        at_picture = (inputs["input_ids"] == self.model.config.image_token_id).float()
        return [(p[:, :, -1] * at_picture[:, None]).sum(-1).mean().item() for p in patterns]
