"""How well a model predicts, on rows that are public or held out for this purpose."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from .flatten import Tensors, load_tensors
from .task import Dataset, Task, metrics_of


def evaluate(task: Task, tensors: Tensors, dataset: Dataset) -> dict[str, float]:
    """The task's metrics of a model on a data set, and `n`, its number of rows.

    The numbers are exact, with no noise: for public or hold-out rows only.

    Raises:
        InvalidInput: the tensors are not those of the task's model.
    """
    outputs = predict(task, tensors, dataset.features)
    return {**metrics_of(task)(outputs, dataset.labels), "n": float(len(dataset))}


def predict(task: Task, tensors: Tensors, features: NDArray[np.float32]) -> NDArray[np.float32]:
    """The model's outputs (logits), float32 of shape (n, outputs) or (n,).

    Raises:
        InvalidInput: the tensors are not those of the task's model.
    """
    import torch

    model = task.build_model(0)
    load_tensors(model, tensors)
    model.eval()
    with torch.no_grad():
        outputs: NDArray[np.float32] = model(torch.from_numpy(features)).numpy()
    return outputs


def default_metrics(outputs: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """`accuracy` in [0, 1], and for two classes `auc` in [0, 1], the area under the ROC curve.

    Args:
        outputs: logits of shape (n,), (n, 1) or (n, classes).
        labels: classes 0, 1, …, shape (n,). With a single class present `auc` is not defined and is left out.
    """
    scores: NDArray[Any] | None
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        scores = outputs.reshape(len(outputs))
        predicted = (scores > 0).astype(np.int64)
    else:
        scores = outputs[:, 1] - outputs[:, 0] if outputs.shape[1] == 2 else None
        predicted = outputs.argmax(axis=1)
    metrics = {"accuracy": float(np.mean(predicted == labels))}
    if scores is not None and np.unique(labels).size == 2:
        metrics["auc"] = float(roc_auc_score(labels, scores))
    return metrics
