"""The README's Python runs as written, with a tiny Qwen3-VL in the place of the one on the hub."""

import re
import subprocess
import sys

from PIL import Image
from transformers import AutoModelForImageTextToText

from moe_llava.checkpoints.files import SPARSE
from tests.conftest import REPOSITORY
from tests.families.processors import tiny_checkpoint

WITHOUT_PACKAGE = """
import sys
sys.modules["moe_llava"] = None
from transformers import AutoModelForImageTextToText
print(type(AutoModelForImageTextToText.from_pretrained("qwen3-vl-sparse", trust_remote_code=True)).__name__)
"""


def test_ten_lines_of_python(tmp_path, monkeypatch, capsys):
    (script,) = re.findall(r"```py\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    tiny_checkpoint("qwen3_vl", tmp_path / "model")
    Image.new("RGB", (48, 32), (200, 30, 30)).save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    named = script.replace('"Qwen/Qwen3-VL-2B-Instruct"', repr(str(tmp_path / "model")))
    assert named != script
    exec(compile(named, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    assert AutoModelForImageTextToText.from_pretrained("qwen3-vl-sparse").config.model_type == f"{SPARSE}qwen3_vl"
    done = subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "MoeQwen3VLForConditionalGeneration", done.stderr
