import importlib

import pytest


@pytest.mark.parametrize("place", ["modeling_emo.kernels", "modeling_emo"])
def test_programs_that_import_it_are_told_what_to_use(place):
    module = importlib.import_module(f"transformers_emo.{place}.quantised_experts")
    for args, kwargs in (((), {}), ((4,), {"group_size": 32})):
        with pytest.raises(RuntimeError, match=r"PackedConfig\(bits=\d\).*made again"):
            module.quantised_experts(*args, **kwargs)
