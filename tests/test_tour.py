"""docs/tour.md: its files exist, and together they read in about an hour."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOUR = (ROOT / "docs" / "tour.md").read_text()
FILES = re.findall(r"^\| `([\w/]+\.py)` \|", TOUR, re.M)


def test_the_tour_reads_in_an_hour():
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in FILES)
    (said,) = re.findall(r"about\s+([\d,]+) lines", TOUR)
    assert abs(lines - int(said.replace(",", ""))) <= 200
    assert lines <= 3700
    assert 18 <= len(FILES) <= 24


def test_each_file_named_in_the_documents_exists():
    for name in ("tour.md", "architecture.md"):
        text = (ROOT / "docs" / name).read_text()
        for path in re.findall(r"`((?:distrain|launch|tests|conf)/[\w/]*(?:\.py|/))`", text):
            assert (ROOT / path).exists(), f"docs/{name}: {path}"
