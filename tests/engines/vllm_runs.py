"""Runs vLLM in a process of its own: reads jobs as JSON from standard input, writes what came out as the last
line.

A job is `{"model": ..., "options": {...}, "prompts": [[ids], ...], "requests": [{...}, ...], "tokens": 48}`:
the options of `LLM`, prompts as token ids, and for each prompt its `vllm_xargs`; `wait` are seconds before
the end. `{"error": ...}` comes out where vLLM refuses. `--with-ours` imports this package first,
`--without-ours` makes that fail, as where it is not installed.
"""

import json
import os
import sys
import time
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def run(job: dict[str, Any]) -> Any:
    """The result of a job."""
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16}
    try:
        llm = LLM(job["model"], **(defaults | job.get("options", {})))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    requests = job.get("requests") or [None] * len(job["prompts"])
    tokens = job.get("tokens", 48)
    try:
        params = [
            SamplingParams(
                temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=said
            )
            for said in requests
        ]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], params, use_tqdm=False)
        time.sleep(job.get("wait", 0))
    except VLLMValidationError as error:
        return {"refused": str(error)}
    finally:
        _end(llm)
    return {"ids": [list(output.outputs[0].token_ids) for output in outputs]}


def _end(llm: Any) -> None:
    """Let go of an engine, so that the next job of this process finds its memory and names free."""
    import gc

    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    gc.collect()


def main() -> None:
    """Run the jobs."""
    if "--without-ours" in sys.argv:
        sys.modules["transformers_emo"] = None  # type: ignore[assignment]
    if "--with-ours" in sys.argv:
        import transformers_emo  # noqa: F401 (its config is then the one that vLLM gets)
    results = [run(job) for job in json.load(sys.stdin)]
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
