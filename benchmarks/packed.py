"""Products with weights in 8 and 4 bits on a CPU, beside those in bfloat16.

    python benchmarks/packed.py [--quick] [--threads N] [--group 32] [--rows 1 8 512]

Claim: weights in few bits are multiplied where they lie: one token takes about as much less time as there are
fewer bytes to read, and a prompt no more than in bfloat16.

Bar: of the time in bfloat16, one token in 4 bits 0.45 and in 8 bits 0.65; eight sequences in 4 bits 0.5; a
prompt of 512 in 4 bits 1.1.

The products of the released model: a projection of the attention (2048 to 2048), the head (2048 to 100,352),
and a block of 128 or 16 experts (hidden size 2048, 1024 an expert, the best 8). There are so many of each
that no cache holds them, and they lie in large pages. All take turns in one run; times are medians, in
brackets is the ratio of the fastest runs. GB/s are the bytes of the weights that are needed, by the time. In
bfloat16 runs what this package would run.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers_emo.checkpoints.memory.large_pages import empty
from transformers_emo.modeling_emo.kernels.layer_kernels import few_rows_linear
from transformers_emo.modeling_emo.kernels.native_library import load_kernels
from transformers_emo.modeling_emo.kernels.packed.packed_products import packed_experts, packed_linear
from transformers_emo.modeling_emo.kernels.packed.packed_weights import PackedWeight

HIDDEN, WIDTH, VOCABULARY, TOP_K = 2048, 1024, 100_352, 8
CACHES = 200e6  # bytes that no cache holds


def random_weight(*shape: int) -> torch.Tensor:
    """In bfloat16."""
    weight = empty(torch.Size(shape).numel(), torch.bfloat16).view(shape)
    return weight.uniform_(-0.04, 0.04)


def random_packed(bits: int, group: int, *shape: int) -> PackedWeight:
    """Random numbers: their time does not depend on what they are."""
    packed = (*shape[:-1], shape[-1] * bits // 32)
    scale = (*shape[:-1], shape[-1] // group)
    numbers = empty(torch.Size(packed).numel(), torch.int32).view(packed)
    numbers.random_(-(2**31), 2**31 - 1)
    scales = empty(torch.Size(scale).numel(), torch.bfloat16).view(scale).fill_(0.04 / 2 ** (bits - 1))
    return PackedWeight(numbers, scales, None, bits, group)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As the network does it."""
    found = few_rows_linear(x, weight, None)
    return F.linear(x, weight) if found is None else found


def linears(outputs: int, group: int) -> Callable[[int], dict[str, tuple[Callable[[], None], float]]]:
    """The calls of a linear layer, for so many rows: of how many times the work, and bytes."""
    copies = max(1, round(CACHES * 2 / (outputs * HIDDEN)))
    plain = [random_weight(outputs, HIDDEN) for _ in range(copies)]
    packed = {bits: [random_packed(bits, group, outputs, HIDDEN) for _ in range(copies)] for bits in (4, 8)}

    def calls(rows: int):
        x = torch.randn(rows, HIDDEN).bfloat16()

        def each(product: Callable, weights: list) -> Callable[[], None]:
            return lambda: [product(x, weight) for weight in weights][0]

        found = {"bfloat16": (each(linear, plain), sum(weight.nbytes for weight in plain))}
        for bits, weights in packed.items():
            size = sum(part.nbytes for weight in weights for part in weight.tensors.values())
            found[f"{bits} bits"] = each(packed_linear, weights), size
        return {name: (call, size / copies, copies) for name, (call, size) in found.items()}

    return calls


def experts(number: int, group: int):
    """The calls of a block of experts."""
    plain = random_weight(number, 2 * WIDTH, HIDDEN), random_weight(number, HIDDEN, WIDTH)
    packed = {
        bits: (
            random_packed(bits, group, number, 2 * WIDTH, HIDDEN),
            random_packed(bits, group, number, HIDDEN, WIDTH),
        )
        for bits in (4, 8)
    }

    def calls(rows: int):
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, HIDDEN, generator=generator).bfloat16()
        # As many different ones as no cache holds.
        index = [
            torch.rand(rows, number, generator=generator).argsort(dim=1)[:, :TOP_K].contiguous()
            for _ in range(8)
        ]
        weights = torch.rand(rows, TOP_K, generator=generator)
        hit = sum(len(each.unique()) for each in index) / len(index) / number
        kernels = load_kernels()

        def each(product: Callable) -> Callable[[], None]:
            return lambda: [product(each) for each in index][0]

        found = {
            "bfloat16": (
                each(lambda index: kernels.experts(x, *plain, weights, index)[0]),
                sum(weight.nbytes for weight in plain),
            )
        }
        for bits, pair in packed.items():
            size = sum(part.nbytes for weight in pair for part in weight.tensors.values())
            found[f"{bits} bits"] = each(lambda i, pair=pair: packed_experts(x, *pair, weights, i)), size
        return {name: (call, size * hit, len(index)) for name, (call, size) in found.items()}

    return calls


def measure(calls: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Times of each, in turns, for about so many seconds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    start = time.perf_counter()
    while min(map(len, times.values())) < 3 or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return times


def compare(what: str, rows: int, found: dict, seconds: float) -> None:
    """Print the lines of one product."""
    times = measure({name: call for name, (call, _, _) in found.items()}, seconds)
    plain = times["bfloat16"]
    for name, (_, size, copies) in found.items():
        middle, least = statistics.median(times[name]), min(times[name])
        print(
            f"{middle / statistics.median(plain):.2f} ({least / min(plain):.2f})  times the time in "
            f"bfloat16: {what}, {rows} rows, {name} ({1e3 * middle / copies:.3f} ms, "
            f"{size * copies / middle / 1e9:.1f} GB/s)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="16 experts, one second each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--only", nargs="+", default=["projection", "head", "128", "16"])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each line, at least")
    args = parser.parse_args()
    if args.quick:
        args.only, args.rows, args.seconds = ["projection", "16"], [1, 8], 1.0
    torch.set_num_threads(args.threads)
    print(
        f"{args.threads} threads, groups of {args.group}, PyTorch {torch.__version__}, Python "
        f"{sys.version.split()[0]}"
    )
    makers: dict[str, tuple[str, Callable]] = {
        "projection": ("projection", lambda: linears(HIDDEN, args.group)),
        "head": ("head", lambda: linears(VOCABULARY, args.group)),
        "128": ("128 experts", lambda: experts(128, args.group)),
        "16": ("16 experts", lambda: experts(16, args.group)),
    }
    with torch.no_grad():
        for name in args.only:
            what, make = makers[name]
            calls = make()
            for rows in args.rows:
                compare(what, rows, calls(rows), args.seconds)


if __name__ == "__main__":
    main()
