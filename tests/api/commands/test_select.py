"""The command `emo select`: what it offers is what `select_experts` does."""

import json

import pytest
from conftest import TOY
from hub_server import HubServer
from transformers import AutoTokenizer
from transformers_emo import EmoForCausalLM, ExpertSubset, cli, select_experts


def test_select_writes_subsets_from_a_file_of_texts(tmp_path, capsys):
    data = "model_cards/toy-emo/documents/c.jsonl"
    words = ["select", "model_cards/toy-emo", str(tmp_path / "c-{}.json"), "--data", data, "--max-texts", "2"]
    assert cli.main([*words, "--experts", "4", "8", "--method", "global"]) == 0
    small, large = (ExpertSubset.load(tmp_path / f"c-{size}.json") for size in (4, 8))
    expected = select_experts(
        "model_cards/toy-emo", dataset=data, max_texts=2, num_experts=8, method="global"
    )
    assert large == expected and small.experts == expected.top(4).experts
    assert f"c-8.json: 8 experts a layer, from {expected.num_tokens} tokens" in capsys.readouterr().out


def test_select_says_before_it_begins_that_it_cannot_write(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "c.json"):
        assert cli.main(["select", "no-such-model", str(out), "--text", "a"]) == 1
        assert f"Cannot write '{out}'" in capsys.readouterr().err


def test_select_refuses_one_file_for_two_subsets_before_it_begins(tmp_path, capsys):
    words = ["select", "no-such-model", str(tmp_path / "c.json"), "--text", "a", "--experts", "4", "8"]
    assert cli.main(words) == 1
    assert "put {} in its name" in capsys.readouterr().err and not list(tmp_path.iterdir())


CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
)
QUESTIONS = [
    {"q": "One and one is", "a": " two."},
    {"q": "import os", "a": "\n\ndef main():"},
    {"q": "Theorem plus_comm", "a": " : forall n m"},
]


@pytest.fixture
def files(tmp_path):
    """JSONL files of texts and chats, and a dataset of two splits."""
    chats = [
        [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]
        for row in QUESTIONS
    ]
    (tmp_path / "qa.jsonl").write_text("\n".join(json.dumps(row) for row in QUESTIONS))
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "train.jsonl").write_text(json.dumps(QUESTIONS[0]))
    (tmp_path / "dataset" / "test.jsonl").write_text("\n".join(json.dumps(row) for row in QUESTIONS[1:]))
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("--text one --text two --answer 1 --answer 2 --tokens answer", "answers"),
        ("--data qa.jsonl --column q --answer-column a --tokens prompt --weight-by text", "columns"),
        ("--data chats.jsonl --column messages --tokens answer --tokenizer tokenizer", "chats"),
        ("--dataset dataset --split test --column q --max-texts 1", "dataset"),
        ("--text one --method global --budget mass --exclude 0:1,2 --exclude 0:2,3", "budget"),
        ("--text one --exclude not.json --batch-size 1 --max-length 2 --hidden-memory 1KB", "running"),
        ("--data qa.jsonl --column q --settle 0.1 --method reap --dtype bfloat16 --device cpu", "settle"),
        ("--method random --seed 3 --exclude 3:5", "random"),
    ],
)
def test_options_are_those_of_select_experts(files, monkeypatch, capsys, words, arguments):
    monkeypatch.chdir(files)
    ExpertSubset([[0, 1, 31]] * 4).save("not.json")
    rows = [QUESTIONS[0]["q"], QUESTIONS[1]["q"], QUESTIONS[2]["q"]]
    expected = {
        "answers": {"texts": ["one", "two"], "answers": ["1", "2"], "tokens": "answer"},
        "columns": {
            "texts": rows,
            "answers": [row["a"] for row in QUESTIONS],
            "tokens": "prompt",
            "weight_by": "text",
        },
        "chats": {
            "dataset": "chats.jsonl",
            "column": "messages",
            "tokens": "answer",
            "tokenizer": AutoTokenizer.from_pretrained("tokenizer"),
        },
        "dataset": {"texts": rows[1:2]},
        "budget": {
            "texts": "one",
            "method": "global",
            "budget": "mass",
            "exclude_experts": {0: [1, 2, 3]},
        },
        "running": {"texts": "one", "exclude_experts": "not.json", "max_length": 2},
        "settle": {"texts": rows, "stop_when_settled": 0.1, "method": "reap", "dtype": "bfloat16"},
        "random": {"method": "random", "seed": 3, "exclude_experts": {3: [5]}},
    }[arguments]
    assert cli.main(["select", str(TOY), "out.json", "--experts", "8", *words.split()]) == 0
    chosen = ExpertSubset.load("out.json")
    assert chosen == select_experts(TOY, num_experts=8, progress=False, **expected)
    plain = {name: value for name, value in expected.items() if name in ("texts", "dataset", "column")}
    if plain and arguments not in ("dataset", "chats"):  # the options say something
        assert chosen != select_experts(TOY, num_experts=8, progress=False, **plain)
    printed = capsys.readouterr().out
    if arguments == "random":
        assert "8 experts a layer, at random" in printed
    else:
        assert f"from {chosen.num_tokens} tokens of {chosen.num_texts} texts" in printed


def test_sizes_that_differ_by_layer_are_told(files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    model = EmoForCausalLM.from_pretrained(TOY)
    model.model.layers[0].mlp.gate.weight.data.mul_(30)  # one expert takes all
    model.save_pretrained("model")
    words = ["select", "model", "out.json", "--text", "import os", "--tokenizer", str(TOY), "--experts", "10"]
    assert cli.main([*words, "--method", "global", "--budget", "mass"]) == 0
    sizes = [len(ids) for ids in ExpertSubset.load("out.json").experts]
    assert min(sizes) < max(sizes)
    assert f"out.json: {min(sizes)} to {max(sizes)} experts a layer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "Give one of --text, --data and --dataset, or --usage: there is no text"),
        ("--text a --data b", "there is --text and --data"),
        ("--text a --column b", "--column goes with --data or --dataset, not --text"),
        ("--data a --answer b", "--answer goes with --text, not --data"),
        ("--data a --split b", "--split goes with --dataset, not --data"),
        ("--text a --answer b --answer c", "`answers` has 2 entries for 1 texts"),
        ("--text a --seed 1", "--seed is of --method random"),
        ("--text a --method random", "--text has no part in a choice at random"),
        ("--settle 0.9 --method random", "--settle has no part"),
        ("--text a --method best", "Unknown method 'best', expected one of layerwise"),
        ("--text a --tokens some", "Unknown tokens 'some', expected one of all"),
        ("--text a --weight-by word", "Unknown weight_by 'word', expected one of token"),
        ("--text a --budget most", "Unknown budget 'most', expected one of uniform"),
        ("--text a --budget mass", "needs scores of all layers at once"),
        ("--text a --exclude 1:2 --exclude 3", "--exclude '3': expected LAYER:ID,ID"),
        ("--text a --exclude 3:400", "Layer 3 has no expert 400"),
        ("--text a --exclude 3:31", "Expert 31 of layer 3 cannot be excluded"),
        ("--text a --exclude 9:1", "There is no layer 9"),
        ("--text a --exclude maths", "There is no expert subset 'maths'"),
        ("--text a --hidden-memory 4XB", "--hidden-memory is '4XB', expected bytes, or a string"),
        ("--text a --batch-size 0", "`batch_size` is 0, expected an integer from 1"),
        ("--text a --max-length -1", "`max_length` is -1, expected an integer from 1"),
        ("--text a --max-texts 0", "`max_texts` is 0, expected an integer from 1"),
        ("--text a --dtype float31", "Unknown dtype 'float31'"),
        ("--text a --device gpu", "Cannot run on the device 'gpu'"),
        ("--text a --settle 0", "`stop_when_settled` is 0"),
        ("--data qa.jsonl --column b", "lacks the column 'b'"),
        ("--data chats.jsonl --column messages", "no chat template"),
        ("--dataset dataset --split dev --column q", "dev"),
        ("--dataset nowhere", "nowhere"),
        ("--text a --experts 33", "Cannot keep 33 experts"),
        ("--text a --tokenizer nowhere/there", "nowhere/there"),
    ],
)
def test_what_does_not_go_together_is_one_line(files, monkeypatch, capsys, words, message):
    monkeypatch.chdir(files)
    assert cli.main(["select", str(TOY), "out.json", *words.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("emo select: ") and message in error and error.count("\n") == 1
    assert not (files / "out.json").exists()


def test_help_says_every_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["select", "--help"]) == 0
    said = capsys.readouterr().out
    for default in ("16", "layerwise", "uniform"):
        assert f"[default: {default}]" in said, default
    for default in ("8", "4GB", "train", "text", "all", "token", "main", "cpu", "0"):
        assert f"[default: ({default})]" in said, default


FROM_THE_HUB = """
from transformers_emo import cli
words = ["select", "user/emo", "out.json", "--experts", "4", "--text", "a"]
print(cli.main([*words, "--revision", "old", "--token", TOKEN]), cli.main([*words, "--token", "wrong"]))
"""


def test_revision_and_token_are_for_the_hub(tmp_path):
    """A private repository, whose token is given and nowhere else to be found."""
    with HubServer() as hub:
        hub.commit("user/emo", TOY, private=True)
        commit = hub.commit("user/emo", {"README.md": b"old"}, branch="old", private=True)
        code = FROM_THE_HUB.replace("TOKEN", repr(hub.token))
        assert hub.run(code, HF_TOKEN=None).strip().splitlines()[-1] == "0 1"
        assert ExpertSubset.load(hub.root / "work" / "out.json").revision == commit
