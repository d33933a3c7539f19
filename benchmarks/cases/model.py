"""Calls that share a model, an object with numpy arrays in it; a new one each time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from joblib import Parallel, delayed

from benchmarks.case import Case, Pick, Row, each, timed
from benchmarks.peers import ALL

_seeds = itertools.count()


class Model:
    def __init__(self, layers: list[np.ndarray]) -> None:
        self.layers = layers


def new_model(megabytes: int) -> Model:
    random = np.random.default_rng(next(_seeds))
    return Model([random.random(megabytes * 12_500) for _ in range(10)])


def predict(i: int, model: Model) -> float:
    return float(model.layers[i % 10][i])


def rows(peers: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
    calls, megabytes = pick(1_000, 50), pick(50, 20)

    def gather(peer: Any) -> float:
        model = new_model(megabytes)
        seconds, values = timed(lambda: peer.map(predict, range(calls), model=model))
        assert list(values) == [predict(i, model) for i in range(calls)]
        return seconds

    def parallel(peer: Any) -> float:
        model = new_model(megabytes)
        with peer.joblib():
            seconds, values = timed(lambda: Parallel()(delayed(predict)(i, model) for i in range(calls)))
        assert values == [predict(i, model) for i in range(calls)]
        return seconds

    title = f"{calls:,} calls with one {megabytes} MB model"
    yield Row(title, each(peers, gather))
    # Not Dask, whose backend sends the model with each batch: more than a minute.
    yield Row(f"Parallel: {title}", each(peers, parallel, "skyward", "loky", "Ray"))


CASE = Case("model", rows, ALL)
