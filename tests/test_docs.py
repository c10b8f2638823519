"""The documents: they build without a warning, and hold every key, module and group."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distrain.config import keys
from distrain.launch.client import State

ROOT = Path(__file__).parents[1]
pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings_handlers.python")


@pytest.fixture(scope="module")
def generate():
    """The hook that makes pages from the sources."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import generate
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return generate


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a warning fails the build, and prints itself."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-d", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")
    return folder


def text(path):
    return html.unescape(re.sub(r"<[^>]*>", "", path.read_text()))


def test_every_page_is_there_and_no_link_is_broken(site):
    navigation, index = (ROOT / "mkdocs.yml").read_text(), (ROOT / "docs/index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / page.with_suffix(".html").name).exists()
        assert f": {page.name}\n" in navigation or page.name == "index.md", page.name
        assert f"({page.name})" in index or page.name == "index.md", page.name


def test_the_configuration_has_every_key_with_type_and_meaning(site, generate):
    page = text(site / "configuration.html")
    found = {key: kind for key, kind, _, doc in generate.schema_keys() if not doc}
    assert {"seed", "trainer.window", "optim.rules", "checkpoint.keep_last"} <= found.keys()
    for key, kind in found.items():
        assert re.search(rf"^\s*{re.escape(key)}\s*$", page, re.M), key
        assert kind
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \| (.*) \| (.+) \|$", generate.configuration(), re.M)
    assert {row[0] for row in rows} == found.keys()


def test_the_configuration_in_the_repository_is_that_of_the_sources(generate):
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == generate.configuration(), "python docs/generate.py writes it again"


def test_types_and_comments_are_read(generate, tmp_path):
    rows = {key: (kind, default) for key, kind, default, _ in generate.schema_keys()}
    assert rows["trainer.window"] == ("int, at least 1", "`20`")
    assert rows["trainer.clip_norm"] == ("float, above 0 or null", "`null`")
    assert rows["resume"] == ("`auto` or `never` or `must`", "`auto`")
    assert rows["hooks"] == ("keys, each a node with `_target_` or null", "`{}`")
    assert rows["data.train"] == ("node with `_target_` or null", "")
    file = tmp_path / "x.yaml"
    file.write_text("a: 1    # one | two\nb:\n  c: 2  # three\nd: '# 4'\n")
    comments = generate._comments(file, "top")
    assert comments == {"top.a": "one or two", "top.b": "", "top.b.c": "three", "top.d": "4'"}


def test_the_configuration_has_every_choice_of_every_group(site):
    page = text(site / "configuration.html")
    for path in (ROOT / "conf").glob("*/*.yaml"):
        assert f"{path.parent.name}={path.stem}" in page


def test_every_module_is_on_one_page(site, generate):
    pages = generate.api()
    listed = [name for names in pages.values() for name in names]
    assert len(listed) == len(set(listed))
    assert {"distrain.trainer", "distrain.launch.local", "distrain.hooks.timer"} <= {*listed}
    for part, names in pages.items():
        page = (site / "api" / generate._file(part).replace(".md", ".html")).read_text()
        for name in names:
            assert f'id="{name}"' in page, name
    page = text(site / "api" / "scalars.html")
    assert "A tensor is copied on its device and not read back." in page  # of put_scalar


def test_the_schema_is_what_the_page_is_made_of(generate):
    assert generate.keys is keys


def test_pages_name_keys_and_classes_that_exist(generate):
    """A key or an import path of ours in the text of a page is one."""
    known = {key for key, *_ in generate.schema_keys()}
    tops = {key.partition(".")[0] for key in known} - {"launch", "hooks", "schedule", "model"}
    for page in (ROOT / "docs").glob("*.md"):
        for word in re.findall(r"`([a-z_.]+)(?:=[^`]*)?`", page.read_text()):
            top, dot, _ = word.partition(".")
            if dot and top in tops and top not in ("run", "vars"):
                is_open = word.startswith(("trainer.ddp", "model.", "data.eval."))
                own = word.startswith(("trainer.error", "trainer.module", "trainer.iter"))
                assert word in known or is_open or own, f"{page.name}: {word}"


def test_every_hook_is_on_the_page_of_hooks_and_says_whether_it_is_in_every_run():
    from distrain import HookBase, hooks

    page = (ROOT / "docs" / "hooks.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| (yes)? ?\|$", page, re.M))
    every = [n for n in hooks.__all__ if isinstance(getattr(hooks, n), type)]
    assert rows.keys() == {n for n in every if issubclass(getattr(hooks, n), HookBase)}
    default = (ROOT / "conf" / "hooks" / "default.yaml").read_text()
    in_default = set(re.findall(r"_target_: distrain.hooks.(\w+)", default))
    assert {name for name, mark in rows.items() if mark} == in_default


def test_the_states_of_a_run_are_those_of_the_code():
    page = (ROOT / "docs" / "monitoring.md").read_text()
    told = page[page.index("| State |") :].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", told, re.MULTILINE) == [*State]
