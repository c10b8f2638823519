"""The rules of the tree: who may import whom, how long files and functions may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("distrain", "launch")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(parent.is_symlink() for parent in path.parents)
]

# Each package, and each module of the ground floor, imports from lower levels only; lazy imports
# count. A package without a level here is a mistake.
LEVELS = {
    8: "__main__",
    7: "tune",
    6: "cli runs evaluate",
    5: "job launch hooks adapters",
    4: "trainer weights schedule runfolder experiments transforms",
    3: "distributed optim config writers",
    2: "events data checkpoint gpus",
    1: "checks durations extras heartbeat progress files process",
    0: "errors log text scalar_names run_layout redact _lazy",
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names.split()}
UPWARD_FOR_TYPES = set()
GROUND_FLOOR = {"__init__", "__main__", *LEVELS[1].split(), *LEVELS[0].split()}
LIBRARIES = {
    "hydra": ("distrain.cli", "distrain.config"),
    "omegaconf": ("distrain.cli", "distrain.config"),
    "submitit": ("distrain.launch.slurm",),
}
MOST_LINES = 350
MOST_LINES_OF_A_FUNCTION = 60


def name_of(path):
    """Return the dotted name of a module; of the package for its `__init__`."""
    parts = [*path.relative_to(ROOT).with_suffix("").parts]
    if parts[0] == "launch":
        parts.insert(0, "distrain")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SOURCES}


def imports(path):
    """Return (module, is it only for the type checker, is it lazy) of every import in a file."""
    found = []

    def visit(node, typing_only, lazy):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, True, lazy)
            for child in node.orelse:
                visit(child, typing_only, lazy)
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, typing_only, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name for name in submodules if name in MODULES] or [node.module]
            found.extend((name, typing_only, lazy) for name in names)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, typing_only, lazy)

    visit(ast.parse(path.read_text()), False, False)
    return found


def part(module):
    """Return the package, or the module of the ground floor, that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def level(module):
    """Return the level of a module; a `__main__` may import what it is the command of."""
    return 8 if module.endswith(".__main__") else LEVEL[part(module)]


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"distrain"}))
def test_imports_go_down(module):
    for imported, typing_only, _ in imports(MODULES[module]):
        library = imported.split(".")[0]
        if library in LIBRARIES and not typing_only:
            assert module.startswith(LIBRARIES[library]), f"{module} imports {imported}"
        if library != "distrain" or imported == "distrain" or typing_only:
            continue
        if part(imported) not in (part(module), "conf"):
            assert level(imported) < level(module), f"{module} imports {imported}"


def test_each_package_has_a_level():
    assert {part(module) for module in MODULES} - {"__init__"} == LEVEL.keys() - {
        name for name in LEVEL if not any(part(m) == name for m in MODULES)
    }


def test_the_trainer_uses_strategies_through_their_base_class():
    modules = [module for module in MODULES if module.startswith("distrain.trainer.")]
    imported = {name for module in modules for name, _, _ in imports(MODULES[module])}
    assert "distrain.distributed.strategy" in imported
    assert imported.isdisjoint({"distrain.distributed.ddp", "distrain.distributed.fsdp"})


def test_no_import_cycle():
    graph = {
        module: {
            name for name, typing_only, _ in imports(path) if name in MODULES and not typing_only
        }
        for module, path in MODULES.items()
    }
    assert not _cycle(graph)


def test_imports_for_the_type_checker_go_down_too():
    up = {
        (module, imported)
        for module, path in MODULES.items()
        for imported, typing_only, _ in imports(path)
        if typing_only
        and imported in MODULES
        and module.count(".") > 1
        and LEVEL[part(imported)] >= LEVEL[part(module)]
        and part(imported) != part(module)
    }
    assert up == UPWARD_FOR_TYPES


def test_no_cycle_between_packages():
    graph = {}
    for module, path in MODULES.items():
        if module.endswith("__main__") or module == "distrain":
            continue
        names = {
            part(name)
            for name, typing_only, _ in imports(path)
            if name in MODULES and not typing_only
        }
        graph.setdefault(part(module), set()).update(names - {part(module), "__init__"})
    assert not _cycle(graph)


def _cycle(graph):
    """Return a cycle of a graph of sets, empty if there is none."""
    done, active = set(), []

    def visit(node):
        if node in active:
            return [*active[active.index(node) :], node]
        if node not in done:
            active.append(node)
            for other in sorted(graph.get(node, ())):
                if found := visit(other):
                    return found
            active.pop()
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node))), [])


def test_nothing_lies_flat_beyond_the_ground_floor():
    flat = {path.stem for path in (ROOT / "distrain").glob("*.py")}
    assert flat <= GROUND_FLOOR


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_and_functions_are_short(module):
    text = MODULES[module].read_text()
    assert text.count("\n") <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_LINES_OF_A_FUNCTION, f"{module}.{node.name}"


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


def test_files_of_tests_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), "pytest imports them by name"
