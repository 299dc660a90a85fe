"""Run every notebook from top to bottom, and compare what it prints with its kept outputs: `python docs/notebooks.py`.

`--save` keeps the outputs of this run instead. They hold figures of few colours, text and tables; no widget or script,
no path of this machine and no time. The code must not warn.
"""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
from outputs import differences
from PIL import Image

ROOT = Path(__file__).parent.parent
KEPT = ("image/png", "text/html", "text/plain")  # of what a cell shows
COLOURS = 128
# A page within a page (the explorer's view) is as large as a hundred tables.
LARGEST = 50_000
VERSION = re.compile(r"\b(transformers|torch) \d[\w.+]*")


def executed(path: Path) -> Any:
    """Return a notebook with the outputs of a new run. Raises: CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, record_timing=False, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = cleaned(cell.outputs)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def cleaned(outputs: list[Any]) -> list[Any]:
    """Return outputs fit to be kept: what was printed in one piece, and no progress bars."""
    kept: list[Any] = []
    for output in outputs:
        if output.output_type == "stream":
            text = output.text.replace(f"{ROOT}/", "")
            if kept and kept[-1].get("name") == output.name:
                kept[-1].text += text
            else:
                kept.append(nbformat.v4.new_output("stream", name=output.name, text=text))
        elif "application/vnd.jupyter.widget-view+json" not in output.data:
            output.data = {kind: output.data[kind] for kind in KEPT if kind in output.data}
            if len(output.data.get("text/html", "")) > LARGEST:
                del output.data["text/html"]
            if "image/png" in output.data:
                output.data["image/png"] = small(output.data["image/png"])
            output.data["text/plain"] = output.data["text/plain"].replace(f"{ROOT}/", "")
            kept.append(output)
    return kept


def small(png: str) -> str:
    """Return a figure with few colours, about a third of its size."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        few, file = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE), io.BytesIO()
    few.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def text_of(cell: Any) -> str:
    """Return what is compared of a code cell: everything printed, and the text that stands for everything shown."""
    parts = [o.text if o.output_type == "stream" else f"{o.data['text/plain']}\n" for o in cell.outputs]
    return VERSION.sub(r"\1", "".join(parts))


def changes(kept: Any, now: Any) -> list[str]:
    """Return what differs between the kept outputs of a notebook and new ones, cell by cell."""
    found = []
    for number, (old, new) in enumerate(zip(kept.cells, now.cells, strict=True)):
        if old.cell_type == "code":
            found += [f"cell {number}: {line}" for line in differences(text_of(old), text_of(new), 0.02, 0.01)]
    return found


def warnings_of(notebook: Any) -> list[str]:
    """Return what the code wrote to stderr."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [f"warns: {output.text}" for output in outputs if output.get("name") == "stderr"]


def main() -> int:
    """Run all notebooks, and return 1 if one has changed or warns."""
    wrong = 0
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        now = executed(path)
        found = warnings_of(now)
        if "--save" in sys.argv:
            nbformat.write(now, path)
        else:
            found += changes(nbformat.read(path, as_version=4), now)
        print(path.name, *(found or ["as kept" if "--save" not in sys.argv else "saved"]), sep="\n  ", flush=True)
        wrong += bool(found)
    if wrong:
        print("if the new outputs are right: `make notebooks-save`, and commit the notebooks", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
