"""HookedVLM: a vision-language model with HookedTransformer's names, built from our own components.

The text decoder's hooks lie at the root as in HookedTransformer, the tower's under `vision.`, the projector's
under `connector.`. Text-only checkpoints load as the same class without a tower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from veena_lens import checkpoints
from veena_lens.components.block import Block, Embed, Unembed
from veena_lens.components.context import Context
from veena_lens.components.kv_cache import KVCache
from veena_lens.components.norms import make_norm
from veena_lens.components.rotary import LayerRotary
from veena_lens.config import HookedVLMConfig
from veena_lens.images.layout import image_runs, layout_of, pack_features
from veena_lens.inputs import MultimodalInputs
from veena_lens.model.attention_rows import Attending, AttentionRows
from veena_lens.model.edits import Intervening
from veena_lens.model.forward import PassSpan, next_token_targets, resolve_layer, run_blocks, scatter_features
from veena_lens.model.generation import Generation, end_tokens
from veena_lens.model.hooks import Hooking
from veena_lens.model.text import TextInterface, bare_inputs, require_prompt_fits
from veena_lens.model.weights import StackedWeights
from veena_lens.vision import make_tower
from veena_lens.vision.connector import TowerOutput, make_connector
from veena_lens.vision.qwen import DeepstackMerger

Deepstack: TypeAlias = dict[int, Float[Tensor, "batch pos d_model"]]


class HookedVLM(Intervening, Attending, Generation, StackedWeights, TextInterface, Hooking):
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
        self._applied, self._run = [], None
        self._rows: AttentionRows | None = None
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

    def _as_inputs(
        self, input: Any, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> MultimodalInputs:
        """Prepared inputs, bare tokens, or raw text as inputs on the model's device."""
        if isinstance(input, MultimodalInputs):
            if attention_mask is not None or position_ids is not None:
                raise ValueError("MultimodalInputs carry their own mask and positions; do not pass others.")
            inputs = input.to(self.embed.weight.device)
        else:
            if isinstance(input, str) or (isinstance(input, (list, tuple)) and input and isinstance(input[0], str)):
                rows = self._encode(input)
                length, pad = max(map(len, rows)), self.pad_token_id
                attention_mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
                input = torch.tensor([[pad] * (length - len(r)) + r for r in rows])
            inputs = bare_inputs(self.cfg, self.tokenizer, input, attention_mask, position_ids).to(
                self.embed.weight.device
            )
        require_prompt_fits(self.cfg, inputs)
        return inputs

    def _remember_inputs(self, args: Sequence[Any], kwargs: dict[str, Any]) -> MultimodalInputs | None:
        """The inputs of a coming forward, prepared once so that a cache can keep them; None for a residual."""
        if kwargs.get("start_at_layer") is not None:
            given = kwargs.get("tokens")
            return given if isinstance(given, MultimodalInputs) else None
        if not args:
            return None
        return self._as_inputs(args[0], kwargs.pop("attention_mask", None), kwargs.pop("position_ids", None))

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
        if start_at_layer is not None:
            start = resolve_layer(start_at_layer, n, "start_at_layer") or 0
            inputs = self._inputs_of_residual(input, tokens, attention_mask, position_ids)
            return self._finish(inputs, input, start, stop, return_type, loss_per_token)
        inputs = self._as_inputs(input, attention_mask, position_ids)
        return self._finish(inputs, None, 0, stop, return_type, loss_per_token)

    def forward_hf(self, **outputs: Any) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits for a Hugging Face processor's tensors: equals Hugging Face's `model(**outputs).logits`."""
        return self(self.inputs_from_hf(**outputs))

    def _finish(
        self,
        inputs: MultimodalInputs,
        resid: Tensor | None,
        start: int,
        stop: int | None,
        return_type: str | None,
        loss_per_token: bool,
    ) -> Any:
        with self._running(PassSpan(inputs, 0, inputs.shape[1])) as run:
            if resid is None:
                resid, deepstack = self._embed(inputs)
            else:
                deepstack = self.deepstack_of(inputs) if start <= self.cfg.n_deepstack else {}
            context = self._context(run, None, deepstack=deepstack)
            resid = run_blocks(self.blocks, resid, context, start, stop)
            if stop is not None:
                return resid
            if return_type is None:
                return None
            logits = self._unembed(context.with_deepstack(self.cfg.n_layers, resid))
        if return_type == "logits":
            return logits
        loss = self._loss(logits, inputs, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def _forward_chunk(
        self,
        inputs: MultimodalInputs,
        run: PassSpan,
        cache: KVCache | None,
        tokens: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Float[Tensor, "batch one d_vocab"]:
        """Logits of the last position of a prompt, or of one further chunk of tokens, through a cache."""
        with self._running(run):
            resid, deepstack = self._embed(inputs) if tokens is None else (self.hook_embed(self.embed(tokens)), {})
            context = self._context(run, cache, position_ids, deepstack)
            resid = run_blocks(self.blocks, resid, context)
            return self._unembed(context.with_deepstack(self.cfg.n_layers, resid)[:, -1:])

    def embed_inputs(self, inputs: MultimodalInputs) -> Float[Tensor, "batch pos d_model"]:
        """The merged sequence that enters block 0: token embeddings with image features scattered in."""
        return self._embed(inputs)[0]

    def _embed(self, inputs: MultimodalInputs) -> tuple[Float[Tensor, "batch pos d_model"], Deepstack]:
        """The merged sequence, and what later layers add to it."""
        embeds = self.embed(inputs.tokens)
        seen = self._see(inputs)
        if seen is None:
            return self.hook_embed(embeds), {}
        features = self._connect(seen, inputs)
        deepstack = self._deepstack(seen, inputs)
        return self.hook_embed(scatter_features(embeds, inputs.image_mask, features)), deepstack

    def _see(self, inputs: MultimodalInputs) -> TowerOutput | None:
        """What the tower makes of the images; None without images."""
        if inputs.pixel_values is None:
            return None
        return self.vision(inputs.pixel_values.to(self.vision.patch_embed.weight.device), inputs.crop_shapes)

    def image_features(self, inputs: MultimodalInputs) -> Float[Tensor, "n_image_tokens d_model"] | None:
        """What the tower and the connector make of the images, row after row; None without images."""
        seen = self._see(inputs)
        return None if seen is None else self._connect(seen, inputs)

    def _connect(self, seen: TowerOutput, inputs: MultimodalInputs) -> Float[Tensor, "n_image_tokens d_model"]:
        return self.hook_image_features(self._pack(self.connector(seen.features), inputs))

    def deepstack_of(self, inputs: MultimodalInputs) -> Deepstack:
        """Layer -> what is added at its input, zero away from the image tokens; empty without deep-stack."""
        seen = self._see(inputs) if self.cfg.n_deepstack else None
        return {} if seen is None else self._deepstack(seen, inputs)

    def _deepstack(self, seen: TowerOutput, inputs: MultimodalInputs) -> Deepstack:
        out = {}
        for i, inner in enumerate(seen.inner[: self.cfg.n_deepstack]):
            merger: Any = self.deepstack[i]
            out[i + 1] = self.scatter_deepstack(merger.hook_out(self._pack(merger(inner), inputs)), inputs)
        return out

    def scatter_deepstack(
        self, features: Float[Tensor, "n_image_tokens d_model"], inputs: MultimodalInputs
    ) -> Float[Tensor, "batch pos d_model"]:
        """Features in the places of their tokens, zeros elsewhere."""
        return scatter_features(features.new_zeros(*inputs.shape, features.shape[-1]), inputs.image_mask, features)

    def _pack(
        self, features: Float[Tensor, "crop pos d_model"], inputs: MultimodalInputs
    ) -> Float[Tensor, "n_image_tokens d_model"]:
        """Features of images in the order of the image tokens that they fill."""
        return pack_features(self.cfg, features, inputs, getattr(self, "image_newline", None))

    def _unembed(self, resid: Tensor) -> Float[Tensor, "batch pos d_vocab"]:
        return self.unembed(self.ln_final(resid.to(self.ln_final.weight.device)))

    def _context(
        self,
        run: PassSpan,
        cache: KVCache | None,
        position_ids: Tensor | None = None,
        deepstack: Deepstack | None = None,
    ) -> Context:
        """What the blocks of this pass share."""
        positions = run.inputs.position_ids if position_ids is None else position_ids
        mask = run.inputs.attention_mask
        n_past = 0
        if cache is not None:
            n_past = cache.length
            fresh = mask if n_past == 0 else mask.new_ones(len(mask), run.stop - run.start)
            mask = cache.extend_mask(fresh)
        if self._rows is not None:
            self._rows.begin(run)
        return Context(
            key_mask=mask,
            n_past=n_past,
            n_new=run.stop - run.start,
            rotary=self._rotary.tables(positions, self.embed.weight.dtype),
            kv_cache=cache,
            windows=self.cfg.window,
            bias=self._bias if self._applied else lambda layer: None,
            rows=self._rows,
            deepstack=deepstack or {},
            blocks=image_runs(self.cfg, run.inputs) if n_past == 0 else None,
        )

    @contextmanager
    def _running(self, run: PassSpan) -> Iterator[PassSpan]:
        """Interventions resolve their positions against the pass that runs."""
        if run.is_prefill:
            self._check_reach(run)
        before, self._run = self._run, run
        try:
            yield run
        finally:
            self._run = before

    def _inputs_of_residual(
        self, resid: Any, tokens: Any, mask: Tensor | None, positions: Tensor | None
    ) -> MultimodalInputs:
        if not isinstance(resid, Tensor) or resid.ndim != 3 or resid.shape[-1] != self.cfg.d_model:
            shape = list(resid.shape) if isinstance(resid, Tensor) else type(resid).__name__
            raise ValueError(f"start_at_layer takes a residual [batch pos {self.cfg.d_model}] as input, not {shape}.")
        if tokens is None and self.cfg.bidirectional_images:
            raise ValueError(
                "start_at_layer: tokens of an image read each other in both directions in this model, so pass the "
                "inputs that the residual came from as tokens=."
            )
        if tokens is None:  # which tokens does not matter past the embedding; that none is a pad does
            tokens = torch.zeros(resid.shape[:2], dtype=torch.long, device=resid.device)
            mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        inputs = self._as_inputs(tokens, mask, positions)
        if inputs.shape != resid.shape[:2]:
            raise ValueError(f"The residual is {list(resid.shape[:2])} but its tokens are {list(inputs.shape)}.")
        return inputs

    def _loss(self, logits: Tensor, inputs: MultimodalInputs, per_token: bool) -> Tensor:
        """Next-token cross-entropy over text targets: neither images nor pads count."""
        targets, counted = next_token_targets(
            inputs.tokens, inputs.attention_mask & ~inputs.image_mask, inputs.attention_mask
        )
        targets, counted = targets.to(logits.device), counted.to(logits.device)
        safe = torch.where(counted, targets, torch.zeros_like(targets))
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), safe, reduction="none") * counted
        return losses if per_token else losses.sum() / counted.sum()

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
