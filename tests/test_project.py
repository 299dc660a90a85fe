"""What a wheel would hold: packages are packages, adapters are found and load."""

import tomllib
from importlib.metadata import entry_points
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for top in ("veena_lens", "model_adapters") for path in (ROOT / top).rglob("*.py")}
    assert not sorted(str(folder) for folder in folders if not (folder / "__init__.py").exists())


def test_every_adapter_of_the_project_is_installed_and_loads() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["entry-points"]["veena_lens.adapters"]
    installed = {entry.name: entry for entry in entry_points(group="veena_lens.adapters")}
    for architecture, value in declared.items():
        assert installed[architecture].value == value
        assert installed[architecture].load().architecture == architecture
