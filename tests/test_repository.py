"""Files of the repository that no code imports: workflows, forms, hooks, changelog, and the pages beside the README."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

import veena_lens
from veena_lens.cli import build_parser

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def make_targets() -> set[str]:
    """The targets that the Makefile declares as commands."""
    line = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert line is not None
    return set(line[1].split())


def jobs_of(workflow: Path) -> dict[str, Any]:
    return read_yaml(workflow)["jobs"]


def steps_of(workflow: Path) -> list[dict[str, Any]]:
    return list(chain.from_iterable(job["steps"] for job in jobs_of(workflow).values()))


def commands_of(workflow: Path) -> list[str]:
    """The shell commands of every job, once per entry of its matrix, with the matrix's values filled in."""
    commands = []
    for job in jobs_of(workflow).values():
        rows = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
        for step in job["steps"]:
            for row in rows if "run" in step else []:
                commands.append(
                    re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda m, row=row: row.get(m[1], m[0]), step["run"])
                )
    return commands


@pytest.mark.parametrize(
    "path", [*WORKFLOWS, *FORMS, ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"], ids=name_of
)
def test_yaml_file_parses(path: Path) -> None:
    assert isinstance(read_yaml(path), dict)


def test_workflows_call_only_targets_of_the_makefile() -> None:
    called = {target for path in WORKFLOWS for text in commands_of(path) for target in re.findall(r"make (\S+)", text)}
    assert {"check", "test", "docs", "notebooks"} <= called <= make_targets()


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_workflow_may_only_read_and_pins_its_actions(path: Path) -> None:
    workflow = read_yaml(path)
    assert workflow["permissions"] == {"contents": "read"} and "concurrency" in workflow
    extra = [name for job in jobs_of(path).values() for name in job.get("permissions", {})]
    assert set(extra) <= {"pages", "id-token"}, "a job may publish; it must not write to the repository"
    actions = [step["uses"] for step in steps_of(path) if "uses" in step]
    assert actions and not [action for action in actions if not re.search(r"@(v\d+|release/v\d+)$", action)]
    assert all("timeout-minutes" in job for job in jobs_of(path).values())


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_workflow_installs_the_torch_of_the_makefile(path: Path) -> None:
    default = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert default is not None
    assert read_yaml(path)["env"]["TORCH"].split()[0] == default[1]


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_tests_that_a_workflow_names_exist(path: Path) -> None:
    named = re.findall(r"(?<!\S)tests/\S+", "\n".join(commands_of(path)))
    assert not [name for name in named if not (ROOT / name).exists()]


def test_workflows_run_the_oldest_python_that_the_project_supports() -> None:
    oldest = PROJECT["requires-python"].removeprefix(">=")
    tested = [row["python"] for row in jobs_of(WORKFLOWS[0])["make"]["strategy"]["matrix"]["include"]]
    assert oldest in tested


@pytest.mark.parametrize("path", [form for form in FORMS if form.name != "config.yml"], ids=name_of)
def test_issue_form_has_what_the_forge_requires(path: Path) -> None:
    form = read_yaml(path)
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


def test_pre_commit_uses_the_ruff_of_the_dev_extra() -> None:
    wanted = next(need for need in PROJECT["optional-dependencies"]["dev"] if need.startswith("ruff"))
    hooks = {
        hook["id"]: hook for repo in read_yaml(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]
    }
    assert hooks["ruff-check"]["additional_dependencies"] == [wanted]
    assert hooks["ruff-format"]["additional_dependencies"] == [wanted]


def test_every_file_names_the_same_version() -> None:
    newest = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest is not None
    found = {
        "CHANGELOG.md": newest[1],
        "CITATION.cff": str(read_yaml(ROOT / "CITATION.cff")["version"]),
        "veena_lens.__version__": veena_lens.__version__,
    }
    assert found == dict.fromkeys(found, PROJECT["version"])


def test_versions_of_the_changelog_are_dated_but_for_the_newest() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    dated = re.compile(r"\[\d+\.\d+\.\d+\S*\] - \d{4}-\d{2}-\d{2}")
    assert headings
    assert dated.fullmatch(headings[0]) or headings[0].endswith("] - Unreleased")
    assert not [heading for heading in headings[1:] if not dated.fullmatch(heading)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_to_files_of_the_repository(page: Path) -> None:
    assert not [link for link in LINK.findall(page.read_text("utf-8")) if not (page.parent / link).exists()]


def test_contributing_explains_every_target_of_the_makefile() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rows = set(re.findall(r"^\| `make ([\w-]+)` \|", text, re.MULTILINE))
    assert rows == make_targets()
    assert set(re.findall(r"`make (\w+)`", text)) <= rows


def test_security_page_states_the_defaults_of_the_explorer() -> None:
    text = " ".join((ROOT / "SECURITY.md").read_text("utf-8").split())
    defaults = build_parser().parse_args(["explore"])
    assert f"listens on {defaults.host}" in text
    assert f"{defaults.max_upload_mb} MiB per file (`--max-upload-mb`)" in text
    assert f"{defaults.max_megapixels} megapixels (`--max-megapixels`)" in text


def test_source_distribution_leaves_out_all_tests() -> None:
    """setuptools would add tests/test*.py, and they do not run without the rest of the folder."""
    assert "prune tests" in (ROOT / "MANIFEST.in").read_text("utf-8").splitlines()
