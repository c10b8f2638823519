"""The rules of the tree: who may import whom, how long a function may be, where the links lead."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "distrain").glob("**/*.py"), *(ROOT / "launch").glob("*.py")])
SOURCES = [p for p in SOURCES if not any(parent.is_symlink() for parent in p.parents)]
MODULES = {
    "distrain." + ".".join(p.relative_to(ROOT / "distrain").with_suffix("").parts)
    if p.is_relative_to(ROOT / "distrain")
    else "distrain.launch." + p.stem: p
    for p in SOURCES
}

# module -> parts of distrain that it must not import, at import time or later
FORBIDDEN = {
    "trainer": ("hooks", "writers", "config", "launch", "run", "training", "checkpoint"),
    "loop": ("hooks", "writers", "config", "launch", "run", "training", "checkpoint", "trainer"),
    "hook": ("hooks", "writers", "config", "launch", "run", "training", "events"),
    "events": ("hooks", "writers", "config", "launch", "loop", "trainer", "distributed"),
    "reduction": ("hooks", "writers", "config", "launch", "loop", "trainer"),
    "optim": ("hooks", "events", "config", "launch", "loop", "trainer", "checkpoint"),
    "schedule": ("hooks", "events", "config", "launch", "loop", "trainer", "checkpoint"),
    "data": ("hooks", "events", "config", "launch", "loop", "trainer", "checkpoint"),
    "writers": ("hooks", "events", "config", "launch", "loop", "trainer", "checkpoint"),
    "checkpoint": ("hooks", "events", "config", "launch", "loop", "trainer"),
    "training": ("launch",),
    "runs": ("hooks", "events", "loop", "trainer", "training", "optim", "data", "config"),
    "hooks": ("config", "launch", "run", "training"),
    "launch": ("hooks", "events", "loop", "trainer", "training", "optim", "data"),
}
LIBRARIES = {
    "hydra": (
        "distrain.cli.command",
        "distrain.config.origins",
        "distrain.config",
        "distrain.cli.sweep",
    ),
    "omegaconf": (
        "distrain.cli.command",
        "distrain.config.origins",
        "distrain.config",
        "distrain.config.instantiate",
    ),
    "submitit": ("distrain.launch.slurm", "distrain.launch.allocation"),
}


def imports(path):
    """Return (module, is it only for the type checker) of every import in a file."""
    found = []

    def visit(node, typing_only):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, True)
            for child in node.orelse:
                visit(child, typing_only)
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module, typing_only))
            if node.module == "distrain":
                found.extend((f"distrain.{a.name}", typing_only) for a in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, typing_only)

    visit(ast.parse(path.read_text()), False)
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module):
    part = module.split(".")[1]
    banned = FORBIDDEN.get(part, ())
    for imported, typing_only in imports(MODULES[module]):
        parts = imported.split(".")
        if parts[0] == "distrain" and len(parts) > 1 and not typing_only:
            assert parts[1] not in banned or parts[1] == part, f"{module} imports {imported}"
        for library, allowed in LIBRARIES.items():
            if parts[0] == library and not typing_only:
                assert any(module.startswith(name) for name in allowed), f"{module}: {imported}"


def test_no_import_cycle():
    graph = {}
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {n.module for n in top if isinstance(n, ast.ImportFrom)}
        graph[module] = names & MODULES.keys()
    done, active = set(), []

    def visit(module):
        assert module not in active, " -> ".join([*active[active.index(module) :], module])
        if module not in done:
            active.append(module)
            for other in sorted(graph[module]):
                visit(other)
            active.pop()
            done.add(module)

    for module in sorted(graph):
        visit(module)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_function_is_over_sixty_lines_beside_its_docstring(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            is_docstring = ast.get_docstring(node) is not None
            words = first.end_lineno - first.lineno + 1 if is_docstring else 0
            assert node.end_lineno - node.lineno - words <= 60, f"{module}.{node.name}"


def test_the_links_lead_to_packages():
    for name, target in (("conf", "../conf"), ("launch", "../launch")):
        link = ROOT / "distrain" / name
        hint = f"repair it: ln -s {target} distrain/{name}"
        assert link.is_symlink(), hint
        assert (link / "__init__.py").exists(), hint


def test_there_is_no_utils():
    assert not [module for module in MODULES if "util" in module]


def test_an_unknown_public_name_is_an_attribute_error():
    import distrain

    with pytest.raises(AttributeError):
        _ = distrain.NoSuchName
