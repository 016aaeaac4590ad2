"""lm_eval gives the numbers of `emo retention` on the same text: of the full model, a subset and pools."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY
from transformers import AutoTokenizer
from transformers_emo import EmoForCausalLM
from transformers_emo.analysis import document_losses, encode_documents

pytestmark = pytest.mark.tools
TINY = TOY.parent / "emo-tiny"
TASKS = Path(__file__).parent / "lm_eval_tasks"


@pytest.mark.parametrize(
    ("options", "loaded", "generated", "said"),
    [
        ([], {}, {}, None),
        (
            ["--expert-subset", "python"],
            {"expert_subset": "python"},
            {},
            "subset 'python' (16 of 64 a layer)",
        ),
        (["--document-pool", "8"], {}, {"document_pool": 8}, "in document pools of 8 routed experts"),
    ],
    ids=["full", "subset", "pools"],
)
def test_numbers_are_those_of_this_package(tmp_path, emo_run, documents, options, loaded, generated, said):
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    words = [
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={TINY},dtype=float32",
        "--device",
        "cpu",
    ]
    words += ["--tasks", "emo_documents,emo_continued", "--include_path", TASKS, "--log_samples"]
    # Padding is in lm_eval's own batches, without a mask for scoring: pools are chosen one row at a time.
    words += ["--output_path", "out", "--batch_size", "1" if generated else "4"]
    _, lines = emo_run(*options, "--", *words)
    assert len(lines) == (said is not None) and (said is None or said in lines[0])

    model = EmoForCausalLM.from_pretrained(TINY, dtype=torch.float32, **loaded)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = encode_documents(tokenizer, [document["text"] for document in documents], window=512)
    if generated:
        nats = torch.stack([_nats_in_pools(model, one, **generated) for one in ids])
    else:
        nats = document_losses(model, ids).loss_N
    logged = torch.tensor([-float(response[0][0]) for response in _responses(tmp_path, "emo_documents")])
    assert len(logged) == len(documents) >= 3
    torch.testing.assert_close(logged.double(), nats.double(), rtol=1e-4, atol=0)

    for document, response in zip(documents, _responses(tmp_path, "emo_continued"), strict=True):
        prompt = tokenizer(document["prompt"], return_tensors="pt")
        whole = model.generate(**prompt, max_new_tokens=12, do_sample=False, **generated)[0]
        assert response[0] == tokenizer.decode(
            whole[prompt["input_ids"].shape[1] :], skip_special_tokens=True
        )


def _nats_in_pools(model: EmoForCausalLM, ids_S: torch.Tensor, **pool) -> torch.Tensor:
    """What is read, all but the last token, is the document that chooses."""
    with torch.inference_mode():
        return F.cross_entropy(model(ids_S[None, :-1], **pool).logits[0], ids_S[1:], reduction="sum")


def _responses(folder: Path, task: str) -> list:
    (file,) = folder.glob(f"out/*/samples_{task}_*.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return [sample["resps"][0] for sample in samples]


def test_a_subset_that_is_not_there_is_told_before_the_tool_starts(emo_run):
    words = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={TINY}", "--tasks", "emo_documents"]
    output, said = emo_run("--expert-subset", "nope", "--", *words, status=1)
    assert output == "" and "There is no expert subset 'nope'" in said[0]
