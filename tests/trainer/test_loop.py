import pytest

from distrain import EventStorage, HookBase, TrainerBase, get_event_storage
from distrain.errors import ConfigError
from distrain.hooks import CallbackHook


class Steps(TrainerBase):
    def __init__(self, hooks=(), **kwargs):
        super().__init__(hooks, **kwargs)
        self.done = []

    def run_step(self):
        assert get_event_storage() is self.storage
        self.storage.put_scalars(square=float(self.iter**2))
        self._call("after_backward")
        self.done.append(self.iter)


class Recorder(HookBase):
    def __init__(self, name, log):
        self.name, self.log = name, log

    def before_train(self):
        self.log.append((self.name, "before_train", self.trainer.iter))

    def before_step(self):
        self.log.append((self.name, "before_step", self.trainer.iter))

    def after_backward(self):
        self.log.append((self.name, "after_backward", self.trainer.iter))

    def after_step(self):
        self.log.append((self.name, "after_step", self.trainer.iter))

    def after_last_step(self):
        self.log.append((self.name, "after_last_step", self.trainer.iter))

    def after_train(self):
        self.log.append((self.name, "after_train", self.trainer.iter))


def test_the_calling_sequence():
    log = []
    Steps([Recorder("a", log), Recorder("b", log)]).train(3, 5)
    moments = ["before_step", "after_backward", "after_step"]
    steps = [(name, moment, i) for i in (3, 4) for moment in moments for name in "ab"]
    start = [("a", "before_train", 3), ("b", "before_train", 3)]
    end = [(name, moment, 5) for moment in ("after_last_step", "after_train") for name in "ab"]
    assert log == [*start, *steps, *end]


def test_only_overridden_moments_are_called():
    class OnlyAfterStep(HookBase):
        def after_step(self):
            pass

    trainer = Steps([OnlyAfterStep(), OnlyAfterStep()])
    assert [len(calls) for calls in trainer._calls.values()] == [0, 0, 0, 2, 0, 0]


def test_hooks_run_by_order_then_as_given():
    class Early(HookBase):
        order = 10

    class Late(HookBase):
        order = 90

    class Usual(HookBase):
        pass

    trainer = Steps({"z": Late(), "b": Usual(), "a": Usual(), "c": Early()})
    assert list(trainer.hooks) == ["c", "b", "a", "z"]
    trainer.register_hooks({"d": Usual()})
    assert list(trainer.hooks) == ["c", "b", "a", "d", "z"]
    with pytest.raises(ValueError, match="'a'"):
        trainer.register_hooks({"a": Usual()})


def test_two_hooks_of_one_class_keep_their_own_state():
    class Counter(HookBase):
        def __init__(self):
            self.num = 0

        def after_step(self):
            self.num += 1

        def state_dict(self):
            return {"num": self.num}

        def load_state_dict(self, state):
            self.num = state["num"]

    first, second = Counter(), Counter()
    trainer = Steps([first, second])
    trainer.train(0, 3)
    second.num = 10
    others = Counter(), Counter()
    resumed = Steps(list(others))
    resumed.load_state_dict(trainer.state_dict())
    assert [hook.num for hook in others] == [3, 10]


def test_after_train_runs_after_a_failure_and_knows_of_it():
    seen = []

    def fail(trainer):
        if trainer.iter == 2:
            raise KeyError("broken")

    trainer = Steps(
        [CallbackHook(after_step=fail), CallbackHook(after_train=lambda t: seen.append(t.error))]
    )
    with pytest.raises(KeyError, match="broken"):
        trainer.train(0, 5)
    assert isinstance(seen[0], KeyError)
    assert trainer.done == [0, 1, 2]


def test_each_hook_ends_though_another_fails_at_the_end(caplog):
    seen = []

    def fail(trainer):
        raise KeyError("broken")

    def fail_too(trainer):
        raise ValueError("torn")

    ends = [fail, fail_too, lambda trainer: seen.append(trainer.error)]
    trainer = Steps([CallbackHook(after_train=end) for end in ends])
    with pytest.raises(KeyError, match="broken"):
        trainer.train(0, 5)
    assert isinstance(seen[0], KeyError)  # who communicates does not, then
    assert "torn" in caplog.text


def test_a_ctrl_c_at_the_end_leaves_at_once():
    seen = []

    def interrupt(trainer):
        raise KeyboardInterrupt

    ends = [interrupt, lambda trainer: seen.append(trainer.error)]
    with pytest.raises(KeyboardInterrupt):
        Steps([CallbackHook(after_train=end) for end in ends]).train(0, 5)
    assert seen == []


def stops_at_six():
    def stop(trainer):
        if trainer.iter == 6:
            trainer.storage.early_stop = True

    return Steps([CallbackHook(after_step=stop)], window=5)


def test_early_stop_ends_where_the_period_ends():
    trainer = stops_at_six()
    trainer.train(0, 100)
    assert trainer.iter == trainer.iter_done == len(trainer.done)
    assert trainer.iter == 10
    assert trainer.storage.history("square").values() == [
        (float(i**2), i) for i in range(trainer.iter)
    ]


def test_a_run_that_resumes_between_an_early_stop_and_its_iteration_stops_there():
    first = stops_at_six()
    first.train(0, 8)
    second = Steps(window=5)
    second.load_state_dict(first.state_dict())
    second.train(8, 100)
    assert second.iter == 10
    third = Steps(window=5)  # it was obeyed: who starts the run again wants it to go on
    third.load_state_dict(second.state_dict())
    third.train(10, 100)
    assert third.iter == 100


def test_a_stop_requested_before_training_is_heeded():
    trainer = Steps(window=5)
    trainer.request_stop()
    trainer.train(0, 100)
    assert len(trainer.done) == 1  # the first window is the first iteration


def test_histories_go_on_after_resumption():
    straight = Steps()
    straight.train(0, 50)
    first, second = Steps(), Steps()
    first.train(0, 23)
    second.load_state_dict(first.state_dict())
    second.train(23, 50)
    assert second.storage.history("square").values() == straight.storage.history("square").values()


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (6, 5)])
def test_iterations_out_of_range(start, end):
    with pytest.raises(ConfigError, match=f"start_iter={start}: expected at least 0"):
        Steps().train(start, end)


def test_window_and_step_are_checked():
    with pytest.raises(ConfigError, match="window=0"):
        Steps(window=0)
    with pytest.raises(TypeError, match="override run_step"):
        TrainerBase().train(0, 1)


def test_a_hook_for_the_main_rank_runs_on_rank_0():
    class Main(Recorder):
        ranks = "main"

    log = []
    Steps([Main("m", log)]).train(0, 1)
    assert [moment for _, moment, _ in log][0] == "before_train"


def test_storage_is_left_at_the_end():
    Steps().train(0, 2)
    with EventStorage(0) as storage:
        assert get_event_storage() is storage


def test_a_hook_that_finds_itself_idle_is_called_at_both_ends_only():
    calls = []

    class Idle(HookBase):
        def before_train(self):
            calls.append("before_train")
            self.is_idle = self.trainer.max_iter == 2

        def after_step(self):
            calls.append("after_step")

        def after_train(self):
            calls.append("after_train")

    class Loop(TrainerBase):
        def run_step(self):
            pass

    loop = Loop([Idle()])
    loop.train(0, 2)
    assert calls == ["before_train", "after_train"]
    calls.clear()
    loop.train(0, 1)
    assert calls == ["before_train", "after_step", "after_train"]


def named(name):
    """Return a hook class with one method of this name."""
    return type("Mine", (HookBase,), {name: lambda self: None})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("after_setp", "after_step"),
        ("after_steps", "after_step"),
        ("afterStep", "after_step"),
        ("befor_step", "before_step"),
        ("before_training", "before_train"),
        ("after_trian", "after_train"),
        ("after_bakward", "after_backward"),
    ],
)
def test_a_misspelt_moment_is_refused(name, meant):
    class Derived(named(name)):
        pass

    with pytest.raises(ConfigError, match=f"Derived: {name} is never called: expected {meant}"):
        Steps([Derived()])


@pytest.mark.parametrize(
    "name", ["after_eval", "before_epoch", "after_save", "before_iter", "step", "_after_steps"]
)
def test_other_methods_of_a_hook_are_its_own(name):
    Steps([named(name)()])
