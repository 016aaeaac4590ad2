"""A model quantised by the package `compressed-tensors` itself: every matrix a linear layer, as in its own
models.

    python tests/tools/quantised_elsewhere.py CHECKPOINT OUT '{"num_bits": 4, "strategy": "group", ...}'

It also made `tests/goldens/E_compressed_tensors`.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def skeleton(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Modules with the names of the tensors; matrices other than embeddings are linear layers."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for step, part in enumerate(path):
            if not hasattr(module, part):
                is_linear = step == len(path) - 1 and tensor.dim() == 2 and "embed" not in name
                rows, inputs = tensor.shape if is_linear else (0, 0)
                module.add_module(part, nn.Linear(inputs, rows, bias=False) if is_linear else nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    return root


def quantise(checkpoint: Path, out: Path, weights: dict) -> dict[str, torch.Tensor]:
    """Write the quantised checkpoint; what its weights stand for, by the package's own reckoning."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    model = skeleton(load_file(checkpoint / "model.safetensors"))
    scheme = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["re:.*mlp.gate$"], format="pack-quantized"
    )
    apply_quantization_config(model, config)
    meant = {}
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        args, weight = module.quantization_scheme.weights, module.weight
        groups = weight.unflatten(-1, (-1, args.group_size or weight.shape[1]))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        module.weight_scale.data = scale.to(weight.dtype)
        module.weight_zero_point.data = zero
        numbers = quantize(weight, module.weight_scale, zero, args, dtype=torch.int8)
        meant[f"{name}.weight"] = dequantize(numbers, module.weight_scale, zero, args)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    out.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, out / "model.safetensors", {"format": "pt"})
    settings = json.loads((checkpoint / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings))
    compressor.update_config(out)
    return meant


if __name__ == "__main__":
    checkpoint, out, weights = sys.argv[1:]
    meant = quantise(Path(checkpoint), Path(out), json.loads(weights))
    save_file(meant, Path(out) / "meant.safetensors")
