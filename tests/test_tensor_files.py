"""Tensor files of ours: the same bytes for the same content, and no changed bit is read."""

import json
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from fastunlearn.errors import UserError
from fastunlearn.files.tensors import load_tensors, save_tensors
from fastunlearn.files.weights import names_in, stored_types
from fastunlearn.models.foreign_files import headers
from fastunlearn.training.budget import device_memory

TENSORS = {
    "b": torch.arange(7, dtype=torch.uint8),
    "a": torch.randn(3, 5),
    "c": torch.zeros(()),
    "d": torch.ones(2).bfloat16(),
}
CONTENT = {"shapes": {"a": [3, 5]}, "made": "by a test", "odd": "ä\n\0", "part": "unet"}


def test_what_was_written_is_read(tmp_path):
    save_tensors(tmp_path / "x", TENSORS, "form-1", CONTENT)
    tensors, content = load_tensors(tmp_path / "x", "form-1", "thing")
    assert content == CONTENT
    assert tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[name], TENSORS[name]) and tensors[name].dtype == TENSORS[name].dtype for name in TENSORS
    )


def test_equal_content_gives_equal_bytes_in_any_process_and_order(tmp_path):
    script = f"""
import torch
from fastunlearn.files.tensors import save_tensors
from pathlib import Path
tensors = {{name: torch.full((3,), float(number)) for number, name in enumerate("cab")}}
content = {{str(number): number for number in range(20)}}
save_tensors(Path({str(tmp_path)!r}) / "other", tensors, "form-1", content)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    tensors = {name: torch.full((3,), float("cab".index(name))) for name in "abc"}
    save_tensors(tmp_path / "own", tensors, "form-1", {str(number): number for number in reversed(range(20))})
    assert (tmp_path / "own").read_bytes() == (tmp_path / "other").read_bytes()


def test_none_of_200_damaged_files_is_read(tmp_path):
    save_tensors(tmp_path / "x", TENSORS, "form-1", CONTENT)
    whole, draw = (tmp_path / "x").read_bytes(), random.Random(0)
    for number in range(200):
        damaged = bytearray(whole)
        at = draw.randrange(len(damaged))
        if number % 4 == 0:
            del damaged[at:]
        elif number % 4 == 1:
            damaged[at : at + 8] = bytes(min(8, len(damaged) - at))
        else:
            damaged[at] ^= 1 << draw.randrange(8)
        if bytes(damaged) == whole:
            continue
        (tmp_path / "x").write_bytes(damaged)
        with pytest.raises(UserError) as error:
            load_tensors(tmp_path / "x", "form-1", "thing")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "metadata", [None, {}, {"format": "pt"}, {"fastunlearn": "[]"}, {"fastunlearn": '{"format": "x"}'}]
)
def test_another_file_is_told_by_its_format(metadata, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "x", metadata=metadata)
    with pytest.raises(UserError, match=r"x is no mask of ours: its format is .*, not 'form-1'\."):
        load_tensors(tmp_path / "x", "form-1", "mask of ours")


def test_a_file_that_is_none_is_refused_in_one_line(tmp_path):
    (tmp_path / "x").write_text("hello")
    with pytest.raises(UserError, match="is no thing"):
        load_tensors(tmp_path / "x", "form-1", "thing")


def test_the_header_of_a_file_larger_than_the_memory_is_read(tmp_path):
    """Torch maps a file as memory that can be written, which a system may refuse for so much."""
    size, path = 4 * device_memory(torch.device("cpu")), tmp_path / "a.safetensors"
    text = json.dumps({"a": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + size)  # takes no place on the disk
    assert names_in(path) == ["a"]
    assert stored_types([path]) == {"BF16"}
    assert headers(path)[0]["a"]["shape"] == [size // 2]
