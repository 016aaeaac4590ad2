"""A block of experts and a model on a GPU: Transformers' implementations beside the authors' loop.

    python benchmarks/gpu.py [--quick] [--device cuda] [--layers N]

Claim: none yet, for it has not run on a GPU. It compares the ways to run experts, and shows what pools,
masks, a compiled step and fewer experts change.

This package has no kernels for GPUs: its default there is Transformers' `grouped_mm`, and `batched_mm` for
the steps behind a prompt. Random weights of the released model's width (2048 hidden, 1024 an expert, 128
experts, top 8) in bfloat16. All take turns; times are medians after a warm-up, by the GPU's own events.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from device import find_device, forget_peak, milliseconds, peak_bytes_on
from experts import LoopExperts
from torch import nn
from transformers import StaticCache
from transformers.utils import logging
from transformers_emo import EmoConfig, EmoForCausalLM
from transformers_emo.modeling_emo.modeling_emo import EmoExperts

FULL = {"hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16, "num_experts": 128}
SMALL = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "num_experts": 16}
# `batched_mm` copies the weights of every pick.
MOST_COPIED = 16 << 30


def medians(calls: dict[str, Callable[[], object]], device: str, turns: int) -> dict[str, float]:
    """Milliseconds of each, in turns; what cannot run here is left out, with a line that says why."""
    able = {}
    for name, call in calls.items():
        try:
            for _ in range(3):
                call()
            able[name] = call
        # What backends of Transformers raise without their kernel, or on a GPU that they are not made for.
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            print(f"      {name} does not run here: {str(error).splitlines()[0][:100]}")
    times: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(turns):
        for name, call in able.items():
            times[name].append(milliseconds(call, device))
    return {name: statistics.median(each) for name, each in times.items()}


def show(of: str, to: str, what: str, found: dict[str, float]) -> None:
    """A line: the ratio of two times, and all times."""
    if of in found and to in found:
        times = ", ".join(f"{name} {time:.2f} ms" for name, time in found.items())
        print(f"{found[of] / found[to]:.2f}  times the time of {to}: {of}, {what}; {times}", flush=True)


def new_model(device: str, sizes: dict, layers: int, **changes) -> EmoForCausalLM:
    """A model with random weights, made where it runs."""
    settings = {"vocab_size": 4096, "pad_token_id": 0, "eos_token_id": 1, "num_experts_per_tok": 8}
    config = EmoConfig(**settings | sizes | {"num_hidden_layers": layers} | changes)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return EmoForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def compare_blocks(device: str, sizes: dict, tokens: int, turns: int, *, training: bool) -> None:
    """One block of experts: every implementation that runs here."""
    config = EmoConfig(**sizes)
    with torch.device(device):
        experts = EmoExperts(config, config.num_experts).bfloat16()
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.02)
        hidden = torch.randn(tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=training)
        index = torch.rand(tokens, config.num_experts).argsort(dim=1)[:, :8]
        weights = torch.rand(tokens, 8, dtype=torch.bfloat16, requires_grad=training)

    def step(run: nn.Module, name: str | None = None) -> Callable[[], object]:
        def call() -> None:
            if name is not None:
                config._experts_implementation = name
            with torch.set_grad_enabled(training):
                output = run(hidden, index, weights)
            if training:
                output.backward(torch.ones_like(output))
                run.zero_grad()

        return call

    calls = {name: step(experts, name) for name in ("emo", "grouped_mm", "eager")}
    copied = tokens * 8 * 3 * config.hidden_size * config.intermediate_size * 2
    if copied <= MOST_COPIED:
        calls["batched_mm"] = step(experts, "batched_mm")
    if not training:
        calls |= {name: step(experts, name) for name in ("deepgemm", "sonicmoe")}
    calls["authors' loop"] = step(LoopExperts(experts).to(device))
    found = medians(calls, device, turns)
    kind = "forward and backward" if training else "forward"
    for other in ("authors' loop", "eager", "batched_mm", "deepgemm", "sonicmoe"):
        show("emo", other, f"{kind} of {tokens} tokens, {config.num_experts} experts", found)


def compare_training(device: str, sizes: dict, layers: int, tokens: int, turns: int) -> None:
    """A training step with document pools and their losses, and one without."""
    model = new_model(device, sizes, layers, document_pool_min=8, document_pool_max=sizes["num_experts"] - 1)
    model.train()
    ids = torch.randint(2, 4096, (1, tokens), device=device)
    ids[0, :: max(tokens // 16, 2)] = model.config.eos_token_id  # 16 documents

    def step(**kwargs) -> Callable[[], object]:
        def call() -> None:
            model(ids, labels=ids, use_cache=False, **kwargs).loss.backward()
            model.zero_grad()

        return call

    calls = {"pools": step(), "no pools": step(document_pool=False, output_router_logits=False)}
    forget_peak(device)
    show("pools", "no pools", f"a training step of {tokens} tokens", medians(calls, device, turns))
    peak = peak_bytes_on(device)
    if peak is not None:
        size = sum(2 * weight.nbytes for weight in model.parameters())
        print(f"{peak / size:.2f}  times the weights and their gradients: peak of its memory")


def compare_decoding(device: str, sizes: dict, layers: int, turns: int, compiled: bool) -> None:
    """A step behind a prompt: compiled (on a GPU a CUDA graph), masked, within pools, with fewer experts."""
    model = new_model(device, sizes, layers)
    model.set_experts_implementation("batched_mm")
    few = new_model(device, sizes, layers, num_experts=sizes["num_experts"] // 8)
    few.set_experts_implementation("batched_mm")
    kept = [list(range(sizes["num_experts"] // 8 - 1)) + [sizes["num_experts"] - 1]] * layers
    prompt = torch.randint(2, 4096, (1, 64), device=device)

    def step(model: EmoForCausalLM, run: Callable | None = None, subset=None) -> Callable[[], object]:
        cache = StaticCache(config=model.config, max_cache_len=128)
        token, position = prompt[:, :1].clone(), torch.full((1, 1), 64, device=device)
        with torch.no_grad():
            model(prompt, past_key_values=cache, use_cache=True)
        run = run or model

        @torch.no_grad()
        def call() -> None:
            for layer in cache.layers:  # the same step again
                layer.cumulative_length.fill_(64)
            if subset is None:
                run(token, past_key_values=cache, position_ids=position, use_cache=True)
            else:
                with model.use_experts(subset):
                    run(token, past_key_values=cache, position_ids=position, use_cache=True)

        return call

    calls = {"plain": step(model), "an eighth of the experts": step(few), "masked": step(model, subset=kept)}
    if compiled:
        calls["compiled"] = step(model, torch.compile(model.forward, mode="reduce-overhead", fullgraph=True))
    found = medians(calls, device, turns)
    for of in ("compiled", "masked", "an eighth of the experts"):
        show(of, "plain", "a token of one sequence", found)
    ids = {"do_sample": False, "max_new_tokens": 16, "disable_compile": True}
    calls = {
        "pools of the prompt": lambda: model.generate(prompt, document_pool=8, **ids),
        "no pools": lambda: model.generate(prompt, **ids),
    }
    show("pools of the prompt", "no pools", "16 tokens behind a prompt of 64", medians(calls, device, turns))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer tokens and turns: a minute or two")
    parser.add_argument("--device", help="the GPU by default; cpu takes small sizes, to try the script")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    device, what = find_device()
    if args.device is not None:
        device, what = args.device, args.device
    if device is None:
        print(f"Not measured: {what}.")
        return
    logging.set_verbosity_error()
    print(f"{what}, PyTorch {torch.__version__}")
    on_gpu = torch.device(device).type != "cpu"
    sizes, turns = (FULL if on_gpu else SMALL), (5 if args.quick or not on_gpu else 20)
    forward = ((1, 64, 2048) if args.quick else (1, 8, 64, 512, 2048, 8192)) if on_gpu else (1, 64)
    training = ((1024,) if args.quick else (1024, 4096)) if on_gpu else (64,)
    for tokens in forward:
        compare_blocks(device, sizes, tokens, turns, training=False)
    for tokens in training:
        compare_blocks(device, sizes, tokens, turns, training=True)
    compare_training(device, sizes, args.layers if on_gpu else 2, training[-1], turns)
    compare_decoding(device, sizes, args.layers if on_gpu else 2, turns, compiled=True)


if __name__ == "__main__":
    main()
