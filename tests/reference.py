"""EMO written out naively from its description, in float64: for comparison where there is no golden file.

Reads the tensors by their names on disk and loops over tokens and experts.
"""

import math

import torch
import torch.nn.functional as F


def layer_settings(config: dict) -> list[tuple[int, int, list[int]]]:
    """(experts, shared experts, always-active ids) of each layer."""
    layers = config["num_hidden_layers"]
    experts = config.get("num_experts_per_layer") or [config["num_experts"]] * layers
    shared = config.get("num_shared_experts_per_layer") or [
        min(config["num_shared_experts"], e) for e in experts
    ]
    always = (
        config.get("always_active_experts_per_layer") or [config.get("always_active_experts") or []] * layers
    )
    return list(zip(experts, shared, always, strict=True))


def route(
    logits: torch.Tensor, num_shared: int, always: list[int], top_k: int, norm: bool
) -> dict[int, float]:
    """The experts of one token and their weights, from its router logits (E,)."""
    if always:
        probs = logits.softmax(0)
        others = sorted((e for e in range(len(logits)) if e not in always), key=lambda e: -probs[e])
        picked = {e: probs[e] for e in [*always, *others[: top_k - len(always)]]}
    else:
        num_routed = len(logits) - num_shared
        probs = logits[:num_routed].softmax(0)
        best = sorted(range(num_routed), key=lambda e: -probs[e])[: top_k - num_shared]
        picked = {e: probs[e] for e in best}
        if num_shared:
            shared = logits[num_routed:].softmax(0)
            picked |= {num_routed + s: shared[s] for s in range(num_shared)}
    if norm:
        total = sum(picked.values())
        picked = {e: weight / total for e, weight in picked.items()}
    return picked


def forward(config: dict, tensors: dict[str, torch.Tensor], input_ids: torch.Tensor, inv_freq: torch.Tensor):
    """Logits (B, S, V) and raw router logits, one (B * S, E) for each expert layer. No padding."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    hidden = tensors["model.embed_tokens.weight"][input_ids]
    batch, length, width = hidden.shape
    head_dim = width // heads
    angles = torch.arange(length).double()[:, None] * inv_freq.double()
    cos, sin = (torch.cat([f(angles), f(angles)], -1) for f in (torch.cos, torch.sin))
    routers = []

    def norm(x, name):
        scale = (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt()
        return tensors[name] * x * scale

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def swiglu(x, prefix):
        return linear(
            F.silu(linear(x, f"{prefix}.gate_proj")) * linear(x, f"{prefix}.up_proj"), f"{prefix}.down_proj"
        )

    def rotate(x):
        half = head_dim // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    for index, (num_experts, num_shared, always) in enumerate(layer_settings(config)):
        prefix = f"model.layers.{index}"
        x = norm(hidden, f"{prefix}.pre_attention_layernorm.weight")
        q, k, v = (
            linear(x, f"{prefix}.self_attn.{p}_proj").view(batch, length, -1, head_dim).transpose(1, 2)
            for p in "qkv"
        )
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(head_dim)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        hidden = hidden + linear(attended, f"{prefix}.self_attn.o_proj")
        x = norm(hidden, f"{prefix}.pre_feedforward_layernorm.weight")
        if num_experts == 0:
            hidden = hidden + swiglu(x, f"{prefix}.mlp")
            continue
        x = x.reshape(-1, width)
        logits = linear(x, f"{prefix}.mlp.gate")
        routers.append(logits)
        output = torch.zeros_like(x)
        for token in range(len(x)):
            top_k = min(config["num_experts_per_tok"], num_experts)
            for e, weight in route(
                logits[token], num_shared, always, top_k, config["norm_topk_prob"]
            ).items():
                output[token] += weight * swiglu(x[token], f"{prefix}.mlp.experts.{e}")
        hidden = hidden + output.view_as(hidden)
    return linear(norm(hidden, "model.norm.weight"), "lm_head"), routers


def balance_loss(
    config: dict, routers: list[torch.Tensor], counted: torch.Tensor, num_items=None
) -> torch.Tensor:
    """The released balance loss over the tokens where `counted` (B * S,) is true."""
    expert_layers = [layer for layer in layer_settings(config) if layer[0]]
    losses = []
    for logits, (num_experts, num_shared, always) in zip(routers, expert_layers, strict=True):
        routed = [e for e in range(num_experts - num_shared) if e not in always]
        top_k = min(config["num_experts_per_tok"], num_experts) - num_shared - len(always)
        probs = logits[:, : num_experts - num_shared].softmax(-1)[:, routed]
        counts, mean = torch.zeros(len(routed)).double(), torch.zeros(len(routed)).double()
        for token in torch.where(counted)[0].tolist():
            counts[probs[token].topk(top_k).indices] += 1
            mean += probs[token] / counted.sum()
        items = counted.sum() if num_items is None else num_items
        losses.append(len(routed) / top_k * (counts * mean).sum() / items)
    return torch.stack(losses).mean()
