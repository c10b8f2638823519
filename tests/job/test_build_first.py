"""data.build_first: one rank per node builds the data sets before the others."""

import time

import pytest
from ranks import run_ranks
from resume_cases import Images, conf_of, train

from distrain.distributed.ranks import topology
from distrain.errors import ConfigError, ExitCode, RunFailed
from distrain.job.data import build_datasets
from distrain.job.evaluation import EvaluateJob

HERE = __name__


class Unpacked(Images):
    """Unpacks into a folder if it is empty; two processes at once would do it twice."""

    def __init__(self, folder):
        super().__init__()
        if not [*folder.glob("data")]:
            (folder / f"unpacked_by_{topology().rank}").touch()
            time.sleep(0.3)
            (folder / "data").touch()


def fails(error):
    if topology().rank == 0:
        raise {"config": ConfigError("path=x: expected a folder"), "os": OSError("no space")}[error]
    return Images()


def conf(node):
    return conf_of(data={"train": node, "build_first": True}, iters=2)


def trains(rank, folder):
    node = {"_target_": f"{HERE}.Unpacked", "folder": folder}
    return train(conf(node), folder / "run")[0]


def test_the_first_rank_unpacks(tmp_path):
    assert run_ranks(trains, 3, tmp_path) == [ExitCode.FINISHED] * 3
    assert [path.name for path in tmp_path.glob("unpacked*")] == ["unpacked_by_0"]


def evaluates(rank, folder):
    settings = conf_of(data={"train": None, "build_first": True, "eval_batch_size": 4}, iters=2)
    settings["data"]["eval"] = {"_target_": f"{HERE}.Unpacked", "folder": folder}
    settings["trainer"] |= {"precision": "fp32", "channels_last": False}
    (checkpoint,) = folder.glob("run/checkpoints/iter_*2")
    return EvaluateJob(settings, str(folder), str(checkpoint))._values()


def test_an_evaluation_unpacks_on_the_first_rank_too(tmp_path):
    node = {"_target_": f"{HERE}.Images"}
    train(conf_of(data={"train": node}, iters=2), tmp_path / "run")
    first, *others = run_ranks(evaluates, 2, tmp_path)
    assert [first] == others
    assert [path.name for path in tmp_path.glob("unpacked*")] == ["unpacked_by_0"]


def error_of(rank, error):
    node = {"_target_": f"{HERE}.fails", "error": error}
    with pytest.raises(Exception) as caught:
        build_datasets(conf(node), topology())
    return caught.type, str(caught.value)


@pytest.mark.parametrize(("error", "kind"), [("config", ConfigError), ("os", RunFailed)])
def test_a_failure_on_the_first_rank_ends_all(error, kind):
    (_, text), *others = run_ranks(error_of, 3, error)
    for of_other in others:
        assert of_other[0] is kind
        assert of_other[1].startswith("data: building it failed on rank 0: ")
        assert text in of_other[1]
