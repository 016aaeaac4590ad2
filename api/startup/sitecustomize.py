"""Python imports this at the start of every process of `emo run`, which puts this folder before PYTHONPATH.

It leaves no trace but EMO: the folder goes from `sys.path`, and a `sitecustomize` that it hides is run.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec


def _run_the_other():
    """Run the `sitecustomize` that this one hides, if there is one, and let it have the name."""
    spec = PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.loader is not None:
        module = sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(module)


class _NoTransformers:
    """Refuses Transformers in a Python without the package, where the choice of `emo run` would be lost."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "transformers":
            raise ImportError(
                "`emo run` was asked for a choice of experts, and this Python ("
                + sys.executable
                + ") has no "
                "transformers-emo to keep to it: install it there, or start this without `emo run`.",
                name=name,
            )


def _join():
    try:
        from transformers_emo.run_process import join
    except ModuleNotFoundError as error:
        if error.name != "transformers_emo":
            raise
        if os.environ.get("EMO_RUN"):
            sys.meta_path.insert(0, _NoTransformers)
    else:
        join()


_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != _HERE]
try:
    _run_the_other()
finally:
    _join()
