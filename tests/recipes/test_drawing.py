import numpy as np
import torch
from PIL import Image, ImageDraw

from ws_algorithm.recipes.drawing import draw_objects, enlarged


def gray(height: int, width: int, level: int = 128) -> Image.Image:
    return Image.new("RGB", (width, height), (level, level, level))


def test_small_images_are_enlarged_whole_times_and_large_ones_are_not():
    assert enlarged(gray(100, 128)).size == (640, 500)
    assert enlarged(gray(300, 200)).size == (600, 900)  # 640 / 300 is more than two
    assert enlarged(gray(640, 100)).size == (100, 640)


def test_a_mask_is_tinted_and_its_contour_is_of_full_colour():
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 16:32, 16:32] = True

    drawn = np.asarray(draw_objects(gray(64, 64), torch.tensor([[4.0, 4.0, 60.0, 60.0]]), ["x"], mask), dtype=float)

    colour = drawn[160, 160]  # a corner of the mask, ten times as large
    assert (drawn[160, 160:320] == colour).all() and (drawn[319, 160:320] == colour).all()
    assert (drawn[160:320, 160] == colour).all() and (drawn[160:320, 319] == colour).all()
    # inside, four tenths of the colour over gray
    np.testing.assert_allclose(
        drawn[161:319, 161:319], np.broadcast_to(0.6 * 128 + 0.4 * colour, (158, 158, 3)), atol=0.5
    )
    assert (drawn[150, 160:320] == 128).all()


def test_objects_have_colours_of_their_own_and_the_first_lies_on_top():
    boxes = torch.tensor([[10.0, 10.0, 40.0, 40.0], [10.0, 10.0, 40.0, 40.0], [50.0, 10.0, 60.0, 40.0]])
    boxes[1, 2:] = 50

    drawn = np.asarray(draw_objects(gray(64, 64), boxes, ["", "", ""]))

    first, second, third = drawn[399, 300], drawn[499, 300], drawn[399, 550]
    assert len({tuple(colour) for colour in (first, second, third)}) == 3
    assert (drawn[200, 100] == first).all()  # where both have an edge


def test_boxes_on_black_and_on_white_and_at_the_borders():
    boxes = torch.tensor([[-3.0, 0.0, 700.0, 640.0], [640.0, 640.0, 640.0, 640.0]])
    for level in (0, 255):
        drawn = np.asarray(draw_objects(gray(640, 640, level), boxes, ["all", "none"]), dtype=int)
        edge = drawn[320, 0]
        assert np.abs(edge - level).max() > 100
        assert (drawn[320, 639] == edge).all() and (drawn[639, 320] == edge).all()


def test_texts_do_not_hide_one_another():
    boxes = torch.tensor([[100.0, 100.0, 300.0, 300.0]]).repeat(3, 1)

    drawn = np.asarray(draw_objects(gray(640, 640), boxes, ["first 0.90", "second 0.80", "third 0.70"]))

    colours = [tuple(colour) for colour in np.unique(drawn.reshape(-1, 3), axis=0)]
    filled = [colour for colour in colours if (drawn == colour).all(axis=2).sum() > 400 and len(set(colour)) > 1]
    assert len(filled) == 3


def test_no_object_leaves_the_image_as_it_is():
    drawn = draw_objects(gray(64, 64), torch.zeros(0, 4), [], torch.zeros(0, 64, 64, dtype=torch.bool))

    assert drawn.tobytes() == enlarged(gray(64, 64)).tobytes()


def test_a_text_fits_into_the_image():
    boxes = torch.tensor([[630.0, 0.0, 640.0, 8.0]])
    drawn = np.asarray(draw_objects(gray(640, 640), boxes, ["a long name 0.90"]))

    plain = Image.new("RGB", (640, 640))
    extent = ImageDraw.Draw(plain).textbbox((0, 0), "a long name 0.90", font_size=11)
    changed = (drawn != 128).any(axis=2)
    assert changed.any(axis=0).sum() >= extent[2] - extent[0]
