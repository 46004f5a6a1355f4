"""Inputs for the readers of weight files: safetensors, torch's two formats, pickles, an index.

Where the readers of safetensors and of torch accept a file too, the values have to be theirs.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch

from fuzz_judge import CANARY, Files, Kind
from fuzz_mutations import ODD_TEXTS, changed, odd_bytes, to_json
from polymerge.checkpoints import open_checkpoint
from polymerge.checkpoints.safetensors import Head, read_safetensors
from polymerge.checkpoints.tensor_info import Contents
from polymerge.checkpoints.torch_files import read_torch
from polymerge.checkpoints.torch_pickle import Unpickler

__all__ = ["KINDS", "saved_by_torch"]

_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL", "F8_E4M3",
           "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "f32", "X", "")  # fmt: skip
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8}


# --- safetensors


def _header(random: Random) -> tuple[dict[str, Any], int]:
    """A valid header and the bytes that its tensors take."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if random.random() < 0.5 else {}
    end = 0
    for number in range(random.choice((0, 1, 2, 3, 8))):
        dtype = random.choice(tuple(_BITS))
        shape = [random.choice((0, 1, 2, 3, 5)) for _ in range(random.choice((0, 1, 1, 2, 2, 3)))]
        start, count = end, 1
        for size in shape:
            count *= size
        end += count * _BITS[dtype] // 8
        name = f"model.layers.{number}.self_attn.q_proj.weight" if random.random() < 0.8 else random.choice(ODD_TEXTS)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return header, end


def _changed_header(random: Random) -> tuple[bytes, int]:
    header, end = _header(random)
    if random.random() < 0.4 and (names := [name for name in header if name != "__metadata__"]):
        entry = header[random.choice(names)]
        match random.randrange(3):
            case 0:
                entry["dtype"] = random.choice(_DTYPES)
            case 1:
                entry["shape"] = [
                    random.choice((0, 1, 2**31, 2**32, 2**62, 2**63)) for _ in range(random.choice((1, 2, 65)))
                ]
            case _:
                entry["data_offsets"] = [random.choice((0, 1, end, end + 1, 2**63)), random.choice((0, end, 2**64))]
        value: Any = header
    elif random.random() < 0.05:
        value = header
    else:
        value = changed(header, random)
    text = to_json(value, random)
    return text + b" " * (-len(text) % 8 if random.random() < 0.7 else 0), end


def _make_header(random: Random) -> Files:
    text, end = _changed_header(random)
    length = (
        len(text) if random.random() < 0.95 else random.choice((0, 1, len(text) - 1, 2**63, 2**64 - 1, 10**8, 10**9))
    )
    size = 8 + len(text) + end if random.random() < 0.9 else random.choice((0, 7, 8, 9, 2**40, 2**63))
    return {"head": struct.pack("<QQ", size, length & (2**64 - 1)) + text}


def _read_header(folder: Path) -> object:
    raw = (folder / "head").read_bytes()
    return read_safetensors(folder / "x.safetensors", Head(raw[8:], int.from_bytes(raw[:8], "little")))


def _make_safetensors(random: Random) -> Files:
    text, end = _changed_header(random)
    data = struct.pack("<Q", len(text)) + text + random.randbytes(end)
    return {"model.safetensors": odd_bytes(data, random) if random.random() < 0.5 else data}


def _read_safetensors(folder: Path) -> object:
    file = folder / "model.safetensors"
    found = Contents(read_safetensors(file))
    try:
        theirs = dict(safetensors.deserialize(file.read_bytes()))
    except Exception:  # the library is the judge of nothing but of what it accepts
        return found
    ours = {one.name: (one.dtype, list(one.shape), data) for one, data in _values(file, found)}
    expected = {name: (one["dtype"], list(one["shape"]), bytes(one["data"])) for name, one in theirs.items()}
    assert ours == expected, "other values than those of safetensors"
    return found


def _values(file: Path, contents: Contents) -> Iterator[tuple[Any, bytes]]:
    raw = file.read_bytes()
    for one in contents.entries:
        assert 0 <= one.start <= one.start + one.nbytes <= len(raw), f"{one.name!r} lies outside of its file"
        yield one, raw[one.start : one.start + one.nbytes]


# --- torch's formats


def saved_by_torch(new: bool) -> tuple[bytes, ...]:
    """Files that torch writes, of many kinds, in its format of today or in the one before 1.6."""
    return _saved(new)


@cache
def _saved(new: bool) -> tuple[bytes, ...]:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tied = torch.ones(2, 3, dtype=torch.bfloat16)
    states: list[Any] = [
        {"a.weight": base, "b": torch.zeros(0), "c": torch.tensor(1.5)},
        OrderedDict([("tied", tied), ("also", tied), ("view", base[1:]), ("t", base.t())]),
        {"state_dict": {"x": base.half(), "y": torch.arange(3)}, "epoch": 7, "lr": 0.1},
        {"model": {f"layers.{one}.weight": torch.full((2,), float(one)) for one in range(6)}},
        {"p": torch.nn.Parameter(tied), "n": None, "list": [1, "a", (2.5, True)], "u": torch.ones(2,
        dtype=torch.uint16)},
        {"f8": torch.ones(4).to(torch.float8_e4m3fn), "bool": torch.tensor([True, False]),
        "z": base.to(torch.complex64)},
        {"sparse": torch.eye(2).to_sparse(), "conj": base.to(torch.complex64).conj()},
        [base], base, {}, {"module": {}}, {"state_dict": {"x": base}, "model": {"y": base}},
    ]  # fmt: skip
    found = []
    for state in states:
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(state, file, _use_new_zipfile_serialization=new)
        found.append(file.getvalue())
    return tuple(found)


def _members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _make_zip(random: Random) -> Files:
    data = random.choice(_saved(True))
    if random.random() < 0.45:
        return {"pytorch_model.bin": odd_bytes(data, random)}
    members = _members(data)
    root = next(iter(members)).partition("/")[0]
    pickled = f"{root}/data.pkl"
    match random.randrange(6):
        case 0 | 1 | 2:
            members[pickled] = _odd_pickle(members[pickled], random)
        case 3:
            name = random.choice(list(members))
            members[name] = random.choice((b"", b"big", members[name][:-1], members[name] * 2, random.randbytes(40)))
        case 4:
            name = random.choice(list(members))
            members[random.choice((*ODD_TEXTS[:8], f"{root}/../x", f"{root}/data/-1", "x/data.pkl"))] = members.pop(
                name
            )
        case _:
            del members[random.choice(list(members))]
    stream = io.BytesIO()
    packed = zipfile.ZIP_DEFLATED if random.random() < 0.05 else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", packed) as archive:
        warnings.simplefilter("ignore")
        for name, held in members.items():
            archive.writestr(zipfile.ZipInfo(name.replace("\x00", "") or "x"), held, packed)
    data = stream.getvalue()
    if random.random() < 0.5:  # the directory, where each member is said to lie
        directory = data.rfind(b"PK\x01\x02") if random.random() < 0.5 else data.find(b"PK\x01\x02")
        data = data[:directory] + odd_bytes(data[directory:], random)
    return {"pytorch_model.bin": data}


def _make_legacy(random: Random) -> Files:
    data = random.choice(_saved(False))
    if random.random() < 0.5:
        return {"pytorch_model.bin": odd_bytes(data, random)}
    ends = []
    stream = io.BytesIO(data)
    for _ in range(5):
        for _opcode in pickletools.genops(stream):
            pass
        ends.append(stream.tell())
    parts = [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]
    place = random.choice((2, 3, 3, 3, 4, 5))
    parts[place] = odd_bytes(parts[place], random) if place == 5 else _odd_pickle(parts[place], random)
    return {"pytorch_model.bin": b"".join(parts)}


def _read_torch(folder: Path) -> object:
    file = folder / "pytorch_model.bin"
    found = read_torch(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = torch.load(file, weights_only=True, map_location="cpu")
        nested = next(
            (theirs[one] for one in ("state_dict", "model", "module") if isinstance(theirs.get(one), Mapping)), {}
        )
        theirs = theirs if any(isinstance(one, torch.Tensor) for one in theirs.values()) else nested
        expected = {
            name: one.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if one.numel() else b""
            for name, one in theirs.items()
            if isinstance(one, torch.Tensor) and not one.is_sparse
        }
    except Exception:  # torch is the judge of nothing but of what it accepts
        return found
    ours = {one.name: data for one, data in _values(file, found)}
    assert ours.keys() <= expected.keys(), "other tensors than those of torch"
    assert all(expected[name] == data for name, data in ours.items()), "other values than those of torch"
    return found


# --- pickles alone


def _evil(random: Random) -> bytes:
    """A pickle that runs code where it is loaded as pickles are."""
    module, name, argument = random.choice(
        (("sys", "audit", CANARY), ("os", "system", "true"), ("posix", "system", "true"), ("builtins", "eval", "1"),
         ("builtins", "exec", f"import sys; sys.audit({CANARY!r})"), ("subprocess", "getoutput", "true"),
         ("importlib", "import_module", "antigravity"), ("torch.serialization", "load", "/dev/null"),
         ("torch._utils", "_rebuild_tensor_v2.__globals__", "x"), ("torch", "load", "x"), ("webbrowser", "open", "x"))
    )  # fmt: skip
    said = pickle.dumps(argument, protocol=0)[:-1]
    return random.choice(
        (f"c{module}\n{name}\n".encode() + b"(" + said + b"tR.", b"(" + said + f"i{module}\n{name}\n.".encode(),
         b"(" + f"c{module}\n{name}\n".encode() + said + b"o.",
         pickle.dumps(module)[:-1] + pickle.dumps(name)[2:-1] + b"\x93(" + said + b"tR.")
    )  # fmt: skip


_OPCODES = tuple(one.code.encode("latin-1") for one in pickletools.opcodes)
_ARGUMENTS: tuple[bytes, ...] = (
    b"", b"\x00", b"\x01", b"\xff", b"\x00\x00\x00\x00", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\x01\x00\x00\x00a",
    b"\x00\x00\x00\x40", b"\xff" * 8, b"\x00" * 8, b"0\n", b"1\n", b"9" * 5000 + b"L\n", b"99999999999999999999\n",
    b"-1\n", b"'a'\n", b"nan\n", b"1e400\n", b"torch\nFloatStorage\n", b"collections\nOrderedDict\n", b"\n",
    b"torch._utils\n_rebuild_tensor_v2\n", b"\x01a",
)  # fmt: skip


def _odd_pickle(data: bytes, random: Random) -> bytes:
    """A pickle with one to four of its opcodes changed, put in, taken out or repeated."""
    match random.randrange(8):
        case 0:
            return odd_bytes(data, random)
        case 1:
            return _evil(random)
        case 2:
            place = random.choice([at for _, _, at in pickletools.genops(data)])
            return data[:place] + _evil(random)[:-1] + data[place:]
    ends = [at for _, _, at in pickletools.genops(data)]
    opcodes = [data[start:end] for start, end in zip(ends, [*ends[1:], len(data)], strict=True)]
    for _ in range(random.choice((1, 1, 2, 3, 4))):
        place = random.randrange(len(opcodes) + 1)
        match random.randrange(6):
            case 0:
                opcodes[place:place] = [random.choice(_OPCODES) + random.choice(_ARGUMENTS)]
            case 1 if place < len(opcodes):
                del opcodes[place]
            case 2 if place < len(opcodes):
                opcodes[place:place] = [opcodes[place]] * random.choice((1, 2, 200))
            case 3 if place < len(opcodes):
                opcodes[place] = odd_bytes(opcodes[place], random, 1)
            case 4 if opcodes:
                opcodes[place:place] = [random.choice(opcodes)]
            case _ if place < len(opcodes):
                other = random.randrange(len(opcodes))
                opcodes[place], opcodes[other] = opcodes[other], opcodes[place]
    return b"".join(opcodes)


@cache
def _plain_pickles() -> tuple[bytes, ...]:
    values: tuple[Any, ...] = (
        {"a": [1, 2.5, "x", b"y", None, True, (1,)]}, [[]] * 3, {"n": {"n": {"n": {}}}}, 10**40, {1, 2}, "é" * 300,
        OrderedDict(a=1), frozenset({1}), bytearray(b"x"), [1, [2, [3, [4]]]],
    )  # fmt: skip
    made = [pickle.dumps(value, protocol=protocol) for value in values for protocol in range(6)]
    return (*made, *(_members(data)[name] for data in _saved(True) for name in _members(data) if name.endswith(".pkl")))


def _make_pickle(random: Random) -> Files:
    if random.random() < 0.1:  # of opcodes alone
        opcodes = [random.choice(_OPCODES) + random.choice(_ARGUMENTS) for _ in range(random.choice((2, 5, 20, 60)))]
        return {"data.pkl": b"".join(opcodes) + b"."}
    if random.random() < 0.05:  # a list of the one before, twice, and so on
        return {
            "data.pkl": b"]q\x00."
            if random.random() < 0.1
            else b"]" + b"2" * 3 + b"(l" + b"(h\x00h\x00lq\x00" * 60 + b"."
        }
    return {"data.pkl": _odd_pickle(random.choice(_plain_pickles()), random)}


def _read_pickle(folder: Path) -> object:
    return Unpickler(io.BytesIO((folder / "data.pkl").read_bytes()), folder / "data.pkl").value()


# --- an index


def _make_index(random: Random) -> Files:
    files: dict[str, bytes] = {}
    weight_map: dict[str, str] = {}
    torch_format = random.random() < 0.3
    shards = random.choice((1, 2, 3))
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        tensors = {f"model.layers.{shard}.{end}.weight": torch.zeros(2, 2) for end in ("q", "k")}
        if torch_format:
            name = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
            stream = io.BytesIO()
            torch.save(tensors, stream)
            files[name] = stream.getvalue()
        else:
            files[name] = safetensors.torch.save(tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index: Any = {"metadata": {"total_size": 64}, "weight_map": weight_map}
    if random.random() < 0.5:
        index["weight_map"] = changed(weight_map, random)
    else:
        index = changed(index, random)
    if (
        random.random() < 0.3
        and isinstance(index, dict)
        and isinstance(index.get("weight_map"), dict)
        and index["weight_map"]
    ):
        places = (*ODD_TEXTS, *files, "../model.safetensors", "x/" * 200 + "a.safetensors",
        "é" * 200 + ".safetensors",
                  "a\x00b.safetensors", "config.json", "\udcff.safetensors",
                  "model-00001-of-99999.safetensors")  # fmt: skip
        index["weight_map"][random.choice(list(index["weight_map"]))] = random.choice(places)
    base = "pytorch_model.bin.index.json" if torch_format else "model.safetensors.index.json"
    files[base] = to_json(index, random)
    if random.random() < 0.15:
        files.pop(random.choice(list(files)))
    return files


def _read_index(folder: Path) -> object:
    return open_checkpoint("x", folder)


KINDS = (
    Kind("safetensors header", _make_header, _read_header, 100),
    Kind("safetensors file", _make_safetensors, _read_safetensors, 100),
    Kind("torch zip", _make_zip, _read_torch, 80),
    Kind("torch legacy", _make_legacy, _read_torch, 80),
    Kind("pickle", _make_pickle, _read_pickle, 100),
    Kind("index", _make_index, _read_index, 40),
)
