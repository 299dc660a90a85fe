"""The view: everything that one page needs of a run, built from a model or from a cache, and shown by three hosts.

What does not fit a file's budget is left out and, where a host has a Python behind it, asked for token by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
from jaxtyping import Float
from torch import Tensor

from veena_lens.activation_cache import ActivationCache
from veena_lens.app.view import building
from veena_lens.app.view.bundles import Bundle, Key, attention_bundles, pack_bundles, push_bundle
from veena_lens.app.view.files import OpenedCache, open_cache
from veena_lens.app.view.opening import seen_layer
from veena_lens.app.view.page import page_of, script, style
from veena_lens.app.view.rows import RULE, CachedRows, ModelRows, Rows, rule_of
from veena_lens.inputs import MultimodalInputs
from veena_lens.long_runs import write_file

if TYPE_CHECKING:
    from PIL import Image

    from veena_lens.model.model import HookedVLM


class ViewSettings(TypedDict, total=False):
    """What every view can be made with; see `ExplorerView.from_run`."""

    modes: Sequence[str] | None
    words: Sequence[str | int] | None
    max_bytes: int
    title: str


MODES = ("attention", "sinks", "difference", "lens", "push", "norms")
BUDGET = 32 * 2**20  # bytes of maps in a view, before compression


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """The same with its defaults."""

    modes: Sequence[str] | None = None
    words: Sequence[str | int] | None = None
    max_bytes: int = BUDGET
    title: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExplorerView:
    """What a page shows of a run: `header` (words and settings), `arrays`, the `bundles` that are there from the start.

    Make it with `from_run` or `from_cache`; then `.save("view.html")`, `.widget()`, or let a notebook show it."""

    title: str
    inputs: MultimodalInputs
    header: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(repr=False)
    bundles: tuple[Bundle, ...] = field(repr=False)
    runs: tuple[Rows, ...] = field(repr=False)
    directions: Mapping[str, Float[Tensor, ...]] = field(default_factory=dict, repr=False)

    # --- making one -----------------------------------------------------------------------------------
    @classmethod
    def from_run(
        cls,
        model: HookedVLM,
        source: Any,
        *,
        answer: str | bool | None = None,
        pictures: Sequence[Image.Image] | None = None,
        other: Any = None,
        other_pictures: Sequence[Image.Image] | None = None,
        directions: Mapping[str, Float[Tensor, ...]] | None = None,
        interventions: Sequence[Any] = (),
        max_new_tokens: int = 64,
        **settings: Unpack[ViewSettings],
    ) -> ExplorerView:
        """Build a view of what `model` does with an image and a prompt.

        source: `(image or images, prompt)`, or prepared inputs of one row.
        answer: a text to force, or True to generate one of at most `max_new_tokens` tokens (default: no answer).
        pictures, other_pictures: the images that prepared inputs were made from; without them the page draws bare
        cells.
        other: a second image (or inputs) with the same token grid and text, for the difference.
        directions: name -> [layer d_model] or [d_model], for the projection.
        interventions: in force in every run of the view.
        modes: of "attention", "sinks", "difference", "lens", "push" (projection), "norms" (default: all that the
        arguments allow).
        words: tokens whose probability the lens maps (default: the answer's).
        max_bytes: of maps that the view holds from the start.
        title: of the page (default: the model's name).

        Raises: ValueError for several rows, a second image of another grid or text, an unknown mode, or one that
        lacks what it needs.
        """
        chosen = _Settings(**settings)
        inputs, drawn = building.prepared(model, source, pictures)
        modes = building.modes_of(chosen.modes, MODES, has_other=other is not None, has_directions=bool(directions))
        if answer is True:
            with model.intervene(list(interventions)):
                inputs = inputs.with_answer(model.generate(inputs, max_new_tokens, return_type="tokens"))
        elif isinstance(answer, str):
            inputs = inputs.with_answer(answer)
        runs: list[Rows] = [ModelRows(model=model, inputs=inputs, interventions=tuple(interventions))]
        second = None
        if other is not None:
            prompt = None if isinstance(source, MultimodalInputs) else source[1]
            twin, their_pictures = building.twin_of(model, inputs, other, other_pictures, prompt)
            runs.append(ModelRows(model=model, inputs=twin, interventions=tuple(interventions)))
            second = (twin, their_pictures)
        parts = building.Parts(inputs=inputs, pictures=drawn, second=second, model=model, modes=modes)
        with model.intervene(list(interventions)):
            parts.measure_run(model, chosen.words)
        return cls._built(parts, runs, directions or {}, chosen.max_bytes, chosen.title or building.name_of(model))

    @classmethod
    def from_cache(
        cls,
        cache: ActivationCache | OpenedCache | str | Path,
        *,
        model: HookedVLM | None = None,
        pictures: Sequence[Image.Image] | None = None,
        texts: Sequence[str] | None = None,
        tokenizer: Any = None,
        row: int = 0,
        **settings: Unpack[ViewSettings],
    ) -> ExplorerView:
        """Build a view of a cache, or of a file that holds one; no model is loaded.

        The cache must hold attn.hook_pattern of every layer, or attn.hook_rot_q and attn.hook_rot_k; with
        hook_resid_post the view has norms, and with a `model` of the same shape the lens. `pictures`, `texts` (of
        every position) or a `tokenizer` say what a file by `ActivationCache.save` does not; `save_cache` writes both.
        `settings` as for `from_run`.
        Raises: FileNotFoundError; ValueError for a file cut short, or a cache of another model than `model`;
        MissingActivation without attention.
        """
        shown = _Settings(**settings)
        title = shown.title
        opened = open_cache(cache) if isinstance(cache, (str, Path)) else cache
        if isinstance(opened, OpenedCache):
            is_first = row in (0, -len(opened.cache.inputs or [0]))  # the file tells of its first row alone
            pictures = opened.pictures if pictures is None and is_first else pictures
            texts = opened.texts if texts is None and tokenizer is None and is_first else texts
            title, about, cache = title or opened.model_name, opened.about, opened.cache
        else:
            about, cache = {}, opened
        known = model if model is not None else cache.model
        rule = {k: about[k] for k in RULE if k in about} if known is None else rule_of(known.cfg)
        if cache.inputs is not None and cache.has_batch_dim and len(cache.inputs) > 1:
            cache = cache.apply_slice_to_batch_dim([range(len(cache.inputs))[row]])
        building.require_own_cache(cache, model)
        rows = CachedRows(cache=cache, **rule)
        inputs = cache.inputs
        assert inputs is not None
        modes = building.modes_of(shown.modes, MODES, has_other=False, has_directions=False)
        parts = building.Parts(inputs=inputs, pictures=pictures, model=model, modes=modes, texts=texts)
        parts.tokenizer = parts.tokenizer if tokenizer is None else tokenizer
        parts.measure_cache(cache, rows, shown.words)
        return cls._built(parts, [rows], {}, shown.max_bytes, title or "activation cache")

    @classmethod
    def _built(
        cls,
        parts: building.Parts,
        runs: Sequence[Rows],
        directions: Mapping[str, Float[Tensor, ...]],
        max_bytes: int,
        title: str,
    ) -> ExplorerView:
        queries, is_image = parts.queries(), parts.inputs.image_mask[0].cpu()
        first = runs[0]
        n_whole = building.within(max_bytes // len(runs), len(queries), first.n_layers, first.n_heads, len(is_image))
        bundles: list[Bundle] = []
        for run, rows in enumerate(runs):
            bundles += attention_bundles(rows, queries, is_image, n_whole, run)
        if "push" in parts.modes and isinstance(first, ModelRows):
            for name, direction in directions.items():
                bundles.append(push_bundle(first.model, first.inputs, first.interventions, direction, queries[0], name))
        header, arrays = parts.finished(first, queries, list(directions), title)
        header["layer"] = first.n_layers - 1
        if header["modes"][:1] not in (["lens"], ["norms"]):
            maps = next(b for b in bundles if b.key == Key(query=queries[0])).maps
            header["layer"] = seen_layer(maps.decode(is_image), is_image)
        return cls(
            title=title,
            inputs=parts.inputs,
            header=header,
            arrays=arrays,
            bundles=tuple(bundles),
            runs=tuple(runs),
            directions=dict(directions),
        )

    # --- words ----------------------------------------------------------------------------------------
    def word_at(self, position: int) -> str:
        """Return the text of the token at a position; "" within an image."""
        return next((t["text"] for t in self.header["tokens"] if t.get("at") == position), "")

    def place_of(self, query: int) -> str:
        """Return a position in words: its token, and the one that it predicts."""
        here = self.word_at(query).strip()
        place = f"position {query}" + (f" (“{here}”)" if here else "")
        after = self.word_at(query + 1).strip()
        return f"{place}, which predicts “{after}”" if after else place

    # --- what hosts ask for ---------------------------------------------------------------------------
    def payload(self) -> bytes:
        """Return the view as one binary (`veena_lens.app.view.bundles.unpack` reads it back)."""
        return pack_bundles(self.bundles, self.header, self.arrays)

    def maps(self, key: Key | Mapping[str, Any]) -> bytes:
        """Return all heads' maps of one token, packed; computed now unless the view holds them.

        Raises: ValueError for a token, a run or a direction that the view does not have."""
        key = key if isinstance(key, Key) else Key.read(key)
        for bundle in self.bundles:
            if bundle.key == key and bundle.maps.values.shape[1] == self.runs[0].n_heads:
                return pack_bundles([bundle], {}, {})
        length = self.inputs.shape[1]
        if not 0 <= key.query < length or not bool(self.inputs.attention_mask[0, key.query]):
            raise ValueError(f"No token at position {key.query}; the sequence has {length} positions.")
        if key.run >= len(self.runs):
            raise ValueError("This view has no second image: give other= when you make it.")
        rows = self.runs[key.run]
        if key.kind == "push":
            if key.name not in self.directions or not isinstance(rows, ModelRows):
                raise ValueError(f"No direction {key.name!r}; the view knows {list(self.directions) or 'none'}.")
            direction = self.directions[key.name]
            found = push_bundle(rows.model, rows.inputs, rows.interventions, direction, key.query, key.name)
        else:
            found = attention_bundles(rows, [key.query], self.inputs.image_mask[0].cpu(), 1, key.run)[0]
        return pack_bundles([found], {}, {})

    # --- hosts ----------------------------------------------------------------------------------------
    def html(self) -> str:
        """Return a whole page that needs nothing else: no server, no network."""
        return page_of(self.payload(), self.title)

    def save(self, path: str | Path) -> Path:
        """Write the page; returns its path. Raises: ValueError for a name that does not end in .html."""
        path = Path(path)
        if path.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"A view is saved as a page: {path.name!r} must end in .html.")
        write_file(path, self.html())
        return path

    def widget(self) -> Any:
        """Return a notebook widget that asks for further tokens as you hover. Raises: ImportError without anywidget."""
        return make_widget(self)

    def _repr_html_(self) -> str:
        page = escape(self.html(), quote=True)
        return (
            f'<iframe srcdoc="{page}" title="{escape(self.title, quote=True)}" sandbox="allow-scripts" '
            'style="width:100%;height:860px;border:1px solid #d9dce1;border-radius:6px"></iframe>'
        )

    def __repr__(self) -> str:
        size = sum(b.size for b in self.bundles) / 2**20
        cells = ", ".join(f"{p['grid'][0]}x{p['grid'][1]}" for p in self.header["panels"]) or "no image"
        return (
            f"ExplorerView({self.title!r}: {self.inputs.shape[1]} positions, cells {cells}, "
            f"{self.header['layers']} x {self.header['heads']} heads, modes {', '.join(self.header['modes'])}, "
            f"{len(self.bundles)} tokens' maps of {size:.1f} MiB)"
        )


def make_widget(view: ExplorerView) -> Any:
    """Make an anywidget of a view; further tokens are computed when the page asks.

    Raises: ImportError, saying what to install, without anywidget."""
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        raise ImportError(
            'The notebook widget needs anywidget: pip install "veena-lens[explore]", or show the view as a page with '
            "view.save('view.html')."
        ) from error

    class ViewWidget(anywidget.AnyWidget):
        """`payload` travels once; messages ask for maps and are answered with them."""

        _esm = script()
        _css = style()
        payload = traitlets.Bytes(b"").tag(sync=True)
        pinned = traitlets.Dict({}).tag(sync=True)

        def __init__(self) -> None:
            super().__init__(payload=view.payload())
            self.on_msg(self._answer)

        def _answer(self, _: Any, asked: Any, __: Any) -> None:
            number = asked.get("number") if isinstance(asked, dict) else None
            try:
                found = view.maps(asked["key"])
            except (ValueError, KeyError, TypeError, RuntimeError) as error:
                self.send({"number": number, "error": str(error)})
            else:
                self.send({"number": number}, buffers=[found])

    return ViewWidget()
