"""The documentation: no dead link, no name that is gone, pages that say for whom they are."""

import ast
import re

import pytest

from interface import folders

PAGES = sorted([*folders.ROOT.glob("*.md"), *(folders.ROOT / "docs").rglob("*.md")])
MODULES = [file.stem for file in folders.ROOT.glob("*.py")]
WINGS = ("formats", "safety", "interface", "beyond", "speed", "report", "toy")


def anchor(heading):
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return text.replace(" ", "-")


def definitions(file):
    """All names that a Python file defines: functions, classes, their methods and fields, constants."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_is_dead(page):
    """Every relative link leads to a file of the repository, and to a heading of it where it names one."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, heading = target.partition("#")
        file = page if not name else page.parent / name
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert heading in map(anchor, headings), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_exists(page):
    """`ppo.gae`, `safety.run.Run`, `formats/tables.py`: what a page names in backticks is still there."""
    for name in re.findall(r"`([\w./]+)`", page.read_text(encoding="utf-8")):
        if re.fullmatch(r"[\w/]+\.(py|md|toml|svg|css|js|html)", name) and "/" in name:
            places = [folders.ROOT / name, page.parent / name]
            of_a_run = name.split("/")[0] in ("runs", "eval", "data")  # written by a run
            assert of_a_run or any(place.exists() for place in places), f"{page.name}: {name}"
            continue
        parts = name.split(".")
        if len(parts) == 2 and parts[0] in MODULES:
            file, rest = folders.ROOT / f"{parts[0]}.py", parts[1]
        elif len(parts) == 3 and parts[0] in WINGS:
            file, rest = folders.ROOT / parts[0] / f"{parts[1]}.py", parts[2]
        else:
            continue
        if rest in ("py", "md", "safetensors"):
            continue
        assert file.exists(), f"{page.name}: {name}"
        assert rest in definitions(file), f"{page.name}: {name}"


def test_the_readme_is_short():
    """Nobody reads more than two screens before the first command."""
    assert len((folders.ROOT / "README.md").read_text(encoding="utf-8")) <= 10_000


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "README.md"], ids=lambda page: page.name)
def test_a_page_says_for_whom_it_is(page):
    """The first line below the title says who needs the page, so that others can skip it."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert lines[0].startswith("# ") and re.match(r"\*For .*", lines[1]), page.name
