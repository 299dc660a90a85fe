"""HookedVLM: a vision-language model with HookedTransformer's names, built from our own components.

The text decoder's hooks lie at the root as in HookedTransformer, the tower's under `vision.`, the projector's
under `connector.`. Text-only checkpoints load as the same class without a tower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from veena_lens import checkpoints
from veena_lens.components.block import Block, Embed, Unembed
from veena_lens.components.norms import make_norm
from veena_lens.components.rotary import LayerRotary
from veena_lens.config import HookedVLMConfig
from veena_lens.images.layout import layout_of
from veena_lens.inputs import MultimodalInputs
from veena_lens.model.attention_rows import Attending
from veena_lens.model.edits import EditStack, Frame, intervene
from veena_lens.model.forward import (
    Deepstack,
    connect,
    deepstack_features,
    embed,
    forward,
    last_logits,
    next_token_loss,
    residual_state,
    resolve_layer,
    run_tower,
    scattered,
    unembed,
)
from veena_lens.model.generation import Generation, end_tokens
from veena_lens.model.hooks import Hooking
from veena_lens.model.span import PassSpan
from veena_lens.model.text import TextInterface, as_inputs, inputs_of_residual
from veena_lens.model.weights import StackedWeights
from veena_lens.vision import make_tower
from veena_lens.vision.connector import make_connector
from veena_lens.vision.qwen import DeepstackMerger


class HookedVLM(Attending, Generation, StackedWeights, TextInterface, Hooking):
    """A native multimodal model with named, live hook points.

    `HookedVLM.from_pretrained("tiny-llava-emotion")` loads an embedded checkpoint, a folder or a hub id;
    `HookedVLM(cfg)` makes a random one. Fields: cfg, tokenizer, processor, generation_config (None without).
    """

    cfg: HookedVLMConfig

    def __init__(self, cfg: HookedVLMConfig, tokenizer: Any = None, processor: Any = None) -> None:
        super().__init__()
        self.cfg, self.tokenizer, self.processor = cfg, tokenizer, processor
        self.generation_config: Any = None
        self.adapter: Any = None
        self.device_map: dict[str, Any] | None = None
        self._edits = EditStack()
        if cfg.vision is not None and cfg.connector is not None:
            self.vision = make_tower(cfg.vision)
            self.connector = make_connector(cfg.connector)
            self.hook_image_features = HookPoint()
            if layout_of(cfg).has_newline:
                self.image_newline = nn.Parameter(torch.zeros(cfg.d_model))
            if cfg.vision.deepstack_layers:
                n = len(cfg.vision.deepstack_layers)
                reach = (i < cfg.n_deepstack for i in range(n))
                self.deepstack = nn.ModuleList(DeepstackMerger(cfg.vision, cfg.connector, live) for live in reach)
        self.embed = Embed(cfg.d_vocab, cfg.d_model, cfg.scales_embeddings)
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(Block(cfg, layer, has_rotary=True) for layer in range(cfg.n_layers))
        self.ln_final = make_norm(cfg)
        self.unembed = Unembed(
            cfg.d_vocab, cfg.d_model, self.embed if cfg.tie_word_embeddings else None, cfg.unembed_bias
        )
        self._rotary = LayerRotary(cfg)
        self.setup()
        self.eval()
        self._refresh_cfg()

    # --- loading ---------------------------------------------------------------------------------------
    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: Any = None,
        casts: str = "hf",
        revision: str | None = None,
        lora: str | Path | None = None,
    ) -> HookedVLM:
        """An embedded checkpoint by name, a folder, or a hub id, with its processor where it has one.

        dtype: None keeps what is stored. device: None is the CPU. device_map="auto" spreads the blocks over the
        machine's GPUs. casts="none" computes norms in the model's dtype instead of rounding as Hugging Face does.
        lora: a folder or hub id of a LoRA adapter in peft's files, merged into the weights; a folder that holds an
        adapter and no model may be given as `name` itself, and its base is loaded. Weights in 4 or 8 bits
        (bitsandbytes, torchao) stay packed. Weights stream into an empty model: peak memory is about one copy.
        Raises: FileNotFoundError; ValueError for an unknown architecture, or weights that do not fit (all listed).
        """
        if lora is None and checkpoints.is_lora_folder(name):
            name, lora = checkpoints.base_of(name), name
        tuned = None if lora is None else checkpoints.open_lora(lora)
        checkpoint = checkpoints.open_checkpoint(name, dtype=dtype, casts=casts, revision=revision)
        with torch.device("meta"):
            model = cls(checkpoint.cfg)
        checkpoints.fill_from_files(model, checkpoint, dtype=dtype, device=device, device_map=device_map, lora=tuned)
        processor = checkpoints.load_processor(checkpoint.path)
        return model._loaded(
            checkpoint.adapter, processor, checkpoints.load_generation_config(checkpoint.path, checkpoint.hf_config)
        )

    @classmethod
    def from_hf(cls, hf_model: Any, processor: Any = None, *, copy: bool = False, casts: str = "hf") -> HookedVLM:
        """A Hugging Face model that is in memory, converted; keeps its dtype and device and shares its storage
        unless `copy`. The processor (or a tokenizer, for text models) is optional.

        Raises: ValueError for an unknown architecture."""
        adapter = checkpoints.find_adapter(type(hf_model).__name__)
        cfg = replace(adapter.read_config(hf_model.config), architecture=adapter.architecture, casts=casts)
        cfg = replace(cfg, model_name=getattr(hf_model.config, "_name_or_path", "") or "")
        with torch.device("meta"):
            model = cls(cfg)
        checkpoints.fill_from_state_dict(model, hf_model.state_dict(), adapter, cfg, copy=copy)
        if cfg.scales_embeddings:  # the factor as their model holds it, rounded to the dtype that it was made in
            model.embed.scale = float(hf_model.get_input_embeddings().embed_scale)
        return model._loaded(adapter, processor, getattr(hf_model, "generation_config", None))

    def _loaded(self, adapter: Any, processor: Any, generation_config: Any) -> HookedVLM:
        """Attach what belongs to a checkpoint beside its weights."""
        self.adapter, self.generation_config = adapter, generation_config
        self.setup()  # quantised weights came in modules of their own
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.processor = processor
        self.eval()
        self._refresh_cfg()
        return self

    def to_hf_state_dict(self) -> dict[str, Tensor]:
        """Every weight under the name and in the shape that Hugging Face's model of this architecture has.

        Raises: ValueError for a model that came from no checkpoint."""
        if self.adapter is None:
            raise ValueError("to_hf_state_dict: this model came from no Hugging Face checkpoint.")
        return checkpoints.to_hf_state_dict(self, self.adapter, self.cfg)

    def _refresh_cfg(self) -> None:
        """dtype and device of the configuration follow the weights."""
        weight = self.embed.weight
        self.cfg = replace(self.cfg, dtype=weight.dtype, device=weight.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        out = super()._apply(fn, recurse)
        self._refresh_cfg()
        return out

    # --- inputs ----------------------------------------------------------------------------------------
    def prepare(
        self, text: Any = None, images: Any = None, *, chat: bool = True, answer: Any = None, messages: Any = None
    ) -> MultimodalInputs:
        """Text and images as inputs, through the checkpoint's own processor.

        text: a prompt or a list of prompts; images: for one prompt an image (PIL, path) or several, for a list
        one list a prompt (or one image each). chat=True wraps the prompt in the chat template; chat=False
        takes it raw, holding the model's image token itself. answer: a lead-in or teacher-forced answer, with
        its span. messages: a conversation in Hugging Face's format instead of text.
        Raises: ValueError for images that do not match their placeholders, no template, or a prompt too long.
        """
        inputs = checkpoints.prepare(
            self.processor, self.cfg, text, images, chat=chat, answer=answer, messages=messages
        )
        return self._placed(inputs)

    def inputs_from_hf(self, **outputs: Any) -> MultimodalInputs:
        """Whatever a Hugging Face processor emits as inputs; padding side and position ids are kept.

        Raises: ValueError for unknown keys, missing images, or padding without a mask."""
        inputs = checkpoints.inputs_from_hf(self.cfg, self.tokenizer, **outputs)
        return self._placed(inputs)

    def _placed(self, inputs: MultimodalInputs) -> MultimodalInputs:
        """Inputs on the model's device, knowing which tokens end an answer."""
        ends = end_tokens(self.generation_config)
        return replace(inputs, end_token_ids=ends).to(self.embed.weight.device)

    def as_inputs(
        self, input: Any, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> MultimodalInputs:
        """Return prepared inputs on the model's device, made of bare tokens or raw text where needed.

        input: prepared inputs; tokens [batch pos] or [pos]; a text or a list of texts (no chat template).
        attention_mask, position_ids: [batch pos], of bare tokens only.
        Raises: ValueError for padding without a mask, image tokens without images, a context too long, or a mask
        beside prepared inputs; TypeError for anything else than inputs, tokens or text.
        """
        return as_inputs(self, input, attention_mask, position_ids)

    # --- forward ---------------------------------------------------------------------------------------
    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        *,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        tokens: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Any:
        """Logits [batch pos d_vocab] of prepared inputs, tokens [batch pos] or raw text.

        return_type: "logits", "loss" (mean next-token loss over text targets), "both", or None.
        stop_at_layer=l returns the residual stream that enters block l; start_at_layer=l takes such a residual
        as `input` (with the inputs it came from as `tokens`, where positions, padding, a loss or images whose tokens
        read each other in both directions matter).
        Raises: ValueError for padding without a mask, image tokens without images, or a context too long.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(f"return_type={return_type!r} must be 'logits', 'loss', 'both' or None.")
        n = self.cfg.n_layers
        stop = resolve_layer(stop_at_layer, n, "stop_at_layer")
        start = resolve_layer(start_at_layer, n, "start_at_layer")
        if start is None:
            span, entering = PassSpan.whole(self.as_inputs(input, attention_mask, position_ids)), None
        else:
            span = PassSpan.whole(inputs_of_residual(self, input, tokens, attention_mask, position_ids))
            entering = residual_state(self, span, input, start)
        if stop is not None:
            return forward(self, span, entering=entering, stop=stop)
        if return_type is None:
            forward(self, span, entering=entering, stop=n)
            return None
        logits = forward(self, span, entering=entering)
        if return_type == "logits":
            return logits
        loss = next_token_loss(logits, span.inputs, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def forward_hf(self, **outputs: Any) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits for a Hugging Face processor's tensors: equals Hugging Face's `model(**outputs).logits`."""
        return self(self.inputs_from_hf(**outputs))

    def last_logits(self, inputs: Any) -> Float[Tensor, "batch d_vocab"]:
        """Return the logits of the last real position of each row; the other positions are not unembedded.

        inputs: prepared inputs, tokens [batch pos] or raw text. Hooks of `ln_final` and `unembed` hear one position
        per row; interventions in force act.
        Raises: as `forward`.
        """
        return last_logits(self, self.as_inputs(inputs))

    def unembed_resid(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the logits of a residual stream that left the last block: final norm and unembedding.

        resid: at any number of positions; it is moved to the device of the final norm."""
        return unembed(self, resid)

    def embed_inputs(self, inputs: MultimodalInputs) -> Float[Tensor, "batch pos d_model"]:
        """Return the merged sequence that enters block 0: token embeddings with image features in their places."""
        return embed(self, PassSpan.whole(inputs)).resid

    def image_features(self, inputs: MultimodalInputs) -> Float[Tensor, "n_image_tokens d_model"] | None:
        """Return what the tower and the connector make of the images, row after row; None without images."""
        seen = run_tower(self, inputs)
        return None if seen is None else connect(self, seen, inputs)

    def deepstack_of(self, inputs: MultimodalInputs) -> Deepstack:
        """Return, by layer, what is added at its input, zero away from the image tokens; empty without deep-stack."""
        seen = run_tower(self, inputs) if self.cfg.n_deepstack else None
        return {} if seen is None else deepstack_features(self, seen, inputs)

    def scatter_deepstack(
        self, features: Float[Tensor, "n_image_tokens d_model"], inputs: MultimodalInputs
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return features in the places of their image tokens, zeros elsewhere."""
        return scattered(features, inputs)

    # --- interventions ---------------------------------------------------------------------------------
    def intervene(
        self, interventions: Sequence[Any] | None = None, *, per_row: Sequence[Any] | None = None
    ) -> AbstractContextManager[HookedVLM]:
        """Apply interventions inside a `with` block; `per_row` gives one list per row of the batch.

        An empty list changes nothing; blocks nest, outer interventions acting first.
        Raises: TypeError for what is not an intervention; ValueError for one that does not fit the model.
        """
        return intervene(self, interventions, per_row)

    @property
    def interventions(self) -> tuple[Any, ...]:
        """The interventions in force, outer `with` blocks first."""
        return tuple(applied.intervention for applied in self._edits.applied)

    @property
    def is_untouched(self) -> bool:
        """True where no hook is on a hook point, no intervention is in force and nobody records attention."""
        hooked = any(p._forward_hooks or p._backward_hooks for p in self.hook_dict.values())
        return not (hooked or self.interventions or self._edits.recorder)

    @contextmanager
    def without_interventions(self) -> Iterator[HookedVLM]:
        """Interventions in force, and recorders of attention, rest inside the block; hooks added by hand do not."""
        with self._edits.entered(Frame(hides=True)):
            yield self

    def __repr__(self) -> str:
        cfg = self.cfg
        n = sum(p.numel() for p in self.parameters())
        tower = "no tower" if cfg.vision is None else f"{cfg.vision.kind} tower of {cfg.vision.n_layers} layers"
        where = f"{str(cfg.dtype).removeprefix('torch.')} on {cfg.device}"
        name = cfg.model_name or cfg.architecture or "random weights"
        return (
            f"HookedVLM({name}: {cfg.n_layers} layers, {cfg.n_heads} heads, d_model {cfg.d_model}, {tower}, "
            f"{n:,} parameters, {where}, {len(self._points.canonical_names)} hook points)"
        )
