"""The pages that describe the house, held against the house."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "pipeline").rglob("*.md")),
    *(ROOT / d / "README.md" for d in ("launch", "tests")),
]


def test_the_tree_names_every_module_and_what_it_says_of_itself():
    """Catches a module that was added, moved or rewritten and a page that was not."""
    text = (ROOT / "pipeline" / "README.md").read_text()
    [tree] = re.findall(r"<!-- tree -->\n```text\n(.*?)\n```\n<!-- /tree -->", text, re.DOTALL)
    told = dict(line.split("  ", 1) for line in tree.splitlines())
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        if source := path.read_text().strip():
            first = re.split(r"(?<=[.?:])\n|\n\n", ast.get_docstring(ast.parse(source)) or "")[0].replace("\n", " ")
            assert told.pop(str(path.relative_to(ROOT / "pipeline"))) == first
    assert not told


def test_every_command_has_a_script():
    """`pip install .` puts `lai-train` on the path beside `python -m pipeline.train`."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    doors = {path.stem for path in (ROOT / "pipeline").glob("*.py")} - {"__init__"}
    assert scripts == {f"lai-{door.replace('_', '-')}": f"pipeline.{door}:main" for door in doors}
    assert all("def main(argv" in (ROOT / "pipeline" / f"{door}.py").read_text() for door in doors)


def test_the_readme_fits_into_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
