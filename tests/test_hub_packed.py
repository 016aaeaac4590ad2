"""A repository in few bits is pushed to the Hub and loaded from it in part: the server counts the bytes."""

import json

import pytest
from conftest import tiny_model
from hub_server import HubServer
from transformers_emo import EmoForCausalLM, PackedConfig
from transformers_emo.checkpoints import Checkpoint, wanted_ranges
from transformers_emo.quantization.packed_files import PackedCheckpoint
from transformers_emo.subsets.loading.wanted_tensors import lazy_parameters

KEPT = [[0, 9, 40, 63], [1, 30, 31, 63], [5, 6, 50, 63]]
CODE = """
import hashlib, json, sys
from transformers import AutoModelForCausalLM
from transformers_emo import EmoForCausalLM, PackedConfig

def facts(model):
    parts = {}
    for name, tensor in model.state_dict().items():
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else [None]
        for part in names:
            plain = tensor if part is None else getattr(tensor, part)
            parts[f"{name} {part}"] = hashlib.sha256(plain.numpy().tobytes()).hexdigest()
    return parts
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    tiny_model(
        hidden_size=32, intermediate_size=128, num_experts=64, num_experts_per_tok=4, vocab_size=256
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("packing", [PackedConfig(4, 16, symmetric=False), PackedConfig(8)])
def test_a_part_of_what_was_pushed_is_loaded_by_its_bytes(folder, tmp_path, packing):
    settings = (packing.bits, packing.group_size, packing.symmetric)
    model = EmoForCausalLM.from_pretrained(folder, quantization_config=packing)
    model.save_pretrained(tmp_path)
    checkpoint = PackedCheckpoint(Checkpoint.from_folder(tmp_path), packing)
    ranges = wanted_ranges(lazy_parameters(checkpoint, model.config, KEPT).values())
    needed = sum(end - start for parts in ranges.values() for start, end in parts)
    header = 8 + int.from_bytes((tmp_path / "model.safetensors").open("rb").read(8), "little")
    with HubServer() as hub:
        hub.run(
            f"{CODE}\nmodel = EmoForCausalLM.from_pretrained({str(folder)!r}, "
            f"quantization_config=PackedConfig(*{settings}))\nmodel.push_to_hub('user/packed')"
        )
        before = hub.bytes_served("user/packed/model.safetensors")
        print_facts = "print(json.dumps(facts(AutoModelForCausalLM.from_pretrained({!r}, expert_subset={}))))"
        found = json.loads(hub.run(CODE + print_facts.format("user/packed", KEPT)).splitlines()[-1])
        served = hub.bytes_served("user/packed/model.safetensors") - before
        expected = json.loads(hub.run(CODE + print_facts.format(str(tmp_path), KEPT)).splitlines()[-1])
        whole = hub.run(CODE + "print(len(facts(EmoForCausalLM.from_pretrained('user/packed'))))")
    assert found == expected and int(whole) == len(found)
    assert needed * 0.99 < served <= 1.1 * (needed + header)
    assert served < 0.4 * (tmp_path / "model.safetensors").stat().st_size
