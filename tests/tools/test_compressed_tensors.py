"""The package `compressed-tensors` reads what is saved here, and what it writes is read."""

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from tools.quantised_elsewhere import quantise, skeleton
from transformers_emo import EmoForCausalLM, PackedConfig
from transformers_emo.modeling_emo.kernels.packed.packed_tensor import PackedTensor

pytestmark = pytest.mark.tools
SIZES = {"hidden_size": 32, "intermediate_size": 32}
WAYS = [
    PackedConfig(4, 16, True),
    PackedConfig(4, 32, symmetric=False),
    PackedConfig(8),
    PackedConfig(8, 16, symmetric=False),
    PackedConfig(4, 16, True, modules_to_not_convert=["lm_head"]),
    PackedConfig(4, 16, True, head_bits=4),
]


def numbers(model):
    """The weights under the names on disk."""
    result = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.dequantize() if isinstance(tensor, PackedTensor) else tensor
        if name.endswith("gate_up_proj"):
            for expert, rows in enumerate(tensor):
                gate, up = rows.chunk(2)
                place = name.removesuffix("gate_up_proj")
                result |= {f"{place}{expert}.gate_proj.weight": gate, f"{place}{expert}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            place = name.removesuffix("down_proj")
            result |= {f"{place}{expert}.down_proj.weight": rows for expert, rows in enumerate(tensor)}
        else:
            result[name] = tensor
    return result


@pytest.mark.parametrize("packing", WAYS)
def test_it_reads_what_is_saved_here(tmp_path, packing):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    tiny_model(**SIZES).save_pretrained(tmp_path / "plain")
    model = EmoForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=packing)
    model.save_pretrained(tmp_path / "packed")
    settings = packing.to_dict()
    config = QuantizationConfig.model_validate({k: v for k, v in settings.items() if k != "version"})
    theirs = skeleton(load_file(tmp_path / "plain" / "model.safetensors"))
    apply_quantization_config(theirs, config)
    compressor = ModelCompressor.from_pretrained_model(theirs)
    compressor.compress_model(theirs)  # makes room for the packed parts
    state = load_file(tmp_path / "packed" / "model.safetensors")
    assert theirs.state_dict().keys() == state.keys()
    theirs.load_state_dict(state)
    compressor.decompress_model(theirs)
    expected = numbers(model)
    for name, tensor in theirs.state_dict().items():
        if name in expected:
            torch.testing.assert_close(tensor, expected.pop(name), rtol=0, atol=0, msg=name)
    assert not expected


@pytest.mark.parametrize("packing", WAYS[:4])
def test_what_it_writes_is_read(tmp_path, packing):
    tiny_model(**SIZES).save_pretrained(tmp_path / "plain")
    weights = packing.to_dict()["config_groups"]["group_0"]["weights"]
    names = ("num_bits", "type", "symmetric", "strategy", "group_size")
    meant = quantise(tmp_path / "plain", tmp_path / "theirs", {name: weights[name] for name in names})
    found = numbers(EmoForCausalLM.from_pretrained(tmp_path / "theirs"))
    assert len(meant) == 3 * (4 + 3 * 12) + 1
    for name, tensor in meant.items():
        assert torch.equal(found[name], tensor), name
