"""The model that saved edits were made for: a vector of one model says nothing to another of the same width."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

SIZES = ("n_layers", "n_heads", "d_model", "d_mlp")
SCHEMA = {"model": str, **dict.fromkeys(SIZES, (None, int)), "version": str}


@dataclass(frozen=True, kw_only=True)
class MadeFor:
    """A model's name, the sizes of its decoder's hook points (None: not known), and the version of the package."""

    model: str
    n_layers: int | None = None
    n_heads: int | None = None
    d_model: int | None = None
    d_mlp: int | None = None
    version: str = ""

    @classmethod
    def of(cls, cfg: Any) -> MadeFor:
        """Return what is recorded of a model of a configuration."""
        sizes = {size: getattr(cfg, size, None) for size in SIZES}
        return cls(model=cfg.model_name, version=package_version(), **sizes)

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)

    def require(self, cfg: Any, what: str, allow_other_model: bool = False) -> None:
        """Check that a model is the one that something was made for.

        cfg: of the model at hand.
        what: what messages call the thing.
        allow_other_model: True takes a model of another name; sizes must agree in any case.

        Raises: ValueError with both models."""
        here = MadeFor.of(cfg)
        pairs = {size: (getattr(self, size), getattr(here, size)) for size in SIZES}
        differ = [
            f"{size} {mine}, not {theirs}"
            for size, (mine, theirs) in pairs.items()
            if None not in (mine, theirs) and mine != theirs
        ]
        if differ:
            raise ValueError(f"{what} was made for {self._named()} ({', '.join(differ)} as {here._named()} has).")
        if not allow_other_model and not same_name(self.model, here.model):
            raise ValueError(
                f"{what} was made for {self._named()}; this is {here._named()}, whose states have other directions. "
                "Make it anew for this model, or pass allow_other_model=True."
            )

    def _named(self) -> str:
        return repr(self.model) if self.model else "an unnamed model"


def same_name(one: str, other: str) -> bool:
    """Return True for one model's names: equal in their last part ("llava-hf/x" and "/models/x"), or not known."""
    parts = [name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower() for name in (one, other)]
    return not all(parts) or parts[0] == parts[1]


def package_version() -> str:
    """Return the version of the installed package, "" where it is not installed."""
    try:
        return version("veena-lens")
    except PackageNotFoundError:
        return ""
