"""Weight files one by one: what is written, and how little of it is in memory at a time."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from respike.checkpoint.folder import INDEX
from respike.conversion.shards import write_shards

SHAPES = {f"layer.{i}.weight": (7 + i, 11) for i in range(9)} | {"head": (90, 11), "norm": (5,)}
SHARD = 2000


def tensor(name: str) -> Tensor:
    count = torch.Size(SHAPES[name]).numel()
    return torch.linspace(-1, 1, count).view(SHAPES[name]) + len(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_than_a_shard_is_ever_in_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    given: list[weakref.ref[Tensor]] = []

    def read(name: str) -> Tensor:
        alive = [ref() for ref in given]
        assert sum(t.nbytes for t in alive if t is not None) <= SHARD
        made = tensor(name).to(dtype)
        given.append(weakref.ref(made))
        return made

    files = write_shards(tmp_path, SHAPES, read, dtype, SHARD)
    assert len(given) == len(SHAPES)
    assert not any(ref() is not None for ref in given)
    home = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert list(home) == list(SHAPES)
    for file in files:
        held = load_file(file)
        assert {name for name, at in home.items() if at == file.name} == set(held)
        size = sum(t.nbytes for t in held.values())
        assert size <= SHARD or len(held) == 1, "only what is larger has a file to itself"
        for name, got in held.items():
            assert torch.equal(got, tensor(name).to(dtype))


def test_what_fits_is_one_file_without_an_index(tmp_path: Path) -> None:
    (file,) = write_shards(tmp_path, SHAPES, tensor, torch.float32)
    assert file.name == "model.safetensors"
    assert not (tmp_path / INDEX).exists()
    assert load_file(file).keys() == SHAPES.keys()
