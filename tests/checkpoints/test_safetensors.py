import json
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from polymerge.checkpoints import safetensors as safetensors_files
from polymerge.checkpoints.bounds import HEADER_BYTES, NAME_LENGTH, PROBLEMS
from polymerge.checkpoints.safetensors import read_safetensors
from polymerge.checkpoints.tensor_info import TensorInfo, listed
from polymerge.errors import CheckpointError, PolymergeError, Refused

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def write(path: Path, header: Any, data: int = 0, text: bytes | None = None) -> Path:
    text = json.dumps(header).encode() if text is None else text
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def tensor(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refusal(path: Path) -> list[str]:
    """What is wrong with a file; every message has to name it."""
    with pytest.raises(PolymergeError) as caught:
        read_safetensors(path)
    problems = caught.value.problems if isinstance(caught.value, Refused) else (caught.value,)
    messages = [str(problem) for problem in problems]
    assert all(isinstance(problem, CheckpointError) for problem in problems)
    assert all(str(path) in message and message.endswith(".") for message in messages)
    return messages


def test_reads_what_the_header_says(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "later": tensor("BF16", [2, 3], 4, 16),
        "scalar": tensor("F32", [], 0, 4),
        "nothing": tensor("F32", [0, 7], 4, 4),
        "packed": tensor("F4", [4], 16, 18),
    }
    path = write(tmp_path / "x.safetensors", header, data=18)
    start = path.stat().st_size - 18
    assert read_safetensors(path) == (
        TensorInfo("scalar", "F32", (), path, start, 4),
        TensorInfo("nothing", "F32", (0, 7), path, start + 4, 0),
        TensorInfo("later", "BF16", (2, 3), path, start + 4, 12),
        TensorInfo("packed", "F4", (4,), path, start + 16, 2),
    )


def test_a_header_may_be_padded_and_empty(tmp_path: Path) -> None:
    assert read_safetensors(write(tmp_path / "x.safetensors", None, text=b"{}      ")) == ()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is 0 bytes long"),
        (b"\x02\0\0\0\0\0\0", "is 7 bytes long"),
        (struct.pack("<Q", 3) + b"{}", "should be 3 bytes long, only 2 follow"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", f"should be {2**64 - 1} bytes long"),
        (struct.pack("<Q", 2) + b"[]", "begins with b'[', not with '{'"),
        (struct.pack("<Q", 3) + b" {}", "begins with b' ', not with '{'"),
        (struct.pack("<Q", 0), "begins with b'', not with '{'"),
        (struct.pack("<Q", 4) + b'{"a}', "not JSON: Unterminated string starting at column 2"),
        (struct.pack("<Q", 4) + b'{"\xff"', "not UTF-8: byte 2 is 0xff"),
        (struct.pack("<Q", 12) + b'{"\\ud800":1}', "half of a surrogate pair"),
        (struct.pack("<Q", 90_005) + b'{"a":' + b"[" * 90_000, "nested too deeply"),
        (struct.pack("<Q", 13) + b'{"a":1,"a":2}', "'a' appears twice in one object"),
        (struct.pack("<Q", 9005) + b'{"a":' + b"9" * 9000, "cannot be read"),
    ],
)
def test_a_broken_header_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    (message,) = refusal(path)
    assert said in message


def test_a_header_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", HEADER_BYTES + 1))
        file.truncate(HEADER_BYTES + 100)  # sparse
    (message,) = refusal(path)
    assert f"{HEADER_BYTES + 1} bytes long, more than the {HEADER_BYTES}" in message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ([], "expected object, got array"),
        ({"dtype": "F32", "shape": [1]}, "data_offsets is missing"),
        ({"shape": [1], "data_offsets": [0, 4]}, "dtype is missing"),
        ({**tensor("F32", [1], 0, 4), "scale": 2}, "object contains unknown field scale"),
        (tensor(32, [1], 0, 4), "dtype: expected str, got 32"),
        (tensor("F32", 1, 0, 4), "shape: expected array, got 1"),
        (tensor("F32", [True], 0, 4), "shape[0]: expected int, got true"),
        (tensor("F32", [1.5], 0, 4), "shape[0]: expected int, got 1.5"),
        (tensor("F32", [2, -1], 0, 4), "shape[1]: expected int >= 0, got -1"),
        (tensor("F32", [2**63], 0, 4), "shape[0]: "),
        (tensor("F32", [1] * 65, 0, 4), "shape: expected array of length <= 64"),
        (tensor("F32", [2**62, 2**62], 0, 4), f"takes {2**126} bytes, its data_offsets span 4"),
        (tensor("F32", [1], 4, 0), "data_offsets [4, 0] are not in order"),
        (tensor("F32", [1], -4, 0), "data_offsets[0]: expected int >= 0"),
        (tensor("F32", [1], False, 4), "data_offsets[0]: expected int, got bool"),
        ({**tensor("F32", [1], 0, 4), "data_offsets": [0, 2, 4]}, "data_offsets: expected array of length 2, got 3"),
        (tensor("F32", [2], 0, 4), "F32 [2] takes 8 bytes, its data_offsets span 4"),
        (tensor("F4", [3], 0, 4), "F4 [3] does not fill whole bytes"),
    ],
)
def test_a_broken_entry_is_refused(tmp_path: Path, fields: Any, said: str) -> None:
    (message,) = refusal(write(tmp_path / "x.safetensors", {"a.weight": fields}, data=4))
    assert "'a.weight'" in message
    assert said in message


def test_every_problem_is_reported(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"step": 3},
        "a": tensor("F3", [1], 0, 4),
        "b": tensor("F3", [1], 4, 8),
        "c": tensor("F32", [7], 8, 12),
        "d": tensor("F32", "?", 12, 16),
    }
    metadata, c, d, dtypes = refusal(write(tmp_path / "x.safetensors", header, data=16))
    assert "__metadata__: ['step']: expected str, got 3" in metadata
    assert "'c': F32 [7] takes 28 bytes" in c
    assert "'d': shape: expected array" in d
    assert "dtype 'F3' of 'a', 'b' is not known" in dtypes
    assert "Upgrade polymerge" in dtypes


def test_tensors_fill_the_data_exactly(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    a, b = tensor("F32", [2], 0, 8), tensor("F32", [2], 8, 16)
    (truncated,) = refusal(write(path, {"a": a, "b": b}, data=15))
    size = path.stat().st_size
    assert f"{size + 1} bytes expected, {size} there; cut off 'b'" in truncated
    (trailing,) = refusal(write(path, {"a": a, "b": b}, data=17))
    assert "the last 1 bytes belong to none" in trailing
    (overlap,) = refusal(write(path, {"a": a, "b": tensor("F32", [2], 4, 12)}, data=12))
    assert "'b' begins at byte" in overlap
    assert "inside 'a', which ends at byte" in overlap
    (hole,) = refusal(write(path, {"a": a, "b": tensor("F32", [2], 12, 20)}, data=20))
    assert "'b' begins at byte" in hole
    assert "after a gap behind 'a'" in hole
    (late,) = refusal(write(path, {"b": b}, data=16))
    assert "after a gap behind the header" in late


def test_a_long_list_of_names_is_cut() -> None:
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed(list("abcdefgh")) == "'a', 'b', 'c' and 5 more"


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
            lambda s: s != "__metadata__"
        ),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_what_safetensors_writes_is_found_byte_for_byte(described: dict[str, tuple[str, list[int]]]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (dtype, shape) in described.items():
        width = DTYPES[dtype].itemsize
        raw = torch.randint(0, 2, (*shape, width), generator=generator, dtype=torch.uint8)  # 0 and 1 suit bool as well
        tensors[name] = raw.view(DTYPES[dtype]).reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_file(tensors, path)
        data = path.read_bytes()
        entries = read_safetensors(path)
    assert {entry.name: (entry.dtype, list(entry.shape)) for entry in entries} == described
    for entry in entries:
        expected = tensors[entry.name].contiguous().reshape(-1).view(torch.uint8)
        assert data[entry.start : entry.start + entry.nbytes] == expected.numpy().tobytes()


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_byte_is_refused_or_harmless(data: st.DataObject) -> None:
    header = {"a": tensor("F32", [2], 0, 8), "b": tensor("BF16", [2, 2], 8, 16)}
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "x.safetensors"), header, data=16)
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        try:
            entries = read_safetensors(path)
        except (CheckpointError, Refused):
            return
    assert all(entry.start + entry.nbytes <= len(content) for entry in entries)


def test_reading_imports_no_torch() -> None:
    code = (
        "import sys, polymerge.checkpoints\n"
        "print(sorted({'torch', 'safetensors', 'transformers', 'numpy', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_name_is_as_long_as_stated_and_no_longer(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"x" * NAME_LENGTH: tensor("F32", [1], 0, 4)}, data=4)
    assert len(read_safetensors(path)[0].name) == NAME_LENGTH
    (message,) = refusal(write(path, {"x" * (NAME_LENGTH + 1): tensor("F32", [1], 0, 4)}, data=4))
    assert f"its name is {NAME_LENGTH + 1} characters long, at most {NAME_LENGTH} are read" in message
    assert len(message) < 1000


def test_tensors_are_counted_before_any_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.safetensors", {f"t{n}": tensor("F32", [1], 4 * n, 4 * n + 4) for n in range(9)}, data=36)
    monkeypatch.setattr(safetensors_files, "TENSORS", 9)
    assert len(read_safetensors(path)) == 9
    monkeypatch.setattr(safetensors_files, "TENSORS", 8)
    assert "describes more than 8 tensors" in refusal(path)[0]


def test_thousands_of_wrong_entries_are_a_few_messages(tmp_path: Path) -> None:
    for entry in ({}, tensor("F32", [2], 0, 4), tensor("F32", [1], 4, 8)):
        path = write(tmp_path / "x.safetensors", {f"t{n}": entry for n in range(5000)}, data=4)
        assert len(refusal(path)) <= PROBLEMS + 2


def test_what_no_tensor_has_is_not_built(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", None, text=b'{"a":{"dtype":[' + b"[]," * (5 * 2**20) + b"[]]}}")
    tracemalloc.start()
    (message,) = refusal(path)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "it holds more than" in message
    assert used < 5 * path.stat().st_size


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":%s,"a":%s}',
        b'{"a":%s,"\\u0061":%s}',
        b'{"a":%s,"__metadata__":{},"a":%s}',
        b'{"__metadata__":{},"a":%s,"__metadata__":{},"b":%s}',
        b'{"a":%s,"b":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"shape":[0]},"c":%s}',
        b'{"a":%s,"b":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"sh\\u0061pe":[0]},"c":%s}',
        b'{"a":%s,"b":{"sh\\u0061pe":[0],"dtype":"F32","data_offsets":[0,0]},"a":%s}',
    ],
)
def test_a_key_appears_once_however_it_is_spelled(tmp_path: Path, text: bytes) -> None:
    entry = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    path = write(tmp_path / "x.safetensors", None, text=text % (entry, entry))
    assert "appears twice in one object" in refusal(path)[0]


def test_names_and_metadata_may_hold_what_looks_like_a_header(tmp_path: Path) -> None:
    header = {
        "__metadata__": {'a "quoted" text': '{"dtype": "F32", \\ "shape": []}', "b": ":" * 50},
        '"dtype"': tensor("F32", [1], 0, 4),
        "shape": tensor("F32", [1], 4, 8),
        "data_offsets": tensor("F32", [1], 8, 12),
        "é\\": tensor("F32", [1], 12, 16),
    }
    path = write(tmp_path / "x.safetensors", header, data=16)
    assert [one.name for one in read_safetensors(path)] == ['"dtype"', "shape", "data_offsets", "é\\"]
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(header) - {"__metadata__"}


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_what_both_accept_has_the_librarys_values(data: st.DataObject) -> None:
    header = {"a": tensor("F32", [2], 0, 8), "b": tensor("BF16", [2, 2], 8, 16), "__metadata__": {"a": "b"}}
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "x.safetensors"), header)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            place = data.draw(st.integers(8, len(content) - 1))
            content[place] = data.draw(st.sampled_from(b'0123456789[]{},:"ab \\FBT'))
        path.write_bytes(content + bytes(range(16)))
        try:
            ours = read_safetensors(path)
        except PolymergeError:
            return
        whole = path.read_bytes()
        with safe_open(path, "pt") as file:
            theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    assert {one.name: whole[one.start : one.start + one.nbytes] for one in ours} == {
        name: value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, value in theirs.items()
    }
    assert {one.name: one.shape for one in ours} == {name: tuple(value.shape) for name, value in theirs.items()}
