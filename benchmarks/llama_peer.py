"""EMO in llama.cpp, for `generation.py`: writes a checkpoint as GGUF, and answers how long llama.cpp takes.

    python benchmarks/llama_peer.py write FOLDER FILE.gguf
    python benchmarks/llama_peer.py serve FILE.gguf THREADS

Wants llama-cpp-python, gguf and numpy, and nothing else: no PyTorch. llama.cpp's `deepseek` architecture is
exact for EMO with one shared expert: a softmax over the routed experts, whose top weights are not
renormalised, a shared expert of weight 1, no norm on queries and keys, no dense layers. Its rotary embedding
turns neighbours, and not halves, so that the rows of q and k change places.

Shape suffixes: R routed experts, F expert width, D hidden size.
"""

import importlib
import json
import mmap
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from processes import resident

Array = np.ndarray[Any, Any]


class Checkpoint:
    """Tensors of a folder in the released layout, not copied; bfloat16 as uint16, as numpy has none."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        index = folder / "model.safetensors.index.json"
        names = {"model.safetensors"}
        if index.exists():
            names = set(json.loads(index.read_text())["weight_map"].values())
        self.tensors: dict[str, Array] = {}
        for name in sorted(names):
            with open(folder / name, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            start = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:start])
            header.pop("__metadata__", None)
            for key, entry in header.items():
                dtype = {"BF16": np.uint16, "F32": np.float32}.get(entry["dtype"])
                if dtype is None:
                    raise ValueError(
                        f"{key} is {entry['dtype']}, expected BF16 or F32: convert the checkpoint."
                    )
                begin, end = entry["data_offsets"]
                whole = np.frombuffer(data, dtype, (end - begin) // np.dtype(dtype).itemsize, start + begin)
                self.tensors[key] = whole.reshape(entry["shape"])

    def check(self) -> None:
        """Refuse what `deepseek` would compute otherwise."""
        wanted = {
            "num_shared_experts": (1,),
            "norm_topk_prob": (False,),
            "hidden_act": ("silu",),
            "rope_scaling": (None,),
            "attention_bias": (False, None),
            "tie_word_embeddings": (False,),
            "num_experts_per_layer": (None,),
            "always_active_experts": (None, []),
            "always_active_experts_per_layer": (None,),
        }
        for key, values in wanted.items():
            if self.config.get(key, values[0]) not in values:
                raise ValueError(
                    f"`{key}` is {self.config[key]!r}, expected {values[0]!r}: deepseek has no other."
                )


def neighbours(weight: Array, heads: int) -> Array:
    """Rows of q or k (heads * 2 * H, D) from two halves of each head to pairs of neighbours."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return halves.transpose(0, 2, 1, 3).reshape(weight.shape)


def gguf_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, list[Array], bool]]:
    """Names in GGUF; what to write, one after the other; whether these have an axis of their own."""
    config, tensors = checkpoint.config, checkpoint.tensors
    routed = config["num_experts"] - config["num_shared_experts"]

    def float32(tensor: Array) -> Array:  # as llama.cpp wants norms and routers
        return (tensor.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == np.uint16 else tensor

    yield "token_embd.weight", [tensors["model.embed_tokens.weight"]], False
    yield "output_norm.weight", [float32(tensors["model.norm.weight"])], False
    yield "output.weight", [tensors["lm_head.weight"]], False
    for layer in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{layer}.", f"blk.{layer}."
        for part, norm in (("attn", "pre_attention"), ("ffn", "pre_feedforward")):
            yield f"{new}{part}_norm.weight", [float32(tensors[f"{old}{norm}_layernorm.weight"])], False
        for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            weight = tensors[f"{old}self_attn.{part}_proj.weight"]
            yield f"{new}attn_{part}.weight", [neighbours(weight, config[heads])], False
        yield f"{new}attn_v.weight", [tensors[f"{old}self_attn.v_proj.weight"]], False
        yield f"{new}attn_output.weight", [tensors[f"{old}self_attn.o_proj.weight"]], False
        yield f"{new}ffn_gate_inp.weight", [float32(tensors[f"{old}mlp.gate.weight"][:routed])], False
        for part in ("gate", "up", "down"):
            each = [tensors[f"{old}mlp.experts.{e}.{part}_proj.weight"] for e in range(config["num_experts"])]
            yield f"{new}ffn_{part}_exps.weight", each[:routed], True
            yield f"{new}ffn_{part}_shexp.weight", each[routed:], False


def write(folder: Path, path: Path) -> None:
    """Write a checkpoint as GGUF, in its own dtype, without a copy of it in memory."""
    gguf = importlib.import_module("gguf")  # of llama.cpp's own environment, as below

    checkpoint = Checkpoint(folder)
    checkpoint.check()
    config = checkpoint.config
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, "deepseek")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_leading_dense_block_count(0)
    writer.add_expert_count(config["num_experts"] - 1)
    writer.add_expert_used_count(config["num_experts_per_tok"] - 1)
    writer.add_expert_shared_count(1)
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_weights_scale(1.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    kinds = {2: gguf.GGMLQuantizationType.BF16, 4: gguf.GGMLQuantizationType.F32}
    for name, parts, stacked in gguf_tensors(checkpoint):
        shape = (len(parts), *parts[0].shape) if stacked else parts[0].shape
        nbytes = sum(part.nbytes for part in parts)
        writer.add_tensor_info(name, shape, parts[0].dtype, nbytes, kinds[parts[0].itemsize])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, parts, _ in gguf_tensors(checkpoint):
        writer.write_tensor_data(np.stack(parts) if len(parts) > 1 else parts[0])
    writer.close()
    partial.replace(path)


class Server:
    """A model in llama.cpp."""

    def __init__(self, path: str, threads: int):
        llama_cpp = importlib.import_module("llama_cpp")
        self.api, self.threads = llama_cpp, threads
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}.")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.contexts: dict[tuple, Any] = {}

    def context(self, sequences: int, tokens: int, exact: bool) -> Any:
        """Room for so many sequences of so many tokens; with `exact` all in float32."""
        key = sequences, tokens, exact
        if key not in self.contexts:
            settings = self.api.llama_context_default_params()
            settings.n_seq_max, settings.n_ctx = sequences, sequences * -(-tokens // 256) * 256
            settings.n_batch = settings.n_ctx
            settings.n_threads = settings.n_threads_batch = self.threads
            if exact:
                settings.type_k = settings.type_v = self.api.GGML_TYPE_F32
                settings.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED
            self.contexts[key] = self.api.llama_init_from_model(self.model, settings)
            if not self.contexts[key]:
                raise RuntimeError(f"llama.cpp makes no context of {sequences} times {tokens} tokens.")
        return self.contexts[key]

    def decode(self, context: Any, ids: list[list[int]], position: int, every: bool) -> float:
        """Seconds that some more tokens of each sequence take, with the last one's logits or all."""
        length = len(ids[0])
        batch = self.api.llama_batch_init(length * len(ids), 0, 1)
        batch.n_tokens = length * len(ids)
        for sequence, row in enumerate(ids):
            for offset, token in enumerate(row):
                at = sequence * length + offset
                batch.token[at], batch.pos[at] = token, position + offset
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = every or offset == length - 1
        start = time.perf_counter()
        failed = self.api.llama_decode(context, batch)
        self.api.llama_synchronize(context)
        seconds = time.perf_counter() - start
        self.api.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama.cpp fails to read {len(ids)} times {length} tokens: {failed}.")
        return seconds

    def run(
        self, prompt: list[list[int]], steps: list[list[int]], logits: str, exact: bool = False
    ) -> dict[str, Any]:
        """Read prompts (B, S), then steps of a token each (N, B): seconds, and how far the process grows.

        The last token's logits (B, vocabulary), float32, go to the file `logits`. With `exact` all is in
        float32, and the logits are those of all tokens of the prompts (B * S, vocabulary).
        """
        context = self.context(len(prompt), len(prompt[0]) + len(steps), exact)
        self.api.llama_memory_clear(self.api.llama_get_memory(context), True)
        before = resident(peak=False, forget=True)
        read = self.decode(context, prompt, 0, exact)
        position = len(prompt[0])
        times = [
            self.decode(context, [[token] for token in step], position + n, False)
            for n, step in enumerate(steps)
        ]
        rows = len(prompt) * (position if exact else 1)
        np.save(logits, np.ctypeslib.as_array(self.api.llama_get_logits(context), (rows, self.vocabulary)))
        return {"prompt": read, "steps": times, "megabytes": resident(peak=True) - before}


def serve(path: str, threads: int) -> None:
    """Answer calls of `Server.run`, a line of JSON each, with a line of JSON."""
    server = Server(path, threads)
    version = server.api.__version__
    print(json.dumps({"version": version}), flush=True)
    for line in sys.stdin:
        print(json.dumps(server.run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        serve(sys.argv[2], int(sys.argv[3]))
