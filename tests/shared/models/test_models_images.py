"""Networks over images: shapes, sizes, and that each can learn what it is for."""

import pytest
import torch
from torch import nn

from fedge.shared.models.autoencoder import ConvAutoencoder
from fedge.shared.models.dcgan import Discriminator, Generator
from fedge.shared.models.detector import STRIDE, CenterDetector, Maps, peaks
from fedge.shared.models.resnet import ResidualBlock, ResNet
from fedge.shared.models.unet import UNet


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_a_resnet_of_n_blocks_a_stage_has_6n_and_2_layers():
    for blocks, layers in ((1, 8), (3, 20)):
        network = ResNet(classes=10, blocks=blocks)
        weighted = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        # The paper does not count the shortcuts' convolutions.
        assert len(weighted) - 2 == layers
    count = sum(p.numel() for p in ResNet(classes=10).parameters())
    assert 75_000 <= count <= 80_000


def test_a_block_without_change_of_shape_adds_its_input_as_it_is():
    block = ResidualBlock(4, 4)
    nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 4, 6, 6)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize(("side", "start"), [(28, 7), (32, 4), (64, 4), (8, 4)])
def test_gan_grows_from_4_to_7_pixels(side, start):
    generator = Generator(channels=1, side=side, latent=6, width=4)
    images = generator(torch.randn(3, 6))
    assert images.shape == (3, 1, side, side) and images.abs().max() <= 1
    assert generator.layers[0].kernel_size == (start, start)
    assert Discriminator(channels=1, side=side, width=4)(images).shape == (3, 1)


@pytest.mark.parametrize("side", [3, 7, 18, 33])
def test_other_sides_of_a_gan_are_refused(side):
    for network in (Generator, Discriminator):
        with pytest.raises(ValueError, match=f"doubled once or more, got {side}"):
            network(side=side)


@pytest.mark.parametrize("size", [(140,), (28, 28)])
def test_the_autoencoder_learns_to_restore(size):
    network = ConvAutoencoder(channels=1, axes=len(size), width=4)
    x = torch.linspace(0, 9, size[-1]).sin().expand(4, 1, *size)
    steps = torch.optim.Adam(network.parameters(), 0.01)
    losses = []
    for _ in range(15):
        loss = (network(x) - x).square().mean()
        losses.append(loss.item())
        steps.zero_grad()
        loss.backward()
        steps.step()
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(ValueError, match="axes: must be 1 or 2, got 3"):
        ConvAutoencoder(channels=1, axes=3)


def test_the_u_net_tells_every_pixel():
    network = UNet(classes=3, width=4, depth=2)
    x = torch.rand(2, 3, 12, 20, requires_grad=True)
    logits = network(x)
    assert logits.shape == (2, 3, 12, 20)
    # At full resolution, by the way across: one pixel is felt most in its own logits.
    with torch.no_grad():
        changed = x.clone()
        changed[0, :, 5, 9] += 1
        difference = (network(changed) - logits)[0].abs().sum(0)
    row, column = divmod(int(difference.argmax()), 20)
    assert abs(row - 5) <= 2 and abs(column - 9) <= 2


def maps(objects, *, classes=2, rows=6, columns=8):
    """Maps of one image with objects (class, row, column, score logit, width, height) in cells."""
    heat = torch.full((1, classes, rows, columns), -9.0)
    heat += torch.rand_like(heat) * 0.01
    size, offset = torch.zeros(2, 1, 2, rows, columns)
    for label, row, column, logit, width, height in objects:
        heat[0, label, row, column] = logit
        size[0, :, row, column] = torch.tensor([width, height])
        offset[0, :, row, column] = torch.tensor([0.5, 0.25])
    return Maps(heat, size, offset)


def test_peaks_are_the_objects_best_first():
    found = peaks(maps([(0, 1, 2, 1.0, 2.0, 1.0), (1, 4, 7, 2.0, 1.0, 3.0)]), 2)
    assert found.labels.tolist() == [[1, 0]]
    torch.testing.assert_close(found.scores, torch.tensor([[2.0, 1.0]]).sigmoid())
    centres = [(7.5, 4.25, 1.0, 3.0), (2.5, 1.25, 2.0, 1.0)]
    expected = [[x - w / 2, y - h / 2, x + w / 2, y + h / 2] for x, y, w, h in centres]
    torch.testing.assert_close(found.boxes, STRIDE * torch.tensor([expected]))


def test_a_peaks_neighbour_is_no_second_object():
    found = peaks(maps([(0, 2, 2, 2.0, 1.0, 1.0), (0, 2, 3, 1.5, 1.0, 1.0)]), 2)
    assert found.scores[0, 0] > 0.8
    assert found.scores[0, 1] < 0.01


def test_fewer_peaks_than_asked_for_score_zero():
    flat = maps([])
    found = peaks(flat, 6 * 8 * 2)
    assert (found.scores == 0).any()
    assert (found.scores.diff() <= 0).all()


def test_the_detector_begins_with_few_objects():
    heat = CenterDetector(classes=3, width=4)(torch.rand(2, 3, 32, 48)).heat
    assert heat.shape == (2, 3, 8, 12)
    assert heat.sigmoid().mean() < 0.2
