"""What images of many kinds take to prepare, in a process of its own: a line each, of what was measured and what the server expects.

python -m tests.serving.measured_images
"""

import re
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import LlavaImageProcessorPil, Qwen2VLImageProcessorPil

from moe_llava.common.images import InlineImage, open_image
from moe_llava.serving.http.prompts import FORMATS, working_bytes
from tests.serving.hostile import encoded

SIDE = 1500


def memory(name):
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def images(side):
    """name -> content"""
    canvas = Image.radial_gradient("L").resize((side, side)).convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6
    jpeg = {"progressive": True, "exif": turned}
    moving = {"lossless": True, "method": 0, "exif": turned, "save_all": True, "append_images": [Image.new("RGBA", canvas.size)]}
    return {
        "PNG": encoded(canvas.crop((0, 0, side, side // 2)), compress_level=1),
        "PNG with alpha, sideways": encoded(canvas.convert("RGBA"), compress_level=1, exif=turned),
        "PNG of 16 bits": encoded(Image.fromarray(np.zeros((side, side), np.uint16))),
        "PNG with a palette": encoded(canvas.convert("P"), transparency=3),
        "JPEG": encoded(canvas, "JPEG", subsampling=0, **jpeg),
        "JPEG in CMYK": encoded(canvas.convert("CMYK"), "JPEG", **jpeg),
        "WebP": encoded(canvas, "WEBP", quality=20, method=0),
        "WebP, moving": encoded(canvas.convert("RGBA"), "WEBP", **moving),
        "GIF": encoded(canvas.convert("P"), "GIF", transparency=3),
        "long PNG": encoded(Image.new("1", (side * 12, side // 16))),
    }


def prepare(name, content, processor):
    """(bytes that it took, bytes that were expected)"""
    sent = InlineImage(name, content)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    inputs = processor([open_image(sent, "test", FORMATS)], return_tensors="pt")
    taken = memory("VmHWM") - before
    with Image.open(sent.open()) as header:
        size = sum(tensor.nbytes for tensor in inputs.values())
        return taken, working_bytes(header.size, header.format == "WEBP", processor, size)


if __name__ == "__main__":
    large = images(SIDE)
    clip = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    for kind, processor in {
        "cropped": LlavaImageProcessorPil(**clip, do_pad=False),
        "padded": LlavaImageProcessorPil(**clip, do_pad=True),
        "in patches": Qwen2VLImageProcessorPil(size={"shortest_edge": 2**16, "longest_edge": 2**24}),
    }.items():
        for name, content in images(48).items():  # loads what decodes them
            prepare(name, content, processor)
        for name, content in large.items():
            if kind != "cropped" and "PNG" not in name:  # what decodes does not know of it
                continue
            print(name, kind, *prepare(name, content, processor), sep="|")
