"""Other libraries on a pool. Names are imported when first used, so none of the libraries is needed.

The joblib and scikit-learn names live in the package `skyward_joblib`, which builds on skyward: it is reached
only from `__getattr__`.
"""

from __future__ import annotations

import re
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
else:  # as in skyward's own __init__, each name is written once, above
    _SOURCE = __spec__.loader.get_source(__name__)
    _IMPORT = re.compile(r"^    from (\S+) import (\w+) as \2$", re.MULTILINE)
    _MODULES = {name: module for module, name in _IMPORT.findall(_SOURCE)}
    __all__ = sorted(_MODULES)

    def __dir__() -> list[str]:
        return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})

    def __getattr__(name: str) -> Any:
        module = _MODULES.get(name)
        if module is None:
            raise AttributeError(f"module 'skyward.integrations' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(module), name)
        return value
