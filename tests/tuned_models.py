"""Subsets that were trained a little, and what differs between a model and what they were put back into."""

import hashlib

import torch
from safetensors.torch import load_file
from transformers_emo import EmoForCausalLM
from transformers_emo.training import train_only

INPUT_IDS = torch.tensor([[5, 17, 60, 2, 33, 8, 90], [44, 44, 3, 71, 12, 9, 28]])
FIRST = [[0, 3, 4, 11], [1, 5, 11], [0, 6, 9, 10, 11]]
SECOND = [[3, 7, 11], [5, 6, 8, 11], [2, 11]]
MATRICES = ("gate_proj", "up_proj", "down_proj")


def hashes(folder) -> dict[str, str]:
    """The SHA-256 of every tensor, router rows one by one."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            rows = {f"{name}[{i}]": row for i, row in enumerate(tensor)} if "mlp.gate." in name else {}
            for key, value in (rows or {name: tensor}).items():
                raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                found[key] = hashlib.sha256(raw).hexdigest()
    return found


def changed(before, after) -> set[str]:
    before, after = hashes(before), hashes(after)
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def expert_names(experts, *, drop=()) -> set[str]:
    return {
        f"model.layers.{layer}.mlp.experts.{e}.{matrix}.weight"
        for layer, ids in enumerate(experts)
        for e in ids or ()
        if e not in drop
        for matrix in MATRICES
    }


def router_names(experts) -> set[str]:
    return {f"model.layers.{i}.mlp.gate.weight[{e}]" for i, ids in enumerate(experts) for e in ids or ()}


def trained(folder, experts, out, what="all", steps: int = 1):
    """A subset after training steps, in memory and saved."""
    model = EmoForCausalLM.from_pretrained(folder, expert_subset=experts)
    train_only(model, what)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(out)
    return model


def same_files(first, second, files=("*.safetensors", "*.json")) -> bool:
    names = sorted(path.name for pattern in files for path in first.glob(pattern))
    return bool(names) and all((first / n).read_bytes() == (second / n).read_bytes() for n in names)
