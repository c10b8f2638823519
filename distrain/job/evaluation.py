"""Evaluate a checkpoint as one rank: metrics and predictions, without training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distrain import log
from distrain.errors import ExitCode
from distrain.files import atomic
from distrain.run_layout import LOGS

RESULT_FILE = "metrics.json"


@dataclass(frozen=True)
class EvaluateJob:
    """Evaluates one checkpoint on the sets of `data.eval`. Picklable.

    Attributes:
        conf: resolved configuration.
        run_dir: folder of this evaluation: logs and `metrics.json`.
        checkpoint: folder of the checkpoint.
        ema: name of an EMA hook whose average is evaluated; None: the weights.
        predict: file for the predictions, `.jsonl` or `.safetensors`; None: metrics only.
    """

    conf: dict[str, Any]
    run_dir: str
    checkpoint: str
    ema: str | None = None
    predict: str | None = None

    def __call__(self) -> ExitCode:
        """Evaluate as one rank; rank 0 writes the results."""
        from distrain.distributed.ranks import process_group
        from distrain.process.environment import env_int

        log.set_up(Path(self.run_dir, LOGS), rank=env_int("RANK"))
        with process_group() as ranks:
            values = self._values()
            if ranks.is_main:
                result = {"checkpoint": self.checkpoint, "ema": self.ema, "metrics": values}
                atomic.write(Path(self.run_dir, RESULT_FILE), json.dumps(result, indent=1).encode())
        return ExitCode.FINISHED

    def _values(self) -> dict[str, float]:
        """Return the metrics over all ranks; write the predictions. A collective."""
        from distrain.data.loader import EvalLoader
        from distrain.distributed.ranks import local_device, topology
        from distrain.job.build_first import build_first
        from distrain.job.data import loading
        from distrain.job.eval_sets import build_metrics, build_sets, eval_loader
        from distrain.job.load import model_of
        from distrain.job.predictions import write_predictions
        from distrain.trainer.evaluate import check_eval_sets, evaluate
        from distrain.trainer.numerics import numerics

        conf, trainer, ranks = self.conf, self.conf["trainer"], topology()
        metrics = build_metrics(conf)
        is_first = conf["data"]["build_first"]
        sets = build_first(partial(build_sets, conf), ranks) if is_first else build_sets(conf)
        found = eval_loader(conf, sets, **loading(conf, ranks))
        loaders = {"": found} if isinstance(found, EvalLoader) else found or {}
        model = model_of(conf, Path(self.checkpoint), ema=self.ema)
        check_eval_sets(model, loaders)
        settings: dict[str, Any] = {
            "device": local_device(),
            "precision": trainer["precision"],
            "channels_last": trainer["channels_last"],
        }
        values: dict[str, float] = {}
        # rounds as in training, so that the values are those of its own evaluation
        with numerics(
            deterministic=trainer["deterministic"], float32_matmul=trainer["float32_matmul"]
        ):
            for of_set, loader in loaders.items():
                if self.predict is not None:  # the command has left one set
                    write_predictions(model, loader, self.predict, **settings)
                of_this = evaluate(model, loader, metrics=metrics, **settings)
                prefix = f"{of_set}/" if of_set else ""
                values |= {f"{prefix}{name}": value for name, value in of_this.items()}
        return values
