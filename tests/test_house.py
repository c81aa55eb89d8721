"""Where things are: which file may import which, so that the method stays readable without what protects it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("formats", "toy", "speed", "safety", "beyond", "interface", "report")  # each imports those before it
GROUND = {  # ground-floor file: the ground-floor files and the parts of wings that it may import
    "lora": {"formats.errors"},
    "quant": {"formats.errors"},
    "data": {"formats", "toy"},
    "model": {"lora", "quant", "formats", "speed"},
    "ppo": {"data"},
    "eval": {"formats.errors", "formats.words"},  # the tokenizer of ROUGE and lengths for languages other than English
    "lastmile": {"data", "model", "lora", "quant", "ppo", "eval", *WINGS},
}


def imports(file):
    """All modules of ours that a file imports, anywhere in it, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {*GROUND, *WINGS}
    return {name for name in found if name.split(".")[0] in ours}


def engine_files():
    return [ROOT / f"{name}.py" for name in GROUND] + [file for wing in WINGS for file in (ROOT / wing).glob("*.py")]


def test_the_root_has_the_seven_files_only():
    """The ground floor is what a reader opens first: a new file there belongs into a wing."""
    assert {file.stem for file in ROOT.glob("*.py")} == set(GROUND)


@pytest.mark.parametrize("name", GROUND)
def test_the_ground_floor_imports_one_way(name):
    """Pins the plan above: for example, the equations in ppo.py depend on no wing, and so can be read alone."""
    allowed = GROUND[name]
    for module in imports(ROOT / f"{name}.py"):
        parts = module.split(".")
        prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        is_parent = any(entry.startswith(f"{module}.") for entry in allowed)
        assert prefixes & allowed or is_parent, f"{name}.py imports {module}"


@pytest.mark.parametrize("wing", WINGS)
def test_wings_import_one_way(wing):
    """What protects a run knows nothing of what talks to the user, and neither of the report: each part can be read,
    or thrown away, without those above it. The exceptions of `speed` lie between the ground floor's files.
    """
    below = WINGS[: WINGS.index(wing) + 1]
    for file in (ROOT / wing).glob("*.py"):
        for module in imports(file):
            room = module.split(".")[0]
            assert room in below or room in GROUND, f"{file.relative_to(ROOT)} imports {module}"


def test_no_file_is_too_long_to_read():
    """A file of the ground floor is read in one sitting, one of the rooms around it in a quarter of an hour."""
    for file in engine_files():
        most = {ROOT: 600, ROOT / "safety": 300, ROOT / "interface": 300}.get(file.parent)
        lines = len(file.read_text(encoding="utf-8").splitlines())
        assert most is None or lines <= most, f"{file.relative_to(ROOT)} has {lines} lines"


def test_nobody_imports_lastmile():
    """lastmile.py is the top: what others need from it belongs into a wing."""
    for file in engine_files():
        assert "lastmile" not in imports(file), file


def test_no_import_goes_round():
    """Two files that import one another cannot be read one after the other."""
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in engine_files()}
    names = {file: name.removesuffix(".__init__") for file, name in names.items()}
    graph = {name: imports(file) & set(names.values()) - {name} for file, name in names.items()}
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_the_ground_floor_stays_plain():
    """One statement a line: no lambda, no nested comprehension, and no `fmt: skip` outside tables of constants."""
    for name in GROUND:
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            assert not isinstance(node, ast.Lambda), f"{name}.py:{node.lineno}: lambda"
            if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
                assert len(node.generators) == 1, f"{name}.py:{node.lineno}: nested comprehension"
