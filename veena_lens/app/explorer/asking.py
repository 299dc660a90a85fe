"""Asking a model about pictures, piece by piece, and the view of what it did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veena_lens.app.explorer.code import listed, program
from veena_lens.app.explorer.directions import Direction, direction_imports, direction_lines
from veena_lens.app.explorer.pictures import Shown
from veena_lens.app.explorer.state import Explorer, Session
from veena_lens.app.explorer.told import by_name
from veena_lens.app.view import ExplorerView, open_cache, save_cache

IMPORTS = ("from veena_lens import HookedVLM", "from veena_lens.app.view import ExplorerView")


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """A question that was answered: what every other tab builds on."""

    model: str
    pictures: Sequence[Shown]
    prompt: str
    inputs: Any  # prepared, with the answer
    answer: str


def ask(
    explorer: Explorer, session: Session, name: str, pictures: Sequence[Shown], prompt: str, max_new_tokens: int
) -> Iterator[str]:
    """The answer as it grows; the session holds what is there so far as "asked".

    The model is free for others between two tokens; nothing is hooked meanwhile.
    Raises: ValueError for an empty or overlong prompt, or whatever the processor refuses."""
    limits = explorer.limits
    if not prompt.strip():
        raise ValueError("Write a question first.")
    if len(prompt) > limits.prompt_characters:
        raise ValueError(
            f"The question has {len(prompt):,} characters; the limit here is {limits.prompt_characters:,}."
        )
    with explorer.using(name) as model:
        inputs = model.prepare(text=prompt, images=[p.image for p in pictures] or None)
        steps = model.generate_stream(inputs, max_new_tokens=min(max_new_tokens, limits.new_tokens))
    text = ""
    while True:
        with explorer.using(name):
            piece = next(steps, None)
        text += piece or ""
        answered = inputs.with_answer(text) if text else inputs
        # Kept at each step: an answer that is stopped is one to look at as well.
        session.kept["asked"] = Asked(model=name, pictures=tuple(pictures), prompt=prompt, inputs=answered, answer=text)
        if piece is None:
            return
        yield text


def look(explorer: Explorer, session: Session, second: Shown | None = None) -> tuple[ExplorerView, str]:
    """The view of the last answer, and the code that makes it; `second`: a picture of the same grid to compare."""
    asked: Asked = session.need("asked", "Ask something first.")
    found = session.kept.get("direction")
    direction = found if found is not None and found.model == asked.model else None
    with explorer.using(asked.model) as model:
        view = ExplorerView.from_run(
            model,
            asked.inputs,
            pictures=[p.image for p in asked.pictures],
            other=None if second is None else [second.image],
            directions=None if direction is None else {direction.emotion: direction.vectors},
            max_bytes=explorer.limits.view_bytes,
            title=asked.model,
        )
    return view, look_code(asked, second, direction)


def look_code(asked: Asked, second: Shown | None, direction: Direction | None = None) -> str:
    """The program behind the Look tab."""
    used = [*asked.pictures, *([] if second is None else [second])]
    settings = "answer=True"
    lines: list[str] = [f"model = HookedVLM.from_pretrained({asked.model!r})"]
    imports: list[str] = list(IMPORTS)
    if second is not None:
        settings += f", other={second.code}"
    if direction is not None:
        lines = direction_lines(direction)
        imports = [*IMPORTS[1:], *direction_imports(direction)]
        settings += f", directions={{{direction.emotion!r}: direction}}"
    body = [
        *lines,
        f"view = ExplorerView.from_run(model, ({listed(asked.pictures)}, {asked.prompt!r}), {settings})",
        'view.save("view.html")  # or view.widget() in a notebook',
    ]
    return program(imports, body, used)


def look_at_cache(explorer: Explorer, path: str | Path, name: str | None = None) -> tuple[ExplorerView, str]:
    """The view of a cache file and its code; with the `name` of a model also the lens, without it none is loaded.

    Raises: ValueError for a file that is no cache, was cut short, or is of another model."""
    limit = explorer.limits.view_bytes
    with by_name(path):
        opened = open_cache(path)
    if name is None:
        view = ExplorerView.from_cache(opened, max_bytes=limit)
    else:
        with explorer.using(name) as model:
            view = ExplorerView.from_cache(opened, model=model, max_bytes=limit)
    file, imports, body = Path(path).name, list(IMPORTS[1:]), []
    if name is not None:
        imports, body = list(IMPORTS), [f"model = HookedVLM.from_pretrained({name!r})"]
    body += [f"view = ExplorerView.from_cache({file!r}{'' if name is None else ', model=model'})"]
    return view, program(imports, [*body, 'view.save("view.html")'])


def cell_boxes_of(inputs: Any, image: int = 0) -> Any:
    """Boxes of the grid's cells row by row, in pixels of the picture; None where they are not known."""
    boxes = None if inputs.patch_boxes is None else inputs.patch_boxes[0][image]
    if boxes is None or not inputs.grid_places:
        return boxes
    return boxes[list(inputs.grid_places[0][image])]


def export_look(explorer: Explorer, session: Session) -> list[str]:
    """The view as a page, a picture and a table, and the run's cache; paths of the files.

    Raises: ValueError before anything was asked."""
    from veena_lens import plots
    from veena_lens.circuits import picture_attention

    view: ExplorerView = session.need("look", "Ask something first; then there is something to export.")
    files = [view.save(session.folder / "view.html")]
    asked: Asked | None = session.kept.get("asked")
    if asked is None:
        return [str(f) for f in files]
    with explorer.using(asked.model) as model:
        parts = ("attn.hook_rot_q", "attn.hook_rot_k", "hook_resid_post")
        names = [n for n in model.hook_dict if n.startswith("blocks.") and n.endswith(parts)]
        _, cache = model.run_with_cache(asked.inputs, names_filter=names)
        windows = [model.cfg.window(layer) for layer in range(model.cfg.n_layers)]
        scores = picture_attention(model, asked.inputs) if asked.pictures else None
    files.append(
        save_cache(
            cache,
            session.folder / "cache.safetensors",
            pictures=[p.image for p in asked.pictures],
            tokenizer=model.tokenizer,
            model_name=asked.model,
            windows=windows if any(windows) else None,
        )
    )
    if scores is not None:
        frame = scores.to_frame()
        frame.to_csv(session.folder / "attention.csv", index=False)
        frame.to_parquet(session.folder / "attention.parquet", index=False)
        files += [session.folder / "attention.csv", session.folder / "attention.parquet"]
        total = scores.values[0].sum((-1, -2)).mean(-1)
        best = scores.select(batch=0).mean("head").select(layer=int(total.argmax()))
        figure = plots.overlay(asked.pictures[0].image, best.values, patch_boxes=cell_boxes_of(asked.inputs))
        files.append(plots.save(figure, session.folder / "attention.png"))
    return [str(f) for f in files]
