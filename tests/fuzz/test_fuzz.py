"""Bad values into every input of every node: a finite result, the host's refusal or a sentence of ours."""

import pytest
from fuzz import graphs, running, values
from fuzz.fuzz import Fuzz

CASES, CANCELS = 300, 6


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    base = tmp_path_factory.mktemp("fuzz")
    with running.own_folders(base), running.quiet():
        made = Fuzz(base)
        yield made
        made.runner.close()


def test_every_node_has_a_graph(fuzz):
    """By its sockets, or where that is not enough by hand."""
    assert {f"Palimpsest{node}" for node in fuzz.made.nodes} == set(fuzz.made.info)
    assert fuzz.made.nodes.keys() >= graphs.NODES.keys()


def test_a_graph_by_sockets_leaves_nothing_free_that_is_required(fuzz):
    for node, given in fuzz.made.nodes.items():
        required = fuzz.made.info[f"Palimpsest{node}"]["input"].get("required", {})
        wanted = {name for name, (kind, *_) in required.items() if kind.isupper() and kind not in graphs.WIDGETS}
        assert {name.partition(".")[0] for name in given} >= wanted - {"images"}, node


def test_every_socket_that_carries_numbers_has_bad_values(fuzz):
    learned = {"PALIMPSEST_ATTENTION_RECORD", "PALIMPSEST_CONTEXT_ADAPTER", "PALIMPSEST_MULTIMODAL_ENCODER",
               "PALIMPSEST_MULTIMODAL_DATASET", "PALIMPSEST_EDIT_HEAD", "CLIP", "CLIP_VISION", "CONTROL_NET",
               "VAE"}  # fmt: skip
    plain = {"INT", "FLOAT", "COMBO", "STRING", "BOOLEAN", "MODEL", "COMFY_AUTOGROW_V3"}
    sockets = {kind for node in fuzz.made.info for kind, _ in fuzz.made.inputs(node).values()}
    assert sockets <= values.BAD.keys() | learned | plain


def test_every_answer_is_a_result_or_a_sentence(fuzz):
    fuzz.run(fuzz.cases(seed=0)[:CASES])
    assert [f"{kind.kind}: {what}: {kind.said}" for what, kind in fuzz.faults] == []
    assert fuzz.counts.total() == CASES
    assert min(fuzz.counts[kind] for kind in (running.FINE, running.REFUSED, running.HOSTS)) > 10


def test_long_work_ends_soon_after_it_is_cancelled(fuzz):
    assert [found for found in fuzz.cancel(CANCELS, seed=0) if found[1] > running.SOON] == []


def test_an_error_of_torch_in_our_lines_is_foreign():
    """Its last Python frame is ours, but nobody wrote a sentence."""
    frame = f'  File "{running.SHIPPED[0]}host/masks.py", line 9, in f\n    '
    assert running.is_ours("ValueError", [frame + 'raise ValueError("mask is empty.")\n'])
    assert not running.is_ours("RuntimeError", [frame + "x = torch.cat([])\n"])
    assert not running.is_ours("KeyError", [frame + "raise KeyError(name)\n"])
