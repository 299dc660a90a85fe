"""The view as a notebook widget: the same module, fed through the kernel's own channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from veena_lens.app.view.page import script, style

if TYPE_CHECKING:
    from veena_lens.app.view.view import ExplorerView


def make_widget(view: ExplorerView) -> Any:
    """An anywidget of a view; further tokens are computed when the page asks.

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
