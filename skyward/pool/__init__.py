"""Pools, and the decorator that puts one around a function.

Small at the top: specifications are loaded when a pool is made, Dask and the engine when one is entered, so that
``import skyward`` stays fast.
"""

from skyward.pool.compute_pool import ComputePool as ComputePool
from skyward.pool.compute_pool import bring_up as bring_up
from skyward.pool.decorator import pool as pool
from skyward.pool.options import PoolOptions as PoolOptions
