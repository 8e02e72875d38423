"""Hostile and broken adapters for the tiny model: each is a good one with one thing wrong, and what is said of it."""

from __future__ import annotations

import gzip
import io
import json
import stat
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save

from tests.service.test_adapters_live import ALPHA, MODULES, RANK, tensors
from tests.workers.adapters.test_archives import (
    central,
    descriptor,
    member,
    overlapping,
    patched,
    tar,
    zip_info,
    zipped,
)

WEIGHTS, CONFIG, MARKER = "adapter_model.safetensors", "adapter_config.json", "checkpoint_complete"
SEED = 5
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = Q_A.replace("lora_A", "lora_B")
LAST = "base_model.model.model.layers.3.self_attn.v_proj.lora_B.weight"
MAX_BYTES = 32 << 20

SAID: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "r": RANK,
    "lora_alpha": ALPHA,
    "target_modules": sorted(name.rpartition(".")[2] for name in MODULES),
}
GOOD_TENSORS = tensors(SEED)
GOOD = save(GOOD_TENSORS)


def files(weights: bytes = GOOD, config: dict[str, Any] | bytes = SAID) -> dict[str, bytes]:
    """The files of an adapter; further fields of a config go over the good one's."""
    said = config if isinstance(config, bytes) else json.dumps(config).encode()
    return {WEIGHTS: weights, CONFIG: said, MARKER: b""}


FILES = files()


def good_tar(*members: tuple[str, bytes] | tarfile.TarInfo, **options: Any) -> bytes:
    return tar(*members, files=FILES, **options)


def good_zip(*members: tuple[str | zipfile.ZipInfo, bytes], **options: Any) -> bytes:
    return zipped(*members, files=FILES, **options)


# --- weights ---------------------------------------------------------------------------------------------------


def parts(weights: bytes = GOOD) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def joined(header: Any, data: bytes, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def headed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """An archive whose weights have a header that was changed."""
    header, data = parts()
    change(header)
    return tar(files=files(joined(header, data)))


def holding(change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> bytes:
    """An archive of other tensors."""
    found = dict(GOOD_TENSORS)
    change(found)
    return tar(files=files(save(found), {**SAID, **config}))


def saying(**config: Any) -> bytes:
    return tar(files=files(config={**SAID, **config}))


def configured(text: str) -> bytes:
    """An archive whose config is this text, with the good one's fields in the place of `...`."""
    return tar(files=files(config=text.replace("...", json.dumps(SAID)[1:-1]).encode()))


def spoilt(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(found: dict[str, torch.Tensor]) -> None:
        found[name] = found[name].clone()
        found[name].view(-1)[7] = value

    return change


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(found: dict[str, torch.Tensor]) -> None:
        for name in [name for name in found if old in name]:
            found[name.replace(old, new)] = found.pop(name)

    return change


def reordered(first: str) -> bytes:
    """The good tensors in another order, each with its own bytes."""
    header, data = parts()
    header.pop("__metadata__", None)
    names = sorted(header, key=lambda name: (name != first, name[::-1]))
    made: dict[str, Any] = {}
    moved = b""
    for name in names:
        begin, end = header[name]["data_offsets"]
        made[name] = {**header[name], "data_offsets": [len(moved), len(moved) + end - begin]}
        moved += data[begin:end]
    return joined(made, moved)


def a_name_twice() -> bytes:
    header, data = parts()
    text = json.dumps(header).encode()
    again = json.dumps({Q_A: header[Q_A]}).encode()
    return joined(text[:-1] + b", " + again[1:], data)


def overlap(header: dict[str, Any], *names: str) -> None:
    """The later one lies where the other one, of the same size, lies."""
    first, second = sorted((header[name] for name in names), key=lambda entry: entry["data_offsets"])
    second["data_offsets"] = first["data_offsets"]


def wider(side: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda found: found.update({Q_A: torch.randn(RANK, side)})


def swapped(found: dict[str, torch.Tensor]) -> None:
    found[Q_A], found[Q_B] = found[Q_B], found[Q_A]


# --- archives --------------------------------------------------------------------------------------------------


def claiming(size: int) -> bytes:
    """A tar whose first file claims a size; its checksum is right."""
    data = bytearray(good_tar(("notes", b"")))
    data[124:136] = b"\x80" + size.to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


def torch_file() -> bytes:
    out = io.BytesIO()
    torch.save(GOOD_TENSORS, out)
    return out.getvalue()


def twice() -> bytes:
    """A zip with two configs."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zipfile's own, of the duplicate
        for name, data in [*FILES.items(), (CONFIG, b"{}")]:
            archive.writestr(name, data)
    return out.getvalue()


@dataclass(frozen=True)
class Case:
    make: Callable[[], bytes]
    slug: str
    words: str
    """What the sentence says is wrong, a regular expression; two cases of one sentence give the same words."""
    names: str | None = None
    """One of the names in the problem."""


def unsafe(words: str, make: Callable[[], bytes], names: str | None = None) -> Case:
    return Case(make, "adapter-archive-unsafe", words, names)


def unreadable(words: str, make: Callable[[], bytes]) -> Case:
    return Case(make, "adapter-archive-unreadable", words)


def large(words: str, make: Callable[[], bytes]) -> Case:
    return Case(make, "adapter-too-large", words)


def incomplete(words: str, make: Callable[[], bytes], names: str | None = None) -> Case:
    return Case(make, "adapter-incomplete", words, names)


def pickled(words: str, make: Callable[[], bytes], names: str | None = None) -> Case:
    return Case(make, "adapter-pickled", words, names)


def malformed(words: str, make: Callable[[], bytes], names: str | None = None) -> Case:
    return Case(make, "adapter-weights-malformed", words, names)


def misfit(words: str, make: Callable[[], bytes], names: str | None = None) -> Case:
    return Case(make, "adapter-base-mismatch", words, names)


def invalid(words: str, make: Callable[[], bytes], names: str | None = None) -> Case:
    return Case(make, "adapter-tensors-invalid", words, names)


def config(words: str, make: Callable[[], bytes], names: str | None = None) -> Case:
    return Case(make, "adapter-config-invalid", words, names)


def unsupported(words: str, make: Callable[[], bytes], names: str | None = None) -> Case:
    return Case(make, "adapter-unsupported", words, names)


SYM, LNK = tarfile.SYMTYPE, tarfile.LNKTYPE
ENDS = "the archive ends too early"
LINKED = "/etc/passwd"

HOSTILE: dict[str, Case] = {
    # What has no place in an archive.
    "a symbolic link": unsafe("a symbolic link", lambda: good_tar(member("x", SYM, linkname=LINKED)), "x"),
    "a symbolic link after the weights": unsafe(
        "a symbolic link", lambda: tar((WEIGHTS, GOOD), member(CONFIG, SYM, linkname=LINKED), files={}), CONFIG
    ),
    "a folder that is a link": unsafe(
        "a symbolic link", lambda: tar(member("run", SYM, linkname="/tmp"), files=FILES, folder="run/"), "run"
    ),
    "a hard link": unsafe("a hard link", lambda: good_tar(member("x", LNK, linkname=WEIGHTS)), "x"),
    "a device": unsafe("a device", lambda: good_tar(member("x", tarfile.CHRTYPE, devmajor=1, devminor=5)), "x"),
    "a block device": unsafe("a device", lambda: good_tar(member("x", tarfile.BLKTYPE)), "x"),
    "a pipe": unsafe("a pipe", lambda: good_tar(member(CONFIG, tarfile.FIFOTYPE)), CONFIG),
    "a sparse file": unsafe("a sparse file", lambda: good_tar(member("x", tarfile.GNUTYPE_SPARSE)), "x"),
    "zip: a symbolic link": unsafe(
        "a symbolic link", lambda: good_zip((zip_info("x", stat.S_IFLNK | 0o777), b"/etc")), "x"
    ),
    "zip: a device": unsafe("a device", lambda: good_zip((zip_info("x", stat.S_IFCHR | 0o600), b"")), "x"),
    "zip: a pipe": unsafe("a pipe", lambda: good_zip((zip_info("x", stat.S_IFIFO | 0o600), b"")), "x"),
    # Paths.
    "an absolute path": unsafe("is absolute", lambda: good_tar(("/tmp/x", b"x")), "'/tmp/x'"),
    "a parent path": unsafe("parent folder", lambda: good_tar(("../x", b"x")), "'../x'"),
    "a parent path within": unsafe("parent folder", lambda: good_tar(("a/../../x", b"x"))),
    "a parent path by its pax header": unsafe(
        "parent folder",
        lambda: good_tar(
            member("x", tarfile.REGTYPE, pax_headers={"path": "../" + WEIGHTS}), format=tarfile.PAX_FORMAT
        ),
    ),
    "a backslash": unsafe("backslash or a drive letter", lambda: good_tar(("..\\x", b"x"))),
    "a line break": unsafe("cannot be shown", lambda: good_tar(("a\nlevel=info", b"x"))),
    "a text turned around": unsafe("cannot be shown", lambda: good_tar(("a\u202egpj.sh", b"x"))),
    "a long path": unsafe("longer than 1024", lambda: good_tar(("a/" * 900 + "x", b"x"))),
    "zip: a parent path": unsafe("parent folder", lambda: good_zip(("../../x", b"x"))),
    "zip: a backslash": unsafe("backslash or a drive letter", lambda: good_zip(("a\\..\\x", b"x"))),
    # The same thing twice.
    "the same path twice": unsafe("a path twice", lambda: good_tar((CONFIG, b"{}")), CONFIG),
    "the same path twice, with a dot": unsafe("a path twice", lambda: good_tar((f"./{CONFIG}", b"{}"))),
    "paths that differ in case": unsafe("taken for the same", lambda: good_tar((CONFIG.upper(), b"{}"))),
    "paths that differ in width": unsafe("taken for the same", lambda: good_tar(("adapter_config\uff0ejson", b"{}"))),
    "paths that differ in how they are composed": unsafe(
        "taken for the same", lambda: good_tar(("caf\u00e9", b"x"), ("cafe\u0301", b"y"))
    ),
    "zip: the same path twice": unsafe("a path twice", twice),
    "zip: paths that differ in case": unsafe("taken for the same", lambda: good_zip((CONFIG.title(), b"x"))),
    "two adapters": unsafe("in several folders", lambda: tar((f"b/{WEIGHTS}", GOOD), files=FILES, folder="a/")),
    # Bombs.
    "a thousand entries": large("more than 1000 entries", lambda: good_tar(*((f"{n}", b"") for n in range(1001)))),
    "zip: a thousand entries": large("claims 1004 entries", lambda: good_zip(*((f"{n}", b"") for n in range(1001)))),
    "a terabyte": large("more than 33554432 bytes", lambda: claiming(1 << 40)),
    "gzip: zeros": large("100 times its size", lambda: gzip.compress(good_tar(("x", bytes(20 << 20))))),
    "gzip: zeros behind the end": large("100 times its size", lambda: gzip.compress(good_tar() + bytes(20 << 20))),
    "zip: zeros": large("100 times its size", lambda: good_zip(("x", bytes(20 << 20)))),
    "zip: zeros that lie": unsafe(
        "own header differs", lambda: central(good_zip(("x", bytes(20 << 20))), 24, struct.pack("<L", 10)), "x"
    ),
    "gzip in gzip": unreadable(
        "bad checksum|truncated header|invalid", lambda: gzip.compress(gzip.compress(good_tar()))
    ),
    "a zip in a tar": incomplete(
        f"there is no {WEIGHTS}", lambda: tar(files={"adapter.zip": good_zip()}), "adapter.zip"
    ),
    "a zip in a zip": incomplete(f"there is no {WEIGHTS}", lambda: zipped(files={"a.zip": good_zip()}), "a.zip"),
    "zip: entries that overlap": unsafe("entries that overlap", overlapping),
    # Broken ones.
    "cut off": incomplete(ENDS, lambda: good_tar()[:9000]),
    "cut off between files": incomplete(ENDS, lambda: tar(files={WEIGHTS: GOOD})[: 512 + -(-len(GOOD) // 512) * 512]),
    "gzip: cut off": incomplete(ENDS, lambda: gzip.compress(good_tar())[:-300]),
    "gzip: without its checksum": incomplete(ENDS, lambda: gzip.compress(good_tar())[:-8]),
    "gzip: a wrong checksum": unreadable("data check", lambda: gzip.compress(good_tar())[:-8] + bytes(8)),
    "zip: cut off": incomplete(ENDS, lambda: good_zip()[:-60]),
    "zip: cut off at the start": unsafe("before its start", lambda: b"PK\3\4" + good_zip()[200:]),
    "zip: a wrong size": unsafe("own header differs", lambda: central(good_zip(), 24, struct.pack("<L", 77)), WEIGHTS),
    "zip: a wrong size everywhere": unsafe(
        "shorter than its directory says",
        lambda: central(
            patched(good_zip(), 22, struct.pack("<L", len(GOOD) + 9)), 24, struct.pack("<L", len(GOOD) + 9)
        ),
        WEIGHTS,
    ),
    "zip: a wrong size in its descriptor": unsafe(
        "descriptor differs", lambda: descriptor(good_zip(stream=True), 12, b"\xff"), WEIGHTS
    ),
    "zip: encrypted": unsafe("an encrypted entry", lambda: central(good_zip(), 8, b"\x01"), WEIGHTS),
    "zip: a wrong checksum": unreadable("Bad CRC-32", lambda: central(patched(good_zip(), 14, bytes(4)), 16, bytes(4))),
    "no archive": unreadable("no tar, tar.gz or zip", lambda: GOOD),
    "a broken header": unreadable("bad checksum", lambda: patched(good_tar(), 148, b"0000000\0")),
    "an empty tar": incomplete("the archive is empty", lambda: tar(files={})),
    "an empty zip": incomplete("the archive is empty", lambda: zipped(files={})),
    "a config alone": incomplete(f"there is no {WEIGHTS}", lambda: tar(files={CONFIG: FILES[CONFIG]}), CONFIG),
    # Pickles.
    "pickled weights": pickled(
        "weights are a pickle",
        lambda: tar(files={"adapter_model.bin": torch_file(), CONFIG: FILES[CONFIG]}),
        "adapter_model.bin",
    ),
    "a torch checkpoint": pickled("weights are a pickle", torch_file),
    "pickled weights by another name": pickled("under another name", lambda: tar(files=files(torch_file()))),
    # Headers of safetensors.
    "a header beyond the file": incomplete(
        "its header alone needs", lambda: tar(files=files(joined(*parts(), length=2 * len(GOOD))))
    ),
    "a header of an exabyte": large(
        "claims 1152921504606846976 bytes", lambda: tar(files=files(joined(*parts(), length=1 << 60)))
    ),
    "a header of five million lists": large(
        "more than 5000000 values",
        lambda: gzip.compress(tar(files=files(joined(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}", b"")))),
    ),
    "a header that is no JSON": malformed("is not JSON", lambda: tar(files=files(joined(b"{]", b"")))),
    "a header that is a list": malformed("does not begin with", lambda: tar(files=files(joined(b"[]", b"")))),
    "a deep header": malformed(
        "nested deeper", lambda: tar(files=files(joined(b'{"a":' + b"[" * 90_000 + b"]" * 90_000 + b"}", b"")))
    ),
    "a tensor twice": malformed("twice", lambda: tar(files=files(a_name_twice()))),
    "tensors that overlap": malformed("overlaps the one before it", lambda: headed(lambda h: overlap(h, Q_A, Q_B))),
    "a gap": malformed("leaves a gap", lambda: headed(lambda h: h.pop(Q_A))),
    "an unknown type": malformed("a type that is not known", lambda: headed(lambda h: h[Q_A].update(dtype="F31")), Q_A),
    "a negative side": malformed("whole numbers", lambda: headed(lambda h: h[Q_A].update(shape=[-4, -32])), Q_A),
    "a product that overflows": malformed(
        "needs", lambda: headed(lambda h: h[Q_A].update(shape=[1 << 62, 1 << 61, 32])), Q_A
    ),
    "offsets backwards": malformed(
        r"not \[begin, end\]", lambda: headed(lambda h: h[Q_A]["data_offsets"].reverse()), Q_A
    ),
    "a name that is markup": malformed(
        "name that is not accepted", lambda: headed(lambda h: h.update({"<script>": h.pop(Q_A)}))
    ),
    "truncated data": incomplete("bytes of the", lambda: tar(files=files(GOOD[:-64]))),
    "bytes behind the data": malformed("where the file has", lambda: tar(files=files(GOOD + b"x" * 64))),
    "an empty file": incomplete("too short", lambda: tar(files=files(b""))),
    "no tensors": incomplete("no tensors", lambda: tar(files=files(joined(b"{}      ", b"")))),
    # Tensors.
    "an unknown module": Case(
        lambda: holding(renamed("0.self_attn.q_proj", "0.self_attn.qq_proj")),
        "adapter-tensors-unmatched",
        "no place on tiny",
        Q_A.replace("q_proj", "qq_proj"),
    ),
    "an optimizer's state": Case(
        lambda: holding(lambda t: t.update({"exp_avg.lora_": torch.ones(2)})),
        "adapter-tensors-unmatched",
        "no part of a LoRA adapter",
        "exp_avg.lora_",
    ),
    "a layer too many": misfit(
        "has 4 layers", lambda: holding(renamed("layers.3", "layers.44")), LAST.replace("layers.3", "layers.44")
    ),
    "a wrong shape": misfit(r"shape \[4, 24\], and tiny needs \[4, 32\]", lambda: holding(wider(24)), Q_A),
    "A and B swapped": misfit(r"shape \[32, 4\]|shape \[4, 32\]", lambda: holding(swapped), Q_A),
    "half a pair": invalid("an A without its B", lambda: holding(lambda t: t.pop(Q_B)), Q_A),
    "whole numbers": invalid("of type I32", lambda: holding(lambda t: t.update({Q_A: t[Q_A].int()})), Q_A),
    "another rank in one pair": invalid(
        "has rank 3 and",
        lambda: holding(lambda t: t.update({Q_A: t[Q_A][:3].contiguous()})),
        Q_A,
    ),
    "modules that are missing": incomplete(
        "lists 4 modules", lambda: holding(lambda t: None, target_modules=[*SAID["target_modules"], "o_proj"])
    ),
    "a bias": unsupported(
        "trained biases",
        lambda: holding(lambda t: t.update({Q_B.replace("weight", "bias"): torch.ones(32)})),
        Q_B.replace("weight", "bias"),
    ),
    "NaN": Case(lambda: holding(spoilt(Q_B, float("nan"))), "adapter-values-invalid", "NaN or infinite", Q_B),
    "infinity": Case(lambda: holding(spoilt(LAST, float("-inf"))), "adapter-values-invalid", "NaN or infinite", LAST),
    # Configs.
    "a config that is no JSON": config("is not JSON", lambda: configured("r: 4")),
    "a config that is a list": config("not a JSON object", lambda: configured("[]")),
    "a config in another encoding": config("not UTF-8", lambda: tar(files=files(config=b"\xff\xfe{}"))),
    "a deep config": config("nested deeper", lambda: configured('{..., "a": ' + "[" * 90_000 + "]" * 90_000 + "}")),
    "a large config": config("at most", lambda: configured('{..., "a": "' + "x" * (5 << 20) + '"}')),
    "a field twice": config("'r' twice", lambda: configured('{..., "r": 5}')),
    "another method": unsupported("peft_type must be LORA", lambda: saying(peft_type="VERA"), "peft_type"),
    "no method": unsupported("no peft_type", lambda: saying(peft_type=None), "peft_type"),
    "rank zero": config("greater than or equal to 1", lambda: saying(r=0), "r"),
    "a rank of a million": config("less than or equal to 1024", lambda: saying(r=1_000_000), "r"),
    "a rank that is not the tensors'": invalid("the config says 8", lambda: saying(r=8)),
    "a rank of one module that is not its tensors'": invalid(
        "the config says 2", lambda: saying(rank_pattern={"self_attn.q_proj": 2}), Q_A
    ),
    "alpha NaN": config("holds NaN", lambda: configured('{..., "alpha_pattern": {"q_proj": NaN}}')),
    "alpha infinite": config("holds Infinity", lambda: configured('{..., "alpha_pattern": {"q_proj": Infinity}}')),
    "alpha beyond floats": config(
        "finite number|less than or equal", lambda: configured('{..., "alpha_pattern": {"q_proj": 1e999}}')
    ),
    "half a character in a value": config("one half", lambda: configured('{..., "auto_map": {"A": "\\ud800"}}')),
    "half a character in a pattern": config("one half", lambda: configured('{..., "rank_pattern": {"\\udfff": 4}}')),
    "half a character in a field": config("one half", lambda: configured('{..., "\\udc00": 4}')),
    "a rank of 40 digits": config(
        "less than or equal to", lambda: configured('{..., "rank_pattern": {"q_proj": ' + "9" * 40 + "}}")
    ),
    "alpha zero": config("greater than 0", lambda: saying(lora_alpha=0), "lora_alpha"),
    "code of its own": unsupported("asks for auto_map", lambda: saying(auto_map={"A": "evil--m.C"}), "auto_map"),
    "a parent class of its own": unsupported("asks for custom_", lambda: saying(custom_module="os.system")),
    "weights initialised by PiSSA": unsupported(
        "changes the base model's weights", lambda: saying(init_lora_weights="pissa"), "init_lora_weights"
    ),
    "targets by the thousand": config("at most 20000 items", lambda: saying(target_modules=["a"] * 30_000)),
    "targets of another type": config(
        "a valid string or .* a valid list", lambda: saying(target_modules={"q_proj": 1}), "target_modules"
    ),
    "an endless expression of targets": config(
        "at most 65536 characters", lambda: saying(target_modules="(a+)+" * 20_000)
    ),
    "an expression that never ends": unsupported(
        "is not evaluated here", lambda: saying(rank_pattern={"(.*a)*b": RANK}), "(.*a)*b"
    ),
    "wildcards without end": unsupported(
        "is not evaluated here", lambda: saying(alpha_pattern={".*" * 250 + "Z": 1.0})
    ),
}


ODD: dict[str, Callable[[], bytes]] = {
    "tensors in another order": lambda: tar(files=files(reordered(LAST))),
    "in one folder, with other files": lambda: tar(
        ("run/optimizer.pt", b"\x80\x04"), ("run/evil.py", b"import os"), files=FILES, folder="run/"
    ),
    "a class to import": lambda: saying(auto_mapping={"base_model_class": "Evil", "parent_library": "os"}),
    "an expression that never ends, not evaluated": lambda: saying(target_modules=r"(.*.*)*(a|a)*(x+x+)+y"),
    "absurd targets to leave out": lambda: saying(exclude_modules=r"((a+)+)+$"),
    "many targets": lambda: saying(target_modules=[*SAID["target_modules"], *(f"m{n}" for n in range(15_000))]),
    "patterns that name nothing": lambda: saying(rank_pattern={f"nothing{n}": 2 for n in range(4000)}),
    "streamed as zip": lambda: good_zip(stream=True),
}
