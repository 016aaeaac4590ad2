"""EMO's classes by the names of Transformers: `transformers.EmoForCausalLM`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from transformers_emo.imports.lazy_imports import import_name

_PACKAGE = __package__
# Tools look for a model's classes in `transformers` by the names in its config (`transformers serve`, TRL).
_NAMES = (
    "EmoConfig",
    "EmoForCausalLM",
    "EmoForSequenceClassification",
    "EmoForTokenClassification",
    "EmoModel",
    "EmoPreTrainedModel",
    "EmoTokenizer",
)


def name_classes(module: ModuleType | None = None) -> None:
    """Give `transformers` the names of EMO's classes; they are imported when somebody asks for one.

    Args:
        module (`ModuleType`, *optional*): Transformers, as it was just imported.

    Raises:
        ImportError: if this Transformers is no lazy module.

    Example:

    ```python
    >>> import transformers
    >>> from transformers_emo.transformers_names import name_classes
    >>> name_classes()
    >>> transformers.EmoForCausalLM.__module__
    'transformers_emo.modeling_emo.modeling_emo'

    ```
    """
    # Transformers makes its lazy module more than once, of one class: the class is told, not the module.
    lazy_module: Any = type(sys.modules["transformers"])
    others = getattr(lazy_module, "__getattr__", None)
    if others is None:
        raise ImportError(
            f"EMO gives its classes to the lazy module of Transformers, and Transformers "
            f"{getattr(module, '__version__', '')} has none: see the README for the versions tested."
        )
    if getattr(others, "names_emo", False):
        return

    def with_emo(self: ModuleType, name: str) -> Any:
        if name in _NAMES and self.__name__ == "transformers":
            return import_name(_PACKAGE, name)
        return others(self, name)

    with_emo.names_emo = True  # type: ignore[attr-defined]
    lazy_module.__getattr__ = with_emo
