"""What some tests need that not every supported version of Transformers has: without it they are skipped."""

import pytest
from transformers import QuantizedCache
from transformers_emo import EmoConfig
from transformers_emo.modeling_emo.transformers_differences import check_peft


def needs_fp8_cache() -> None:
    """From 5.21 on a cache is quantised without other packages."""
    try:
        QuantizedCache(backend="fp8", config=EmoConfig(num_hidden_layers=1))
    except ValueError as error:
        pytest.skip(str(error))


def waits_for_peft() -> str:
    """Why Transformers' own `add_adapter` does not work with this PEFT; empty if it does."""
    try:
        check_peft()
    except ImportError as error:
        return str(error)
    return ""
