"""Saving the modelling code beside a model, for people who load it without this package."""

import os
import re
from pathlib import Path

# The classes that a saved config.json points to, in the files written by `save_code`.
AUTO_MAP = {
    "AutoConfig": "configuration_emo.EmoConfig",
    "AutoModel": "modeling_emo.EmoModel",
    "AutoModelForCausalLM": "modeling_emo.EmoForCausalLM",
    "AutoModelForSequenceClassification": "modeling_emo.EmoForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_emo.EmoForTokenClassification",
}

_PACKAGE = Path(__file__).resolve().parents[1]
_FILES = [
    "configuration/configuration_emo.py",
    "modeling_emo/document_pool.py",
    "modeling_emo/generation.py",
    "modeling_emo/losses.py",
    "modeling_emo/modeling_emo.py",
    "modeling_emo/prompt_pool.py",
    "modeling_emo/segments.py",
    "modeling_emo/expert_switching.py",
    "modeling_emo/pretrained.py",
    "modeling_emo/standalone.py",
    "modeling_emo/transformers_differences.py",
    "modeling_emo/transformers_versions.py",
    "modeling_emo/weight_names.py",
]
# Their names in the folder of a saved model.
CODE_FILES = [Path(name).name for name in _FILES]


def save_code(folder: str | os.PathLike) -> list[Path]:
    """Write the files that define the network into `folder`, side by side, as Transformers wants remote code.

    Args:
        folder (`str` or `os.PathLike`): the folder, made if need be.

    Returns:
        `list[Path]`: the files written.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.standalone import save_code
    >>> sorted(path.name for path in save_code(tmp_path))[0]
    'configuration_emo.py'

    ```
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    written = []
    for name in _FILES:
        source = (_PACKAGE / name).read_text(encoding="utf-8")
        flat = re.sub(r"^from \.\.\w+\.(\w+) import", r"from .\1 import", source, flags=re.MULTILINE)
        target = Path(folder) / Path(name).name
        target.write_text(flat, encoding="utf-8")
        written.append(target)
    return written
