import copyreg
import io
import pickle
import struct
import tempfile
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polymerge.checkpoints import torch_files
from polymerge.checkpoints.torch_files import read_torch
from polymerge.checkpoints.torch_pickle import Call, Dict, Unpickler
from polymerge.errors import CheckpointError, PolymergeError, Refused

ZIP, LEGACY = True, False
BOTH = pytest.mark.parametrize("new", [ZIP, LEGACY], ids=["zip", "legacy"])
MAGIC, PROTOCOL, MACHINE = 0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.complex128: "C128",
    # these are written as untyped storages
    torch.uint16: "U16",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def save(path: Path, value: Any, new: bool = ZIP) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=new)
    return path


def refusal(path: Path) -> list[str]:
    """What is wrong with a file; every message has to name it and to end in a sentence on what to do."""
    with pytest.raises(PolymergeError) as caught:
        read_torch(path)
    problems = caught.value.problems if isinstance(caught.value, Refused) else (caught.value,)
    messages = [str(problem) for problem in problems]
    assert all(isinstance(problem, CheckpointError) for problem in problems)
    assert all(str(path) in message and message.endswith(".") for message in messages)
    return messages


def assert_bytes_agree(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    data = path.read_bytes()
    entries = {entry.name: entry for entry in read_torch(path).entries}
    assert set(entries) == set(tensors)
    for name, tensor in tensors.items():
        entry = entries[name]
        assert (entry.dtype, entry.shape) == (DTYPES[tensor.dtype], tuple(tensor.shape))
        expected = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data[entry.start : entry.start + entry.nbytes] == expected


def rezipped(path: Path, change: Callable[[str, bytes], bytes | None], **options: Any) -> Path:
    """Write a zip archive anew, with each member changed, or left out where `change` gives None."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            if (changed := change(name, content)) is not None:
                archive.writestr(name, changed)
    return path


class Raw:
    """Pickled as a call of whatever name, with whatever arguments."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


class Storage:
    def __init__(self, *identity: Any) -> None:
        self.identity = ("storage", *identity)


def handmade(
    path: Path, value: Any, storages: dict[str, bytes], protocol: int = 2, byteorder: bytes = b"little"
) -> Path:
    """An archive as torch.save writes one, around any pickle."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.identity if isinstance(obj, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", buffer.getvalue())
        archive.writestr("m/byteorder", byteorder)
        for key, content in storages.items():
            archive.writestr(f"m/data/{key}", content)
    return path


def rebuilt(storage: Any, offset: Any = 0, shape: Any = (2,), strides: Any = (1,), *more: Any) -> Raw:
    return Raw(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, OrderedDict(), *more)


def floats(count: Any = 2, key: Any = "0") -> Storage:
    return Storage(torch.FloatStorage, key, "cpu", count)


# what torch.save writes


@BOTH
def test_every_dtype(tmp_path: Path, new: bool) -> None:
    tensors = {f"of.{code}": torch.ones(3, 2, dtype=torch.uint8).to(dtype) for dtype, code in DTYPES.items()}
    assert_bytes_agree(save(tmp_path / "m.bin", tensors, new), tensors)


@BOTH
def test_shapes_views_and_parameters(tmp_path: Path, new: bool) -> None:
    whole = torch.arange(24, dtype=torch.float32)
    tagged = torch.nn.Parameter(torch.ones(2))
    tagged.origin = "here"  # type: ignore[attr-defined]  # python attributes take another way through pickle
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "view": whole[4:16].view(3, 4),
        "end": whole[24:],
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "tagged": tagged,
        "column": torch.arange(5.0)[:, None].t(),  # strides that only sizes of 1 tell apart from contiguous ones
        "buffer": torch.zeros(2, dtype=torch.bool),
    }
    assert_bytes_agree(save(tmp_path / "m.bin", tensors, new), tensors)


@BOTH
def test_tied_tensors_are_aliases_and_views_are_not(tmp_path: Path, new: bool) -> None:
    embed = torch.ones(4, 2)
    state = {"b.embed": embed, "a.head": embed, "a.again": embed.view(4, 2), "half": embed[:2], "flat": embed.view(8)}
    read = read_torch(save(tmp_path / "m.bin", state, new))
    assert read.aliases == {"a.head": "b.embed", "a.again": "b.embed"}
    assert [entry.name for entry in read.entries] == list(state)
    assert len({entry.start for entry in read.entries}) == 1


@BOTH
def test_a_module_and_its_metadata(tmp_path: Path, new: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = module.state_dict()
    assert vars(state)["_metadata"]  # an attribute of the dict, which pickle writes as state
    assert_bytes_agree(save(tmp_path / "m.bin", state, new), dict(state))


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@BOTH
def test_every_protocol(tmp_path: Path, new: bool, protocol: int) -> None:
    state: dict[str, Any] = OrderedDict(
        a=torch.ones(300), b=torch.zeros(2, 2), n=10**30, s="x" * 300, f=1.5, raw=b"bytes", t=(1, {2})
    )
    torch.save(state, tmp_path / "m.bin", pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    assert_bytes_agree(tmp_path / "m.bin", {"a": state["a"], "b": state["b"]})


@BOTH
def test_what_is_no_tensor_is_skipped_and_said(tmp_path: Path, new: bool) -> None:
    state = {"w": torch.ones(2), "epoch": 3, "name": "x", "none": None, "more": {"v": torch.ones(1)}, 7: [1]}
    read = read_torch(save(tmp_path / "m.bin", state, new))
    assert [entry.name for entry in read.entries] == ["w"]
    assert read.skipped == {
        "epoch": "is of type int, not a tensor",
        "name": "is of type str, not a tensor",
        "none": "is None, not a tensor",
        "more": "is a dict, not a tensor",
        "entry 5": "is of type list, not a tensor",
    }


@pytest.mark.parametrize("nest", ["state_dict", "model", "module"])
def test_one_level_of_nesting(tmp_path: Path, nest: str) -> None:
    inner = {"w": torch.ones(2)}
    path = save(tmp_path / "m.pth", {"epoch": 1, nest: inner, "optimizer": {"m": torch.ones(2)}})
    assert_bytes_agree(path, inner)
    beside = f"lies beside '{nest}', which is the model"
    assert read_torch(path).skipped == {"epoch": beside, "optimizer": beside}


def test_two_nests_are_refused(tmp_path: Path) -> None:
    state = {"w": torch.ones(2)}
    (message,) = refusal(save(tmp_path / "m.pth", {"model": state, "state_dict": state}))
    assert "dicts under model and state_dict" in message


@BOTH
def test_what_is_no_dict_is_refused(tmp_path: Path, new: bool) -> None:
    (message,) = refusal(save(tmp_path / "m.pth", [torch.ones(2)], new))
    assert "holds of type list, not a dict" in message or "not a dict of tensors" in message


# tensors that are no plain bytes


def test_every_unreadable_tensor_is_named(tmp_path: Path) -> None:
    state = {
        "good": torch.ones(2),
        "turned": torch.arange(6.0).view(2, 3).t(),
        "strided": torch.arange(6.0)[::2],
        "spread": torch.ones(1).expand(3),
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
        "bits": torch.ones(2, dtype=torch.uint8).view(torch.bits8),
    }
    messages = refusal(save(tmp_path / "m.pth", state))
    assert [message.split("'")[1] for message in messages] == [name for name in state if name != "good"]
    said = dict(zip([name for name in state if name != "good"], messages, strict=True))
    assert "strides [1, 3] for shape [3, 2], [2, 1] expected. Save it after .contiguous()" in said["turned"]
    assert "is not contiguous" in said["strided"]
    assert "is not contiguous" in said["spread"]
    assert "is sparse" in said["sparse"]
    assert "meta device" in said["meta"]
    assert "conjugate" in said["conjugate"]
    assert "torch.bits8, which safetensors does not have" in said["bits"]


@BOTH
@pytest.mark.filterwarnings("ignore")  # torch means to drop quantized tensors and says so
def test_a_quantized_tensor_is_refused_by_name(tmp_path: Path, new: bool) -> None:
    quantized = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    (message,) = refusal(save(tmp_path / "m.pth", {"a": torch.ones(1), "q": quantized}, new))
    assert "'q' is quantized" in message


# what a forged or damaged file says


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (rebuilt(floats(3)), "needs 8 bytes of storage '0'"),
        (rebuilt(floats(), 1), "needs 12 bytes of storage '0', which has 8"),
        (rebuilt(floats(), shape=(2**40, 2**40), strides=(2**40, 1)), f"needs {2**82} bytes"),
        (rebuilt(floats(key="1")), "in storage '1', which the file lacks"),
        (rebuilt(floats(key=0)), "not described as torch describes one"),
        (rebuilt(floats(-2)), "not described as torch describes one"),
        (rebuilt(floats("2")), "not described as torch describes one"),
        (rebuilt(Storage()), "not described as torch describes one"),
        (rebuilt(Storage(torch.float32, "0", "cpu", 2)), "not described as torch describes one"),
        (rebuilt(Storage(torch.FloatStorage, "0", "cpu", 2, ("v", 0, 1))), "Save it again with torch >= 1.0"),
        (rebuilt("storage"), "not described as torch describes a tensor"),
        (rebuilt(floats(), -1), "not described as torch describes a tensor"),
        (rebuilt(floats(), 0, (-2,)), "not at most 64 sizes"),
        (rebuilt(floats(), 0, (True,)), "not at most 64 sizes"),
        (rebuilt(floats(), 0, "2"), "not at most 64 sizes"),
        (rebuilt(floats(), 0, (1,) * 65, (1,) * 65), "not at most 64 sizes"),
        (rebuilt(floats(), 0, (2,), (1, 1)), "is not contiguous"),
        (Raw(torch._utils._rebuild_tensor_v2, floats()), "not described as torch describes a tensor"),
        (Raw(torch._utils._rebuild_parameter, 3, True), "not described as torch describes a tensor"),
        (Raw(torch._tensor._rebuild_from_type_v2, 3), "not described as torch describes a tensor"),
        (
            Raw(torch._utils._rebuild_tensor_v3, floats(), 0, (2,), (1,), False, OrderedDict(), "float32"),
            "is of dtype of type str",
        ),
    ],
)
def test_a_forged_tensor_is_refused(tmp_path: Path, value: Any, said: str) -> None:
    storage = bytes(4 if said == "needs 8 bytes of storage '0'" else 8)
    (message,) = refusal(handmade(tmp_path / "m.bin", {"w": value}, {"0": storage}))
    assert "'w'" in message
    assert said in message


def test_handmade_archives_are_otherwise_read(tmp_path: Path) -> None:
    size = Raw(torch.Size, [2, 1])
    state = {
        "sized": rebuilt(floats(), 0, size, (1, 1)),
        "old": Raw(torch._utils._rebuild_tensor, floats(), 1, (), ()),
        "parameter": Raw(torch._utils._rebuild_parameter, rebuilt(floats()), True, OrderedDict()),
    }
    path = handmade(
        tmp_path / "m.bin", Raw(OrderedDict, [[name, value] for name, value in state.items()]), {"0": bytes(8)}
    )
    assert {entry.name: entry.shape for entry in read_torch(path).entries} == {
        "sized": (2, 1),
        "old": (),
        "parameter": (2,),
    }


def test_long_local_headers_are_stepped_over_and_a_prefix_is_refused(tmp_path: Path) -> None:
    """Zip64 sizes lengthen a member's local header; whatever stands before the archive moves every offset."""
    path = save(tmp_path / "m.bin", {"w": torch.arange(3.0)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(content)
    assert_bytes_agree(path, {"w": torch.arange(3.0)})
    path.write_bytes(b"PK\x03\x04 and so on" + path.read_bytes())
    with pytest.raises(RuntimeError, match="invalid header or archive is corrupted"):
        torch.load(path)
    (message,) = refusal(path)
    assert "whose directory, at its end, cannot be read (it begins at byte" in message


def test_names_are_strings_and_unique(tmp_path: Path) -> None:
    pairs = [[3, rebuilt(floats())], ["w", rebuilt(floats())], ["w", rebuilt(floats())]]
    number, twice = refusal(handmade(tmp_path / "m.bin", Raw(OrderedDict, pairs), {"0": bytes(8)}))
    assert "name is of type int" in number
    assert "two tensors have the name 'w'" in twice


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    (message,) = refusal(handmade(tmp_path / "m.bin", {"w": rebuilt(floats())}, {"0": bytes(8)}, byteorder=b"big"))
    assert "byte order is big, only little is read" in message
    save(tmp_path / "l.bin", {"w": torch.ones(2)}, LEGACY)
    content = (tmp_path / "l.bin").read_bytes()
    (tmp_path / "l.bin").write_bytes(content.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))
    assert content != (tmp_path / "l.bin").read_bytes()
    (message,) = refusal(tmp_path / "l.bin")
    assert "byte order is big" in message


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"

    def fresh() -> Path:
        return save(path, {"w": torch.ones(200)})

    (truncated,) = refusal_after(fresh(), lambda content: content[:-100])
    assert "zip archive whose directory, at its end, cannot be read" in truncated
    (packed,) = refusal(rezipped(fresh(), lambda _, content: content, compression=zipfile.ZIP_DEFLATED))
    assert "compressed or encrypted" in packed
    (lacking,) = refusal(rezipped(fresh(), lambda name, content: None if name == "m/data/0" else content))
    assert "'w' has its bytes in storage '0', which the file lacks" in lacking
    (short,) = refusal(rezipped(fresh(), lambda name, content: content[:8] if name == "m/data/0" else content))
    assert "'w' needs 800 bytes of storage '0', which has 8" in short
    (none,) = refusal(rezipped(fresh(), lambda name, content: None if name == "m/data.pkl" else content))
    assert "0 members named 'data.pkl'" in none
    (moved,) = refusal_after(
        fresh(), lambda content: content.replace(b"PK\x03\x04", b"PK\x03\x05").replace(b"PK\x03\x05", b"PK\x03\x04", 1)
    )
    assert "do not lie where its directory says" in moved
    (garbled,) = refusal(rezipped(fresh(), lambda name, content: content[:-4] if name == "m/data.pkl" else content))
    assert "its pickle is damaged, or none that torch.save writes (it ends too early)" in garbled
    rezipped(fresh(), lambda _, content: content)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/data/0", bytes(800))
    (twice,) = refusal(path)
    assert "two members of the archive have one name" in twice


def refusal_after(path: Path, change: Callable[[bytes], bytes]) -> list[str]:
    path.write_bytes(change(path.read_bytes()))
    return refusal(path)


def test_a_damaged_legacy_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"

    def fresh() -> Path:
        return save(path, {"w": torch.ones(200), "v": torch.ones(3)}, LEGACY)

    size = fresh().stat().st_size
    (truncated,) = refusal_after(fresh(), lambda content: content[:-1])
    assert f"is truncated: {size} bytes expected up to storage 2 of 2, {size - 1} there" in truncated
    (trailing,) = refusal_after(fresh(), lambda content: content + b"more")
    assert "4 bytes follow the last storage" in trailing
    (cut,) = refusal_after(fresh(), lambda content: content[:120])
    assert "its pickle is damaged, or none that torch.save writes (it ends too early)" in cut
    save(path, {"w": torch.ones(3)}, LEGACY)
    (short,) = refusal_after(path, lambda content: content[:-20] + struct.pack("<q", 2) + bytes(8))
    assert "'w' needs 12 bytes of storage" in short
    for keys in (["unknown"], 3, [], [((),)]):
        parts = [MAGIC, PROTOCOL, MACHINE, {"w": 1}, keys]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
        if keys == []:
            assert read_torch(path).skipped == {"w": "is of type int, not a tensor"}
        else:
            assert "list of storages is not that of its tensors" in refusal(path)[0]


@pytest.mark.parametrize("content", [b"", b"P", b"<!DOCTYPE html>", b"\x80\x02.", pickle.dumps({"a": 1}), bytes(600)])
def test_what_torch_did_not_write_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(content)
    refusal(path)


def test_what_is_wrong_with_a_pickle_is_said(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    for content, cause in ((b"<!DOCTYPE html>", "opcode b'<' is unknown"), (b"\x80\x02K", "it ends too early")):
        path.write_bytes(content)
        assert f"none that torch.save writes ({cause})" in refusal(path)[0]


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", {"w": torch.ones(2)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/constants.pkl", b"")
    assert "TorchScript" in refusal(path)[0]


def test_the_pickle_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "m.pt", {"w": torch.ones(2)})
    monkeypatch.setattr(torch_files, "PICKLE_BYTES", 50)
    assert "more than the 50" in refusal(path)[0]


# code


def touch(path: str) -> None:
    Path(path).write_text("run")


def unpickled(program: bytes) -> Any:
    return Unpickler(io.BytesIO(program), Path("m.bin")).value()


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("where", ["zip", "legacy", "plain"])
def test_code_is_refused_and_never_run(tmp_path: Path, where: str, protocol: int) -> None:
    path, trace = tmp_path / "m.bin", tmp_path / "trace"
    value = {
        "w": 1,
        "x": Raw(eval, f"open({str(trace)!r}, 'w')"),
        "y": Raw(touch, str(trace)),
        "z": Raw(getattr, 1, "a"),
    }
    if where == "zip":
        handmade(path, value, {}, protocol)
    else:
        parts = [MAGIC, PROTOCOL, MACHINE, value, []] if where == "legacy" else [value]
        path.write_bytes(b"".join(pickle.dumps(part, protocol) for part in parts))
    (message,) = refusal(path)
    assert "holds code: " in message
    assert ".eval, " in message
    assert f"{__name__}.touch, " in message
    assert ".getattr. " in message
    assert not trace.exists()
    pickle.loads(pickle.dumps(Raw(touch, str(trace))))  # elsewhere the same payload does its work
    assert trace.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch trace'\ntR.",
        b"(S'touch trace'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch trace'\no.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch trace\x85R.",
        b"\x80\x02cos\nsystem\nq\x000h\x00(S'touch trace'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93(S'touch trace'\nt}\x92.",
        b"\x80\x02ctorch.os\nsystem\nS'touch trace'\n\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
    ],
)
def test_every_way_to_name_code_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="holds code"):
        unpickled(program)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b".",
        b"N",
        b"NN.",
        b"(N.",
        b"t.",
        b"R.",
        b"]N\x86R(",
        b"h\x00.",
        b"NNs.",
        b"}(Nu.",
        b"Nb.",
        b"\x82\x01.",
        b"}NNb.",
        b"\x97.",
        b"\x80\x02}N\x93.",
    ],
)
def test_a_damaged_program_is_refused(program: bytes) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        unpickled(program)


def test_a_pickle_is_read_as_data() -> None:
    value = unpickled(pickle.dumps({"a": Raw(torch.Size, [1]), "b": {2, (3,)}}, 2))
    assert isinstance(value, Dict)
    (a, size), (b, numbers) = value.items
    assert isinstance(size, Call)
    assert isinstance(numbers, Call)
    assert (a, size.name, size.arguments) == ("a", "torch.Size", ([1],))
    assert (b, numbers.name) == ("b", "__builtin__.set")


def test_an_extension_code_is_no_way_around_the_names(tmp_path: Path) -> None:
    copyreg.add_extension(__name__, "touch", 240)
    try:
        program = pickle.dumps(Raw(touch, str(tmp_path / "trace")), 2)
        assert b"\x82\xf0" in program
        pickle.loads(program)  # python keeps what the code stands for, and asks nobody the next time
        (tmp_path / "trace").unlink()
        with pytest.raises(CheckpointError, match="damaged"):
            unpickled(program)
    finally:
        copyreg.remove_extension(__name__, "touch", 240)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "program",
    [
        b"}r\xff\xff\xff\xff.",  # a memo of 2**32 places
        b"\x96" + struct.pack("<Q", 2**36) + b"x.",  # a bytearray whose bytes are not there
        b"\x8e" + struct.pack("<Q", 2**36) + b"x.",
        b"\x95" + struct.pack("<Q", 2**36) + b"N.",  # a frame
        b")" + b"\x86".join([b"q\x00h\x00"] * 200) + b"\x86}2\x85.",  # 2**200 tuples in tuples, as a hash sees them
        b"\x8f(" + b")" + b"q\x00h\x00\x86" * 200 + b"\x90.",  # in a set
        b"}(" + b")" + b"q\x00h\x00\x86" * 200 + b"Nu.",  # as the key of a dict
        b"(" + b")" + b"q\x00h\x00\x86" * 200 + b"Nd.",
        b"(" + b")" + b"q\x00h\x00\x86" * 200 + b"\x91.",  # in a frozenset
        b"c__builtin__\nfrozenset\n(]" + b")" + b"q\x00h\x00\x86" * 200 + b"atR.",
        b"ccollections\nOrderedDict\n(]]" + b")" + b"q\x00h\x00\x86" * 200 + b"aNaatR.",
    ],
)
def test_a_pickle_gets_no_more_memory_or_time_than_its_length(program: bytes) -> None:
    tracemalloc.start()
    try:
        with suppress(CheckpointError):
            unpickled(b"\x80\x04" + program)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_state_changes_no_stand_in(tmp_path: Path) -> None:
    """BUILD sets attributes of whatever lies on the stack: here the size of a storage, and the name of its class."""
    state = b"}(X\x08\x00\x00\x00elementsJ\x00\x00\x00\x7fX\x04\x00\x00\x00nameX\x01\x00\x00\x00xub"
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + state + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"
    )
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + state + b"K\x00K\x03\x85K\x01\x85\x89NtR"
    path = tmp_path / "m.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}X\x01\x00\x00\x00w" + call + b"s.")
        archive.writestr("m/data/0", bytes(100))
    assert "'w' needs 12 bytes of storage '0', which has 8" in refusal(path)[0]


def test_depth_and_circles_do_no_harm(tmp_path: Path) -> None:
    deep = b"\x80\x02)" + b"\x85" * 300_000  # a tuple in a tuple in a tuple ...
    circle = b"\x80\x02ctorch._utils\n_rebuild_parameter\n]q\x00Rq\x01h\x00h\x01a"  # a call that is its own argument
    # a parameter of a typed tensor, whose arguments are a list that the parameter is put into afterwards
    wide = (
        b"\x80\x02}\x8c\x01wctorch._tensor\n_rebuild_from_type_v2\n]q\x00Rq\x01"
        b"h\x00(ctorch._utils\n_rebuild_parameter\nN(h\x01NNtNe0s."
    )
    programs = (deep + b".", b"}" + deep + b"Ns.", deep + b"\x8c\x01aN\x86.", b"}\x8c\x01w" + circle + b"0s.", wide)
    for program in programs:
        path = tmp_path / "m.bin"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/data.pkl", program)
        with suppress(PolymergeError):
            assert not read_torch(path).entries


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of any dtype and shape; some of them lie in one storage, at any offset, and may overlap."""
    state: dict[str, torch.Tensor] = {}
    for number in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(list(DTYPES)))
        raw = torch.randint(0, 2, (draw(st.integers(0, 30)) * dtype.itemsize,), dtype=torch.uint8)
        storage = raw.view(dtype)
        for view in range(draw(st.integers(1, 3))):
            start = draw(st.integers(0, len(storage)))
            shape = draw(st.lists(st.integers(0, 4), max_size=3).filter(lambda s: torch.Size(s).numel() <= 30))
            count = torch.Size(shape).numel()
            if start + count <= len(storage):
                state[f"t{number}.{view}"] = storage[start : start + count].view(shape)
    return state


@given(state_dicts(), st.booleans(), st.integers(2, 5))
@settings(max_examples=120, deadline=None)
def test_what_torch_saves_is_found_byte_for_byte(state: dict[str, torch.Tensor], new: bool, protocol: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.bin")
        torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
        assert_bytes_agree(path, state)
        for later, first in read_torch(path).aliases.items():
            assert state[later].data_ptr() == state[first].data_ptr()


@given(st.data(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_damaged_byte_is_refused_or_harmless(data: st.DataObject, new: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder, "m.bin"), {"w": torch.ones(3, 2), "v": torch.ones(2)}, new)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(len(content) - 9, len(content)))])
        try:
            entries = read_torch(path).entries
        except (CheckpointError, Refused):
            return
        assert all(entry.start >= 0 and entry.start + entry.nbytes <= path.stat().st_size for entry in entries)
