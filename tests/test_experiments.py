"""The data sets and models of the experiments, against values worked by hand."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets
import torch
from run_module import run_module
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from distrain.config.compose import build, resolve
from distrain.events.storage import EventStorage
from distrain.experiments.digits import Digits, DigitsNet, load_split, shifted, split_indices
from distrain.experiments.multiloss import (
    CANVAS,
    DigitCanvas,
    DigitFinder,
    box_iou,
    draw_found,
    ink_boxes,
    render,
)
from distrain.experiments.pydoc_gpt import (
    ALPHABET,
    OTHER,
    VOCABULARY,
    CharGpt,
    PydocText,
    corpus,
    encode,
)
from distrain.optim.groups import param_groups
from distrain.trainer.model_call import total_loss

ROOT = Path(__file__).parents[1]
METRIC = {
    "digits": "eval/accuracy",
    "pydoc_gpt": "eval/bits_per_char",
    "multiloss": "eval/box_iou",
}
EXPERIMENTS = list(METRIC)


def collated(dataset: Dataset[tuple[Tensor, ...]], indices: list[int]) -> list[Tensor]:
    return list(default_collate([dataset[i] for i in indices]))


# digits


def test_digits_split_is_a_fixed_fifth_of_every_class() -> None:
    labels = torch.arange(10).repeat(20)  # 20 of each class
    train, test = split_indices(labels, "train"), split_indices(labels, "test")
    assert sorted(train.tolist() + test.tolist()) == list(range(200))
    assert labels[test].bincount().tolist() == [4] * 10
    assert torch.equal(test, split_indices(labels, "test"))


def test_digits_are_those_of_scikit_learn_without_its_import() -> None:
    code = "import sys; from distrain.experiments import digits; digits.Digits();"
    code += "sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    expected = sklearn.datasets.load_digits()
    labels = torch.from_numpy(expected.target)
    for split in ("train", "test"):
        chosen = split_indices(labels, split)
        images, own_labels = load_split(split)
        assert torch.equal(images, torch.from_numpy(expected.images)[chosen].float() / 16)
        assert torch.equal(own_labels, labels[chosen])


def test_digits_train_and_test_share_no_image() -> None:
    train, test = load_split("train"), load_split("test")
    assert len(train[0]) + len(test[0]) == 1797
    assert len(test[0]) == 359
    seen = {image.numpy().tobytes() for image in train[0]}
    assert not seen & {image.numpy().tobytes() for image in test[0]}
    assert test[1].bincount().min() >= 34  # 174 images of the rarest class


def test_digits_split_name_is_checked() -> None:
    with pytest.raises(ValueError, match="split='validation'.*'train' and 'test'"):
        Digits("validation")  # type: ignore[arg-type]


def test_shifted_moves_whole_pixels_and_fills_with_zeros() -> None:
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(shifted(image, down=0, right=0), image)
    assert torch.equal(shifted(image, down=1, right=0), torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
    assert torch.equal(shifted(image, down=0, right=-1), torch.tensor([[2.0, 0.0], [4.0, 0.0]]))
    assert torch.equal(shifted(image, down=-1, right=1), torch.tensor([[0.0, 3.0], [0.0, 0.0]]))


def test_digits_augmentation_is_drawn_from_the_seeded_generator() -> None:
    train = Digits("train")
    draws = []
    for seed in (3, 3, 4, 5, 6):
        torch.manual_seed(seed)
        draws.append(torch.stack([train[i][0] for i in range(20)]))
    assert torch.equal(draws[0], draws[1])
    assert any(not torch.equal(draws[0], other) for other in draws[2:])
    moves = {(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)}
    originals = [shifted(train.images[0], down=d, right=r) for d, r in moves]
    assert all(any(torch.equal(draw[0, 0], o) for o in originals) for draw in draws)


def test_digits_test_split_draws_nothing() -> None:
    test = Digits("test")
    before = torch.get_rng_state()
    image, label = test[7]
    assert torch.equal(torch.get_rng_state(), before)
    assert image.shape == (1, 8, 8)
    assert torch.equal(image[0], test.images[7])
    assert label == test.labels[7]


def test_digits_net_untrained_loss_and_metrics() -> None:
    torch.manual_seed(0)
    model = DigitsNet(width=8)
    images, labels = collated(Digits("test"), list(range(64)))
    loss = model(images, labels)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(math.log(10), abs=0.4)
    model.eval()
    accuracy = model.metrics(images, labels)["accuracy"]
    expected = (model.logits(images).argmax(1) == labels).float()
    assert accuracy.shape == (64,)
    assert torch.equal(accuracy, expected)


def test_digits_net_learns_one_batch() -> None:
    torch.manual_seed(0)
    model = DigitsNet(width=8)
    images, labels = collated(Digits("test"), list(range(64)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        model(images, labels).backward()
        optimizer.step()
    assert model.metrics(images, labels)["accuracy"].mean() > 0.98


# pydoc_gpt


def test_corpus_holds_every_paragraph_once() -> None:
    paragraphs = corpus().split("\n\n")
    assert len(paragraphs) == len(set(paragraphs))
    assert 200_000 < len(corpus()) < 2_000_000


def test_encode_numbers_characters_and_lumps_the_rest() -> None:
    assert encode("\n !~").tolist() == [0, 1, 2, 95]
    assert encode("é“").tolist() == [OTHER, OTHER]
    assert VOCABULARY == 97
    assert (encode(corpus()) == OTHER).float().mean() < 0.01


def test_text_splits_are_disjoint_and_complete() -> None:
    train, test = PydocText("train"), PydocText("test")
    assert torch.equal(torch.cat([train.text, test.text]), encode(corpus()))
    assert len(test.text) == round(0.1 * len(corpus()))


def test_windows_are_the_text_and_targets_one_further() -> None:
    train = PydocText("train", context=16)
    begin = "".join(ALPHABET[i] for i in train[0][0])
    assert begin == corpus()[:16]
    inputs, targets = train.get_batch(torch.tensor([5, len(train) - 1]))
    assert inputs.shape == targets.shape == (2, 16)
    assert torch.equal(inputs[0], train.text[5:21])
    assert torch.equal(targets[0], train.text[6:22])
    assert torch.equal(targets[1], train.text[-16:])  # the last window ends with the split
    assert torch.equal(train[5][1], targets[0])


def test_test_windows_predict_each_character_once() -> None:
    test = PydocText("test", context=50)
    targets = test.get_batch(torch.arange(len(test)))[1].flatten()
    assert torch.equal(targets, test.text[1 : 1 + len(targets)])
    assert 0 <= len(test.text) - 1 - len(targets) < 50


@pytest.mark.parametrize("context", [0, 10_000_000])
def test_context_must_fit(context: int) -> None:
    with pytest.raises(ValueError, match=f"context={context}: allowed are 1 to"):
        PydocText("test", context=context)


def small_gpt() -> CharGpt:
    torch.manual_seed(0)
    return CharGpt(context=16, depth=2, width=32, heads=4)


def test_gpt_untrained_predicts_every_character_alike() -> None:
    model = small_gpt()
    inputs, targets = PydocText("train", context=16).get_batch(torch.arange(8) * 100)
    loss = model(inputs, targets)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(math.log(VOCABULARY), abs=0.1)
    bits = model.metrics(inputs, targets)["bits_per_char"]
    assert bits.shape == (8,)
    assert bits.mean().item() == pytest.approx(loss.item() / math.log(2), rel=1e-5)


def test_gpt_is_causal() -> None:
    model = small_gpt().double()
    inputs = torch.randint(VOCABULARY, (1, 16))
    changed = inputs.clone()
    changed[0, 10] = (changed[0, 10] + 1) % VOCABULARY
    before, after = model.logits(inputs), model.logits(changed)
    assert torch.equal(before[0, :10], after[0, :10])
    assert not torch.equal(before[0, 10:], after[0, 10:])


def test_gpt_attention_against_its_formula() -> None:
    attention = small_gpt().blocks[0].attention  # type: ignore[union-attr]
    x = torch.randn(1, 5, 32)
    query, key, value = attention.query_key_value(x)[0].chunk(3, dim=1)  # each (5, 32)
    heads = []
    for h in range(4):
        q, k, v = (part[:, 8 * h : 8 * h + 8] for part in (query, key, value))
        scores = (q @ k.T / math.sqrt(8)).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(dim=1) @ v)
    expected = torch.cat(heads, dim=1) @ attention.project.weight.T
    torch.testing.assert_close(attention(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_gpt_ties_weights_and_counts_them_once() -> None:
    model = small_gpt()
    block = 32 * 96 + 32 * 32 + 32 * 128 + 128 + 128 * 32 + 32 + 4 * 32
    assert sum(p.numel() for p in model.parameters()) == 97 * 32 + 16 * 32 + 2 * block + 64


def test_gpt_heads_must_divide_width() -> None:
    with pytest.raises(ValueError, match="heads=5: must divide width=32"):
        CharGpt(width=32, heads=5)


# multiloss


def test_box_iou_of_known_boxes() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 4, 1], [0, 0, 0, 0]])
    others = torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2], [2, 2, 3, 3], [1, 0, 2, 1], [0, 0, 0, 0]])
    expected = torch.tensor([1 / 7, 1, 0, 1 / 4, 0])
    torch.testing.assert_close(box_iou(boxes, others), expected)


def test_ink_boxes_enclose_what_is_drawn() -> None:
    images = torch.zeros(2, 8, 8)
    images[0, 2:5, 1:7] = 0.5
    images[1, 7, 0] = 1
    assert ink_boxes(images).tolist() == [[1, 2, 7, 5], [0, 7, 1, 8]]


def test_render_at_scale_two_doubles_a_square() -> None:
    image = torch.zeros(1, 8, 8)
    image[0, 2:6, 2:6] = 1
    corner = torch.tensor([[4.0, 10.0]])
    canvas = render(image, corner=corner, scale=torch.tensor([2.0]))
    assert canvas.shape == (1, 1, CANVAS, CANVAS)
    assert canvas[0, 0, 15:21, 9:15].min() == 1  # x 4 + 2*2 .. 4 + 2*6 without its soft edge
    assert canvas[0, 0, :13].sum() == 0
    assert canvas[0, 0, :, :7].sum() == 0
    assert canvas.sum().item() == pytest.approx(4 * image.sum().item(), rel=1e-5)


def test_canvases_depend_on_the_index_alone() -> None:
    first, second = DigitCanvas("test", canvases=2), DigitCanvas("test", canvases=2)
    torch.manual_seed(5)
    batch = first.get_batch(torch.tensor([3, 400]))
    torch.manual_seed(6)
    again = collated(second, [3, 400])
    for one, other in zip(batch, again, strict=True):
        assert torch.equal(one, other)
    assert len(first) == 2 * 359
    assert first[0][1] == first[359][1]  # the same digit at another place
    assert not torch.equal(first[0][2], first[359][2])


def test_boxes_lie_on_the_canvas_around_the_ink() -> None:
    canvases, labels, boxes = DigitCanvas("train", canvases=1).get_batch(torch.arange(200))
    assert canvases.shape == (200, 1, 32, 32)
    assert labels.shape == (200,)
    assert boxes.shape == (200, 4)
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    inked = ink_boxes(canvases[:, 0] * (canvases[:, 0] > 0.02)) / CANVAS
    assert (boxes - inked).abs().max() < 2.6 / CANVAS  # interpolation and rounding to pixels
    assert box_iou(boxes, inked).min() > 0.5
    assert box_iou(boxes, inked).mean() > 0.75


def test_draw_found_frames_in_two_colors() -> None:
    canvases = torch.zeros(2, 1, 8, 8)
    boxes = torch.tensor([[0.25, 0.25, 0.75, 0.75]] * 2)
    found = torch.tensor([[0.0, 0.0, 1.0, 1.0], [-3.0, -3.0, 5.0, 5.0]])
    strip = draw_found(canvases, boxes=boxes, found=found, zoom=1)
    assert strip.shape == (3, 8, 16)
    torch.testing.assert_close(strip[:, 2, 2], torch.tensor([0.1, 0.9, 0.1]))
    torch.testing.assert_close(strip[:, 6, 6], torch.tensor([0.1, 0.9, 0.1]))
    torch.testing.assert_close(strip[:, 0, 0], torch.tensor([1.0, 0.2, 0.2]))
    torch.testing.assert_close(strip[:, 7, 15], torch.tensor([1.0, 0.2, 0.2]))
    assert strip[:, 4, 4].sum() == 0
    assert canvases.sum() == 0  # drawn on a copy


def test_finder_returns_named_losses_of_an_untrained_model() -> None:
    torch.manual_seed(0)
    model = DigitFinder(width=8, box_weight=10)
    batch = DigitCanvas("test").get_batch(torch.arange(32))
    losses = model(*batch)
    assert set(losses) == {"loss_class", "loss_box"}
    assert all(loss.shape == () for loss in losses.values())
    assert losses["loss_class"].item() == pytest.approx(math.log(10), abs=0.2)
    _, found = model.predict(batch[0])
    error = (found - batch[2]).abs()
    smooth = torch.where(error < 0.02, error**2 / 0.04, error - 0.01)  # Huber, beta = 0.02
    assert losses["loss_box"].item() == pytest.approx(10 * smooth.mean().item(), rel=1e-4)


def test_finder_metrics_are_per_sample() -> None:
    model = DigitFinder(width=8).eval()
    metrics = model.metrics(*DigitCanvas("test").get_batch(torch.arange(32)))
    assert {name: value.shape for name, value in metrics.items()} == {
        "accuracy": (32,),
        "box_iou": (32,),
    }
    assert (metrics["box_iou"] >= 0).all()
    assert (metrics["box_iou"] <= 1).all()


def test_finder_puts_images_every_period_and_only_in_training() -> None:
    model = DigitFinder(width=8, image_period=2)
    batch = DigitCanvas("test").get_batch(torch.arange(10))
    with EventStorage(0) as storage:
        for _ in range(3):
            model(*batch)
            storage.step()
        shown = [(name, image.shape, iteration) for name, image, iteration in storage.vis_data()]
        model.eval()
        model(*batch)
        assert len(storage.vis_data()) == 2
    assert shown == [("batch/boxes", (3, 96, 768), 0), ("batch/boxes", (3, 96, 768), 2)]
    assert [(name, it) for name, _, it in storage.histograms()] == [
        ("batch/box_iou", 0),
        ("batch/box_iou", 2),
    ]
    assert set(storage.latest()) == {"batch/accuracy", "batch/box_iou"}
    model.train()
    model(*batch)  # and without a storage


# the configuration of each


def composed(name: str, *overrides: str) -> dict[str, Any]:
    from hydra import compose, initialize_config_module

    with initialize_config_module("distrain.conf", version_base=None):
        cfg = compose("config", [f"+experiment={name}", f"run.name={name}", *overrides])
        return resolve(cfg)


def test_every_experiment_is_tested_here() -> None:
    assert {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")} == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_and_its_parts_fit(name: str) -> None:
    conf = composed(name)
    model = build(conf["model"], "model").eval()
    train, held_out = build(conf["data"]["train"]), build(conf["data"]["eval"])
    assert len(train) > len(held_out) > 0
    groups = param_groups(
        model,
        **{key: conf["optim"][key] for key in ("lr", "weight_decay", "weight_decay_norm", "rules")},
    )
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    batch = collated(train, [0, len(train) - 1])
    total_loss(model(*batch))
    for values in model.metrics(*collated(held_out, [0, len(held_out) - 1])).values():
        assert values.shape == (2,)


def test_pydoc_gpt_decays_matrices_alone() -> None:
    conf = composed("pydoc_gpt")
    model = build(conf["model"])
    settings = {
        key: value
        for key, value in conf["optim"].items()
        if key not in ("target", "betas", "fused", "groups")
    }
    for group in param_groups(model, **settings):
        is_decayed = group["weight_decay"] > 0
        for parameter in group["params"]:
            is_embedding = parameter is model.character.weight or parameter is model.place.weight
            assert is_decayed == (parameter.ndim == 2 and not is_embedding)


@pytest.mark.ranks
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_runs_on_two_ranks(name: str, tmp_path: Path) -> None:
    words = ["trainer.max_iter=6", "trainer.window=2", "launch.ranks=2", f"run.dir={tmp_path}/run"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = run_module("distrain", f"+experiment={name}", *words, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert any(METRIC[name] in row for row in rows)
