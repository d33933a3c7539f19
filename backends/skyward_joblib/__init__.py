"""joblib on skyward: `joblib.Parallel`, and with it scikit-learn, on the slots of a pool.

Importing this package registers the backend under the name ``"skyward"``; entering a pool does that too.
"""

from joblib import register_parallel_backend

from skyward_joblib.backend import SkywardBackend
from skyward_joblib.pools import JoblibPool, ScikitLearnPool, joblib_backend, sklearn_backend

register_parallel_backend("skyward", SkywardBackend)

__all__ = ["JoblibPool", "ScikitLearnPool", "SkywardBackend", "joblib_backend", "sklearn_backend"]
