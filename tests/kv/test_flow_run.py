"""A transformer learns keys and values in the host's own executor, by its loaders, as the template is wired."""

from graphs import pocket
from graphs.shipped import check_pictures, nodes_of, pocket_form, provide_files
from kv.flow_graph import REPOSE
from make_workflows import NAMES

LEARNS = {"inner_steps": 3, "rank": 4, "guidance": 3.0, "learning_rate": 0.05}
SHOWS = {"mode": "recompute", "source_guidance": 1.0}


def test_a_transformer_learns_and_shows_it_headless(client, monkeypatch):
    """The small FLUX layout, which draws nothing to look at, by the loaders of such files."""
    monkeypatch.setattr(pocket, "OF_OTHER_KINDS", {})
    prompt = pocket_form(NAMES[REPOSE], short=True)
    (tuning,), (applied,), (text,) = (
        nodes_of(prompt, kind) for kind in ("PalimpsestTuneKV", "PalimpsestApplyKV", "CLIPLoader")
    )
    tuning |= LEARNS
    applied |= SHOWS
    text["type"] = "stable_diffusion"  # of the stand-in's text encoder
    provide_files(client, prompt)
    entry = client.queue(prompt)
    said = [line for output in entry["outputs"].values() for line in output.get("text", ())]
    assert any("rebuilt at guidance 3" in line for line in said)
    assert any("4 steps, cfg 3, euler" in line for line in said)
    check_pictures(client, prompt, entry)
