"""A user's project for tests: a module of the user's own, and an experiment that names it."""

from pathlib import Path


def write_project(folder: Path, *, module: str, code: str, experiment: str, conf: str) -> None:
    """Write `MODULE.py` and `conf/experiment/EXPERIMENT.yaml` into a folder."""
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / f"{experiment}.yaml").write_text(conf)
    (folder / f"{module}.py").write_text(code)
