"""Open a file as decompressed bytes; reject content that does not match its name, and say what it is."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

from persyn.errors import UsageError
from persyn.ingest.record import Flaw

_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_HEAD = 64
#: How a file begins -> what it is, and what to do about it. The longer of two signatures with a common prefix comes
#: first.
_SIGNATURES = {
    b"\xff\xfe\0\0": ("UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8"),
    b"\0\0\xfe\xff": ("UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8"),
    b"\xff\xfe": ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    _GZIP: ("compressed with gzip", "give it a name that ends in .gz, or unpack it"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it: zstd -d"),
    b"BZh": ("compressed with bzip2", "unpack it: bunzip2"),
    b"\xfd7zXZ\0": ("compressed with xz", "unpack it: unxz"),
    b"\x04\x22\x4d\x18": ("compressed with lz4", "unpack it: lz4 -d"),
    b"PK\x03\x04": ("a ZIP archive or a spreadsheet", "unpack it, or save it as CSV in UTF-8"),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet or another Office document", "save it as CSV in UTF-8"),
    b"PAR1": ("Parquet", "give it a name that ends in .parquet"),
    b"ARROW1": ("an Arrow file", "write it as Parquet"),
    b"%PDF": ("a PDF document", "give the data as JSONL or CSV"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "fetch it: git lfs pull"),
    b"<!DOCTYPE": ("a web page", "download the file itself"),
    b"<!doctype": ("a web page", "download the file itself"),
    b"<html": ("a web page", "download the file itself"),
}


def open_text(path: Path) -> io.BufferedReader[Any]:
    """Open a text file for reading bytes, decompressed and without a byte order mark.

    Raises `UsageError` for a file whose beginning is not UTF-8 text.
    """
    is_gzip = path.suffix.lower() == ".gz"
    if is_gzip:
        _require_gzip(path)
    file: io.BufferedReader[Any] = io.BufferedReader(gzip.open(path)) if is_gzip else path.open("rb")  # noqa: SIM115
    try:
        _require_text(path, file.peek(_HEAD)[:_HEAD])
    except BaseException:
        file.close()
        raise
    if file.peek(len(_BOM)).startswith(_BOM):
        file.read(len(_BOM))
    return file


def _require_gzip(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(len(_GZIP))
    if head and head != _GZIP:
        raise UsageError(f"cannot read {path}: it is not compressed with gzip; give it a name without .gz")


def _require_text(path: Path, head: bytes) -> None:
    found = next((what for start, what in _SIGNATURES.items() if head.startswith(start)), None) or _wide(head)
    if found:
        what, advice = found
        if head.startswith(_GZIP) and path.suffix.lower() == ".gz":
            advice = "it is compressed twice; decompress it once"
        raise UsageError(
            f"cannot read {path}: it is {what} (its first bytes are {head[:4].hex(' ').upper()}); {advice}"
        )


def _wide(head: bytes) -> tuple[str, str] | None:
    """Detect UTF-16 and UTF-32 without a byte order mark by the zero bytes of ASCII characters."""
    zeros = [head[place::4].count(0) for place in range(4)]
    if not any(zeros):
        return None
    n = len(head) // 4
    names: dict[tuple[bool, ...], str] = {
        (False, True, True, True): "UTF-32LE",
        (True, True, True, False): "UTF-32BE",
        (False, True, False, True): "UTF-16LE",
        (True, False, True, False): "UTF-16BE",
    }
    name = names.get(tuple(count > n / 4 for count in zeros))
    return (f"{name} text", f"convert it: iconv -f {name} -t UTF-8") if name else None


def not_utf8(data: bytes) -> Flaw:
    """Why bytes are not UTF-8: the first invalid byte, and the likely encoding."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{data[error.start]:02X} at position {error.start + 1:,} of the row"
        advice = "convert Latin-1 or Windows-1252 text with iconv -f WINDOWS-1252 -t UTF-8"
        return Flaw(f"not UTF-8 ({byte})", advice=advice)
    return Flaw("not UTF-8")
