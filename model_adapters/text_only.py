"""Map Llama, Mistral, Qwen2 and Qwen3 without a vision tower to the same model class."""

from __future__ import annotations

from model_adapters.decoders import TESTED, text_config, text_weights
from veena_lens.weight_map import Adapter


def _text_only(architecture: str, *hub_ids: str) -> Adapter:
    """Return the adapter of a decoder whose configuration and weights `decoders` reads."""
    return Adapter(
        architecture=architecture,
        read_config=text_config,
        weight_map=text_weights,
        hub_ids=hub_ids,
        note="text only",
        tested=TESTED,
    )


LLAMA = _text_only("LlamaForCausalLM", "meta-llama/Llama-3.1-8B-Instruct", "lmsys/vicuna-7b-v1.5")
MISTRAL = _text_only("MistralForCausalLM", "mistralai/Mistral-7B-Instruct-v0.2")
QWEN2 = _text_only("Qwen2ForCausalLM", "Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct")
QWEN3 = _text_only("Qwen3ForCausalLM", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B")
