"""Other libraries on a pool. Names are imported when first used, so none of the libraries is needed.

The joblib and scikit-learn names live in the package `skyward_joblib`, which builds on skyward: it is reached
only from `__getattr__`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skyward_joblib.pools import JoblibPool as JoblibPool
    from skyward_joblib.pools import ScikitLearnPool as ScikitLearnPool
    from skyward_joblib.pools import joblib_backend as joblib_backend
    from skyward_joblib.pools import sklearn_backend as sklearn_backend

    from skyward.integrations.frameworks import jax as jax
    from skyward.integrations.frameworks import keras as keras
    from skyward.integrations.frameworks import tensorflow as tensorflow
    from skyward.integrations.frameworks import torch as torch
    from skyward.integrations.frameworks import transformers as transformers

_HOME = {
    **dict.fromkeys(["jax", "keras", "tensorflow", "torch", "transformers"], "skyward.integrations.frameworks"),
    "JoblibPool": "skyward_joblib.pools",
    "ScikitLearnPool": "skyward_joblib.pools",
    "joblib_backend": "skyward_joblib.pools",
    "sklearn_backend": "skyward_joblib.pools",
}

__all__ = [
    "JoblibPool",
    "ScikitLearnPool",
    "jax",
    "joblib_backend",
    "keras",
    "sklearn_backend",
    "tensorflow",
    "torch",
    "transformers",
]


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


if not TYPE_CHECKING:  # a type checker that saw it would believe that every name exists

    def __getattr__(name: str) -> Any:
        home = _HOME.get(name)
        if home is None:
            raise AttributeError(f"module 'skyward.integrations' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(home), name)
        return value
