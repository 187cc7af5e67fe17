"""What tests run in a process of its own (`in_fresh_process`). The package is imported only within the functions."""

import os
import sys
import threading
from pathlib import Path


def peak_of_conversion(published: Path, towers: Path, out: Path, warm: Path) -> int:
    """Return by how many bytes memory grew at most during a conversion, after another one of `warm`: libraries keep some for themselves."""
    import psutil

    from moe_llava.checkpoints.published import convert

    process, peak, done = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    convert(warm, out.with_name("warmed"), towers)
    start = process.memory_info().rss
    thread = threading.Thread(target=watch)
    thread.start()
    convert(published, out, towers)
    done.set()
    thread.join()
    return peak - start


def growth_by_loading(folders: list[Path]) -> list[tuple[int, int]]:
    """Load checkpoints, and read every page of their weights. Return for each by how many bytes the peak of memory grew, and by how many
    the memory that maps no file."""
    from moe_llava.checkpoints.load import load_checkpoint, load_on_meta

    def memory(key: str) -> int:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status[key].split()[0]) * 1024

    kept, found = [load_on_meta(folders[0])], []  # what this imports does not count
    for folder in folders:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before, anonymous = memory("VmRSS"), memory("RssAnon")
        kept.append(load_checkpoint(folder)[0])
        for parameter in kept[-1].parameters():
            parameter.view(-1)[::64].sum()
        found.append((memory("VmHWM") - before, memory("RssAnon") - anonymous))
    return found


class Hidden:
    """An import hook under which the package is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "moe_llava":
            raise ModuleNotFoundError(name)


def run_without_package(folder: Path, out: Path) -> tuple[bool, str, str]:
    """Load a checkpoint by transformers alone, save logits and the model in `out`, and return whether the package was imported and the
    names of the classes."""
    sys.meta_path.insert(0, Hidden())
    import torch
    import transformers.dynamic_module_utils
    from PIL import Image
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

    os.chdir(out)
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(out / "modules")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "MoeLlavaModel"
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text="<image>\nWhat is this?", images=[Image.new("RGB", (50, 30))], return_tensors="pt")
    with torch.no_grad():
        torch.save(model(**inputs, output_router_logits=True).logits, out / "logits.pt")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return "moe_llava" in sys.modules, type(model).__name__, type(processor).__name__
