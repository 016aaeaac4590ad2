"""EMO in vLLM on a CPU, by the plugin in `plugins/vllm`: the real engine, and its answers equal to ours."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engines import load_test
from engines.engine_models import PROMPTS, SMALL, TINY, TOKENS, greedy, small_model
from engines.manual import run_commands
from transformers_emo import ExpertSubset, extract_subset, select_experts
from transformers_emo.conversion import shard_experts

pytestmark = pytest.mark.engines
RUNS = Path(__file__).with_name("vllm_runs.py")
PER_REQUEST = {"enable_prefix_caching": False, "enable_chunked_prefill": False}
EIGHT = ("c", "coq", "python", "go", "sql", "lisp", "french", "metamath")
VARIANTS = {
    "grouped queries, tied embeddings": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "no shared expert": {"num_shared_experts": 0},
    "two shared experts": {"num_shared_experts": 2},
    "always-active experts": {"num_shared_experts": 0, "always_active_experts": [3, 7]},
    "dense first, with biases": {
        "num_experts_per_layer": [0, 16, 16],
        "dense_intermediate_size": 96,
        "dense_mlp_bias": True,
    },
    "other numbers in each layer": {
        "num_experts_per_layer": [16, 8, 3],
        "num_shared_experts_per_layer": [1, 2, 0],
    },
    "biases in the attention": {"attention_bias": True},
    "normalised weights": {"num_shared_experts": 0, "norm_topk_prob": True},
    "fewer experts than a token takes": {"num_experts": 3},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.fixture(scope="session")
def run(engine_environment):
    """Run jobs in one process of vLLM; see `vllm_runs.py`."""

    def run(*jobs, with_ours: bool = False, **variables):
        result = subprocess.run(
            [sys.executable, RUNS, "--with-ours" if with_ours else "--without-ours"],
            input=json.dumps(jobs),
            env=engine_environment | variables,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert result.returncode == 0, result.stderr[-5000:]
        return json.loads(result.stdout.strip().splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def mixed(tiny, prompts):
    """A batch in which every request has other experts, and our answer to each alone."""
    said = [
        None,
        {"expert_subset": "coq"},
        {"document_pool": 16},
        {"expert_subset": "python"},
        {"exclude_experts": "python"},
        {"expert_subset": "coq", "document_pool": 8},
        {"exclude_experts": '{"0": [3, 5, 7], "2": [1]}'},
        {"document_pool": 8},
    ]
    batch, expected = [], []
    for index in range(2 * len(said)):
        ids, words = prompts[index // 2 % len(prompts)], said[index % len(said)]
        choice = {
            key: json.loads(value) if str(value).startswith("{") else value
            for key, value in (words or {}).items()
        }
        batch.append((ids, words))
        expected.append(greedy(tiny, ids, **choice))
    assert len({tuple(ids) for ids in expected}) >= len(said)  # the choices make a difference
    return {"prompts": [ids for ids, _ in batch], "requests": [words for _, words in batch]}, expected


def test_a_released_folder_and_a_subset_at_the_start_give_our_ids(run, tiny, prompts, tmp_path):
    extract_subset(TINY, "coq", tmp_path / "small", progress=False)
    without = {"exclude_experts": "python"}
    full, chosen, extracted, excluded = run(
        {"model": str(TINY), "prompts": prompts},
        {"model": str(TINY), "prompts": prompts, "options": {"hf_overrides": {"expert_subset": "coq"}}},
        {"model": str(tmp_path / "small"), "prompts": prompts},
        {"model": str(TINY), "prompts": prompts, "options": {"hf_overrides": without}},
    )
    assert full["ids"] == [greedy(tiny, ids) for ids in prompts]
    assert chosen["ids"] == extracted["ids"] == [greedy(tiny, ids, expert_subset="coq") for ids in prompts]
    assert excluded["ids"] == [greedy(tiny, ids, exclude_experts="python") for ids in prompts]
    assert len({str(out["ids"]) for out in (full, chosen, excluded)}) == 3


def test_every_kind_of_model_gives_our_ids(run, tmp_path):
    torch.manual_seed(1)
    texts = [torch.randint(2, SMALL["vocab_size"], (n,)).tolist() for n in (3, 9, 17, 30, 44)]
    jobs, expected = [], {}
    for number, (name, changes) in enumerate(VARIANTS.items()):
        model = small_model(**changes)
        model.save_pretrained(tmp_path / str(number))
        expected[name] = [greedy(model, ids) for ids in texts]
        options = {"skip_tokenizer_init": True, "max_model_len": 256}
        jobs.append({"model": str(tmp_path / str(number)), "prompts": texts, "options": options})
    found = dict(zip(VARIANTS, run(*jobs), strict=True))
    assert {name: out.get("ids", out) for name, out in found.items()} == expected


def test_other_layouts_give_our_ids(run, tiny, prompts, tmp_path):
    shard_experts(TINY, tmp_path / "sharded", progress=False)
    subset = {"hf_overrides": {"expert_subset": str(TINY / "subsets" / "coq.json")}}
    whole, part = run(
        {"model": str(tmp_path / "sharded"), "prompts": prompts},
        {"model": str(tmp_path / "sharded"), "prompts": prompts, "options": subset},
    )
    assert whole["ids"] == [greedy(tiny, ids) for ids in prompts]
    assert part["ids"] == [greedy(tiny, ids, expert_subset="coq") for ids in prompts]


def test_what_would_not_be_exact_is_refused(run, tmp_path):
    refusals = {
        "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {}),
        "'gelu'": ({"hidden_act": "gelu"}, {}),
        "--model-impl transformers": ({}, {"model_impl": "transformers", "trust_remote_code": True}),
        "--quantization": ({}, {"quantization": "fp8"}),
        "no expert subset 'nosuch'": ({}, {"hf_overrides": {"expert_subset": "nosuch"}}),
        "LoRA": ({}, {"enable_lora": True}),
        "--load-format": ({}, {"load_format": "safetensors"}),
    }
    jobs = []
    for number, (changes, options) in enumerate(refusals.values()):
        with_code = (
            "trust_remote_code" in options
        )  # vLLM takes other code than its own only where there is some
        small_model(**changes).save_pretrained(tmp_path / str(number), include_code=with_code)
        options = {"skip_tokenizer_init": True, "max_model_len": 256} | options
        jobs.append({"model": str(tmp_path / str(number)), "prompts": [[5]], "options": options})
    for expected, found in zip(refusals, run(*jobs), strict=True):
        assert expected in found["error"]


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        ({"enforce_eager": True}, {}),
        ({"enforce_eager": False}, {}),
        ({"tensor_parallel_size": 2}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
        ({"max_num_seqs": 3}, {}),
    ],
    ids=["eager", "compiled", "two workers", "few rows"],
)
def test_each_request_of_a_mixed_batch_gets_its_own_experts(run, mixed, options, variables):
    batch, expected = mixed
    [found] = run({"model": str(TINY), "options": PER_REQUEST | options, **batch}, **variables)
    assert found["ids"] == expected


def test_compiled_code_is_kept_for_the_next_server_of_the_same_kind_only(run, mixed, tmp_path):
    """vLLM keeps it on disk. A server without choices by request comes first, and one with them twice."""
    batch, expected = mixed
    job = {"model": str(TINY), "options": {"enforce_eager": False}, "prompts": batch["prompts"][:1]}
    for options, requests, ids in (
        ({}, {}, expected[:1]),
        (PER_REQUEST, batch, expected),
        (PER_REQUEST, batch, expected),
    ):
        changed = job | requests | {"options": job["options"] | options}
        [found] = run(changed, VLLM_CACHE_ROOT=str(tmp_path))
        assert found["ids"] == ids


def test_prompts_in_parts_keep_their_subset(run, tiny, prompts):
    long = [ids for prompt in prompts for ids in prompt] * 3
    options = PER_REQUEST | {"enable_chunked_prefill": True, "max_num_batched_tokens": 32}
    said = [{"expert_subset": "coq"}, None, {"expert_subset": "python"}]
    [found] = run({"model": str(TINY), "options": options, "prompts": [long] * 3, "requests": said})
    assert found["ids"] == [greedy(tiny, long, **(words or {})) for words in said]


def test_both_packages_work_in_one_process(run, mixed, tiny, prompts):
    """The config is then of this package's class."""
    batch, expected = mixed
    subset = {"hf_overrides": {"expert_subset": "coq"}}
    found, chosen = run(
        {"model": str(TINY), "options": PER_REQUEST, **batch},
        {"model": str(TINY), "options": subset, "prompts": prompts},
        with_ours=True,
    )
    assert found["ids"] == expected
    assert chosen["ids"] == [greedy(tiny, ids, expert_subset="coq") for ids in prompts]


def test_the_traffic_of_a_server_becomes_a_subset(run, tiny, prompts, tmp_path):
    file = tmp_path / "usage.json"
    options = PER_REQUEST | {"hf_overrides": {"usage_file": str(file)}}
    requests = [None] * len(prompts) + [{"expert_subset": "coq"}]
    job = {
        "model": str(TINY),
        "options": options,
        "prompts": [*prompts, prompts[0]],
        "requests": requests,
        "wait": 4,
    }
    [found] = run(job)
    # The last token of an answer is not read any more.
    texts = [ids + answer[:-1] for ids, answer in zip(prompts, found["ids"][: len(prompts)], strict=True)]
    batches = [[ids] for ids in texts]
    wanted = select_experts(tiny, input_ids=batches, num_experts=16, method="global", progress=False)
    chosen = select_experts(TINY, usage=file, num_experts=16, progress=False)
    assert chosen.num_tokens == wanted.num_tokens == sum(map(len, texts))
    assert chosen.experts == wanted.experts
    assert chosen.method == "usage"


def test_vllm_does_not_take_our_blocks_apart():
    """vLLM's own backend for Transformers' models rebuilds blocks it thinks it knows, without a shared expert
    that has no module of its own. It must not think so of ours."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    from vllm.model_executor.models.transformers.fusers.moe import MoEBlockFuser

    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    known = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    assert MoEBlockFuser.match(known, "experts") is not None  # it would see a block that it knows
    for shared in (0, 1):
        block = small_model(num_shared_experts=shared).model.layers[0].mlp
        assert MoEBlockFuser.match(block, "experts") is None


def test_other_models_start_with_the_plugin_installed():
    """The newer runner of GPUs refuses to start with a hook of the older one, whatever the model."""
    from transformers_emo_vllm.requests import RequestExperts
    from vllm.v1.sample.logits_processor import _load_logitsprocs_plugins
    from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_plugins

    assert _load_logitsprocs_plugins() == _load_v2_logitsprocs_plugins() == [RequestExperts]


class Server:
    """`vllm serve`, as from a shell."""

    def __init__(self, environment: dict[str, str], log: Path, *words: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [Path(sys.executable).with_name("vllm"), "serve", *words, "--host", "127.0.0.1"]
        quiet = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
        }
        self.process = subprocess.Popen(
            [*command, "--port", str(port)],
            env=environment | quiet,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> "Server":
        for _ in range(600):
            if self.process.poll() is not None:
                raise AssertionError(self.log.read_text()[-5000:])
            try:
                with socket.create_connection(("127.0.0.1", int(self.url.rsplit(":", 1)[1])), timeout=1):
                    return self
            except OSError:
                time.sleep(1)
        raise AssertionError(self.log.read_text()[-5000:])

    def __exit__(self, *error) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def server(engine_environment, tmp_path_factory):
    """The server that the manual starts, with a name for its model."""
    manual = (TINY.parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    [command] = re.findall(r"^vllm serve model_cards/emo-tiny (.*--no-enable-chunked-prefill)$", manual, re.M)
    words = [str(TINY), *command.split(), "--enforce-eager", "--served-model-name", "emo"]
    with Server(engine_environment, tmp_path_factory.mktemp("server") / "log.txt", *words) as server:
        yield server


def body(prompt: str, said: dict | None = None, **changes) -> dict:
    words = {"model": "emo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    return words | {"return_token_ids": True, "vllm_xargs": said} | changes


def test_requests_over_http_get_their_own_experts(server, tiny, prompts):
    for said in (None, {"expert_subset": "coq"}, {"document_pool": 16}, {"exclude_experts": "python"}):
        status, answer = load_test.ask(server.url, body(PROMPTS[1], said))
        assert status == 200, answer
        assert load_test.text_ids(answer) == greedy(tiny, prompts[1], **(said or {}))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"expert_subset": "nosuch"}, "the model's subsets/ holds c, chinese, coq"),
        ({"expert_subset": "../coq"}, "There is no expert subset '../coq'"),
        ({"expert_subset": 3}, "There is no expert subset 3"),
        ({"expert_subset": ["coq"]}, "There is no expert subset"),
        ({"expert_subsets": "coq"}, "is `expert_subset` meant?"),
        ({"document_pool": 2}, "expected an integer from 3"),
        ({"document_pool": 64}, "to 63"),
        ({"document_pool": "many"}, "expected an integer"),
        ({"document_pool": 8.5}, "expected an integer"),
        ({"exclude_experts": '{"9": [1]}'}, "names layer '9'"),
        ({"exclude_experts": '{"0": [63]}'}, "every token uses"),
        ({"exclude_experts": '{"0": [3'}, "no JSON"),
        ({"exclude_experts": "nosuch"}, "There is no expert subset 'nosuch'"),
        ({"expert_subset": "coq", "exclude_experts": "coq"}, "No routed expert of layer 0 remains"),
    ],
)
def test_what_cannot_be_had_is_a_bad_request(server, said, words):
    status, answer = load_test.ask(server.url, body("x", said))
    assert status == 400
    assert words in answer["error"]["message"]


def test_beam_search_is_not_without_its_experts(server):
    status, answer = load_test.ask(server.url, body("x", {"expert_subset": "coq"}, use_beam_search=True, n=2))
    assert (status, "leaves out `expert_subset`" in json.dumps(answer)) == (400, True)
    assert load_test.ask(server.url, body("x", None, use_beam_search=True, n=2, max_tokens=4))[0] == 200


def test_64_requests_with_eight_subsets_at_once_none_wrong_none_lost(server, tiny):
    choices = [{"expert_subset": name} for name in EIGHT]
    requests = load_test.bodies("emo", 64, choices, 32)
    result = load_test.load(server.url, requests)
    assert {key: result[key] for key in ("asked", "lost", "wrong")} == {"asked": 64, "lost": 0, "wrong": 0}
    assert result["answers"] > 16
    assert server.process.poll() is None


def test_a_server_with_a_prefix_cache_refuses_experts_by_request(run, prompts):
    job = {"model": str(TINY), "prompts": prompts[:1], "requests": [{"expert_subset": "coq"}]}
    [cached] = run(job | {"options": {"enable_prefix_caching": True}})
    options = PER_REQUEST | {"enable_chunked_prefill": True}
    [in_parts] = run(job | {"options": options, "requests": [{"document_pool": 16}]})
    assert "--no-enable-prefix-caching" in cached["refused"]
    assert "--no-enable-chunked-prefill" in in_parts["refused"]


def test_only_the_bytes_of_kept_experts_are_read(engine_environment):
    """Counted by the operating system: `rchar` of the process."""
    script = (
        "import sys; from transformers_emo_vllm.config import EmoConfig; from transformers_emo_vllm.files "
        "import ModelFiles;from transformers_emo_vllm.startup import apply_choice; from "
        "transformers_emo_vllm.weights import WeightReader;path, name = sys.argv[1:]; files = "
        "ModelFiles(path); config = EmoConfig.from_pretrained(path);config.expert_subset = name or None; "
        "apply_choice(config, files);read = lambda: int(open('/proc/self/io').read().split()[1]); before = "
        "read();reader = WeightReader(config, files); size = sum(t.nbytes for _, t in reader); "
        "print(read() - before, size)"
    )
    found = {}
    for name in ("", "coq"):
        output = subprocess.run(
            [sys.executable, "-c", script, str(TINY), name],
            env=engine_environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        found[name] = tuple(map(int, re.findall(r"\d+", output.splitlines()[-1])))
    whole, part = found[""], found["coq"]
    header = whole[0] - whole[1]
    assert 0 < header < 0.02 * whole[1]
    assert part[0] - part[1] <= 2 * header + 10_000  # the header, and what reading it costs
    assert part[1] < 0.4 * whole[1]
    kept = ExpertSubset.load(TINY / "subsets" / "coq.json")
    assert all(ids is not None and len(ids) == 16 for ids in kept.experts)


def test_the_commands_of_the_manual_run(tmp_path, monkeypatch, engine_environment, coq_answer):
    monkeypatch.chdir(tmp_path)
    variables = engine_environment | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    printed = run_commands("vLLM", tmp_path, Path(sys.executable).parent, variables)
    assert json.loads(printed)["choices"][0]["text"] == coq_answer
