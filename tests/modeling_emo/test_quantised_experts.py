import pytest
from transformers_emo.modeling_emo.quantised_experts import quantised_experts


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((4,), {"group_size": 32})])
def test_programs_that_import_it_are_told_what_to_use(args, kwargs):
    with pytest.raises(RuntimeError, match=r"PackedConfig\(bits=\d\).*made again"):
        quantised_experts(*args, **kwargs)
