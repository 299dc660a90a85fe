"""What one visitor may ask of the machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Raises: ValueError for a limit that allows nothing."""

    upload_bytes: int = 10 * 2**20  # of one file
    pixels: int = 24_000_000  # of one picture
    pictures: int = 8  # of one prompt
    pairs: int = 64  # of a direction
    unpacked_bytes: int = 200 * 2**20  # of an archive of pairs
    new_tokens: int = 256
    prompt_characters: int = 20_000
    sweep_bytes: int = 2 * 2**30  # activations of the rows that travel together
    view_bytes: int = 8 * 2**20  # maps that a view carries from the start; the others come when asked for
    sessions: int = 16  # the one unused for longest goes first
    queue: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"Limits: {name}={value} must be at least 1.")
