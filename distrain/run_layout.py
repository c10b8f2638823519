"""Names of the files and folders in a run folder, each defined once."""

CONFIG_FILE = "run.yaml"
"""The resolved configuration, secrets masked."""

STARTS_FILE = "command.json"
"""Each start: command, versions, commit, changed keys, exit code."""

ATTEMPTS_FILE = "attempts.jsonl"
"""Each attempt of a job that a cluster may restart, one per line."""

LOCK_FILE = "lock"
"""Locked by the process that starts the ranks, and by the ranks."""

EPOCHS_FILE = "epochs.json"
"""Iterations per epoch of a run whose length is given in epochs."""

METRICS_FILE = "metrics.jsonl"
"""Scalars, one line of JSON per written iteration."""

WANDB_RUN_ID = "wandb_run_id"
MLFLOW_RUN_ID = "mlflow_run_id"
"""Ids under which a resumed run continues in a tracker."""

MIRROR_FILE = "mirror.json"
"""State of the mirror of the checkpoints in an object store."""

CHECKPOINTS = "checkpoints"
LOGS = "logs"
PROFILE = "profile"
