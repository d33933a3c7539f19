"""What Dask does on a pool with packages that are large: dataframes, and training with XGBoost."""

from __future__ import annotations

import numpy as np
import pytest

import skyward as sky

pytest.importorskip("pyarrow", reason="pyarrow, which dask.dataframe needs, is not installed")
pd = pytest.importorskip("pandas", reason="pandas is not installed")


@sky.compute
def double(x: object) -> object:
    return x * 2  # type: ignore[operator]


def test_dataframes_are_computed_on_the_pool_beside_calls(pool: sky.ComputePool) -> None:
    import dask.dataframe as dd

    frame = dd.from_pandas(pd.DataFrame({"key": [0, 1] * 50, "value": range(100)}), npartitions=5)
    calls = [pool.submit(double(i)) for i in range(20)]

    sums = frame.groupby("key").value.sum().compute()
    doubled = frame.map_partitions(double).value.sum().compute()
    applied = frame.value.apply(double, meta=("value", int)).sum().compute()

    assert sums.to_dict() == {0: 2450, 1: 2500}
    assert doubled == applied == 9900
    assert [call.result(30) for call in calls] == list(range(0, 40, 2))


def test_xgboost_trains_on_all_workers(pool: sky.ComputePool) -> None:
    pytest.importorskip("xgboost", reason="xgboost is not installed: no wheel for this Python, or not asked for")
    import dask.array as da
    import xgboost.dask

    X = da.random.default_rng(0).random((900, 4), chunks=(300, 4))
    y = (X[:, 0] > 0.5).astype(int)
    data = xgboost.dask.DaskDMatrix(pool.client, X, y)
    options = {"objective": "binary:logistic", "nthread": 1}

    trained = xgboost.dask.train(pool.client, options, data, num_boost_round=4, evals=[(data, "train")])
    predicted = xgboost.dask.predict(pool.client, trained["booster"], X).compute()

    losses = trained["history"]["train"]["logloss"]
    assert losses == sorted(losses, reverse=True)
    assert np.array_equal(predicted > 0.5, y.compute())
