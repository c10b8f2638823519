"""A few trials of the campaign, and that it would see what it looks for."""

import json

import campaign
import pytest

pytestmark = pytest.mark.ranks

ITERATIONS = 40


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quiet") / "run"
    return folder, campaign.reference(folder, iterations=ITERATIONS)


@pytest.mark.parametrize(
    ("fault", "role"), [("kill", "parent"), ("kill", "rank"), ("usr2", "rank")]
)
def test_a_disturbed_run_ends_as_a_quiet_one(tmp_path, quiet, fault, role):
    result = campaign.trial(
        tmp_path / "run", fault, seed=1, iterations=ITERATIONS, quiet=quiet[1], roles=[role]
    )
    assert result.problems == []
    assert len(result.what) == 1, "the fault has come"
    expected = {"parent": -9, "rank": 1}[role] if fault == "kill" else campaign.STOPPED
    assert result.codes == [expected, 0]
    assert result.lost[0] == 0 or fault == "kill"


def test_differences_are_seen(quiet):
    folder, reference = quiet
    runner = campaign.Runner(folder, iterations=ITERATIONS)
    assert campaign.differences(runner, reference) == []
    rows = runner.run / "metrics.jsonl"
    before = rows.read_bytes()
    first = json.loads(before.splitlines()[0])
    changes = [
        before + before.splitlines(keepends=True)[-1],  # an iteration twice
        before[before.index(b"\n") + 1 :],  # one that is missing
        json.dumps({**first, "loss": first["loss"] * (1 + 2e-16)}).encode()
        + before[before.index(b"\n") :],  # the last bit of one value
    ]
    for changed in changes:
        rows.write_bytes(changed)
        [problem] = campaign.differences(runner, reference)
        assert problem.startswith("metrics.jsonl")
    rows.write_bytes(before)
    hidden = runner.run / "checkpoints" / ".tmp-iter_0000000010-0123456789ab"
    hidden.mkdir()
    assert campaign.differences(runner, reference) == [
        "left files ['checkpoints/.tmp-iter_0000000010-0123456789ab']"
    ]
    hidden.rmdir()
    other = campaign.Reference(
        {**reference.digests, "rng": "0"}, reference.rows, {"loss": []}, 1.0, 1.0
    )
    problems = campaign.differences(runner, other)
    assert problems[0] == "the final rng differs"
    assert any(each.startswith("TensorBoard: loss has steps [4, 9,") for each in problems)
