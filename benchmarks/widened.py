"""A small model at the width of the released EMO: the same text, and the released sizes of matrices.

    python benchmarks/widened.py model_cards/emo-tiny OUT

Each matrix is padded with zeros to hidden size 2048 and experts of width 1024, so that an expert has 12.6 MB
and takes as long as the released one's. What is computed stays the same but for rounding: so routers choose
as in the small model, which was trained on text, and not at random. Number of layers, experts and words stay.
"""

import argparse
import json
from pathlib import Path

HIDDEN, WIDTH, HEADS, HEAD = 2048, 1024, 16, 128


def widen(source: Path, folder: Path) -> None:
    """Write `source` with wide matrices to `folder`, a file for each layer."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers_emo import EmoConfig

    if (folder / "config.json").exists():
        return
    config = EmoConfig.from_pretrained(source)
    hidden, heads = config.hidden_size, config.num_attention_heads
    head, times = hidden // heads, HEAD * heads // hidden
    # Rotary embeddings turn channel i with i + head / 2, the faster the smaller i is: so channels are spread.
    half = torch.arange(head // 2) * times
    channels = torch.cat([half, half + HEAD // 2])
    channels = torch.cat([channels + number * HEAD for number in range(heads)])

    def padded(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 1:  # a norm: the mean of squares is over more channels now
            wide = tensor.new_zeros(HIDDEN)
            wide[:hidden] = tensor / (HIDDEN / hidden) ** 0.5
            return wide
        rows, columns = tensor.shape
        if "q_proj" in name or "k_proj" in name or "v_proj" in name:
            scale = times**0.5 if "q_proj" in name else 1  # scores are divided by the root of the head's size
            wide = tensor.new_zeros(HEADS * HEAD, HIDDEN)
            wide[channels, :columns] = tensor * scale
        elif "o_proj" in name:
            wide = tensor.new_zeros(HIDDEN, HEADS * HEAD)
            wide[:rows, channels] = tensor
        else:
            tall, broad = rows, HIDDEN
            if "gate_proj" in name or "up_proj" in name:
                tall = WIDTH
            elif "down_proj" in name:
                tall, broad = HIDDEN, WIDTH
            wide = tensor.new_zeros(tall, broad)
            wide[:rows, :columns] = tensor
        return wide

    tensors = load_file(source / "model.safetensors")
    files: dict[str, list[str]] = {}
    for name in sorted(tensors):
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{part}.safetensors", []).append(name)
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in files.items():
        save_file({name: padded(name, tensors[name]) for name in names}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    for beside in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / beside).write_bytes((source / beside).read_bytes())
    config.hidden_size, config.intermediate_size = HIDDEN, WIDTH
    config.num_attention_heads = config.num_key_value_heads = HEADS
    config.rms_norm_eps /= HIDDEN / hidden
    config.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    widen(args.source, args.out)
