import pytest

from distrain import TrainerBase
from distrain.errors import ConfigError
from distrain.hooks import CallbackHook
from distrain.trainer.hook import MOMENTS


class Steps(TrainerBase):
    def run_step(self):
        for call in self._calls["after_backward"]:
            call()


def test_each_moment_calls_its_function():
    seen = []
    functions = {moment: lambda t, moment=moment: seen.append(moment) for moment in MOMENTS}
    Steps([CallbackHook(**functions)]).train(0, 1)
    assert seen == [*MOMENTS]


def test_a_moment_without_a_function():
    Steps([CallbackHook(after_step=None)]).train(0, 1)


def test_a_misspelt_moment():
    with pytest.raises(ConfigError, match="after_setp: expected a moment; did you mean after_step"):
        CallbackHook(after_setp=print)
