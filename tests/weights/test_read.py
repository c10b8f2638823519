"""Weights read from runs and files, and written for inference."""

import pickle

import pytest
import torch
from checkpoint_cases import InlineStore
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from distrain.cli.weights import main
from distrain.errors import ConfigError
from distrain.weights.read import locate_weights, read_weights


def saved(folder, *iterations, average=False):
    """Save checkpoints whose weights are their iteration; return the run's folder."""
    store = InlineStore(folder / "checkpoints")
    for iteration in iterations:
        weights = {"w": torch.full((2, 3), float(iteration)), "count": torch.tensor(iteration)}
        hooks = {"timer": {}}
        if average:
            hooks["ema"] = {"updates": 1, "average": {"w": torch.full((2, 3), 0.5)}}
        store.save(iteration, {"model": weights, "hooks": hooks}, world_size=1)
    store.close()
    return folder


def damage(run, iteration):
    file = run / "checkpoints" / f"iter_{iteration:010d}" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_run_means_its_newest_valid_checkpoint(tmp_path, caplog):
    run = saved(tmp_path / "a", 3, 5)
    assert locate_weights(run).name == locate_weights(run / "checkpoints").name == "iter_0000000005"
    assert read_weights(locate_weights(run))["w"].tolist() == [[5.0] * 3] * 2
    damage(run, 5)
    assert locate_weights(run).name == "iter_0000000003"
    assert "iter_0000000005" in caplog.text
    damage(run, 3)
    with pytest.raises(ConfigError, match="none of its checkpoints is valid"):
        locate_weights(run)


def test_a_checkpoint_may_be_named_and_is_checked(tmp_path):
    run = saved(tmp_path / "a", 3, 5)
    path = run / "checkpoints" / "iter_0000000003"
    assert read_weights(locate_weights(path))["count"].item() == 3
    damage(run, 3)
    with pytest.raises(ConfigError, match="model.safetensors was altered.*; give another"):
        read_weights(locate_weights(path))


def test_the_average_takes_the_place_of_weights_and_buffers_stay(tmp_path):
    path = locate_weights(saved(tmp_path / "a", 3, average=True))
    weights = read_weights(path, ema="ema")
    assert (weights["w"][0, 0].item(), weights["count"].item()) == (0.5, 3)
    with pytest.raises(ConfigError, match="no average called ema=emma; available: ema"):
        read_weights(path, ema="emma")
    other = locate_weights(saved(tmp_path / "b", 3))
    with pytest.raises(ConfigError, match="ema=ema; available: none"):
        read_weights(other, ema="ema")


def test_a_hook_may_have_any_state(tmp_path):
    hooks = {"a": {"average": torch.ones(2)}, "b": {"average": 0.5}, "c": [1], "d": None}
    hooks["ema"] = {"average": {"w": torch.zeros(2)}}
    store = InlineStore(tmp_path / "checkpoints")
    store.save(1, {"model": {"w": torch.ones(2)}, "hooks": hooks}, world_size=1)
    store.close()
    path = locate_weights(tmp_path)
    assert read_weights(path, ema="ema")["w"].tolist() == [0.0, 0.0]
    for name in "abcd":
        with pytest.raises(ConfigError, match=f"no average called ema={name}; available: ema"):
            read_weights(path, ema=name)


@pytest.mark.parametrize("state", [{"net": {"w": torch.ones(2)}}, {"model": torch.ones(2)}])
def test_a_checkpoint_without_a_model_is_one_line(tmp_path, capfd, state):
    store = InlineStore(tmp_path / "checkpoints")
    store.save(1, state, world_size=1)
    store.close()
    assert main([str(tmp_path), "-o", str(tmp_path / "o.safetensors")]) == 2
    error = capfd.readouterr().err
    assert (
        f"it holds no state of a model, a dict called model; it has the parts {[*state][0]}"
        in error
    )
    assert error.count("\n") == 1


def test_files(tmp_path):
    state = nn.Linear(2, 2).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {}}, tmp_path / "c.ckpt")
    torch.save({"model": state}, tmp_path / "d.pth")
    torch.save({"best_acc1": torch.tensor(0.7), "state_dict": state}, tmp_path / "e.pth.tar")
    for path in tmp_path.iterdir():
        found = read_weights(locate_weights(path))
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], value) for name, value in state.items())


class Evil:
    def __reduce__(self):
        return (print, ("this must not be printed",))


def write_bad_files(folder):
    (folder / "empty").mkdir()
    (folder / "a.safetensors").write_bytes(b"nothing of the kind")
    (folder / "b.pt").write_bytes(b"nothing of the kind")
    (folder / "c.pt").write_bytes(pickle.dumps({"w": Evil()}))
    torch.save({"lr": 0.1, "step": 3}, folder / "d.pt")
    torch.save([1, 2], folder / "e.pt")
    torch.save(nn.Linear(1, 1), folder / "f.pt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "there is no such file or folder; expected a run folder"),
        ("empty", "this folder holds no checkpoint"),
        ("a.safetensors", "not a safetensors file"),
        ("b.pt", "b.pt: "),
        ("c.pt", "would run code; save model.state_dict"),
        ("d.pt", "it holds a dict of lr, step, not a state dict"),
        ("e.pt", "it holds .*list.*, not a state dict"),
        ("f.pt", "would run code; save model.state_dict"),
    ],
)
def test_what_is_no_weights_is_one_line(tmp_path, capfd, name, message):
    write_bad_files(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        read_weights(locate_weights(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert "must not be printed" not in capfd.readouterr().out


def test_only_a_checkpoint_has_an_average(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="only a run's checkpoint has an average, ema=ema"):
        read_weights(tmp_path / "a.safetensors", ema="ema")


def test_the_command_writes_a_file_for_inference(tmp_path, capfd):
    run = saved(tmp_path / "a", 3, 5, average=True)
    for name, ema, value in (("plain", [], 5.0), ("average", ["--ema", "ema"], 0.5)):
        file = tmp_path / f"{name}.safetensors"
        assert main([str(run), "-o", str(file), *ema]) == 0
        assert load_file(file)["w"].tolist() == [[value] * 3] * 2
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert "2 tensors, 0.0 MB, from" in capfd.readouterr().out
    assert main([str(run), "-o", str(file)]) == 2
    assert "exists; give another name" in capfd.readouterr().err
    assert main([str(tmp_path / "none"), "-o", str(tmp_path / "x.safetensors")]) == 2
    assert main([str(run), "-o", str(tmp_path / "no" / "x.safetensors")]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a", "average.safetensors", "plain.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["w.pt", "w", "w.SAFETENSORS"])
def test_a_file_that_no_reader_takes_for_safetensors_is_refused(tmp_path, capfd, name):
    output = tmp_path / name
    assert main([str(tmp_path / "none"), "-o", str(output)]) == 2  # before the run is read
    expected = "expected a name that ends with .safetensors"
    assert capfd.readouterr().err == f"distrain: -o {output}: {expected}\n"
    assert not output.exists()


def test_channels_last_weights_are_written_dense(tmp_path):
    store = InlineStore(tmp_path / "checkpoints")
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    store.save(1, {"model": {"w": weight}}, world_size=1)
    store.close()
    assert main([str(tmp_path), "-o", str(tmp_path / "w.safetensors")]) == 0
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], weight)


def test_tied_weights_of_a_file_are_written_under_both_names(tmp_path):
    weight = torch.randn(2, 3)
    torch.save({"a": weight, "b": weight, "c": weight[1:]}, tmp_path / "a.pt")
    assert main([str(tmp_path / "a.pt"), "-o", str(tmp_path / "w.safetensors")]) == 0
    found = load_file(tmp_path / "w.safetensors")
    assert torch.equal(found["a"], weight)
    assert torch.equal(found["b"], weight)
    assert torch.equal(found["c"], weight[1:])


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.zeros(2, dtype=torch.complex128), "cannot hold torch.complex128"),
        (torch.eye(3).to_sparse(), "cannot be written"),
        (torch.empty(3, device="meta"), "cannot be written"),
    ],
    ids=["complex128", "sparse", "meta"],
)
def test_what_a_safetensors_file_cannot_hold_is_one_line(tmp_path, capfd, tensor, why):
    torch.save({"w": tensor}, tmp_path / "a.pt")
    assert main([str(tmp_path / "a.pt"), "-o", str(tmp_path / "w.safetensors")]) == 2
    error = capfd.readouterr().err
    assert why in error
    assert error.count("\n") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["a.pt"]
