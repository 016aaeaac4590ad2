"""One expert block on a CPU: "emo" against an authors-style loop and the backends of Transformers.

    python benchmarks/experts.py [--quick] [--native] [--sorted] [--threads N] [--experts 128 16] ...

Claim: on a CPU a block of experts runs faster with this package than any other way.

Bar: of the time of the best other, with 128 experts: bfloat16 forward of 1, 8 and 64 tokens 0.7, 512 0.75,
2048 0.85, 8192 0.9; float32 forward of 1 token 0.8, 8 to 512 0.6, 2048 0.8; forward and backward 0.5. With 16
experts: forward 1.0.

A block of the released model's width (2048 hidden, 1024 an expert, top 8) with random weights and routing.
The weights lie in large pages, as this package loads them, for all that take part. All take turns in one run.
Times are medians after a warm-up, by the clock, or with one thread in processor time, which other work on the
machine stretches less. First comes the ratio to the best of the others, beside it the same of the fastest
runs. MB are how far the process grows during a call, by Linux's own peak.

`--native` lets the kernels take part as compiled for the very machine, too, and begins each line with the
ratio of the package's times to theirs: to be within 3 % of 1.

`--sorted` lets `emo_sorted` take part, which multiplies by PyTorch, and shows the ratio to it. It is what the
choice between compiled code and PyTorch rests on (`HAS_PANELS` in `native/panels.h`, `_MANY_ROWS` in
`expert_kernels.py`), with `EMO_KERNELS` for each instruction set. The choice looks at the instruction set and
the shapes, never at a clock, so that results are the same bits in every run.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from native_build import native_kernels, running
from processes import peak_megabytes
from torch import nn
from transformers_emo import EmoConfig
from transformers_emo.checkpoints.memory.large_pages import empty
from transformers_emo.modeling_emo.kernels.native_calls import Kernels
from transformers_emo.modeling_emo.modeling_emo import EmoExperts

TOP_K, HIDDEN, WIDTH = 8, 2048, 1024
FORWARD, TRAINING = (1, 8, 64, 512, 2048, 8192), (256, 1024, 4096)
# `batched_mm` copies the weights of every pick: too much for most machines from so many bytes on.
MOST_COPIED = 4 << 30
NATIVE = "emo -march=native"
SORTED = "emo_sorted"


class LoopExperts(nn.Module):
    """Experts as modules of their own, one after the other, as the released code has them."""

    def __init__(self, experts: EmoExperts):
        super().__init__()
        width = experts.intermediate_dim
        self.gate = nn.ParameterList(w[:width].detach() for w in experts.gate_up_proj)
        self.up = nn.ParameterList(w[width:].detach() for w in experts.gate_up_proj)
        self.down = nn.ParameterList(w.detach() for w in experts.down_proj)

    def forward(self, hidden, index, weights):
        """(T, D), (T, K), (T, K) to (T, D)."""
        output = torch.zeros_like(hidden)
        mask = F.one_hot(index, num_classes=len(self.down)).permute(2, 1, 0)
        for expert in range(len(self.down)):
            slot, token = torch.where(mask[expert])
            x = hidden[token]
            x = F.silu(F.linear(x, self.gate[expert])) * F.linear(x, self.up[expert])
            x = F.linear(x, self.down[expert]) * weights[token, slot, None]
            output.index_add_(0, token, x.to(hidden.dtype))
        return output


def contenders(
    experts: EmoExperts, tokens: int, native: Kernels | None, *, training: bool, by_torch: bool = False
) -> dict[str, Callable]:
    """What takes part: calls of (hidden, index, weights)."""

    def choose(name: str) -> Callable:
        def call(*inputs):
            experts.config._experts_implementation = name
            return experts(*inputs)

        return call

    found: dict[str, Callable] = {"emo": choose("emo")}
    if native is not None:

        def call(*inputs):
            with running(native):
                return found["emo"](*inputs)

        found[NATIVE] = call
    if by_torch:
        found[SORTED] = choose(SORTED)
    found["authors' loop"] = LoopExperts(experts)
    found["grouped_mm"] = choose("grouped_mm")
    if not training:
        found["eager"] = choose("eager")
    copied = tokens * TOP_K * 3 * HIDDEN * WIDTH * experts.down_proj.itemsize
    if not training and copied <= MOST_COPIED:
        found["batched_mm"] = choose("batched_mm")
    return found


def measure(calls: dict[str, Callable[[], None]], seconds: float, clock: Callable) -> dict[str, list[float]]:
    """Times of each, in turns, for about so many seconds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    start = time.perf_counter()
    while min(map(len, times.values())) < 3 or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            begin = clock()
            call()
            times[name].append(clock() - begin)
    return times


def compare(experts: EmoExperts, tokens: int, args: argparse.Namespace, *, training: bool) -> None:
    """Print a line of the table."""
    dtype = experts.down_proj.dtype
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype).requires_grad_(training)
    index = torch.rand(tokens, len(experts.down_proj), generator=generator).argsort(dim=1)[:, :TOP_K]
    weights = torch.rand(tokens, TOP_K, generator=generator).to(dtype).requires_grad_(training)

    def step(call: Callable) -> Callable[[], None]:
        def run() -> None:
            if not training:
                with torch.no_grad():
                    call(hidden, index, weights)
                return
            call(hidden, index, weights).backward(torch.ones_like(hidden))
            hidden.grad = weights.grad = None
            for parameter in call.parameters() if isinstance(call, nn.Module) else experts.parameters():
                parameter.grad = None

        return run

    found = contenders(experts, tokens, args.kernels, training=training, by_torch=args.sorted)
    calls = {name: step(call) for name, call in found.items()}
    clock = time.process_time if args.threads == 1 else time.perf_counter
    times = measure(calls, args.seconds, clock)
    memory = {name: peak_megabytes(call) for name, call in calls.items()}
    middle = {name: statistics.median(each) for name, each in times.items()}
    fastest = {name: min(each) for name, each in times.items()}
    ours = ("emo", NATIVE, SORTED)
    ratio, least = (
        each["emo"] / min(v for n, v in each.items() if n not in ours) for each in (middle, fastest)
    )
    beside = [f"{each['emo'] / each[NATIVE]:.3f}" for each in (middle, fastest) if NATIVE in each]
    shown = ", ".join(f"{name} {1e3 * middle[name]:.1f} ms {memory[name]:.0f} MB" for name in calls)
    what = "forward+backward" if training else "forward"
    print(
        f"{beside[0]} ({beside[1]}) of -march=native; " if beside else "",
        f"{middle['emo'] / middle[SORTED]:.2f} of {SORTED}; " if SORTED in middle else "",
        f"{ratio:.2f} ({least:.2f})  times the time of the best other: {what} of {tokens} tokens, "
        f"{len(experts.down_proj)} experts, {str(dtype).removeprefix('torch.')}: {shown}",
        sep="",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="16 experts, up to 512 tokens, one second each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--experts", type=int, nargs="+", default=[128, 16])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--forward", type=int, nargs="*", default=FORWARD, help="numbers of tokens")
    parser.add_argument("--training", type=int, nargs="*", default=TRAINING, help="numbers of tokens")
    parser.add_argument("--native", action="store_true", help="compile for this machine, and compare")
    parser.add_argument("--sorted", action="store_true", help="compare with PyTorch's products, too")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each line, at least")
    args = parser.parse_args()
    if args.quick:
        args.experts, args.forward, args.training, args.seconds = [16], (1, 8, 64, 512), (256,), 1.0
    torch.set_num_threads(args.threads)
    args.kernels = native_kernels() if args.native else None
    print(f"{args.threads} threads, PyTorch {torch.__version__}, Python {sys.version.split()[0]}")
    for num_experts in args.experts:
        for dtype in args.dtypes:
            config = EmoConfig(hidden_size=HIDDEN, intermediate_size=WIDTH)
            with torch.device("meta"):
                experts = EmoExperts(config, num_experts)
            for name, parameter in list(experts.named_parameters()):
                weights = empty(parameter.numel(), getattr(torch, dtype)).view(parameter.shape)
                setattr(experts, name, nn.Parameter(weights.uniform_(-0.04, 0.04)))
            for tokens in args.forward:
                compare(experts, tokens, args, training=False)
            for tokens in args.training:
                compare(experts, tokens, args, training=True)


if __name__ == "__main__":
    main()
