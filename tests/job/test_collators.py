"""Data collators of Hugging Face transformers as data.collate."""

import pytest
import tokenizers
import torch
import transformers
from resume_cases import conf_of
from torch import nn

from distrain.checkpoint.store import CheckpointStore
from distrain.data.samplers import Shuffled
from distrain.distributed.ranks import Topology
from distrain.errors import ConfigError, ExitCode
from distrain.job.data import loading
from distrain.job.model import build_model
from distrain.job.strategy import build_strategy
from distrain.job.training import train

HERE = __name__


class Sentences(torch.utils.data.Dataset):
    """Rows of 1 to 5 tokens and a label, as a tokenised data set has them."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        ids = [1 + (index + i) % 7 for i in range(1 + index % 5)]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "label": index % 2}


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(8, 4, padding_idx=0), nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask, labels):
        mask = attention_mask[..., None]
        pooled = (self.table(input_ids) * mask).sum(1) / mask.sum(1)
        return nn.functional.cross_entropy(self.head(pooled), labels)


def tokenizer():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0}, unk_token="[PAD]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")


PADDING = {
    "_target_": "transformers.DataCollatorWithPadding",
    "tokenizer": {"_target_": f"{HERE}.tokenizer"},
}


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)):
        monkeypatch.setenv(name, str(value))


def conf(collate):
    data = {"train": {"_target_": f"{HERE}.Sentences"}, "collate": collate}
    made = conf_of(data=data, batch_size=4, workers=1, iters=6, noise=0, schedule=None)
    del made["hooks"]["ledger"], made["hooks"]["schedule"]
    return made | {"model": {"_target_": f"{HERE}.Pooled"}}


def test_a_collator_trains_as_in_a_plain_loop(tmp_path):
    assert train(conf(PADDING), str(tmp_path)) == ExitCode.FINISHED
    found = CheckpointStore(tmp_path / "checkpoints").load(6)["model"]
    made = conf(PADDING)
    strategy = build_strategy(made["trainer"])
    model = build_model(made, ranks=Topology(), strategy=strategy, is_new=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    collate = transformers.DataCollatorWithPadding(tokenizer())
    order = Shuffled(10, seed=3)
    for iteration in range(6):
        batch = collate([Sentences()[int(i)] for i in order.at(4 * iteration, 4)[1]])
        optimizer.zero_grad()
        model(**batch).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_a_function_by_its_path():
    collate = loading(conf("transformers.default_data_collator"), Topology())["collate"]
    rows = [{"label": i, "x": [i, i]} for i in (0, 1)]
    assert {k: v.tolist() for k, v in collate(rows).items()} == {
        "labels": [0, 1],
        "x": [[0, 0], [1, 1]],
    }


@pytest.mark.parametrize(
    "collate", ["transformers.DataCollatorWithPadding", {"_target_": f"{HERE}.Sentences"}]
)
def test_what_is_no_function_is_refused(collate):
    with pytest.raises(ConfigError, match=r"^data.collate.*: expected a function of a list of sam"):
        loading(conf(collate), Topology())
