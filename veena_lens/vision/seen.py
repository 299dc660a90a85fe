"""What a tower hands on."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Seen:
    """Features [picture pos d_features], and the outputs of the inner layers that the decoder reads besides."""

    features: Float[Tensor, "picture pos d_features"]
    inner: tuple[Float[Tensor, "picture patch d_model"], ...] = ()
