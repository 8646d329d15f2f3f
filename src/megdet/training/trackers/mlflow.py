"""MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say where."""

import os
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megdet.errors import InputError
from megdet.training.trackers.tracker import PROJECT, Opening

_MOST_PARAMETERS = 100
"""metrics that MLflow takes in one call"""
_LONGEST_VALUE = 500
"""characters of a parameter's value that every server takes"""


def open_mlflow(opening: Opening) -> "MLflow":
    """A new MLflow run, or the run of an earlier start."""
    from mlflow.entities import Param
    from mlflow.tracking import MlflowClient

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and find_spec("sqlalchemy") is None:
        raise InputError(
            "MLFLOW_TRACKING_URI names no server, and a database of its own needs the whole package: "
            "uv pip install mlflow"
        )
    client = MlflowClient(tracking_uri=uri)
    if opening.identity:
        client.update_run(opening.identity, status="RUNNING")
        return MLflow(client, opening.identity)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    found = client.get_experiment_by_name(name)
    experiment = client.create_experiment(name) if found is None else found.experiment_id
    run = client.create_run(experiment, run_name=opening.name).info.run_id
    parameters = [Param(key, str(value)[:_LONGEST_VALUE]) for key, value in opening.recipe.items()]
    for start in range(0, len(parameters), _MOST_PARAMETERS):
        client.log_batch(run, params=parameters[start : start + _MOST_PARAMETERS])
    return MLflow(client, run)


class MLflow:
    """A run of MLflow."""

    forgets_later_steps = False

    def __init__(self, client: Any, identity: str) -> None:
        self._client, self.identity = client, identity
        self.place = f"{client.tracking_uri}, run {identity}"

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self.identity, metrics=[Metric(name, v, now, step) for name, v in numbers.items()])

    def picture(self, name: str, file: Path) -> None:
        """Send a picture, under its name as the folder."""
        self._client.log_artifact(self.identity, str(file), artifact_path=name)

    def attach(self, file: Path) -> None:
        """Send a file."""
        self._client.log_artifact(self.identity, str(file))

    def close(self) -> None:
        """Mark the run as not running any more."""
        self._client.set_terminated(self.identity)
