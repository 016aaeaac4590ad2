"""Scores collected in parts: kills and numbers of processes change nothing of the choice."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import TOY
from transformers_emo import EmoForCausalLM, ExpertSubset, cli, select_experts
from transformers_emo.checkpoints.writing.folder_lock import locked_folder
from transformers_emo.subsets.choosing.calibration import CalibrationText
from transformers_emo.subsets.collecting import SelectionStatistics, collect_statistics, merged_subsets
from transformers_emo.subsets.collecting import collect as module

DOCUMENTS = TOY / "documents"
TEXTS = [
    json.loads(line)["text"]
    for name in ("c", "coq")
    for line in (DOCUMENTS / f"{name}.jsonl").read_text().splitlines()[:5]
]
SETTINGS = {"texts_per_part": 3, "progress": False}


def collect(out, texts=None, **changes):
    calibration = (
        texts if isinstance(texts, CalibrationText) else CalibrationText(texts or TEXTS, max_length=48)
    )
    return collect_statistics(TOY, calibration, out, **SETTINGS | changes)


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors"))}


@pytest.mark.parametrize("method", ["global", "easy_ep", "reap"])
class TestChoice:
    def test_of_one_part_is_that_of_select_experts(self, tmp_path, method):
        collect(tmp_path, method=method, texts_per_part=100)
        [found] = merged_subsets([tmp_path], [8])
        expected = select_experts(TOY, TEXTS, 8, method=method, max_length=48, progress=False)
        assert found == expected

    def test_of_parts_differs_by_rounding_alone(self, tmp_path, method):
        collect(tmp_path, method=method)
        [found] = merged_subsets([tmp_path], [8])
        expected = select_experts(TOY, TEXTS, 8, method=method, max_length=48, progress=False)
        assert (found.num_texts, found.num_tokens) == (expected.num_texts, expected.num_tokens)
        for ours, theirs in zip(found.scores, expected.scores, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)

    def test_is_the_same_for_any_number_of_processes(self, tmp_path, method):
        whole = collect(tmp_path / "one", method=method)
        for number in (2, 0, 1):
            collect(tmp_path / "shared", method=method, process=(number, 3))
            collect(tmp_path / str(number), method=method, process=(number, 3))
        assert files_of(tmp_path / "shared") == files_of(whole.folder)
        expected = merged_subsets([whole.folder], [4, 8])
        apart = [tmp_path / str(number) for number in (1, 2, 0)]
        assert merged_subsets([tmp_path / "shared"], [4, 8]) == expected == merged_subsets(apart, [4, 8])


def test_a_loaded_model_gives_the_same_files(tmp_path):
    collect(tmp_path / "folder")
    model = EmoForCausalLM.from_pretrained(TOY)
    collect_statistics(model, CalibrationText(TEXTS, max_length=48), tmp_path / "loaded", **SETTINGS)
    folder, loaded = (SelectionStatistics(tmp_path / name).read(1) for name in ("folder", "loaded"))
    assert folder.texts == loaded.texts
    for index, sums in folder.sums.items():
        assert sums.tolist() == pytest.approx(loaded.sums[index].tolist(), rel=1e-5)


def slowly(out, started):
    real = module.pass_full_model

    def pass_slowly(*args):
        real(*args)
        started.set()
        time.sleep(0.3)

    module.pass_full_model = pass_slowly
    torch.set_num_threads(1)
    collect(out, texts_per_part=1)


def test_a_killed_run_goes_on_and_comes_to_the_same_files(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    for _ in range(2):
        started = spawn.Event()
        process = spawn.Process(target=slowly, args=(tmp_path / "x", started))
        process.start()
        assert started.wait(60)
        time.sleep(0.4)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    before = files_of(tmp_path / "x")
    assert 0 < len(before) < len(TEXTS)
    with pytest.raises(ValueError, match="No process has read all texts"):
        merged_subsets([tmp_path / "x"], [8])
    times = {name: (tmp_path / "x" / name).stat().st_mtime_ns for name in before}
    collect(tmp_path / "x", texts_per_part=1)
    collect(tmp_path / "whole", texts_per_part=1)
    assert files_of(tmp_path / "x") == files_of(tmp_path / "whole")
    assert {name: (tmp_path / "x" / name).stat().st_mtime_ns for name in before} == times  # not done again


def test_text_is_read_piece_by_piece(tmp_path):
    read = []

    def rows():
        for number, text in enumerate(TEXTS):
            read.append(number)
            yield {"text": text}
            done = len(list(tmp_path.glob("part-*.safetensors")))
            assert done >= (number - 1) // 3  # a part is written before the one after it is read

    collect(tmp_path, CalibrationText(dataset=rows(), max_length=48))
    assert len(read) == len(TEXTS) and SelectionStatistics(tmp_path).missing() == []


def test_folders_of_different_texts_add_up_in_any_order(tmp_path):
    collect(tmp_path / "c", TEXTS[:5])
    collect(tmp_path / "coq", TEXTS[5:])
    forward, backward = (
        merged_subsets([tmp_path / name for name in names], [8]) for names in (("c", "coq"), ("coq", "c"))
    )
    assert forward == backward
    expected = select_experts(TOY, TEXTS, 8, method="global", max_length=48, progress=False)
    assert forward[0].num_tokens == expected.num_tokens and forward[0].experts == expected.experts


def test_ready_batches_answers_and_texts_without_tokens_are_taken(tmp_path):
    ids = [torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[11, 12, 13]])]
    masks = [torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.ones(1, 3)]
    ready = CalibrationText(input_ids=ids, attention_mask=masks)
    collect(tmp_path / "ids", ready, texts_per_part=1)
    [found] = merged_subsets([tmp_path / "ids"], [8])
    assert found == select_experts(
        TOY, input_ids=ids, attention_mask=masks, num_experts=8, method="global", progress=False
    )
    sums = CalibrationText(["1+1=", "", "1+2="], answers=["2", "", "3"], tokens="answer")
    collect(tmp_path / "answers", sums, texts_per_part=1)
    assert merged_subsets([tmp_path / "answers"], [8])[0].num_tokens == 2


def test_a_second_run_of_the_same_share_is_refused(tmp_path):
    with locked_folder(tmp_path / ".process-1-of-1"):
        with pytest.raises(BlockingIOError, match="Another run is writing"):
            collect(tmp_path)
        collect(tmp_path, process=(1, 2))  # another share is not in its way


class TestRefused:
    def test_what_cannot_be_collected(self, tmp_path):
        with pytest.raises(ValueError, match="'layerwise' chooses each layer by all texts"):
            collect(tmp_path, method="layerwise")
        with pytest.raises(ValueError, match="Scores by 'random' cannot be collected"):
            collect(tmp_path, method="random")
        with pytest.raises(ValueError, match="`texts_per_part` is 0"):
            collect(tmp_path, texts_per_part=0)
        with pytest.raises(ValueError, match=r"`process` is \(3, 3\)"):
            collect(tmp_path, process=(3, 3))
        with pytest.raises(ValueError, match="no calibration text"):
            collect(tmp_path, CalibrationText([]))

    def test_other_texts_settings_and_models_in_one_folder(self, tmp_path, make_checkpoint):
        collect(tmp_path)
        with pytest.raises(ValueError, match="method = 'global', and now it is 'reap'"):
            collect(tmp_path, method="reap")
        with pytest.raises(ValueError, match="Part 1 .* was made of other texts"):
            collect(tmp_path, [*TEXTS[:3], "other", *TEXTS[4:]])
        with pytest.raises(ValueError, match="read other texts"):
            collect(tmp_path, TEXTS[:9])
        folder = make_checkpoint(vocab_size=4096)
        ids = CalibrationText(input_ids=[torch.tensor([[5, 6]])], max_length=48)
        with pytest.raises(ValueError, match="holds scores with"):
            collect_statistics(folder, ids, tmp_path, **SETTINGS)

    def test_folders_that_do_not_go_together(self, tmp_path):
        for number in range(3):
            collect(tmp_path / str(number), process=(number, 3))
        with pytest.raises(ValueError, match="1 of 4 parts are missing .* such as part 2"):
            merged_subsets([tmp_path / "0", tmp_path / "1"], [8])
        with pytest.raises(ValueError, match="named twice"):
            merged_subsets([tmp_path / name for name in ("0", "1", "2", "1")], [8])
        collect(tmp_path / "whole")
        with pytest.raises(ValueError, match="Part 0 of the same texts is in .* would count twice"):
            merged_subsets([tmp_path / "whole", tmp_path / "0"], [8])
        collect(tmp_path / "finer", texts_per_part=2)
        with pytest.raises(ValueError, match="of the same texts, in 4 and 5 parts"):
            merged_subsets([tmp_path / "whole", tmp_path / "finer"], [8])
        collect(tmp_path / "reap", method="reap")
        with pytest.raises(ValueError, match="cannot be merged: the first has method = 'global'"):
            merged_subsets([tmp_path / "whole", tmp_path / "reap"], [8])
        with pytest.raises(ValueError, match="no scores"):
            merged_subsets([tmp_path / "nothing"], [8])
        with pytest.raises(ValueError, match="no folders"):
            merged_subsets([], [8])


class TestCommand:
    def test_collects_in_parts_and_writes_the_subset(self, tmp_path, capsys):
        data = tmp_path / "texts.jsonl"
        data.write_text("".join(json.dumps({"text": text[:120]}) + "\n" for text in TEXTS))
        words = ["select", str(TOY), str(tmp_path / "x-{}.json"), "--data", str(data), "--method", "global"]
        words += ["--experts", "4", "8", "--statistics", str(tmp_path / "s"), "--part", "3"]
        assert cli.main([*words, "--process", "2/2"]) == 0
        told = capsys.readouterr().out
        assert "2 of 4 parts are done" in told and not (tmp_path / "x-8.json").exists()
        assert cli.main([*words, "--process", "1/2"]) == 0
        assert "8 experts a layer, from" in capsys.readouterr().out
        assert ExpertSubset.load(tmp_path / "x-8.json") == merged_subsets([tmp_path / "s"], [8])[0]

    def test_merges_folders(self, tmp_path, capsys):
        for number in range(2):
            collect(tmp_path / str(number), process=(number, 2))
        words = ["select", str(TOY), str(tmp_path / "x.json"), "--experts", "8"]
        assert cli.main([*words, "--merge", str(tmp_path / "0"), str(tmp_path / "1"), "--json"]) == 0
        [told] = json.loads(capsys.readouterr().out)["subsets"]
        assert told["num_texts"] == len(TEXTS)
        assert ExpertSubset.load(tmp_path / "x.json").method == "global"

    def test_refuses_options_that_have_no_part(self, tmp_path, capsys):
        words = ["select", str(TOY), str(tmp_path / "x.json")]
        for more, error in (
            (["--merge", "a", "--text", "b"], "--text has no part in a choice by --merge"),
            (["--text", "b", "--part", "3"], "--part goes with --statistics"),
            (["--text", "b", "--statistics", str(tmp_path / "s")], "layerwise"),
            (
                ["--text", "b", "--statistics", str(tmp_path / "s"), "--method", "reap", "--settle", "0.9"],
                "--settle has no part in a choice by --statistics",
            ),
        ):
            assert cli.main([*words, *more]) == 1
            assert error in capsys.readouterr().err

    def test_scores_of_another_model_are_refused(self, tmp_path, capsys, make_checkpoint):
        collect(tmp_path / "s")
        words = ["select", str(TOY.parent / "emo-tiny"), str(tmp_path / "x.json"), "--experts", "8"]
        assert cli.main([*words, "--merge", str(tmp_path / "s")]) == 1
        assert "are not of the model" in capsys.readouterr().err
