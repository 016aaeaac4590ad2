"""Upgrading and cutting a repository of the Hub: which commit, whose token, into which cache."""

import json

import pytest
from hub_server import HubServer
from transformers_emo import EmoConfig, cli


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def test_a_commit_of_a_private_subfolder_is_converted_and_named(hub, make_checkpoint, tmp_path):
    folder = make_checkpoint(shards=True)
    (folder / "merges.txt").write_text("a b")
    (folder / "LICENSE").write_text("Apache 2.0")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    files = {f"inner/{path.name}": path for path in folder.iterdir()}
    commit = hub.commit("user/old", files | {"model.safetensors": b"not this one"}, private=True)
    hub.commit("user/old", {"inner/config.json": b"{}"})  # main goes on
    code = f"""
from transformers_emo.conversion import shard_experts, upgrade_checkpoint
where = dict(revision={commit!r}, subfolder="inner", cache_dir={str(tmp_path / "cache")!r}, progress=False)
try:
    upgrade_checkpoint("user/old", {str(tmp_path / "refused")!r}, **where)
except OSError as error:
    print(error)
upgrade_checkpoint("user/old", {str(tmp_path / "new")!r}, **where, token={hub.token!r})
shard_experts("user/old", {str(tmp_path / "cut")!r}, **where, local_files_only=True)
"""
    refused = hub.run(code, HF_TOKEN=None)
    assert "There is no folder 'user/old'" in refused and "authenticated" in refused
    assert not (tmp_path / "refused").exists() and not (hub.root / "hf_home" / "hub").exists()
    said = json.loads((tmp_path / "new" / "conversion.json").read_text())
    assert (said["model"], said["revision"]) == ("user/old", commit)
    for out in (tmp_path / "new", tmp_path / "cut"):
        assert EmoConfig.from_pretrained(out).num_experts == 12
        assert (out / "merges.txt").read_text() == "a b" and (out / "LICENSE").exists()
        assert not (out / "pytorch_model.bin").exists()
    assert not any("pytorch_model.bin" in (request.file or "") for request in hub.requests)


@pytest.mark.parametrize("command", [["convert", "upgrade"], ["shard"]])
def test_the_commands_take_a_revision_a_token_and_a_cache(command, hub, make_checkpoint, tmp_path):
    commit = hub.commit("user/old", make_checkpoint(), private=True)
    hub.commit("user/old", {"config.json": b"{}"})
    words = [*command, "user/old", str(tmp_path / "out"), "--revision", commit]
    words += ["--token", hub.token, "--cache-dir", str(tmp_path / "cache")]
    hub.run(f"from transformers_emo import cli\nassert cli.main({words!r}) == 0", HF_TOKEN=None)
    assert EmoConfig.from_pretrained(tmp_path / "out").num_experts == 12
    assert [path.name for path in (tmp_path / "cache").glob("models--*")] == ["models--user--old"]


@pytest.mark.parametrize("command", [["convert", "upgrade"], ["shard"]])
def test_a_folder_that_is_not_there_is_said_to_be_none(command, tmp_path, capsys):
    assert cli.main([*command, str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    assert "none' (seen from " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
