"""The edit head and greedy decoding: cases worked by hand, sizes of the published head, identities."""

import pytest
import torch
from palimpsest.kernels.edit_head import EditHeadConfig, EditMapper, where_images_begin
from palimpsest.kernels.greedy_decoding import Limits, go_on, repeating

SMALL = EditHeadConfig(hidden=12, width=8, heads=2, layers=2, feed_forward=16, queries=5, context=6)


def head(dtype=torch.float64) -> EditMapper:
    torch.manual_seed(0)
    return EditMapper(SMALL, torch.nn, dtype=dtype).eval()


def test_the_published_head_has_its_size_and_names():
    full = EditMapper(EditHeadConfig(), torch.nn, device="meta")
    state = full.state_dict()
    assert len(state) == 129
    assert sum(tensor.numel() for tensor in state.values()) == 31_958_784
    assert {"llm2hid.weight", "query", "mapper.encoder.norm.weight", "hid2feat.bias"} <= state.keys()
    plain = torch.nn.Transformer(512, 4, 4, 4, 2048, 0.0, batch_first=True, norm_first=True, device="meta")
    assert {name.removeprefix("mapper.") for name in state if name.startswith("mapper.")} == set(plain.state_dict())
    assert EditHeadConfig.of({name: tensor.shape for name, tensor in state.items()}) == EditHeadConfig()


def test_it_is_torchs_transformer_between_two_linear_layers():
    made, states, embeddings = head(), torch.randn(3, 8, 12).double(), torch.randn(8, 12).double()
    plain = torch.nn.Transformer(8, 2, 2, 2, 16, 0.0, batch_first=True, norm_first=True).double().eval()
    plain.load_state_dict(made.mapper.state_dict())
    want = made.hid2feat(plain(made.llm2hid(states + embeddings), made.query.repeat(3, 1, 1)))
    torch.testing.assert_close(made(states, embeddings), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.null(embeddings), made(torch.zeros(1, 8, 12).double(), embeddings))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 2e-2)])
def test_precisions_agree(dtype, bound):
    states, embeddings = torch.randn(2, 8, 12).double(), torch.randn(8, 12).double()
    exact, rough = head(), head().to(dtype)
    found = rough(states.to(dtype), embeddings.to(dtype)).double()
    torch.testing.assert_close(found, exact(states, embeddings), rtol=0, atol=bound)


def test_where_the_head_reads():
    ids = [7, 7, 7, 1, 2, 20, 21, 22, 23, 24, 25, 26, 27, 3]  # 20 is [IMG0], the last token has no state
    assert where_images_begin(ids, 20, 13) == (4, True)
    assert where_images_begin(ids[:5] + [1] * 9, 20, 13) == (4, False)  # not said: the last eight but one
    assert where_images_begin([*ids[:12], 20], 20, 13) == (4, True)
    assert where_images_begin([1] * 11 + [20, 3], 20, 12) == (3, True)  # said too late: as far as there are states
    with pytest.raises(ValueError, match="a text of 8 tokens holds no 8 states"):
        where_images_begin([1] * 9, 20, 8)


def test_what_would_repeat_three_tokens():
    assert repeating([1, 2, 3, 4, 1, 2], 3) == [3]
    assert repeating([1, 2, 3, 1, 2, 4, 1, 2], 3) == [3, 4]
    assert repeating([1, 2], 3) == []
    assert repeating([5, 5, 5], 1) == [5]
    assert repeating([1, 2, 3, 1, 2], 0) == []


def follows(table: dict[int, list[float]]):
    """A model that says by a table what comes behind a token: (read, speak)."""

    def read(token):
        return torch.tensor([[float(1 if token is None else token)]])

    return read, lambda state: torch.tensor(table[int(state[0])])


def test_the_likeliest_token_that_repeats_nothing():
    table = {0: [0, 2, 1, 0], 1: [1, 0, 2, 0], 2: [0, 2, 1, 0], 3: [0, 1, 0, 0]}
    read, speak = follows(table)
    heard = []
    written, states = go_on(read, speak, [1], Limits(6, no_repeat=0), lambda found: heard.append(len(found)))
    assert written == [2, 1, 2, 1, 2, 1]
    assert heard == [1, 2, 3, 4, 5, 6]
    assert states[:, 0].tolist() == [1, 2, 1, 2, 1, 2]  # of all tokens but the last
    assert go_on(read, speak, [1], Limits(6, no_repeat=3))[0] == [2, 1, 2, 2, 1, 0]
    assert go_on(read, speak, [1], Limits(6, frozenset({2})))[0] == [2]
