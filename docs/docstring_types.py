"""Docstrings write types as Transformers does, in backticks; the reference shows them as types.

mkdocstrings loads this extension, which `mkdocs.yml` names, while it reads the package.
"""

import re

from griffe import Extension

_PARAMETER = re.compile(r"^( +\*{0,2}\w+(?:, \*{0,2}\w+)*) \((.*?)\):", re.M | re.S)
_RESULT = re.compile(r"^( +)`([^`\n]+)`:", re.M)


class PlainTypes(Extension):
    """Takes backticks and defaults out of the types in `Args` and `Returns`: signatures say the defaults."""

    def on_object(self, *, obj, **kwargs):
        """Change the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            text = _PARAMETER.sub(lambda found: f"{found[1]} ({plain(found[2])}):", obj.docstring.value)
            obj.docstring.value = _RESULT.sub(r"\1\2:", text)


def plain(types: str) -> str:
    """The text between the brackets after a parameter's name, without marks and default.

    Args:
        types (`str`): such as "`int` or `str`, defaults to 16".

    Returns:
        `str`: such as "int or str".
    """
    return re.sub(r"(^|, )defaults to .*", "", " ".join(types.split())).replace("`", "").replace("*", "")
