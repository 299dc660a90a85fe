"""One interactive view of a run, for three hosts: a notebook, the explorer, and a file that opens from disk."""

from veena_lens.app.view.files import mean_map_bytes, open_cache, save_cache
from veena_lens.app.view.view import ExplorerView

__all__ = ["ExplorerView", "mean_map_bytes", "open_cache", "save_cache"]
