"""A model goes to the Hub and comes back, with this package and without it."""

import json
from pathlib import Path

import pytest
from hub_server import HubServer
from tolerances import assert_same_numbers, assert_same_scores

TOY = Path(__file__).parents[1] / "model_cards" / "toy-emo"

# Run before each snippet: what makes two models the same, and a prompt for them.
PREAMBLE = """
import hashlib, json
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

PROMPT = torch.tensor([[5, 6, 7, 8]])

def digest(tensor):
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()

def facts(model):
    model.set_experts_implementation("grouped_mm")  # the package has one of its own, which rounds otherwise
    config = model.config.to_dict()
    return {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "tensors": {name: [list(t.shape), digest(t)] for name, t in model.state_dict().items()},
        "config": {k: v for k, v in config.items() if k not in ("_name_or_path", "auto_map")},
        "logits": model.eval()(PROMPT).logits.flatten().tolist(),
    }
"""

PUSH = """
import sys
from huggingface_hub import HfApi
from transformers_emo import EmoConfig, EmoForCausalLM

torch.manual_seed(0)
config = EmoConfig(
    vocab_size=4096, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    num_experts=4, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=None, eos_token_id=0,
)
model = EmoForCausalLM(config)
out = {}

first = model.push_to_hub("user/emo-test")
out["first"] = {"commit": first.oid, **facts(model)}
tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
tokenizer.push_to_hub("user/emo-test")
out["ids"] = tokenizer("Experts group by topic: é, 日本")["input_ids"]

with torch.no_grad():
    model.lm_head.weight.mul_(2)
model.push_to_hub("user/emo-test")
out["second"] = facts(model)

model.push_to_hub("user/emo-private", private=True)
model.push_to_hub("user/emo-code", include_code=True)
model.save_pretrained("emo-code-saved", include_code=True, push_to_hub=True, repo_id="user/emo-code-saved")
out["same afterwards"] = facts(model) == out["second"] and "auto_map" not in model.config.to_dict()
api = HfApi()
repos = ("emo-test", "emo-code", "emo-code-saved")
out["files"] = {repo: api.list_repo_files(f"user/{repo}") for repo in repos}
print(json.dumps(out))
"""

PULL = """
import transformers_emo
from transformers_emo import select_experts

out = {"pulled": facts(AutoModelForCausalLM.from_pretrained("user/emo-test"))}
out["pinned"] = facts(AutoModelForCausalLM.from_pretrained("user/emo-test", revision=COMMIT))
out["private"] = facts(AutoModelForCausalLM.from_pretrained("user/emo-private"))
subset = AutoModelForCausalLM.from_pretrained("user/emo-test", expert_subset=[[0, 3], [1, 3]])
out["subset"] = facts(subset)
subset.push_to_hub("user/emo-subset")
out["subset pulled"] = facts(AutoModelForCausalLM.from_pretrained("user/emo-subset"))
out["ids"] = AutoTokenizer.from_pretrained("user/emo-test")("Experts group by topic: é, 日本")["input_ids"]
texts = ["Experts group by topic"]
chosen = select_experts("user/emo-test", texts, num_experts=3, progress=False)
tokenizer = AutoTokenizer.from_pretrained("user/emo-test")
pinned = select_experts(
    "user/emo-test", texts, 3, progress=False, revision=COMMIT, tokenizer=tokenizer
)
full = AutoModelForCausalLM.from_pretrained("user/emo-test")
expected = select_experts(full, texts, num_experts=3, progress=False)
out["choice"] = {
    "experts": [chosen.experts, expected.experts],
    "scores": [chosen.scores, expected.scores],
    "source": chosen.source,
    "revisions": [pinned.revision, chosen.revision],
}
print(json.dumps(out))
"""

PULL_PUBLIC = """
import transformers_emo

print(json.dumps(facts(AutoModelForCausalLM.from_pretrained("user/emo-test"))))
"""

PULL_ANONYMOUSLY = """
import transformers_emo

AutoModelForCausalLM.from_pretrained("user/emo-test")  # public: no token needed
try:
    AutoModelForCausalLM.from_pretrained("user/emo-private")
except OSError as error:
    print(error)
"""

PULL_WITHOUT_THE_PACKAGE = """
import importlib.abc, sys

class WithoutThePackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers_emo":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, WithoutThePackage())
try:
    import transformers_emo
except ModuleNotFoundError:
    out = {"package": False}

model = AutoModelForCausalLM.from_pretrained("user/emo-code", trust_remote_code=True)
out["pulled"] = facts(model)
second = AutoModelForCausalLM.from_pretrained("user/emo-code-saved", trust_remote_code=True)
out["second copy"] = facts(second)
out["generated"] = model.generate(PROMPT, max_new_tokens=4, do_sample=False).shape

model.save_pretrained("saved-again")
out["saved again"] = facts(AutoModelForCausalLM.from_pretrained("saved-again", trust_remote_code=True))
try:
    type(model).from_pretrained("saved-again", expert_subset=[[0, 3]] * 2)
except ImportError as error:
    out["subset"] = str(error)
try:
    model.generate(PROMPT, expert_subset=[[0, 3]] * 2)
except ImportError as error:
    out["mask"] = str(error)
model.save_pretrained("head-source")
auto_class = transformers.AutoModelForSequenceClassification
out["head"] = type(auto_class.from_pretrained("head-source", trust_remote_code=True)).__name__
out["ids"] = AutoTokenizer.from_pretrained("user/emo-test")("Experts group by topic: é, 日本")["input_ids"]
print(json.dumps(out))
"""


def run(hub, code, **env):
    return json.loads(hub.run(PREAMBLE + code, **env).splitlines()[-1])


@pytest.fixture(scope="module")
def pushed():
    """The Hub after everything was pushed to it, and what was pushed."""
    with HubServer() as hub:
        facts = run(hub, f"TOKENIZER = {str(TOY)!r}\n" + PUSH)
        yield hub, facts


@pytest.fixture(scope="module")
def pulled(pushed):
    """What came back in a fresh process."""
    hub, facts = pushed
    return run(hub, f"COMMIT = {facts['first']['commit']!r}\n" + PULL)


@pytest.fixture(scope="module")
def pulled_alone(pushed):
    """What came back in a process that cannot import this package."""
    hub, _ = pushed
    return run(hub, PULL_WITHOUT_THE_PACKAGE)


def same(pulled, pushed):
    """Bit for bit; what they compute lies elsewhere in memory, and may round otherwise."""
    assert_same_numbers(pulled["logits"], pushed["logits"])
    return all(pulled[name] == pushed[name] for name in ("class", "tensors", "config"))


def test_a_pushed_model_comes_back_bit_for_bit(pushed, pulled):
    _, facts = pushed
    assert same(pulled["pulled"], facts["second"])
    assert pulled["pulled"]["module"].startswith("transformers_emo.")


def test_a_pinned_revision_is_what_it_was(pushed, pulled):
    _, facts = pushed
    assert same(pulled["pinned"], facts["first"])
    assert facts["first"]["tensors"] != facts["second"]["tensors"]


def test_a_subset_is_taken_from_the_hub_and_stands_alone_there(pulled):
    assert pulled["subset"]["config"]["retained_experts"] == [[0, 3], [1, 3]]
    assert pulled["subset"]["tensors"]["model.layers.0.mlp.gate.weight"][0] == [2, 16]
    assert same(pulled["subset"], pulled["subset pulled"])


def test_experts_are_chosen_from_the_hub(pushed, pulled):
    _, facts = pushed
    choice = pulled["choice"]
    assert choice["experts"][0] == choice["experts"][1] and choice["source"] == "user/emo-test"
    assert_same_scores(*choice["scores"])
    assert choice["revisions"][0] == facts["first"]["commit"] != choice["revisions"][1]


def test_the_tokenizer_comes_back(pushed, pulled):
    _, facts = pushed
    assert pulled["ids"] == facts["ids"]


def test_a_private_model_comes_back_to_its_owner(pushed, pulled):
    _, facts = pushed
    assert same(pulled["private"], facts["second"])


def test_a_private_model_without_the_token_is_a_clear_error(pushed):
    hub, _ = pushed
    message = hub.run(PREAMBLE + PULL_ANONYMOUSLY, HF_TOKEN=None, HF_HOME=str(hub.root / "anonymous"))
    assert "user/emo-private" in message
    assert "private repository" in message
    assert "token" in message


def test_the_second_load_works_offline(pushed, pulled):
    hub, facts = pushed
    hub.forget()
    assert same(run(hub, PULL_PUBLIC, HF_HUB_OFFLINE="1"), facts["second"])
    assert hub.requests == []


def test_the_code_is_pushed_only_where_asked_for(pushed):
    _, facts = pushed
    code = {"configuration_emo.py", "modeling_emo.py", "losses.py", "pretrained.py", "weight_names.py"}
    assert code <= set(facts["files"]["emo-code"])
    assert code <= set(facts["files"]["emo-code-saved"])
    assert not any(name.endswith(".py") for name in facts["files"]["emo-test"])
    assert facts["same afterwards"]


def test_a_model_pushed_with_its_code_loads_without_the_package(pushed, pulled_alone):
    _, facts = pushed
    assert pulled_alone["package"] is False
    assert pulled_alone["pulled"]["module"].startswith("transformers_modules.")
    assert same(pulled_alone["pulled"], facts["second"])
    assert same(pulled_alone["second copy"], facts["second"])
    assert pulled_alone["generated"] == [1, 8]
    assert pulled_alone["ids"] == facts["ids"]


def test_without_the_package_saving_keeps_the_code(pushed, pulled_alone):
    _, facts = pushed
    assert same(pulled_alone["saved again"], facts["second"])


def test_without_the_package_a_subset_says_what_to_install(pulled_alone):
    assert "needs the package transformers-emo" in pulled_alone["subset"]
    assert "needs the package transformers-emo" in pulled_alone["mask"]


def test_without_the_package_heads_load_too(pulled_alone):
    assert pulled_alone["head"] == "EmoForSequenceClassification"
