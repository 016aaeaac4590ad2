"""Reading a prompt and generating on a CPU: ours, Transformers' ways, the authors' loop and llama.cpp.

    python benchmarks/generation.py [--folder DIR] [--quick] [--native] [--llama PYTHON] [--check] ...

Claim: a token takes no longer than with llama.cpp, and a prompt less time than any other way takes, with the
same weights in the same run.

Bar: one sequence at 0.9 of llama.cpp's rate and 0.75 of the memory's speed; eight at 3 times the tokens of
one; a prompt of 1,024 in 0.8 of the best other's time, at 0.8 of the speed of packed products.

Without `--folder` a checkpoint is made, as wide as the released model, of 4 layers and random bfloat16
weights (7.4 GB). All read the same weights and the same random tokens, and take turns in one run: a token
after 32, one sequence and eight; a prompt with the logits of its last token. Times are medians of turns after
a warm-up that also says how far the logits are from ours. Ratios come first. MB are how far a process grows
meanwhile. Beside them stand what the machine allows: for tokens how fast it reads memory, the best of several
ways; for prompts the products alone, of weights that oneDNN packed beforehand, with the rows that each expert
really gets. Random routing spreads eight sequences over some 46 experts a layer, three times one's weights:
at the speed of the memory eight sequences then make 2.7 times the tokens of one, and no more.

llama.cpp runs in a process of its own, whose Python (`--llama`, this one by default) needs llama-cpp-python
and gguf. `--check` compares its logits with ours in float32, for a small random model, and stops. `--native`
lets our kernels take part as compiled for the very machine, too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experts import NATIVE, LoopExperts
from loading import make_checkpoint
from native_build import native_kernels, running
from processes import resident
from transformers import DynamicCache
from transformers.utils import logging
from transformers_emo import EmoConfig, EmoForCausalLM
from transformers_emo.modeling_emo.kernels.native_library import find_kernels
from transformers_emo.modeling_emo.package_hooks import package

PROMPT, LONG_PROMPT, SEQUENCES = 32, 1024, 8
PARTS = ("one", "eight", "prompt")
LARGEST_DIFFERENCE = 1e-4  # of float32 logits, in standard deviations of theirs


class Torch:
    """One way of PyTorch to run the model; its weights are there once, for all."""

    def __init__(self, model: EmoForCausalLM, experts: str, loops: list[LoopExperts] | None = None):
        self.model, self.experts, self.loops = model, experts, loops

    @contextmanager
    def _chosen(self) -> Iterator[None]:
        """Ours as it is; for the others PyTorch's own layers, and their experts."""
        ours, blocks = package.hooks, [layer.mlp for layer in self.model.model.layers]
        kept = [block.experts for block in blocks]
        self.model.config._experts_implementation = self.experts
        if self.experts != "emo":
            package.hooks = None
        try:
            for block, loop in zip(blocks, self.loops or kept, strict=True):
                block.experts = loop
            yield
        finally:
            package.hooks, self.model.config._experts_implementation = ours, "emo"
            for block, experts in zip(blocks, kept, strict=True):
                block.experts = experts

    def _logits(self, ids_BS: torch.Tensor, **kwargs) -> torch.Tensor:
        """Of the last tokens; the others' models let all tokens through all experts, as Transformers does."""
        if self.experts == "emo":
            return self.model(ids_BS, logits_to_keep=1, **kwargs).logits
        return self.model.lm_head(self.model.model(ids_BS, **kwargs).last_hidden_state[:, -1:])

    @torch.no_grad()
    def run(self, prompt: list[list[int]], steps: list[list[int]]) -> dict[str, Any]:
        """Read prompts (B, S), then steps of a token each (N, B)."""
        cache, times = DynamicCache(config=self.model.config), []
        calls = [torch.tensor(prompt), *(torch.tensor(step)[:, None] for step in steps)]
        before = resident(peak=False, forget=True)
        with self._chosen():
            for ids in calls:
                start = time.perf_counter()
                logits = self._logits(ids, past_key_values=cache, use_cache=True)
                times.append(time.perf_counter() - start)
        grown = resident(peak=True) - before
        return {"prompt": times[0], "steps": times[1:], "megabytes": grown, "logits": logits[:, -1].float()}


class Native(Torch):
    """Ours, with kernels compiled for the very machine."""

    def __init__(self, model: EmoForCausalLM):
        super().__init__(model, "emo")
        self.kernels = native_kernels()

    @contextmanager
    def _chosen(self) -> Iterator[None]:
        with super()._chosen(), running(self.kernels):
            yield


class Llama:
    """llama.cpp, in a process of its own (`llama_peer.py`)."""

    def __init__(self, python: str, gguf: Path, threads: int):
        command = [python, str(Path(__file__).with_name("llama_peer.py")), "serve", str(gguf), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._answer()["version"]

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError("llama.cpp's process ended; what it said is above.")
        return json.loads(line)

    def run(self, prompt: list[list[int]], steps: list[list[int]], exact: bool = False) -> dict[str, Any]:
        """As `Torch.run`; with `exact` in float32, and with the logits of all tokens of the prompt."""
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/logits.npy"
            request = {"prompt": prompt, "steps": steps, "exact": exact, "logits": path}
            self.process.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
            return self._answer() | {"logits": torch.from_numpy(np.load(path))}

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def write_gguf(python: str, folder: Path, gguf: Path) -> None:
    """In the other Python, which has what that takes."""
    command = [python, str(Path(__file__).with_name("llama_peer.py")), "write", str(folder), str(gguf)]
    subprocess.run(command, check=True)


def missing(python: str) -> str:
    """Why llama.cpp cannot take part; nothing if it can."""
    run = subprocess.run([python, "-c", "import gguf, llama_cpp"], capture_output=True, text=True)
    return run.stderr.strip().splitlines()[-1] if run.returncode else ""


def random_tokens(vocabulary: int, *shape: int) -> list:
    """The same for the same shape."""
    return torch.randint(2, vocabulary - 100, shape, generator=torch.Generator().manual_seed(7)).tolist()


def take_turns(
    contenders: dict[str, Any],
    prompt: list[list[int]],
    steps: list[list[int]],
    turns: int,
    between: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Of each contender the median of the turns, their fastest, growth, and how far its logits are off."""
    first = {name: each.run(prompt, steps) for name, each in contenders.items()}
    ours = first["emo"]["logits"]
    runs: dict[str, list[dict]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, each in contenders.items():
            runs[name].append(each.run(prompt, steps))
        between()
    results = {}
    for name, each in runs.items():
        times = [statistics.median(run["steps"]) if steps else run["prompt"] for run in each]
        results[name] = {
            "seconds": statistics.median(times),
            "fastest": min(times),
            "megabytes": min(run["megabytes"] for run in each),
            "off": float((first[name]["logits"] - ours).abs().max() / ours.std()),
        }
    return results


def show(name: str, result: dict[str, Any], more: str) -> None:
    """Print a line of a table."""
    print(
        f"    {name:15} {1e3 * result['seconds']:8.1f} ms (fastest {1e3 * result['fastest']:.1f}), {more}"
        f"{result['megabytes']:.0f} MB; logits {result['off']:.3f} sd from ours",
        flush=True,
    )


def compare_rates(title: str, results: dict[str, dict], bars: dict[str, float]) -> None:
    """Print ratios of our rate to the others'."""
    for name, result in results.items():
        if name != "emo":
            ratio = result["seconds"] / results["emo"]["seconds"]
            bar = f" (to reach: {bars[name]})" if name in bars else ""
            whose = "the authors' loop's" if name == "authors' loop" else f"{name}'s"
            print(f"{ratio:.2f}  times {whose} tokens a second: {title}{bar}", flush=True)


class Memory:
    """How fast the machine reads: weights of several GB, by the best of several ways."""

    def __init__(self, model: EmoForCausalLM):
        weights = [layer.mlp.experts.gate_up_proj for layer in model.model.layers]
        self.flat = [
            torch.empty(0, dtype=torch.int32).set_(weight.untyped_storage())  # type: ignore[call-overload]
            for weight in weights
        ]
        self.nbytes = sum(each.nbytes for each in self.flat)
        ones = torch.ones(2048)
        self.ways: dict[str, Callable[[torch.Tensor], Any]] = {
            "sum of int64": lambda x: x.view(torch.int64).sum(),
            "sum of float32": lambda x: x.view(torch.float32).sum(),
            "largest int32": lambda x: x.amax(),
            "product of float32": lambda x: torch.mv(x.view(torch.float32).view(-1, 2048), ones),
        }
        kernels, row = find_kernels(), torch.ones(1, 2048, dtype=torch.bfloat16)
        if kernels is not None:
            self.ways["our product"] = lambda x: kernels.linear(
                row, x.view(torch.bfloat16).view(-1, 2048), None
            )
        self.times: dict[str, list[float]] = {name: [] for name in self.ways}

    @torch.no_grad()
    def read(self) -> None:
        """Once, in each way."""
        for name, way in self.ways.items():
            start = time.perf_counter()
            for each in self.flat:
                way(each)
            self.times[name].append(time.perf_counter() - start)

    def rates(self) -> dict[str, float]:
        """Bytes a second of each way, the fastest first, by the medians so far."""
        rates = {name: self.nbytes / statistics.median(times) for name, times in self.times.items()}
        return dict(sorted(rates.items(), key=lambda item: -item[1]))


@torch.no_grad()
def picks(model: EmoForCausalLM, prompt: list[list[int]], steps: list[list[int]]) -> list[list[torch.Tensor]]:
    """For the prompt and for each step the experts that each layer's tokens pick, (T, K)."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, args, output: found.append(output[2]))
        for layer in model.model.layers
    ]
    Torch(model, "emo").run(prompt, steps)
    for hook in hooks:
        hook.remove()
    layers = len(hooks)
    return [found[at : at + layers] for at in range(0, len(found), layers)]


def active_bytes(model: EmoForCausalLM, picked: list[torch.Tensor]) -> int:
    """Bytes of weights that a step reads, with the experts that each layer's tokens pick."""

    def size(module: torch.nn.Module) -> int:
        return sum(parameter.nbytes for parameter in module.parameters())

    total = size(model.lm_head)
    for layer, index in zip(model.model.layers, picked, strict=True):
        experts = layer.mlp.experts
        total += size(layer) - size(experts)
        total += size(experts) // experts.num_experts * len(index.unique())
    return total


@torch.no_grad()
def packed_products(model: EmoForCausalLM, picked: list[torch.Tensor]) -> float:
    """Seconds of the prompt's products alone: oneDNN, with weights that it packed beforehand."""

    def pack(weight: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        return torch.randn(rows, weight.shape[1]).to(weight.dtype), packed

    def seconds(products: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        times = []
        for _ in range(3):  # the first is the warm-up
            start = time.perf_counter()
            for rows, packed in products:
                torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    total = seconds([pack(model.lm_head.weight, 1)])
    for layer, index in zip(model.model.layers, picked, strict=True):
        attention, experts = layer.self_attn, layer.mlp.experts
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        products = [pack(projection.weight, LONG_PROMPT) for projection in projections]
        for expert, rows in enumerate(torch.bincount(index.flatten()).tolist()):
            if rows:
                products.append(pack(experts.gate_up_proj[expert], rows))
                products.append(pack(experts.down_proj[expert], rows))
        total += seconds(products)
    return total


def compare_steps(
    model: EmoForCausalLM, contenders: dict[str, Any], sequences: int, args: argparse.Namespace
) -> dict[str, float]:
    """Print the table of decoding so many sequences; tokens a second."""
    title = f"a token after {PROMPT}, {'one sequence' if sequences == 1 else f'{sequences} sequences'}"
    prompt = random_tokens(model.config.vocab_size, sequences, PROMPT)
    steps = random_tokens(model.config.vocab_size, args.tokens // (1 if sequences == 1 else 4), sequences)
    read = statistics.mean(active_bytes(model, each) for each in picks(model, prompt, steps)[1:])
    memory = Memory(model)
    results = take_turns(contenders, prompt, steps, args.turns, memory.read)
    rates = memory.rates()
    compare_rates(title, results, {"llama.cpp": 0.9} if sequences == 1 else {})
    share = read / results["emo"]["seconds"] / max(rates.values())
    bar = " (to reach: 0.75)" if sequences == 1 else ""
    print(f"{share:.2f}  times the memory's speed: {title}{bar}, {read / 1e6:.0f} MB of weights a step")
    print("    memory, GB/s: " + ", ".join(f"{rate / 1e9:.1f} {name}" for name, rate in rates.items()))
    for name, result in results.items():
        show(name, result, f"{read / result['seconds'] / 1e9:.1f} GB/s, ")
    return {name: sequences / result["seconds"] for name, result in results.items()}


def compare_prompts(model: EmoForCausalLM, contenders: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the table of reading a long prompt."""
    title = f"a prompt of {LONG_PROMPT}"
    prompt = random_tokens(model.config.vocab_size, 1, LONG_PROMPT)
    picked = picks(model, prompt, [])[0]
    alone = packed_products(model, picked)
    results = take_turns(contenders, prompt, [], args.turns)
    others = [result["seconds"] for name, result in results.items() if name not in ("emo", NATIVE)]
    best = min(others, default=float("nan"))
    print(f"{results['emo']['seconds'] / best:.2f}  times the best other's time: {title} (to reach: 0.8)")
    compare_rates(title, results, {})
    speed = alone / results["emo"]["seconds"]
    print(f"{speed:.2f}  times the speed of packed products: {title} (to reach: 0.8)")
    for name, result in results.items():
        show(name, result, "")
    print(f"    {'products alone':15} {1e3 * alone:8.1f} ms", flush=True)


def compare(model: EmoForCausalLM, contenders: dict[str, Any], args: argparse.Namespace) -> None:
    """Print all tables."""
    rates = {
        sequences: compare_steps(model, contenders, sequences, args)
        for part, sequences in (("one", 1), ("eight", SEQUENCES))
        if part in args.parts
    }
    for name in contenders if len(rates) == 2 else ():
        bar = " (to reach: 3)" if name == "emo" else ""
        ratio = rates[SEQUENCES][name] / rates[1][name]
        print(f"{ratio:.2f}  times the tokens a second of one sequence: {SEQUENCES} sequences, {name}{bar}")
    if "prompt" in args.parts:
        compare_prompts(model, contenders, args)


def check(args: argparse.Namespace) -> None:
    """Print how far llama.cpp's float32 logits are from ours, for a small random model; end if it is far."""
    torch.manual_seed(0)
    config = EmoConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = EmoForCausalLM(config).eval()
    for name, parameter in model.named_parameters():  # norms whose order matters
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    prompt = random_tokens(config.vocab_size, 1, 64)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        write_gguf(args.llama, Path(folder), Path(folder, "check.gguf"))
        llama = Llama(args.llama, Path(folder, "check.gguf"), args.threads)
        theirs = llama.run(prompt, [], exact=True)["logits"]
        llama.close()
    with torch.no_grad():
        ours = model(torch.tensor(prompt)).logits[0]
    off = float((theirs - ours).abs().max() / ours.std())
    print(f"{off:.1e}  largest difference of llama.cpp's float32 logits to ours, in standard deviations")
    if not off <= LARGEST_DIFFERENCE:
        sys.exit(f"llama.cpp computes something else: a difference of {off}, at most {LARGEST_DIFFERENCE}.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="a checkpoint in the released layout; random by default")
    parser.add_argument("--quick", action="store_true", help="one layer, two turns of few tokens")
    parser.add_argument("--layers", type=int, default=4, help="of the random model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="for each turn; a quarter of it for sequences")
    parser.add_argument("--llama", default=sys.executable, help="a Python with llama-cpp-python and gguf")
    parser.add_argument("--gguf", type=Path, help="llama.cpp's file of the model; written if it is not there")
    parser.add_argument("--mapped", action="store_true", help="weights stay pages of their files")
    parser.add_argument("--native", action="store_true", help="compile for this machine, and compare")
    parser.add_argument("--only", nargs="+", help="names of contenders beside ours")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured")
    parser.add_argument("--check", action="store_true", help="compare logits in float32, and stop")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.turns, args.tokens = 1, 2, 8
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    reason = missing(args.llama)
    if reason:
        print(f"llama.cpp is left out: {reason} ({args.llama})")
    if args.check:
        sys.exit(1) if reason else check(args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary, "model")
        make_checkpoint(folder, args.layers)
        gguf = args.gguf or Path(temporary, "model.gguf")
        if not reason and not gguf.exists():
            write_gguf(args.llama, folder, gguf)
        kwargs = {"disable_mmap": False} if args.mapped else {}
        model = EmoForCausalLM.from_pretrained(folder, dtype="bfloat16", **kwargs).eval()
        size = sum(parameter.nbytes for parameter in model.parameters())
        loops = [LoopExperts(layer.mlp.experts) for layer in model.model.layers]
        contenders: dict[str, Any] = {
            "emo": Torch(model, "emo"),
            "grouped_mm": Torch(model, "grouped_mm"),
            "eager": Torch(model, "eager"),
            "authors' loop": Torch(model, "eager", loops),
        }
        if args.only:
            contenders = {name: contenders[name] for name in contenders if name in ("emo", *args.only)}
        if args.native:
            contenders[NATIVE] = Native(model)
        llama = None
        if not reason and (not args.only or "llama.cpp" in args.only):
            contenders["llama.cpp"] = llama = Llama(args.llama, gguf, args.threads)
        print(
            f"{len(loops)} layers, {size / 1e9:.2f} GB, {args.threads} threads, PyTorch {torch.__version__}"
            + (f", llama-cpp-python {llama.version}" if llama else "")
        )
        compare(model, contenders, args)
        if llama:
            llama.close()


if __name__ == "__main__":
    main()
