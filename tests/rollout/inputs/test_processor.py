"""Prompts to tokens and pixels: one resize, one rendering, and every fault of a prompt named."""

from __future__ import annotations

import io
import re
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from qwen_vl_utils.vision_process import smart_resize as utils_smart_resize
from transformers import AutoImageProcessor, AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as qwen_smart_resize

from rollout.config import ConfigError, InputsConfig
from rollout.inputs.images import PromptError, check_decodes, decode, file_of, local_source, read_size, smart_resize
from rollout.inputs.processor import InputProcessor
from rollout.inputs.template import InputsError
from rollout.types import Prompt

SMALL = InputsConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 16)

# What Qwen2.5-VL's own folder ships, without its parts for video and tools: a default system message.
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def processor(tiny_model_path) -> InputProcessor:
    return InputProcessor(tiny_model_path, SMALL)


def prompt_of(*images, text="", system="", **more) -> Prompt:
    text = text or "".join(f"[{n + 1}]<image>\n" for n in range(len(images))) + "what amount is on page 2?"
    return Prompt(id="p", text=text, images=tuple(images), system=system, **more)


def png_bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, channels), dtype=np.uint8)


# --- the resize -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (56, 84, (56, 84)),  # already a multiple
        (60, 100, (56, 112)),  # 60/28 = 2.14 -> 2, 100/28 = 3.57 -> 4
        (10, 10, (28, 28)),  # below the minimum: grown and rounded up
        (1000, 500, (140, 56)),  # 12,544 allowed: shrink by sqrt(500,000/12,544) = 6.31 -> 158, 79 -> 5 and 2 units
    ],
)
def test_sizes_worked_out_by_hand(height, width, expected):
    assert smart_resize(height, width, 28, 28 * 28, 28 * 28 * 16) == expected


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([28, 32]), st.integers(1, 64), st.integers(1, 2000))
def test_sizes_equal_those_of_qwens_own_processor_and_of_qwen_vl_utils_where_it_has_any(
    height, width, factor, low, more
):
    limits = {"factor": factor, "min_pixels": low * 1024, "max_pixels": (low + more) * 1024}
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(PromptError, match="200 times"):
            smart_resize(height, width, **limits)
        return
    ours = smart_resize(height, width, **limits)
    assert ours == qwen_smart_resize(height, width, **limits)
    theirs = utils_smart_resize(height, width, **limits)
    assert ours == theirs or 0 in theirs or min(height, width) < 32


def test_qwen_vl_utils_still_gives_slim_pages_no_pixels_and_other_sizes_than_qwens_processor():
    """Why `rollout.inputs.images` has the arithmetic of its own: once this fails, theirs can take its place."""
    limits = {"factor": 28, "min_pixels": 784, "max_pixels": 50176}
    # 3640 / 1.745 = 2085.4 -> 74 x 28; 42 / 1.745 = 24.1 -> 0 x 28
    assert utils_smart_resize(3640, 42, **limits) == (2072, 0)
    assert smart_resize(3640, 42, **limits) == qwen_smart_resize(3640, 42, **limits) == (2072, 28)
    # 0.25 units are 0, an area of nothing: grown by sqrt(784 / 2317) = 0.58 -> 192.5, 4.1 -> 7 and 1 units
    assert utils_smart_resize(331, 7, **limits) == (336, 28)
    assert smart_resize(331, 7, **limits) == qwen_smart_resize(331, 7, **limits) == (196, 28)


# --- equal to what Hugging Face makes by itself -----------------------------------------------------------------


def test_pixels_equal_those_of_the_folders_own_processor_on_the_pil_backend(processor, tiny_model_path, page_images):
    ours = processor.encode(prompt_of(*page_images))
    theirs = AutoImageProcessor.from_pretrained(tiny_model_path, backend="pil")(
        images=[Image.open(path) for path in page_images],
        size={"shortest_edge": SMALL.min_pixels, "longest_edge": SMALL.max_pixels},
        return_tensors="pt",
    )
    assert torch.equal(ours.image_grid_thw, theirs["image_grid_thw"])
    assert ours.image_grid_thw.dtype == torch.int64
    assert ours.pixel_values.dtype == torch.float32
    torch.testing.assert_close(ours.pixel_values, theirs["pixel_values"], atol=1e-6, rtol=0)


def test_pixels_are_close_to_those_of_the_torchvision_backend_whose_bicubic_rounds_otherwise(
    processor, tiny_model_path, page_images
):
    ours = processor.encode(prompt_of(*page_images))
    theirs = AutoImageProcessor.from_pretrained(tiny_model_path)(
        images=[Image.open(path).convert("RGB") for path in page_images],
        size={"shortest_edge": SMALL.min_pixels, "longest_edge": SMALL.max_pixels},
        return_tensors="pt",
    )
    one_level = 1 / 255 / 0.26  # noise is the worst case: single pixels differ by more
    assert (ours.pixel_values - theirs["pixel_values"]).abs().mean() < 0.5 * one_level


@pytest.mark.parametrize("system", ["", "Answer briefly."])
@pytest.mark.parametrize("template", [None, QWEN_TEMPLATE])
def test_tokens_equal_those_of_the_folders_own_processor(tiny_model_path, page_images, system, template):
    processor = InputProcessor(tiny_model_path, SMALL)
    reference = AutoProcessor.from_pretrained(tiny_model_path)
    if template:
        processor.tokenizer.chat_template = reference.chat_template = template
    prompt = prompt_of(*page_images[:3], text="<image>a<image><image>\nwhat amount?", system=system)
    content = [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "image"}, {"type": "image"}]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "\nwhat amount?"}]}]
    if system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    rendered = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert processor.template.prompt(prompt) == rendered
    assert ("You are a helpful assistant." in rendered) == bool(template and not system)
    theirs = reference(
        text=rendered,
        images=[Image.open(file_of(source)).convert("RGB") for source in prompt.images],
        images_kwargs={"size": {"shortest_edge": SMALL.min_pixels, "longest_edge": SMALL.max_pixels}},
    )
    assert processor.encode(prompt).token_ids_T == theirs["input_ids"][0]


def test_the_folder_decides_patch_and_merge_size(tiny_model_path, tmp_path, page_images):
    folder = shutil.copytree(tiny_model_path, tmp_path / "model")
    for name in ("processor_config.json", "preprocessor_config.json"):
        text = (folder / name).read_text()
        assert '"patch_size": 14' in text
        (folder / name).write_text(text.replace('"patch_size": 14', '"patch_size": 16'))
    inputs = InputProcessor(str(folder), SMALL).encode(prompt_of(page_images[2]))  # 84 x 84 -> 96 x 96
    assert inputs.image_grid_thw is not None
    assert inputs.pixel_values is not None
    assert inputs.image_grid_thw.tolist() == [[1, 6, 6]]
    assert inputs.pixel_values.shape == (36, 3 * 2 * 16 * 16)
    assert inputs.token_ids_T.count(357) == 9


# --- counting ---------------------------------------------------------------------------------------------------


def test_every_image_placeholder_becomes_its_merged_vision_tokens(processor, page_images):
    inputs = processor.encode(prompt_of(*page_images[:2]))  # 56 x 84 and 112 x 56 pixels: 2 x 3 and 4 x 2 tokens
    assert inputs.image_grid_thw.tolist() == [[1, 4, 6], [1, 8, 4]]
    runs = [
        len(run) for run in "".join("i" if t == processor.image_token_id else " " for t in inputs.token_ids_T).split()
    ]
    assert runs == [6, 8]


def test_a_count_equals_the_encoded_length_without_decoding_pixels(processor, page_images, monkeypatch):
    prompts = [prompt_of(*page_images[:n], system="s" * n, text="") for n in range(1, 6)] + [
        prompt_of(text="only text")
    ]
    lengths = [len(processor.encode(prompt).token_ids_T) for prompt in prompts]
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("pixels were decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("pixels were decoded"))
    assert [processor.count_tokens(prompt) for prompt in prompts] == lengths


def test_a_prompt_without_images_has_no_pixels(processor):
    inputs = processor.encode(prompt_of(text="what amount?"))
    assert (inputs.pixel_values, inputs.image_grid_thw, inputs.image_hashes) == (None, None, ())


def test_hashes_are_of_pixels_and_shape_wherever_they_come_from(processor, page_images):
    again = png_bytes(Image.open(page_images[0]), compress_level=0)
    first, other, *equal = processor.encode(prompt_of(*page_images[:2], page_images[0], again)).image_hashes
    assert first != other
    assert equal == [first, first]
    red = [png_bytes(Image.new("RGB", size, "red")) for size in ((28, 56), (56, 28))]
    assert len(set(processor.encode(prompt_of(*red)).image_hashes)) == 2


def test_load_images_are_the_pixels_that_encode_normalises(processor, page_images):
    images = processor.load_images(prompt_of(*page_images))
    assert {image.mode for image in images} == {"RGB"}
    again = processor.image_processor(images=images, do_resize=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(again, processor.encode(prompt_of(*page_images)).pixel_values)


def test_threads_encode_as_one_does(processor, page_images):
    prompts = [prompt_of(*page_images[: 1 + n % 5], text="") for n in range(40)]
    expected = [processor.encode(prompt).token_ids_T for prompt in prompts[:5]] * 8
    with ThreadPoolExecutor(8) as pool:
        assert [inputs.token_ids_T for inputs in pool.map(processor.encode, prompts)] == expected


# --- images of every kind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_to_pixels_and_to_counts(processor, orientation, kind):
    upright = Image.fromarray(np.repeat(np.repeat(noise(4, 2), 28, 0), 28, 1))  # 112 high, 56 wide
    stored = upright.transpose(
        {
            1: Image.Transpose.ROTATE_180, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
        }[orientation]
    )  # fmt: skip
    if orientation == 1:
        stored = upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = png_bytes(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {"quality": 100}))
    assert read_size(data) == (112, 56)
    difference = np.asarray(decode(data)).astype(int) - np.asarray(upright)
    assert np.abs(difference).mean() < (12 if kind == "JPEG" else 1e-9)
    assert processor.count_tokens(prompt_of(data)) == len(processor.encode(prompt_of(data)).token_ids_T)


def test_transparency_also_of_a_palette_is_flattened_on_white():
    image = Image.new("RGBA", (28, 28), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 255))
    assert np.asarray(decode(png_bytes(image)))[0, :2].tolist() == [[255, 255, 255], [0, 0, 255]]
    palette = Image.new("P", (28, 28), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert np.asarray(decode(png_bytes(palette, transparency=0)))[0, :2].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_grey_images_of_1_8_and_16_bits_and_cmyk_become_rgb():
    grey16 = Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16))
    assert np.asarray(decode(png_bytes(grey16)))[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]
    assert np.asarray(decode(png_bytes(Image.new("L", (2, 1), 77))))[0, 0].tolist() == [77] * 3
    assert np.asarray(decode(png_bytes(Image.new("1", (2, 1), 1))))[0, 0].tolist() == [255] * 3
    cmyk = decode(png_bytes(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG"))
    assert np.abs(np.asarray(cmyk)[0, 0].astype(int) - [0, 255, 255]).max() < 5


def test_a_reference_is_a_path_a_file_url_or_a_data_url_and_nothing_is_fetched():
    assert local_source("pages/a b.png") == "pages/a b.png"
    assert local_source("file:///pages/a%20b.png") == "/pages/a b.png"
    assert local_source("data:image/png;base64,aGk=") == b"hi"
    for wrong in ("data:text/html;base64,aGk=", "data:image/png,hi", "data:image/png;base64,?"):
        with pytest.raises(ValueError, match="must be data:image"):
            local_source(wrong)
    with pytest.raises(ValueError, match="Download it"):
        local_source("https://example.org/page.png")


# --- faults of one prompt ---------------------------------------------------------------------------------------


def assert_refused(processor, prompt, match):
    with pytest.raises(PromptError, match=match):
        processor.encode(prompt)


def test_a_missing_file_and_one_that_is_not_an_image_are_named(processor, tmp_path):
    (tmp_path / "page.png").write_text("hello")
    assert_refused(processor, prompt_of(str(tmp_path / "gone.png")), r"gone\.png does not exist")
    assert_refused(processor, prompt_of(str(tmp_path / "page.png")), r"page\.png cannot be read")
    assert_refused(processor, prompt_of(str(tmp_path)), "cannot be read: IsADirectoryError")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow also warns of broken TIFF headers
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_a_truncated_image_is_refused_by_encode_and_by_the_cheap_check(processor, kind):
    whole = png_bytes(Image.fromarray(noise(120, 120)), kind)
    check_decodes(whole)
    for cut in (whole[: len(whole) // 2], whole[:20]):
        assert_refused(processor, prompt_of(cut), "bytes> cannot be read")
        with pytest.raises(PromptError, match="cannot be read"):
            check_decodes(cut)


def test_a_decompression_bomb_is_refused(processor, monkeypatch):
    data = png_bytes(Image.new("RGB", (100, 100)))
    for limit in (9_999, 4_000):  # Pillow itself warns over the limit and raises over twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            assert_refused(processor, prompt_of(data), "Scale it down")
            with pytest.raises(PromptError, match="Scale it down"):
                processor.count_tokens(prompt_of(data))


def test_floating_point_strips_and_marks_without_images_are_refused(processor, page_images):
    assert_refused(processor, prompt_of(png_bytes(Image.new("F", (28, 28)), "TIFF")), "floating-point")
    assert_refused(processor, prompt_of(png_bytes(Image.new("RGB", (402, 2)))), r"402 x 2.*200 times")
    assert_refused(processor, prompt_of(page_images[0], text="no mark"), "0 <image> marks for 1 images")
    assert_refused(processor, prompt_of(text="<image><image>"), "2 <image> marks for 0 images")


def test_pixels_of_unknown_range_and_all_but_a_first_page_are_not_lost_in_silence(processor):
    grey = np.full((28, 28), 3_000_000_000, np.uint32)
    deep = png_bytes(Image.fromarray(grey.view(np.int32)), "TIFF")  # read as black before
    for check in (check_decodes, lambda source: processor.encode(prompt_of(source))):
        with pytest.raises(PromptError, match=r"32-bit pixels of unknown range\. Save it with 8 bits"):
            check(deep)
    file = io.BytesIO()
    pages = [Image.new("RGB", (28, 28), colour) for colour in ("red", "blue")]
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    for check in (check_decodes, lambda source: processor.encode(prompt_of(source))):
        with pytest.raises(PromptError, match="has 2 pages, of which a model would see the first alone"):
            check(file.getvalue())


def test_too_many_images_and_too_many_tokens_name_the_limit(tiny_model_path, page_images):
    processor = InputProcessor(tiny_model_path, InputsConfig(784, 12544, max_images=2, max_prompt_tokens=20))
    assert_refused(processor, prompt_of(*page_images[:3]), "3 images, but inputs.max_images is 2")
    assert_refused(processor, prompt_of(*page_images[:2]), r"has \d+ tokens, but inputs.max_prompt_tokens is 20")
    assert processor.count_tokens(prompt_of(*page_images[:2])) > 20


@pytest.mark.parametrize(
    "token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|im_end|>"]
)
def test_control_tokens_in_texts_are_refused_by_name_and_those_of_vision_never_sampled(processor, page_images, token):
    is_banned = processor.tokenizer.convert_tokens_to_ids(token) in processor.banned_token_ids
    assert is_banned == (token != "<|im_end|>")
    assert len(processor.banned_token_ids) == 5
    where = rf"contains the control token '{re.escape(token)}'"
    assert_refused(processor, prompt_of(page_images[0], text=f"<image> {token}"), "the prompt text " + where)
    assert_refused(processor, prompt_of(page_images[0], system=token), "the system message " + where)
    with pytest.raises(PromptError, match="the response " + where):
        processor.encode_response(token)


# --- responses and folders --------------------------------------------------------------------------------------


def test_a_response_is_encoded_with_end_of_text_and_decodes_to_itself(processor):
    response = "<evidence>\n[1]: 7</evidence>"
    ids = processor.encode_response(response)
    assert ids[-1] == processor.eos_token_id
    text, spans = processor.decode(ids)
    assert text == response
    assert len(spans) == len(ids)
    assert spans[-1] == (len(text), len(text))


def test_a_limit_below_one_vision_token_is_refused(tiny_model_path):
    with pytest.raises(InputsError, match="max_pixels must be >= 784"):
        InputProcessor(tiny_model_path, InputsConfig(min_pixels=1, max_pixels=783))


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"min_pixels": 0}, "inputs.min_pixels .* got 0"),
        ({"min_pixels": 10, "max_pixels": 9}, r"inputs.max_pixels \(9\), got 10"),
        ({"max_images": -1}, "inputs.max_images"),
        ({"max_prompt_tokens": 0}, "inputs.max_prompt_tokens"),
    ],
)
def test_impossible_settings_are_refused_by_key(keys, match):
    with pytest.raises(ConfigError, match=match):
        InputsConfig(**keys)


def test_a_template_that_forgets_images_is_the_folders_fault_not_the_prompts(tiny_model_path, page_images):
    processor = InputProcessor(tiny_model_path, SMALL)
    processor.tokenizer.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
    with pytest.raises(InputsError, match="made 0 image placeholders"):
        processor.encode(prompt_of(page_images[0]))
