import pytest
import torch

from ws_algorithm.recipes.detection_input import DetectionInput


def test_rgb_has_the_mean_and_deviation_of_imagenet():
    image = torch.rand(3, 64, 64)
    batch, _ = DetectionInput(64, 64, "rgb")([image])

    mean, std = torch.tensor([123.675, 116.28, 103.53]) / 255, torch.tensor([58.395, 57.12, 57.375]) / 255
    torch.testing.assert_close(batch.tensors[0], (image - mean[:, None, None]) / std[:, None, None])


def test_bgr_is_from_0_to_255_without_the_mean_of_detectron():
    image = torch.rand(3, 64, 64)
    batch, _ = DetectionInput(64, 64, "bgr255")([image])

    blue = 255 * image[2] - 102.9801
    green, red = 255 * image[1] - 115.9465, 255 * image[0] - 122.7717
    torch.testing.assert_close(batch.tensors[0], torch.stack([blue, green, red]))


@pytest.mark.parametrize(
    ("height", "width", "resized", "padded"),
    [
        (480, 640, (800, 1066), (800, 1088)),  # 640 x 800 / 480 is 1066.7
        (400, 1000, (533, 1333), (544, 1344)),  # 1333 / 1000 is less than 800 / 400
    ],
)
def test_ratios_are_kept_and_batches_padded_to_multiples_of_32(height, width, resized, padded):
    target = {"boxes": torch.tensor([[0.0, 0.0, width, height]])}
    batch, targets = DetectionInput(800, 1333, "rgb")([torch.rand(3, height, width)], [target])

    assert batch.image_sizes == [resized] and tuple(batch.tensors.shape[-2:]) == padded
    assert targets is not None
    torch.testing.assert_close(targets[0]["boxes"], torch.tensor([[0.0, 0.0, resized[1], resized[0]]]))
    assert not batch.tensors[..., resized[0] :, :].any() and not batch.tensors[..., resized[1] :].any()
    assert target["boxes"].tolist() == [[0, 0, width, height]]  # the batch itself stays


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("height", "width"), [(3, 2000), (600, 1)])
def test_a_thin_image_keeps_a_pixel_of_its_shorter_side(height, width, training):
    # 64 / 2000 x 3 and 64 / 600 x 1 are less than 1
    whole = {
        "boxes": torch.tensor([[0.0, 0.0, width, height]]),
        "masks": torch.ones(1, height, width, dtype=torch.uint8),
    }
    transform = DetectionInput(32, 64, "rgb").train(training)
    batch, targets = transform([torch.rand(3, height, width)], [whole])
    resized = (1, 64) if width > height else (64, 1)

    assert batch.image_sizes == [resized] and targets is not None
    assert targets[0]["boxes"].tolist() == [[0, 0, resized[1], resized[0]]]
    assert torch.equal(targets[0]["masks"], torch.ones(1, *resized, dtype=torch.uint8))
    assert whole["boxes"].tolist() == [[0, 0, width, height]] and whole["masks"].shape == (1, height, width)

    found = {"boxes": targets[0]["boxes"]}
    back = transform.eval().postprocess([found], batch.image_sizes, [(height, width)])
    torch.testing.assert_close(back[0]["boxes"], whole["boxes"])
