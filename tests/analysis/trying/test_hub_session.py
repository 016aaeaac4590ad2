"""A session with a model of the Hub: its library, its experts and an exchange of them come from there."""

import json
import shutil

from conftest import TOY
from hub_server import HubServer
from transformers_emo.analysis.trying import Session

TRY = """
import json
from transformers_emo.analysis.trying import Session

session = Session.open("me/emo", domain="python")
switch = session.switch("german")
text = "".join(step.text for step in session.answer("Der Tag", max_new_tokens=6, temperature=0))
print(json.dumps([session.domains, switch.bytes_in, switch.num_in, text]))
"""


def test_a_model_of_the_hub_is_as_one_in_a_folder(tmp_path):
    folder = tmp_path / "emo"
    shutil.copytree(
        TOY.parent / "emo-tiny", folder, ignore=shutil.ignore_patterns("results", "documents", "*.png")
    )
    with HubServer() as hub:
        hub.commit("me/emo", folder)
        domains, bytes_in, num_in, text = json.loads(hub.run(TRY).splitlines()[-1])
    session = Session.open(folder, domain="python")
    switch = session.switch("german")
    assert (domains, bytes_in, num_in) == (session.domains, switch.bytes_in, switch.num_in)
    assert text == "".join(step.text for step in session.answer("Der Tag", max_new_tokens=6, temperature=0))
