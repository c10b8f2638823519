"""The site of the documents as a browser shows it from the disk."""

import os
import subprocess
import sys
from pathlib import Path

import browser
import pytest
from browser import Browser

ROOT = Path(__file__).parents[1]
pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings_handlers.python")


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_search_works_from_the_disk(tmp_path: Path) -> None:
    try:
        chromium = browser.install()
    except RuntimeError as error:
        pytest.skip(f"no browser here: {error}")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        check=True,
    )
    for name in "index.html", "api/hooks.html":
        assert "https://unpkg" not in (tmp_path / "site" / name).read_text()  # nothing is fetched
    with Browser(chromium, tmp_path / "profile") as page:
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        for name in "index.html", "api/hooks.html":
            page.open(f"file://{tmp_path}/site/{name}")
            page.wait("all('.md-search__input').length == 1 && document.readyState == 'complete'")
            page.value("all('.md-search__input')[0].focus()")
            page.call("Input.insertText", text="LAMB")
            page.call("Input.dispatchKeyEvent", type="keyUp", key="B")
            page.wait(
                "all('.md-search-result__link').some((e) => e.href.includes('#lars-and-lamb'))"
            )
