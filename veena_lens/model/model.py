"""HookedVLM: a vision-language model with HookedTransformer's names, built from our own components.

The decoder's hooks are at the root as in HookedTransformer, the tower's under `vision.`, the projector's under
`connector.`. Text-only checkpoints load as the same class without a tower."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from veena_lens import checkpoints
from veena_lens.activation_cache import ActivationCache
from veena_lens.checkpoints.prompts import with_named_keywords
from veena_lens.components.block import Block, Blocks, Embed, Unembed
from veena_lens.components.hooks import heard, uncompiled
from veena_lens.components.norms import make_norm
from veena_lens.components.rotary import LayerRotary
from veena_lens.config import HookedVLMConfig
from veena_lens.images.layout import layout_of
from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions.base import Intervention
from veena_lens.model import attention_rows, edits, forward, hooks, loading, past, text
from veena_lens.model.attention_rows import AttentionRows
from veena_lens.model.conveniences import HookedTransformerNames, context_alone, refuse_arguments_of_forward
from veena_lens.model.generation import Generating
from veena_lens.model.generation_settings import end_tokens
from veena_lens.model.hooks import HookedRoot
from veena_lens.model.span import PassSpan
from veena_lens.model.text import TextInterface
from veena_lens.model.threads import Turns
from veena_lens.model.weights import StackedWeights
from veena_lens.scores import Scores
from veena_lens.vision import make_tower
from veena_lens.vision.connector import make_connector
from veena_lens.vision.qwen import DeepstackMerger


class HookedVLM(HookedTransformerNames, StackedWeights, TextInterface, Generating, HookedRoot):
    """A native multimodal model with named, live hook points.

    `HookedVLM.from_pretrained("tiny-llava-emotion")` loads an embedded checkpoint, a folder or a hub id;
    `HookedVLM(cfg)` makes a random one. Fields: cfg, tokenizer, processor, generation_config (None without)."""

    cfg: HookedVLMConfig

    def __init__(self, cfg: HookedVLMConfig, tokenizer: Any = None, processor: Any = None) -> None:
        super().__init__()
        self.cfg = replace(cfg, flags=replace(cfg.flags))  # a model's own, which its user may set
        self.tokenizer, self.processor = tokenizer, processor
        self.generation_config: Any = None
        self.adapter: Any = None
        self.device_map: dict[str, Any] | None = None
        self.mapped_files: tuple[Any, ...] = ()  # the files that weights are read from
        self._edits, self._turns = edits.EditStack(), Turns()
        if cfg.vision is not None and cfg.connector is not None:
            self.vision = make_tower(cfg.vision)
            self.connector = make_connector(cfg.connector)
            self.hook_image_features = HookPoint()
            if layout_of(cfg).has_newline:
                self.image_newline = nn.Parameter(torch.zeros(cfg.d_model))
            if cfg.vision.deepstack_layers:
                reach = [i < cfg.n_deepstack for i in range(len(cfg.vision.deepstack_layers))]
                self.deepstack = nn.ModuleList(DeepstackMerger(cfg.vision, cfg.connector, live) for live in reach)
        self.embed = Embed(cfg.d_vocab, cfg.d_model, cfg.scales_embeddings)
        self.hook_embed = HookPoint()
        self.blocks = Blocks(Block(cfg, layer, has_rotary=True) for layer in range(cfg.n_layers))
        self.ln_final = make_norm(cfg)
        tied_to = self.embed if cfg.tie_word_embeddings else None
        self.unembed = Unembed(cfg.d_vocab, cfg.d_model, tied_to, cfg.unembed_bias)
        for block in self.blocks:
            block.alone = partial(context_alone, self)
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
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        device_map: Any = None,
        casts: str = "hf",
        revision: str | None = None,
        lora: str | Path | None = None,
        **of_hooked_transformer: Any,
    ) -> HookedVLM:
        """Load an embedded checkpoint by name, a folder, or a hub id, with its processor where it has one.

        On a CPU weights that need no conversion stay in their files, mapped, which nothing may write to; others stream
            in. Weights in 4 or 8 bits (bitsandbytes, torchao) stay packed.
        dtype: one of torch, or its name ("bfloat16"); None keeps what is stored. device: None is the CPU. device_map:
            "auto" spreads the blocks over the machine's GPUs. revision: of a hub id.
        casts: "hf" rounds norms as Hugging Face does, "none" computes them in the model's dtype.
        lora: a folder or hub id of a LoRA adapter in peft's files, merged into the weights. A folder that holds an
            adapter and no model may be given as `name` itself; its base is loaded.
        of_hooked_transformer: `hf_model` (`from_hf` is called), `tokenizer`, `default_padding_side`,
            `default_prepend_bos`, and `fold_ln=False`, `center_unembed=False` and so on, which is done anyway.
        Raises: FileNotFoundError; ValueError for an unknown architecture, or weights that do not fit (all listed);
        MemoryError for weights that would not fit in free memory; TypeError for an unknown argument.
        """
        return loading.from_pretrained(
            cls,
            name,
            dtype=dtype,
            device=device,
            device_map=device_map,
            casts=casts,
            revision=revision,
            lora=lora,
            further=of_hooked_transformer,
        )

    @classmethod
    def from_hf(cls, hf_model: Any, processor: Any = None, *, copy: bool = False, casts: str = "hf") -> HookedVLM:
        """Convert a Hugging Face model that is in memory, with its dtype and device, and its storage unless `copy`.

        processor: of a text model its tokenizer. casts: as `from_pretrained`. Raises: ValueError for an unknown
        architecture, or weights that are on the meta device or not finite."""
        return loading.from_hf(cls, hf_model, processor, copy, casts)

    def to_hf_state_dict(self) -> dict[str, Tensor]:
        """Return every weight under the name and in the shape that Hugging Face's model of this architecture has.

        Raises: ValueError for a model that came from no checkpoint."""
        if self.adapter is None:
            raise ValueError("to_hf_state_dict: this model came from no Hugging Face checkpoint.")
        return checkpoints.to_hf_state_dict(self, self.adapter, self.cfg)

    def _refresh_cfg(self) -> None:
        """Let dtype and device of the configuration follow the weights."""
        weight = self.embed.weight
        self.cfg = replace(self.cfg, dtype=weight.dtype, device=weight.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        out = super()._apply(fn, recurse)
        self._refresh_cfg()
        return out

    # --- inputs ----------------------------------------------------------------------------------------
    @with_named_keywords
    def prepare(
        self, text: Any = None, images: Any = None, *, chat: bool = True, answer: Any = None, messages: Any = None
    ) -> MultimodalInputs:
        """Make inputs of text and images, through the checkpoint's own processor.

        text: a prompt or a list of them. images: of one prompt an image or several; of a list one list per prompt.
        chat: True wraps the prompt in the chat template; False takes it raw, holding the model's image token itself.
        answer: a lead-in or teacher-forced answer, with its span. messages: a conversation in Hugging Face's format
            instead of text.
        Raises: ValueError for images that do not match their placeholders, no template, or a prompt too long."""
        made = checkpoints.prepare(self.processor, self.cfg, text, images, chat=chat, answer=answer, messages=messages)
        return self._placed(made)

    def inputs_from_hf(self, **outputs: Any) -> MultimodalInputs:
        """Make inputs of whatever a Hugging Face processor emits; padding side and position ids are kept.

        Raises: ValueError for unknown keys, missing images, or padding without a mask."""
        return self._placed(checkpoints.inputs_from_hf(self.cfg, self.tokenizer, **outputs))

    def _placed(self, inputs: MultimodalInputs) -> MultimodalInputs:
        """Return the inputs on the model's device, knowing which tokens end an answer."""
        made = replace(inputs, end_token_ids=end_tokens(self.generation_config))
        return text.outside_inference(made.to(self.embed.weight.device))

    def as_inputs(
        self,
        input: Any,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> MultimodalInputs:
        """Return prepared inputs on the model's device, made of bare tokens or raw text where needed.

        input: prepared inputs; tokens [batch pos] or [pos]; a text or a list of texts (no chat template).
        attention_mask, position_ids: [batch pos], of bare tokens only; without a mask the pads that a row begins or
            ends with are masked. prepend_bos, padding_side: of raw text, as `to_tokens` takes them.
        Raises: ValueError for image tokens without images, a context too long, or a mask beside prepared inputs;
        TypeError for anything else than inputs, tokens or text.
        """
        how: dict[str, Any] = dict(prepend_bos=prepend_bos, padding_side=padding_side)
        return text.as_inputs(self, input, attention_mask, position_ids, **how)

    # --- forward ---------------------------------------------------------------------------------------
    @uncompiled
    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        *,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        tokens: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_kv_cache: Any = None,
        **unknown: Any,
    ) -> Any:
        """Return logits [batch pos d_vocab], a loss or the residual stream that enters a block.

        input: prepared inputs, tokens [batch pos], raw text; with start_at_layer a residual [batch pos d_model].
        return_type: "logits", "loss" (next-token loss over text targets), "both" (a named tuple), or None: the
            unembedding is left out.
        loss_per_token: the loss of each position instead of their mean.
        prepend_bos, padding_side: of raw text, as `to_tokens` takes them.
        start_at_layer: the block that `input` enters; `tokens` are then the inputs it came from, needed where
            positions, padding, a loss, or images whose tokens read each other in both directions matter.
        stop_at_layer: the block whose input is returned, 0 .. n_layers. attention_mask, position_ids: of bare tokens.
        past_kv_cache: keys and values of earlier positions, a TransformerLensKeyValueCache of
            transformer_lens.cache.key_value_cache.
        Raises: ValueError for image tokens without images, or a context too long; TypeError for an unknown argument.
        """
        if unknown:
            refuse_arguments_of_forward(unknown)
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(f"return_type={return_type!r} must be 'logits', 'loss', 'both' or None.")
        n = self.cfg.n_layers
        stop = forward.resolve_layer(stop_at_layer, n, "stop_at_layer")
        start = forward.resolve_layer(start_at_layer, n, "start_at_layer")
        of_text: dict[str, Any] = dict(prepend_bos=prepend_bos, padding_side=padding_side)
        with past.taken(self, past_kv_cache) as cache:
            if start is None:
                inputs = text.as_inputs(self, input, attention_mask, position_ids, **of_text)
            else:
                inputs = text.inputs_of_residual(self, input, tokens, attention_mask, position_ids)
            span = PassSpan.whole(past.after(self, cache, inputs, position_ids))
            entering = None if start is None else forward.residual_state(self, span, input, start)
            if stop is not None:
                return forward.forward(self, span, entering=entering, stop=stop, cache=cache)
            logits = forward.forward(self, span, entering=entering, unembeds=return_type is not None, cache=cache)
        if return_type in ("logits", None):
            return logits if return_type else None
        loss = forward.next_token_loss(logits, span.inputs, loss_per_token)
        return loss if return_type == "loss" else forward.Output(logits, loss)

    def forward_hf(self, **outputs: Any) -> Float[Tensor, "batch pos d_vocab"]:
        """Return logits for a Hugging Face processor's tensors: equals Hugging Face's `model(**outputs).logits`."""
        return self(self.inputs_from_hf(**outputs))

    def last_logits(self, inputs: Any) -> Float[Tensor, "batch d_vocab"]:
        """Return the logits of the last real position of each row; the other positions are not unembedded.

        inputs: as `forward` takes them. Hooks of `ln_final` and `unembed` hear one position per row."""
        return forward.last_logits(self, self.as_inputs(inputs))

    def unembed_resid(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the logits of a residual stream that left the last block: final norm and unembedding.

        resid: at any number of positions; it is moved to the device of the final norm."""
        return forward.unembed(self, resid)

    def embed_inputs(self, inputs: MultimodalInputs) -> Float[Tensor, "batch pos d_model"]:
        """Return the merged sequence that enters block 0: token embeddings with image features in their places."""
        return forward.embed(self, PassSpan.whole(inputs)).resid

    def image_features(self, inputs: MultimodalInputs) -> Float[Tensor, "n_image_tokens d_model"] | None:
        """Return what the tower and the connector make of the images, row after row; None without images."""
        seen = forward.run_tower(self, inputs)
        return None if seen is None else forward.connect(self, seen, inputs)

    def deepstack_of(self, inputs: MultimodalInputs) -> forward.Deepstack:
        """Return, by layer, what is added at its input, zero away from the image tokens; empty without deep-stack."""
        return forward.deepstack_of(self, inputs)

    def scatter_deepstack(
        self, features: Float[Tensor, "n_image_tokens d_model"], inputs: MultimodalInputs
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return features in the places of their image tokens, zeros elsewhere."""
        return forward.scattered(features, inputs)

    # --- interventions and attention -------------------------------------------------------------------
    def intervene(
        self,
        interventions: Sequence[Any] | None = None,
        *,
        per_row: Sequence[Any] | None = None,
        allow_other_model: bool = False,
    ) -> AbstractContextManager[HookedVLM]:
        """Apply interventions in a `with` block, to passes of this thread. [] changes nothing; outer blocks act first.

        interventions: a list, a Circuit, or a single one. per_row: one list per row of the batch instead.
        allow_other_model: True takes a Circuit of a model of another name and the same sizes.
        Raises: TypeError for what is not an intervention; ValueError for one that does not fit the model.
        """
        return edits.intervene(self, interventions, per_row, allow_other_model)

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """Return the interventions in force, outer `with` blocks first."""
        return tuple(applied.intervention for applied in self._edits.applied)

    @property
    def is_untouched(self) -> bool:
        """Return True where this thread has no hook on a hook point, no intervention and no recorder of attention."""
        return not (any(map(heard, self.hook_dict.values())) or self.interventions or self._edits.recorder)

    @contextmanager
    def without_interventions(self) -> Iterator[HookedVLM]:
        """Let interventions in force, and recorders of attention, rest inside a `with` block; hooks stay."""
        with self._edits.entered(edits.Frame(hides=True)):
            yield self

    def attention(
        self,
        inputs: Any,
        queries: Any = "last",
        keys: Any = "image",
        layers: Any = None,
        heads: Any = None,
    ) -> Scores:
        """Return attention weights of chosen query rows: Scores over (batch, layer, head, query, key).

        Only these rows are computed and every layer stays fused, so memory is that of a plain forward.
        queries, keys: words ("last", "query", "image", "generated", "all", joined with +), positions, a slice,
            a mask, a Box of pixels or a Tile; `.meta` of the result holds their positions.
        inputs: as `forward` takes them. layers, heads: which; None for all. Interventions in force act.
        Raises: ValueError for an empty selection, or for image keys without an image."""
        return attention_rows.attention(self, inputs, queries, keys, layers, heads)

    def record_attention(
        self,
        queries: Any = "generated",
        keys: Any = "image",
        layers: Any = None,
        heads: Any = None,
    ) -> AbstractContextManager[AttentionRows]:
        """Collect attention rows of whatever runs inside a `with` block, `generate` too; read `.scores()` after it.

        The arguments are those of `attention`; "generated" queries are the tokens being generated.
        Raises: ValueError, on entering, for a layer or a head that does not exist, or none."""
        return attention_rows.record_attention(self, queries, keys, layers, heads)

    @contextmanager
    def recording(self, rows: AttentionRows) -> Iterator[AttentionRows]:
        """Let `rows` read the attention of whatever runs inside a `with` block."""
        with self._edits.entered(edits.Frame(recorder=rows)):
            yield rows

    # --- caches and generation -------------------------------------------------------------------------
    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: Any = None,
        device: Any = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        return_cache_object: bool = True,
        max_bytes: int | str | None = "auto",
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run forward; return its output, and an ActivationCache of hook points.

        model_args, model_kwargs: those of `forward`.
        names_filter: None (all but the large split inputs), a name, a list of names, or a predicate.
        device: of the stored activations; None: where they are computed. remove_batch_dim: a single row without axis.
        incl_bwd: run backward on the output (a scalar: return_type="loss"), store gradients under "..._grad".
        pos_slice: int, slice, (start, stop) or list; slices positions of decoder activations (query positions
            of scores and patterns), never heads, never images.
        reset_hooks_end, clear_contexts: as transformer_lens. return_cache_object: False for a plain dictionary.
        max_bytes: the most that the cache may hold, estimated first; "auto" is what is free, None anything.
        Raises: ValueError for an unknown name, and for remove_batch_dim with more than one row; MemoryError with what
            would fit."""
        caching = dict(names_filter=names_filter, device=device, remove_batch_dim=remove_batch_dim, pos_slice=pos_slice)
        caching["max_bytes"] = max_bytes
        ending = dict(incl_bwd=incl_bwd, reset_hooks_end=reset_hooks_end, clear_contexts=clear_contexts)
        out, cache, inputs = hooks.run_with_cache(self, model_args, model_kwargs, **caching, **ending)
        if not return_cache_object:
            return out, cache
        return out, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim, inputs=inputs)

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
