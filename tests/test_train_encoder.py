"""The encoder keeps the paper's maps at every size, and what is scored belongs to where it was seen."""

from __future__ import annotations

import pytest
import torch

from dimkern.train.encoder import DeepInfoMax, Encoder, Head


@pytest.mark.parametrize(
    ("size", "local", "conv"),
    [(8, (8, 4, 4), (16, 2, 2)), (16, (4, 8, 8), (8, 4, 4)), (28, (8, 8, 8), (16, 4, 4)), (32, (8, 8, 8), (16, 4, 4)),
     (64, (16, 8, 8), (32, 4, 4))],
)  # fmt: skip
def test_maps_of_every_image_size(size, local, conv):
    encoder = Encoder(3, size, width=4, fc=12)
    seen = encoder(torch.randn(2, 3, size, size))
    assert (tuple(seen.local.shape[1:]), tuple(seen.conv.shape[1:])) == (local, conv)
    assert (encoder.local_channels, encoder.conv_features) == (local[0], seen.conv[0].numel())
    assert (tuple(seen.fc.shape), tuple(seen.summary.shape)) == ((2, 12), (2, 64))


def test_the_papers_encoder_at_32x32():
    seen = Encoder(3, 32, width=64, fc=1024)(torch.randn(2, 3, 32, 32))
    assert [tuple(t.shape[1:]) for t in seen] == [(128, 8, 8), (256, 4, 4), (1024,), (64,)]


@pytest.mark.parametrize(
    ("height", "width", "pad"), [(28, 28, (2, 2, 2, 2)), (32, 27, (2, 3, 0, 0)), (5, 6, (1, 1, 1, 2))]
)
def test_padding_is_even_and_repeats_the_border(height, width, pad):
    torch.manual_seed(0)
    encoder = Encoder(1, max(height, width), width=2, fc=4).eval()
    images = torch.randn(2, 1, height, width)
    padded = torch.nn.functional.pad(images, pad, mode="replicate")
    assert padded.shape[2:] == (encoder.size, encoder.size)
    assert torch.equal(encoder(images).summary, encoder(padded).summary)


def test_a_local_vector_depends_on_its_own_location_only():
    torch.manual_seed(0)
    model = DeepInfoMax(Encoder(1, 8, width=4, fc=8), ["local"], 10).eval()
    images = torch.randn(2, 1, 8, 8, requires_grad=True)
    pairs = model(images)
    l, m = pairs["local_l"], pairs["local_m"]
    assert l.shape == (2, 10, 4, 4)
    (gradient,) = torch.autograd.grad((l[0, :, 0, 3] * torch.randn(10)).sum(), images)
    assert gradient[0, 0, :5, 4:].abs().sum() > 0
    assert gradient[0, 0, 5:].abs().sum() == 0  # far below the top right corner
    assert gradient[0, 0, :, :3].abs().sum() == 0  # far to the left of it
    assert gradient[1].abs().sum() == 0
    assert m.shape == (2, 10)


def test_every_term_has_its_own_pair_and_multi_global_a_summary_of_every_location():
    encoder = Encoder(1, 16, width=4, fc=8)
    pairs = DeepInfoMax(encoder, ["local", "global"], 10, multi_global=True)(torch.randn(3, 1, 16, 16))
    shapes = {name: tuple(pair.shape) for name, pair in pairs.items()}
    summaries = (3, 10, 1 + 4 * 4)
    assert shapes == {
        "code": (3, 64), "local_l": (3, 10, 8, 8), "local_m": summaries, "global_l": (3, 10, 1), "global_m": summaries
    }  # fmt: skip
    assert DeepInfoMax(encoder, ["global"], 10)(torch.randn(3, 1, 16, 16))["global_m"].shape == (3, 10)


def test_multi_global_summaries_are_those_of_their_locations():
    torch.manual_seed(0)
    model = DeepInfoMax(Encoder(1, 16, width=4, fc=8), ["local"], 10, multi_global=True).eval()
    images = torch.randn(2, 1, 16, 16, requires_grad=True)
    m = model(images)["local_m"]
    (gradient,) = torch.autograd.grad((m[0, :, 1 + 3] * torch.randn(10)).sum(), images)  # the top right of 4x4
    assert gradient[0, 0, :7, 9:].abs().sum() > 0
    assert gradient[0, 0, 10:].abs().sum() == gradient[0, 0, :, :6].abs().sum() == gradient[1].abs().sum() == 0


def test_without_heads_the_pair_is_the_encoders_own():
    model = DeepInfoMax(Encoder(1, 16, width=4, fc=8), ["local", "global"], 10, heads=False).eval()
    images = torch.randn(2, 1, 16, 16)
    seen, pairs = model.encoder(images), model(images)
    assert torch.equal(pairs["local_l"], seen.local)
    assert torch.equal(pairs["global_l"], seen.conv.flatten(1)[:, :, None])
    assert torch.equal(pairs["global_m"], seen.summary)
    assert not [name for name, _ in model.named_parameters() if not name.startswith("encoder.")]


def test_norm_groups_are_counted_apart():
    torch.manual_seed(0)
    model = DeepInfoMax(Encoder(1, 16, width=4, fc=8), ["local"], 10, norm_batch=4)
    images = torch.randn(12, 1, 16, 16)
    whole = model(images)
    for i in range(0, 12, 4):
        part = model(images[i : i + 4])
        assert all(torch.equal(part[name], whole[name][i : i + 4]) for name in part)
    model.norm_batch = 0
    assert not torch.allclose(model(images)["code"], whole["code"], atol=1e-3)


def test_a_head_starts_near_the_identity():
    torch.manual_seed(0)
    head = Head(6, 9, normalise=False)
    rows = torch.randn(50, 6)
    passed = head.shortcut(rows) - head.shortcut.bias
    assert (passed[:, :6] - rows).abs().max() < 0.3
    assert passed[:, 6:].abs().max() < 0.3


def test_normalised_features_have_unit_scale_over_channels():
    out = Head(5, 16, normalise=True)(7 + 30 * torch.randn(40, 5))
    assert torch.allclose(out.mean(1), torch.zeros(40), atol=1e-5)
    assert torch.allclose(out.var(1, unbiased=False), torch.ones(40), atol=1e-3)
