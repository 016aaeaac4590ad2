"""What goes to the Hub beside models: adapters, subsets, documents and folders, also in two attempts."""

import json
import signal
import time
from collections import Counter

import pytest
from conftest import TOY, tiny_model
from hub_server import HubServer
from tolerances import assert_same_numbers
from transformers_emo import cli

ADAPTERS = """
import hashlib, json
import torch
from peft import PeftModel, get_peft_model
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM
import transformers_emo
from transformers_emo import SubsetError
from transformers_emo.subsets import push_folder
from transformers_emo.training import load_adapter, lora_config

INPUT = torch.tensor([[5, 6, 7, 8]])
KEPT, OTHER = [[0, 3, 5, 11]] * 3, [[0, 3, 6, 11]] * 3

def base(subset):
    return AutoModelForCausalLM.from_pretrained("user/model", expert_subset=subset)

def digest(model):
    return hashlib.sha256(model.eval()(INPUT).logits.detach().numpy().tobytes()).hexdigest()

model = base(KEPT)
before = digest(model)
config = lora_config(model, r=2, target_parameters=["mlp.experts.down_proj", "mlp.gate.weight"])
adapted = get_peft_model(model, config)
optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=10.0)
for _ in range(2):
    optimiser.zero_grad()
    adapted(INPUT, labels=INPUT).loss.backward()
    optimiser.step()
adapted.push_to_hub("user/adapter")
adapted.save_pretrained("adapter")
push_folder("adapter", "user/adapter-folder")
out = {"trained": digest(adapted), "before": before}
out["pulled by PEFT"] = digest(PeftModel.from_pretrained(base(KEPT), "user/adapter"))
out["pulled"] = digest(load_adapter(base(KEPT), "user/adapter"))
plain = base(KEPT)
plain.load_adapter("user/adapter-folder")
out["pulled by Transformers"] = digest(plain)
full = load_adapter(base(None), "user/adapter")
with full.get_base_model().use_experts(KEPT):
    out["on the full model"] = full.eval()(INPUT).logits.flatten().tolist()
out["logits"] = adapted.eval()(INPUT).logits.flatten().tolist()
for name, load in {
    "refused": lambda: load_adapter(base(OTHER), "user/adapter"),
    "refused by Transformers": lambda: base(OTHER).load_adapter("user/adapter"),
}.items():
    try:
        load()
    except SubsetError as error:
        out[name] = str(error)
card = ModelCard.load("user/adapter-folder")
out["card"] = [card.data.to_dict(), card.text]
print(json.dumps(out))
"""

DOCUMENTS = """
import json
from datasets import Dataset, load_dataset
from huggingface_hub import HfApi
from transformers_emo.cli import main

rows = [{"text": "import os"}, {"text": "def f(): é"}]
Dataset.from_list(rows).push_to_hub("user/docs", private=True)
out = {"pulled": load_dataset("user/docs", split="train").to_list() == rows}
assert main(["push", "documents", "user/domains"]) == 0
out["all"] = sorted(row["text"] for row in load_dataset("user/domains", split="train"))
out["python"] = load_dataset("user/domains", "python", split="train")["text"][:]
out["streamed"] = [row["text"] for row in load_dataset("user/domains", "coq", split="train", streaming=True)]
print(json.dumps(out))
"""

PARTS = """
import json, logging
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
import transformers_emo

said = []
logging.getLogger("transformers_emo.subsets.loading.tokenizer_copy").warning_once = said.append
KEPT = [[0, 1, 2, 31]] * 4
def part(**options):
    return AutoModelForCausalLM.from_pretrained("user/model", expert_subset=KEPT, **options)

model = part()
model.push_to_hub("user/part")
model.push_to_hub("user/branch", revision="new")
model.save_pretrained("saved", push_to_hub=True, repo_id="user/saved")
AutoModelForCausalLM.from_pretrained("user/model").push_to_hub("user/whole")
tokenizer = AutoTokenizer.from_pretrained("user/model")
tokenizer.add_tokens(["<mine>"])
for repo in ("mine", "mine-saved", "mine-branch"):
    tokenizer.push_to_hub("user/" + repo)
model.push_to_hub("user/mine")
model.push_to_hub("user/mine-branch", revision="new")
model.save_pretrained("saved-again", push_to_hub=True, repo_id="user/mine-saved")
api = HfApi()
out = {"files": {name: api.list_repo_files("user/" + name) for name in ("part", "saved", "whole")}}
out["files"]["branch"] = api.list_repo_files("user/branch", revision="new")
names = ("model", "part", "mine", "mine-saved")
out["size"] = [len(AutoTokenizer.from_pretrained("user/" + name)) for name in names]
out["size"].append(len(AutoTokenizer.from_pretrained("user/mine-branch", revision="new")))
out["written"] = pipeline("text-generation", "user/part")("import")[0]["generated_text"]
offline = part(local_files_only=True)
offline.save_pretrained("offline")
out["offline"] = len(AutoTokenizer.from_pretrained("offline"))
assert not said, said
part(cache_dir="another-cache")
part(cache_dir="another-cache", local_files_only=True).save_pretrained("without")
out["said"] = said
out["still saved"] = AutoModelForCausalLM.from_pretrained("without").config.num_experts
print(json.dumps(out))
"""

PUSH = """
from huggingface_hub import HfApi
from transformers_emo.cli import main
assert main(["push", {folder!r}, "user/large", *{more}]) == 0
"""


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def run(hub, code, **env):
    return json.loads(hub.run(code, **env).splitlines()[-1])


def files_of(hub, repo):
    found = hub.repos[repo]
    return found.commits[found.branches["main"]].files


def text_of(hub, repo, file):
    return hub.blob(files_of(hub, repo)[file].sha256).read_text()


def test_an_adapter_of_a_subset_comes_back_and_knows_its_experts(hub, make_checkpoint):
    pytest.importorskip("peft")
    hub.commit("user/model", make_checkpoint())
    out = run(hub, ADAPTERS)
    assert out["trained"] != out["before"]
    assert out["pulled by PEFT"] == out["pulled"] == out["pulled by Transformers"] == out["trained"]
    assert_same_numbers(out["on the full model"], out["logits"])
    for refused in ("refused", "refused by Transformers"):
        assert out[refused].startswith("The adapter was trained on the experts [0, 3, 5, 11] in layer 0")
    assert json.loads(text_of(hub, "user/adapter", "expert_subset.json"))["experts"] == [[0, 3, 5, 11]] * 3
    assert set(files_of(hub, "user/adapter")) >= {"adapter_config.json", "adapter_model.safetensors"}
    data, text = out["card"]  # the other card is written by Transformers, which knows nothing of the adapter
    assert {"emo", "mixture-of-experts", "expert-subset"} <= set(data["tags"])
    assert (data["base_model"], data["library_name"]) == ("user/model", "peft")
    assert "Trained on 4 of the 12 experts" in text and "load_adapter" in text


def test_a_part_is_pushed_with_its_tokenizer_unless_there_is_one(hub):
    hub.commit("user/model", TOY)
    out = run(hub, PARTS)
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    for pushed in ("part", "branch", "saved"):
        assert tokenizer < set(out["files"][pushed])
    assert not tokenizer & set(out["files"]["whole"])
    size = out["size"][0]
    assert out["size"] == [size, size, size + 1, size + 1, size + 1]
    assert out["written"].startswith("import")
    assert out["offline"] == size
    (said,) = out["said"]
    assert "user/model" in said and "cache" in said and "tokenizer.save_pretrained" in said
    assert out["still saved"] == 4


def test_documents_come_back_by_domain(hub):
    pytest.importorskip("datasets")
    folder = hub.root / "work" / "documents"
    folder.mkdir()
    (folder / "python.jsonl").write_text(json.dumps({"text": "import os"}) + "\n")
    (folder / "coq.jsonl").write_text('{"text": "Lemma a."}\n{"text": "Qed."}\n')
    out = run(hub, DOCUMENTS)
    assert out["pulled"]
    assert out["all"] == ["Lemma a.", "Qed.", "import os"]
    assert (out["python"], out["streamed"]) == (["import os"], ["Lemma a.", "Qed."])


def test_a_library_of_subsets_gets_a_card_where_there_is_none(hub):
    hub.commit("user/model", {"README.md": b"# Mine"})
    hub.run("""
from transformers_emo import ExpertSubset
subset = ExpertSubset([[0, 31]], source="user/model")
for name in ("math", "code"):
    subset.push_to_hub("user/library", name)
    subset.push_to_hub("user/model", name)
""")
    assert {"README.md", "subsets/math.json", "subsets/code.json"} == set(files_of(hub, "user/library"))
    card = text_of(hub, "user/library", "README.md")
    assert "base_model: user/model" in card and "expert-subset" in card and "subsets/math.json" in card
    assert text_of(hub, "user/model", "README.md") == "# Mine"


def test_a_branch_is_made_for_a_subset_as_for_a_folder(hub):
    hub.commit("user/model", {"README.md": b"# Mine"})
    hub.commit("user/model", {"note.txt": b"-"}, branch="refs/pr/1")
    hub.run("""
from transformers_emo import ExpertSubset
for branch in ("dev", "refs/pr/1"):
    ExpertSubset([[0, 31]]).push_to_hub("user/model", "math", revision=branch)
    ExpertSubset([[0, 31]]).push_to_hub("user/new", "math", revision="dev")
""")
    branches = hub.repos["user/model"].branches
    assert {"main", "dev", "refs/pr/1"} == set(branches)
    assert "subsets/math.json" not in files_of(hub, "user/model")
    for branch in ("dev", "refs/pr/1"):
        assert "subsets/math.json" in hub.repos["user/model"].commits[branches[branch]].files
    # The Hub makes no branch of this name: it comes with the pull request.
    made = [request.path for request in hub.requests if "/branch/" in request.path]
    assert made and not any("refs/pr" in path for path in made)


def test_a_push_that_is_killed_goes_on_and_sends_nothing_twice(hub, tmp_path):
    folder = tmp_path / "model"
    tiny_model(num_hidden_layers=6).save_pretrained(folder, max_shard_size="60KB")
    (folder / ".partial").write_text("not to be pushed")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) >= 6
    hub.inject("/lfs/*", delay=0.1, times=None)

    def sent():
        return Counter(r.path for r in list(hub.requests) if r.path.startswith("/lfs/") and r.status == 200)

    def kill(process):
        while process.poll() is None:
            if len(sent()) >= 2:
                process.send_signal(signal.SIGKILL)
                return
            time.sleep(0.002)

    code = PUSH.format(folder=str(folder), more=["--private"])
    with pytest.raises(RuntimeError, match="-9"):
        hub.run(code, meanwhile=kill)
    before = sent()
    assert 2 <= len(before) < len(shards)
    hub.run(code)
    again = [path for path, times in sent().items() if times > 1]
    assert not set(again) & set(before)
    assert len(sent()) == len(shards)
    files = files_of(hub, "user/large")
    assert ".partial" not in files and hub.repos["user/large"].private
    for name in shards:
        assert hub.blob(files[name].sha256).read_bytes() == (folder / name).read_bytes()
    card = text_of(hub, "user/large", "README.md")
    assert "- mixture-of-experts" in card and 'from_pretrained("user/large")' in card


def test_secrets_and_the_state_of_a_trainer_stay_behind(hub, make_checkpoint, tmp_path):
    folder = make_checkpoint()
    stay = [".env", "eval/.env", "eval/.git/config", "optimizer.pt", "rng_state_0.pth", "training_args.bin"]
    stay += ["checkpoint-5/optimizer.pt", "checkpoint-5/model.safetensors", "eval/training_args.bin"]
    go = ["eval/notes.txt", "subsets/math.json", "checkpoint-notes.md"]
    for name in stay + go:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (tmp_path / "licence").write_text("MIT")
    (folder / "LICENSE").symlink_to(tmp_path / "licence")  # as in the Hub's cache
    (folder / "again").symlink_to(folder)
    hub.run(PUSH.format(folder=str(folder), more=[]))
    model = {"config.json", "generation_config.json", "model.safetensors", "README.md", "LICENSE"}
    assert set(files_of(hub, "user/large")) - {".gitattributes"} == model | set(go)
    assert text_of(hub, "user/large", "LICENSE") == "MIT"


def test_what_would_get_a_false_card_is_not_pushed(make_checkpoint, tmp_path, capsys, edit_json):
    other, documents = make_checkpoint(), tmp_path / "documents"
    edit_json(other / "config.json", model_type="mixtral")
    documents.mkdir()
    (documents / "default.jsonl").write_text('{"text": "a"}\n')
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / ".draft.jsonl").write_text('{"text": "a"}\n')
    pattern = tmp_path / "pattern"
    pattern.mkdir()
    (pattern / "page[1].jsonl").write_text('{"text": "a"}\n')
    cases = {
        other: "of type 'mixtral'",
        documents: "rename default.jsonl",
        hidden: "nothing to push",
        pattern: "'page[1].jsonl' in",
    }
    for folder, message in cases.items():
        assert cli.main(["push", str(folder), "user/large"]) == 1
        assert message in capsys.readouterr().err


def test_a_folder_with_damaged_weights_or_with_nothing_is_not_pushed(make_checkpoint, tmp_path, capsys):
    folder = make_checkpoint()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    for broken, message in ((folder, "it is cut short"), (tmp_path, "nothing to push")):
        assert cli.main(["push", str(broken), "user/large"]) == 1  # offline: an attempt would say so
        assert message in capsys.readouterr().err
