"""SmolVLM2 (Marafioti et al. 2025, arXiv 2504.05299): Idefics3 under another name, frames of videos as pictures."""

from __future__ import annotations

from dataclasses import replace

from model_adapters.idefics3 import ADAPTER as IDEFICS3

ADAPTER = replace(
    IDEFICS3,
    architecture="SmolVLMForConditionalGeneration",
    hub_ids=(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    ),
    note="as Idefics3; frames of a video are pictures that are not cut",
)
