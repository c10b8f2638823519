"""Pages made from the sources, so that they cannot drift: the configuration, the API by module.

As a command it writes docs/configuration.md, which is in the repository: it is read without the
site, too. As a hook of mkdocs it adds the pages of the API and their places in the navigation.
"""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from distrain.config import keys

ROOT = Path(__file__).parents[1]
PARTS = {
    "Training": ("distrain", "trainer", "job"),
    "Hooks": ("hooks",),
    "Scalars": ("events", "writers"),
    "Optimizer and schedule": ("optim", "schedule"),
    "Data": ("data",),
    "Ranks": ("distributed",),
    "Checkpoints and weights": ("checkpoint", "weights"),
    "Configuration": ("config",),
    "Launching": ("launch", "gpus"),
    "Runs": ("runs", "runfolder"),
    "Models of other trainers": ("adapters",),
    "Transforms of the model": ("transforms",),
    "Experiments": ("experiments",),
}
REST = "Further modules"
MEANINGS = {  # of keys behind which no file in conf/ says anything
    "run.name": "name of the run; the experiment's if you say nothing",
    "launch": "how ranks are started: `launch=local`, `slurm`, `external`, `allocation`",
    "seed": "of the weights, of the order of the samples and of what is drawn while training",
    "schedule": "the learning rate over iterations, such as `schedule=cosine`; null: it stays",
    "hooks": "hooks by name; `hooks.NAME=null` leaves one out",
    "trainer.compile": "through `torch.compile`",
    "trainer.channels_last": "images and filters in that memory format",
    "trainer.ddp": "keywords of torch's `DistributedDataParallel`",
    "optim.lr": "learning rate, before any schedule",
    "optim.target": "import path of a `torch.optim.Optimizer` class",
    "optim.weight_decay": "of all that is neither norm nor bias",
    "optim.bias_lr_factor": "factor on the rate of biases outside norm layers",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the API into the navigation."""
    assert config.nav is not None
    pages: list[Any] = [{part: f"api/{_file(part)}"} for part in api()]
    config.nav.append({"API": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the API."""
    for part, modules in api().items():
        page = api_page(part, modules)
        files.append(File.generated(config, f"api/{_file(part)}", content=page))
    return files


def _file(part: str) -> str:
    return part.lower().replace(" ", "-") + ".md"


# the API


def modules() -> list[str]:
    """Return the import paths of all modules of the package that say something."""
    package = ROOT / "distrain"
    paths = [*package.rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    names = set()
    for path in paths:
        if any(p.is_symlink() for p in path.parents if p != ROOT):
            continue
        inside = (
            path.relative_to(package) if path.is_relative_to(package) else path.relative_to(ROOT)
        )
        parts = [part for part in inside.with_suffix("").parts if part != "__init__"]
        if parts != ["__main__"] and ast.get_docstring(ast.parse(path.read_text())):
            names.add(".".join(["distrain", *parts]))
    return sorted(names)


def api() -> dict[str, list[str]]:
    """Return the modules of each page, those that no page claims on the last."""
    pages: dict[str, list[str]] = {part: [] for part in [*PARTS, REST]}
    claimed = {name: part for part, names in PARTS.items() for name in names}
    for module in modules():
        top = "distrain" if module == "distrain" else module.split(".")[1]
        pages[claimed.get(top, REST)].append(module)
    return {part: names for part, names in pages.items() if names}


def api_page(part: str, names: list[str]) -> str:
    """Return the page of some modules; a package that only re-exports shows its docstring."""
    lines = [f"# {part}", ""]
    for name in names:
        lines += [f"::: {name}", "    options: {show_root_toc_entry: true, heading_level: 2}", ""]
    return "\n".join(lines)


# the configuration


def configuration() -> str:
    """Return the page with every key: of the schema, then of the files in conf/."""
    lines = [
        "# Configuration",
        "",
        "Every key that the service reads. A key is changed on the command line, as in",
        "`optim.lr=0.05`, or in an experiment. `python -m distrain +experiment=digits --cfg job`",
        "shows a composed configuration. A node with `_target_` is built from that import path,",
        "and its other keys are keywords of what it names.",
        "",
    ]
    sections: dict[str, list[tuple[str, ...]]] = {"": []}
    comments = _comments(ROOT / "conf" / "config.yaml")
    for group in ("trainer/default", "optim/sgd"):
        comments |= _comments(ROOT / "conf" / f"{group}.yaml", group.partition("/")[0])
    docs = {"": "The keys at the top."}
    for key, kind, default, doc in schema_keys():
        top = key.partition(".")[0] if "." in key else ""
        if doc:
            docs[key] = doc
        else:
            meaning = comments.get(key) or MEANINGS.get(key, "")
            if "`" not in meaning:  # else Markdown takes its underscores for emphasis
                meaning = meaning.replace("_target_", "`_target_`")
            row = (f"`{key}`", kind, default, meaning)
            sections.setdefault(top, []).append(row)
    for top, rows in sections.items():
        lines += [f"## {top or 'At the top'}", "", docs[top], ""]
        lines += [*_table(("key", "type", "default", "meaning"), rows), ""]
    lines += [
        "## Groups",
        "",
        "A choice is made by `group=choice`, an experiment by `+experiment=choice`.",
        "",
    ]
    for group in sorted(path for path in (ROOT / "conf").iterdir() if path.is_dir()):
        for path in sorted(group.rglob("*.yaml")):
            text = path.read_text().rstrip()
            is_choice = path.parent == group  # else included by the choices
            name = path.relative_to(ROOT / "conf").with_suffix("").as_posix()
            title = f"{group.name}={path.stem}" if is_choice else name
            lines += [f"### {title}", "", "```yaml", text, "```", ""]
    return "\n".join(lines)


def schema_keys(cls: type = keys.Keys, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield the schema's keys: dotted name, type, default, and what a node's docstring says."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for entry in dataclasses.fields(cls):
        hint, key = hints[entry.name], prefix + entry.name
        nodes = [
            each
            for each in (hint, *typing.get_args(hint))
            if isinstance(each, type) and dataclasses.is_dataclass(each)
        ]
        if nodes:
            [node] = nodes
            yield key, "", "", (node.__doc__ or "").partition(": ")[2].capitalize()
            yield from schema_keys(typing.cast(type, node), key + ".")
        else:
            yield key, type_text(hint), _default(entry), ""


def type_text(hint: Any) -> str:
    """Return a type and its range in words, as `int, at least 1`."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        inner, *limits = typing.get_args(hint)
        words = [type_text(inner)]
        for limit in limits:
            if isinstance(limit, keys.AtLeast):
                words.append(f"at least {limit.limit}")
            elif limit is keys.positive:
                words.append("above 0")
        return ", ".join(words)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if origin in (types.UnionType, typing.Union):
        words = [
            "null" if each is type(None) else type_text(each) for each in typing.get_args(hint)
        ]
        return " or ".join(words)
    if hint is keys.Length:
        return "int, at least 1, or text in epochs"
    if hint is keys.Target:
        return "node with `_target_`"
    if origin in (dict, list):
        of = typing.get_args(hint)[-1]
        kind = "keys" if origin is dict else "list"
        return kind if of is Any else f"{kind}, each a {type_text(of)}"
    return "text" if hint is str else hint.__name__


def _default(entry: dataclasses.Field[Any]) -> str:
    if entry.default_factory is not dataclasses.MISSING:
        return f"`{entry.default_factory()}`"
    if entry.default is dataclasses.MISSING:
        return ""
    return f"`{'null' if entry.default is None else yaml.safe_dump(entry.default).split()[0]}`"


def _comments(path: Path, prefix: str = "") -> dict[str, str]:
    """Return what a YAML file says behind its keys, by dotted key."""
    found, above = {}, [(-1, prefix)]
    for line in path.read_text().splitlines():
        name, colon, rest = line.partition(":")
        if not colon or not name.strip().isidentifier():
            continue
        depth = len(name) - len(name.lstrip())
        while above[-1][0] >= depth:
            above.pop()
        key = ".".join(filter(None, [above[-1][1], name.strip()]))
        above.append((depth, key))
        found[key] = rest.partition("# ")[2].replace("|", "or") if "# " in rest else ""
    return found


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [head, ("---",) * len(head), *rows]]


if __name__ == "__main__":
    (ROOT / "docs" / "configuration.md").write_text(configuration())
