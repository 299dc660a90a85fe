"""Define the configuration of a native model, which an adapter reads from a Hugging Face config.

The dataclasses are frozen, use TransformerLens's field names and are checked when created, so that a bad value stops a
load before any weight is read. Nothing here imports torch, so that `veena-lens models` and `--help` stay quick.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from veena_lens.config_parts import Printed, require_numbers
from veena_lens.flags import Flags, Settable, has_settable_flags

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"]
Casts = Literal["hf", "none"]
ACTIVATIONS: tuple[str, ...] = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu")


@dataclass(frozen=True, kw_only=True, repr=False)
class RopeConfig(Printed):
    """Configure rotary positions.

    theta: the base.
    rope_type: the scaling rule.
    scaling: the numbers of the rule under Hugging Face's names (factor, low_freq_factor, ...).
    sections: for multimodal rotary positions, the frequencies of the (time, height, width) streams.
    interleaved: whether the streams alternate (Qwen3-VL) or follow one another (Qwen2-VL).

    Raises: ValueError for an unknown rule or a base that is not positive."""

    theta: float = 10_000.0
    rope_type: str = "default"
    scaling: tuple[tuple[str, Any], ...] = ()
    sections: tuple[int, ...] | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        known = ("default", "linear", "dynamic", "llama3", "yarn")
        if self.rope_type not in known:
            raise ValueError(f"rope_type {self.rope_type!r} is not supported; supported: {', '.join(known)}.")
        require_numbers(self)
        if self.theta <= 0:
            raise ValueError(f"RopeConfig: theta={self.theta} must be positive.")
        for name, value in self.scaling:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                may_be_zero = name.startswith("mscale")
                if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
                    raise ValueError(f"RopeConfig: {name}={value} must be a positive finite number.")

    @property
    def parameters(self) -> dict[str, Any]:
        """Return the scaling rule's numbers as a dictionary."""
        return dict(self.scaling)


@dataclass(frozen=True, kw_only=True, repr=False)
class TransformerConfig(Printed):
    """Configure a stack of blocks, of text or vision, under TransformerLens's names.

    norm_eps: the epsilon of the norms.
    qkv_bias, attn_out_bias, mlp_bias: which linear maps have a bias.
    gated_mlp: act(gate(x)) * up(x) instead of act(up(x)).
    qk_norm: an RMS norm over the head width of queries and keys, before rotary.
    post_norms: Gemma's norms after attention and MLP, before the output is added to the residual.
    norm_weight_plus_one: RMS norms multiply by 1 + weight, in float32, and cast at the end (Gemma).
    query_scalar: scores are multiplied by query_scalar ** -0.5. None: by d_head ** -0.5.

    Raises: ValueError for values that do not fit together."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    act_fn: Activation
    normalization_type: Literal["RMS", "LN"]
    norm_eps: float
    n_key_value_heads: int = 0  # 0: as many as query heads
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_weight_plus_one: bool = False
    query_scalar: float | int | None = None
    casts: Casts = "hf"

    def __post_init__(self) -> None:
        require_numbers(self)
        name = type(self).__name__
        if self.norm_eps < 0:
            raise ValueError(f"{name}: norm_eps={self.norm_eps} must not be negative.")
        for size in ("d_model", "n_heads", "d_head", "d_mlp"):
            if getattr(self, size) < 1:
                raise ValueError(f"{name}: {size}={getattr(self, size)} must be at least 1.")
        if self.n_layers < 0:
            raise ValueError(f"{name}: n_layers={self.n_layers} must not be negative.")
        if not self.n_key_value_heads:
            object.__setattr__(self, "n_key_value_heads", self.n_heads)
        if self.n_heads % self.n_key_value_heads:
            raise ValueError(
                f"{name}: n_heads={self.n_heads} must be a multiple of n_key_value_heads={self.n_key_value_heads}."
            )
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"{name}: act_fn={self.act_fn!r} is unknown; known: {', '.join(ACTIVATIONS)}.")
        if self.casts not in ("hf", "none"):
            raise ValueError(f"{name}: casts={self.casts!r} must be 'hf' or 'none'.")
        if (self.post_norms or self.norm_weight_plus_one) and self.normalization_type != "RMS":
            raise ValueError(f"{name}: post_norms and norm_weight_plus_one go with normalization_type='RMS'.")
        if self.query_scalar is not None and self.query_scalar <= 0:
            raise ValueError(f"{name}: query_scalar={self.query_scalar} must be positive.")

    @property
    def score_scale(self) -> float:
        """Return the factor of products of queries and keys."""
        return (self.d_head if self.query_scalar is None else self.query_scalar) ** -0.5


@dataclass(frozen=True, kw_only=True, repr=False)
class VisionConfig(TransformerConfig):
    """Configure a vision tower.

    n_layers: the layers that reach the features and have hooks.
    n_unused_layers: the layers after `feature_layers`, whose weights are kept for export only.
    merge_size: squares of this many patches per side become what one token reads.

    CLIP and SigLIP towers:
    feature_layers: indices of the L + 1 hidden states (0 is the input of block 0), non-negative.
    drop_class_token: LLaVA's "default" strategy.
    has_pooling_head: SigLIP's unused head.
    has_last_norm: a norm of the features after the last block.
    positions_by_fraction: an image may be smaller than its square; a patch's position follows from its fraction of the
        image's height and width (Idefics3).
    averages_patches: the patches of a square are averaged instead of concatenated (Gemma-3).

    Qwen towers, which take images of any size (`image_size` 0):
    temporal_patch_size: frames per crop.
    rope_theta: the base of the rotary positions over rows and columns.
    position_grid: the side of a learned table that is resampled to each image. 0: none.
    deepstack_layers: blocks whose outputs are added in the decoder's first layers.
    window_side: a patch attends only inside its window of this many squares per side. 0: to the whole image.
    full_attention_layers: the blocks without windows.

    Raises: ValueError for values that do not fit together."""

    kind: Literal["clip", "siglip", "qwen"]
    image_size: int  # pixels; 0: any
    patch_size: int  # pixels
    n_channels: int = 3
    n_unused_layers: int = 0
    feature_layers: tuple[int, ...] = ()
    drop_class_token: bool = False
    has_pooling_head: bool = False
    has_last_norm: bool = False
    positions_by_fraction: bool = False
    averages_patches: bool = False
    temporal_patch_size: int = 1
    merge_size: int = 1
    patch_bias: bool = False
    rope_theta: float | None = None
    position_grid: int = 0
    deepstack_layers: tuple[int, ...] = ()
    window_side: int = 0  # squares that one token reads; 0: every block attends to the whole image
    full_attention_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_theta is not None and self.rope_theta <= 0:
            raise ValueError(f"VisionConfig: rope_theta={self.rope_theta} must be positive.")
        if self.window_side < 0:
            raise ValueError(f"VisionConfig: window_side={self.window_side} must not be negative (0: no windows).")
        for size in ("patch_size", "temporal_patch_size", "merge_size"):
            if getattr(self, size) < 1:
                raise ValueError(f"VisionConfig: {size}={getattr(self, size)} must be at least 1.")
        if self.rope_theta is not None and self.d_head % 4:
            raise ValueError(f"VisionConfig: d_head={self.d_head} must be a multiple of 4 for rotary rows and columns.")
        for layer in self.deepstack_layers:
            if not 0 <= layer < self.n_layers:
                raise ValueError(f"VisionConfig: deep-stack layer {layer} is outside the tower's {self.n_layers}.")
        if self.takes_any_size:
            return
        if self.image_size < self.patch_size:
            raise ValueError(
                f"VisionConfig: image_size={self.image_size} is smaller than one patch ({self.patch_size} pixels)."
            )
        if self.grid[0] % self.merge_size:
            raise ValueError(
                f"VisionConfig: {self.grid[0]} patches per side (image_size={self.image_size}, patch_size="
                f"{self.patch_size}) must be a multiple of merge_size={self.merge_size}."
            )
        for layer in self.feature_layers:
            if not 0 <= layer <= self.n_layers:
                raise ValueError(
                    f"VisionConfig: feature layer {layer} is outside the tower's {self.n_layers + 1} hidden states."
                )

    @property
    def takes_any_size(self) -> bool:
        """Say whether the number of patches depends on the size of the image."""
        return self.image_size == 0

    def is_windowed(self, layer: int) -> bool:
        """Return True if the patches of a block attend only inside their windows."""
        return self.window_side > 0 and layer not in self.full_attention_layers

    @property
    def patch_width(self) -> int:
        """Return the numbers in one patch: channels, frames, rows and columns of pixels."""
        return self.n_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def grid(self) -> tuple[int, int]:
        """Return (height, width) in patches of one crop, if all have one size."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def token_grid(self) -> tuple[int, int]:
        """Return (height, width) in tokens of one crop, if all have one size."""
        return self.grid[0] // self.merge_size, self.grid[1] // self.merge_size

    @property
    def has_class_token(self) -> bool:
        return self.kind == "clip"

    @property
    def n_positions(self) -> int:
        """Return the number of positions in the tower: patches and, for CLIP, the class token at position 0."""
        return self.grid[0] * self.grid[1] + int(self.has_class_token)

    @property
    def n_features(self) -> int:
        """Return the number of features per crop: positions (or merged squares), without the class token if it is
        dropped."""
        return self.n_positions // self.merge_size**2 - int(self.drop_class_token)


@dataclass(frozen=True, kw_only=True, repr=False)
class ConnectorConfig(Printed):
    """Configure the projector between tower and decoder.

    kind: two linear maps with an activation in between ("mlp"), one map ("linear"; `d_hidden` 0), or an RMS norm of the
        features and one map ("normed"; `casts` determines how it rounds)."""

    d_in: int
    d_hidden: int
    d_out: int
    act_fn: Activation = "gelu"
    bias: bool = True
    kind: Literal["mlp", "linear", "normed"] = "mlp"
    norm_eps: float = 0.0
    casts: Casts = "hf"

    def __post_init__(self) -> None:
        require_numbers(self)
        for size in ("d_in", "d_out"):
            if getattr(self, size) < 1:
                raise ValueError(f"ConnectorConfig: {size}={getattr(self, size)} must be at least 1.")


@has_settable_flags
@dataclass(frozen=True, kw_only=True, repr=False)
class HookedVLMConfig(Settable, TransformerConfig):
    """Configure the whole model: the decoder at the root, as in HookedTransformer, tower and connector below.

    n_ctx: the longest context in tokens.
    casts: "hf" rounds where Hugging Face does (norms and rotary tables in float32), "none" stays in the model's dtype.
    sliding_windows: one entry per layer (None: full attention), or empty if no layer has a window.
    sliding_rope: the rotary positions of layers with a window. None: `rope`.
    scales_embeddings: token embeddings, but not image features, are multiplied by the square root of `d_model`.
    bidirectional_images: the tokens of an image (a run of image tokens) attend to each other in both directions; in
        layers with a window, as far back as the window reaches.
    positions_per_second: the time stream of rotary positions counts a video's seconds. None: its frames.

    Raises: ValueError for values that do not fit together."""

    d_vocab: int
    n_ctx: int
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    unembed_bias: bool = False
    scales_embeddings: bool = False
    sliding_rope: RopeConfig | None = None
    bidirectional_images: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    image_layout: str = "fixed"  # a row of `images.layout.LAYOUTS`
    image_pinpoints: tuple[tuple[int, int], ...] = ()  # any resolution: canvases (height, width) in pixels
    max_tiles: int = 0  # any resolution: larger grids are resampled to about this many tiles (0: never)
    tiles_single_images_only: bool = (
        False  # any resolution: images that share a prompt are one tile each, as are frames
    )
    image_token_id: int | None = None
    video_token_id: int | None = None
    frames_as_images: bool = False  # a video's frames lie apart in the text, each with its own positions
    positions_per_second: int | None = None  # of a video
    pad_token_id: int | None = None
    vision: VisionConfig | None = None
    connector: ConnectorConfig | None = None
    architecture: str = ""
    model_name: str = ""
    dtype: Any = None
    device: Any = None
    flags: Flags = field(default_factory=Flags, repr=False, compare=False)  # may be set: cfg.use_attn_result = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in ("d_vocab", "n_ctx"):
            if getattr(self, size) < 1:
                raise ValueError(f"HookedVLMConfig: {size}={getattr(self, size)} must be at least 1.")
        if self.sliding_windows and len(self.sliding_windows) != self.n_layers:
            raise ValueError(
                f"HookedVLMConfig: {len(self.sliding_windows)} sliding windows for {self.n_layers} layers; "
                "give one per layer, or none."
            )
        if self.d_head % 2:
            raise ValueError(f"HookedVLMConfig: d_head={self.d_head} must be even for rotary positions.")
        if self.vision is not None and self.image_token_id is None:
            raise ValueError("HookedVLMConfig: a model with a vision tower needs image_token_id.")
        if self.image_pinpoints and self.vision is not None:
            height, width = self.vision.grid
            if self.vision.n_features != height * width:
                raise ValueError(
                    f"HookedVLMConfig: a tile has {self.vision.n_features} features, but tiles must have "
                    f"{height} x {width}: the feature strategy must drop the class token and nothing else."
                )
        if self.rope.sections is not None and not self.rope.interleaved and sum(self.rope.sections) != self.d_head // 2:
            raise ValueError(
                f"HookedVLMConfig: rotary sections {list(self.rope.sections)} must add up to d_head / 2 = "
                f"{self.d_head // 2}."
            )
        if self.vision is not None and self.vision.casts != self.casts:
            object.__setattr__(self, "vision", replace(self.vision, casts=self.casts))
        if self.connector is not None and self.connector.casts != self.casts:
            object.__setattr__(self, "connector", replace(self.connector, casts=self.casts))

    @property
    def n_deepstack(self) -> int:
        """Return the number of inner tower layers that are added in the decoder, the i-th at the input of layer i + 1.

        With as many as there are layers, the last one is added after the blocks; further ones are not used."""
        return 0 if self.vision is None else min(len(self.vision.deepstack_layers), self.n_layers)

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        """Return the tokens that image features replace: those of images and, if the model takes them, of video
        frames."""
        return tuple(i for i in (self.image_token_id, self.video_token_id) if i is not None)

    def window(self, layer: int) -> int | None:
        """Return the sliding window of a layer in tokens; None: full attention."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    # Further fields that transformer_lens's tools read.
    @property
    def eps(self) -> float:
        return self.norm_eps

    @property
    def d_vocab_out(self) -> int:
        return self.d_vocab

    @property
    def final_rms(self) -> bool:
        return self.normalization_type == "RMS"

    attn_only = False
    parallel_attn_mlp = False
    positional_embedding_type = "rotary"
    use_normalization_before_and_after = property(lambda self: self.post_norms)
    original_architecture = property(lambda self: self.architecture)

    @property
    def n_params(self) -> int:
        """Return the number of weights as HookedTransformer counts: of attention, one matrix per query head for keys
        and values too, and MLPs, without embeddings, norms and biases."""
        per_layer = 4 * self.d_model * self.d_head * self.n_heads + self.d_model * self.d_mlp * (2 + self.gated_mlp)
        return self.n_layers * per_layer

    def to_dict(self) -> dict[str, Any]:
        """Return a nested dictionary of all fields, JSON-able (dtype and device as text)."""
        return _plain(self)


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.name != "flags"}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
