"""GGUF files: what the `gguf` package and Transformers read in them."""

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, quants
from safetensors.torch import load_file
from tolerances import assert_same_numbers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers_emo import CheckpointError, EmoForCausalLM
from transformers_emo.conversion import export_model
from transformers_emo.conversion.engines.gguf_tokenizer import add_tokenizer

IDS = torch.tensor([[5, 9, 1, 40, 7, 88, 3, 60]])
EMO_TINY = "model_cards/emo-tiny"


def tensors_of(path):
    return {
        tensor.name: torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in GGUFReader(path).tensors
    }


def field(reader, name):
    return reader.fields[name].contents()


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16", "q8_0"])
def test_every_type_is_read_back(make_checkpoint, tmp_path, kind):
    folder = make_checkpoint(hidden_size=64, intermediate_size=32, num_attention_heads=4)
    notes = export_model(folder, tmp_path / "m", to="gguf", type=kind, verify=True, progress=False)
    assert notes["verified"] == "tensors"
    ours, theirs = load_file(folder / "model.safetensors"), tensors_of(tmp_path / "m" / "m.gguf")
    up = torch.stack([ours[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] for e in range(11)])
    limit = {"f32": 0, "bf16": 2**-8, "f16": 2**-10, "q8_0": 1 / 127}[kind] * up.abs().max()
    assert (theirs["blk.1.ffn_up_exps.weight"] - up).abs().max() <= limit
    router = ours["model.layers.1.mlp.gate.weight"][:11]
    assert torch.equal(theirs["blk.1.ffn_gate_inp.weight"], router)  # in float32, whatever the type


def test_transformers_computes_the_same_of_our_gguf(tmp_path):
    export_model(EMO_TINY, tmp_path / "coq", to="gguf", expert_subset="coq", type="f32", progress=False)
    config = AutoConfig.from_pretrained(tmp_path / "coq")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "coq", gguf_file="coq.gguf", config=config, dtype=torch.float32
    )
    ours = EmoForCausalLM.from_pretrained(EMO_TINY, expert_subset="coq", dtype=torch.float32)
    with torch.no_grad():
        assert_same_numbers(model.eval()(IDS).logits, ours.eval()(IDS).logits)


def test_the_header_says_what_the_model_is(tmp_path):
    export_model(EMO_TINY, tmp_path / "coq", to="gguf", expert_subset="coq", progress=False)
    reader = GGUFReader(tmp_path / "coq" / "coq.gguf")
    assert field(reader, "general.architecture") == "qwen2moe"
    assert field(reader, "general.license") == "apache-2.0"
    assert field(reader, "general.base_model.0.name") == "emo-tiny"
    assert field(reader, "qwen2moe.expert_count") == 15
    assert field(reader, "qwen2moe.expert_used_count") == 3
    assert field(reader, "tokenizer.ggml.pre") == "dbrx"
    assert field(reader, "tokenizer.ggml.add_bos_token") is False
    assert field(reader, "tokenizer.ggml.eos_token_id") == 0
    kept = json.loads(field(reader, "emo.config"))["retained_experts"]
    assert len(kept) == 4 and all(len(layer) == 16 for layer in kept)
    types = field(reader, "tokenizer.ggml.token_type")
    assert types[:3] == [3, 3, 1]  # end of text and padding are control tokens


def test_dense_layers_first_become_a_deepseek_whose_heads_are_interleaved(make_checkpoint, tmp_path):
    folder = make_checkpoint(num_experts_per_layer=[0, 12, 12], dense_intermediate_size=40)
    export_model(folder, tmp_path / "m", to="gguf", verify=True, progress=False)
    reader = GGUFReader(tmp_path / "m" / "m.gguf")
    assert field(reader, "general.architecture") == "deepseek"
    assert field(reader, "deepseek.leading_dense_block_count") == 1
    config = AutoConfig.from_pretrained(folder)
    query = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    head = config.hidden_size // config.num_attention_heads
    written = tensors_of(tmp_path / "m" / "m.gguf")["blk.0.attn_q.weight"]
    assert torch.equal(written[0], query[0]) and torch.equal(written[1], query[head // 2])


def test_without_a_shared_expert_one_of_zeros_is_written(make_checkpoint, tmp_path):
    export_model(
        make_checkpoint(num_shared_experts=0), tmp_path / "m", to="gguf", verify=True, progress=False
    )
    theirs = tensors_of(tmp_path / "m" / "m.gguf")
    assert not theirs["blk.0.ffn_down_shexp.weight"].any()
    assert theirs["blk.0.ffn_gate_inp_shexp.weight"].any()  # llama.cpp divides by its output


def test_a_model_without_a_tokenizer_says_so(make_checkpoint, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        export_model(make_checkpoint(), tmp_path / "m", to="gguf", progress=False)
    assert "no tokenizer" in caplog.text
    assert "tokenizer.ggml.tokens" not in GGUFReader(tmp_path / "m" / "m.gguf").fields


def test_tokens_beyond_the_tokenizer_are_unused(tmp_path, make_model):
    tokenizer = AutoTokenizer.from_pretrained(EMO_TINY)
    make_model(vocab_size=4100, eos_token_id=0, pad_token_id=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "m", to="gguf", progress=False)
    reader = GGUFReader(tmp_path / "m" / "m.gguf")
    assert field(reader, "tokenizer.ggml.tokens")[4096:] == [f"[PAD{i}]" for i in range(4096, 4100)]
    assert field(reader, "tokenizer.ggml.token_type")[4096:] == [5] * 4


class Writer:
    """Takes whatever is written."""

    def __getattr__(self, name):
        return lambda *args: None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"), "pattern"),
        (lambda t: t.update(normalizer={"type": "NFC"}), "NFC"),
        (lambda t: t["model"].update(byte_fallback=True), "byte_fallback"),
        (lambda t: t["model"].update(type="Unigram"), "Unigram"),
        (lambda t: t["added_tokens"][0].update(lstrip=True), "spaces"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tmp_path, change, reason):
    content = json.loads(Path(EMO_TINY, "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=reason):
        add_tokenizer(Writer(), tmp_path, 4096)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    content = json.loads(Path(EMO_TINY, "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="4000 rows"):
        add_tokenizer(Writer(), tmp_path, 4000)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="Cannot read"):
        add_tokenizer(Writer(), tmp_path, 4000)
