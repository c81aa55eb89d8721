"""Where things are: which file may import which, so that the method stays readable without what protects it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("formats", "toy", "speed", "safety", "beyond", "interface", "report")  # each may import those before it
GROUND = {  # ground-floor file: the ground-floor files and the parts of wings that it may import
    "lora": {"formats.errors"},
    "quant": {"formats.errors"},
    "data": {"formats", "toy"},
    "model": {"lora", "quant", "formats", "speed"},
    "ppo": {"data"},
    "eval": {"formats.words"},  # the tokenizer of ROUGE and lengths for languages other than English
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


def test_rooms_import_one_way():
    """What protects a run knows no user interface, and neither of them the report; formats/ and speed/ know none."""
    for i, wing in enumerate(WINGS):
        for file in (ROOT / wing).glob("*.py"):
            assert not {name.split(".")[0] for name in imports(file)} & set(WINGS[i + 1 :]), file


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
