"""One shard of rows on disk: a Parquet file that is either whole or absent, and whose corruption is always noticed.

A file becomes visible by rename after its bytes are on the disk. Every page has a checksum, verified on reading; the footer,
which Parquet does not protect, is held against a digest of its own schema. Equal tables give equal bytes.
"""

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from rpo.errors import RpoError, disk_error, disk_errors

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""How an image is stored: encoded bytes (never re-encoded); `path` is always null and never opened."""

ROW_GROUP_BYTES = 4 * 2**20
"""Rows are gathered to about so many bytes a row group: what a reader holds in memory, and few enough groups for a short footer."""
PARTIAL_SUFFIX = ".tmp"
_TEMPORARY = re.compile(
    r".+\.[0-9a-f]{8}\.tmp|\.tmp[A-Za-z0-9]{6}|(\d{5}|pairs)\.parquet\.tmp|.+\.safetensors\.tmp|(stage|config|index)\.json\.tmp"
)
"""Ours, safetensors' own, and those of files that earlier versions wrote in place of ours."""
CORRUPT = (OSError, pa.ArrowException, ValueError)
"""What pyarrow raises when a file is not what was written."""

_SCHEMA_KEY = b"rpo.schema"
_ROWS_KEY = b"rpo.rows"
_HF_DTYPES = {"double": "float64", "float": "float32", "halffloat": "float16"}


def fsync(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create(path: Path) -> BinaryIO:
    """A new file to write in; every byte of a run passes here."""
    return path.open("wb")


def umask() -> int:
    """The mode bits that this process takes off new files."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def open_to_all(path: Path) -> None:
    """Gives a new file the mode that the umask asks for; some libraries write theirs for the owner alone."""
    os.chmod(path, 0o666 & ~umask())


@contextmanager
def atomic_path(path: Path) -> Generator[Path, None, None]:
    """Yields a temporary path beside `path`; when the block ends well its file becomes `path`, synced to the disk.

    When anything fails, `path` is as it was and the temporary file is gone. Several writers may write one path if their bytes are
    equal. An error of the disk becomes an `RpoError` that names `path`.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    with disk_errors(path):
        try:
            yield partial
            open_to_all(partial)
            fsync(partial)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a small UTF-8 file, whole or not at all."""
    with atomic_path(path) as partial, create(partial) as file:
        file.write(text.encode())


def append_text(path: Path, text: str) -> None:
    """Adds text to the end of a file and syncs it; a kill leaves a prefix of the text."""
    with disk_errors(path), path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def is_temporary(path: Path) -> bool:
    """Whether the name is that of a temporary file: ours by its random digits, or safetensors'."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sweep(folder: Path) -> None:
    """Removes the temporary files of killed writers in `folder` (not in its subfolders)."""
    for partial in folder.iterdir() if folder.is_dir() else ():
        if is_temporary(partial) and partial.is_file() and not partial.is_symlink():
            partial.unlink(missing_ok=True)


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.parquet"


def _hf_feature(kind: pa.DataType) -> object:
    if kind.equals(IMAGE):
        return {"_type": "Image"}
    if pa.types.is_struct(kind):
        return {field.name: _hf_feature(field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return {"feature": _hf_feature(kind.value_type), "_type": "List"}
    if pa.types.is_fixed_size_list(kind):
        return {"feature": _hf_feature(kind.value_type), "length": kind.list_size, "_type": "List"}
    return {"dtype": _HF_DTYPES.get(str(kind), str(kind)), "_type": "Value"}


def hf_features(schema: pa.Schema) -> bytes:
    """The value of the `huggingface` schema entry, by which `datasets` loads image columns as `Image`."""
    return json.dumps({"info": {"features": {field.name: _hf_feature(field.type) for field in schema}}}).encode()


def _schema_digest(schema: pa.Schema) -> bytes:
    columns = [[field.name, str(field.type), field.nullable] for field in schema]
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest().encode()


@contextmanager
def open_writer(path: Path, schema: pa.Schema, metadata: Mapping[str, str] | None = None) -> Generator["TableWriter", None, None]:
    """Writes tables of one schema to a Parquet file, with the settings that every file of a run shares; `metadata` goes to the footer."""
    entries: dict[bytes, bytes] = {key.encode(): value.encode() for key, value in (metadata or {}).items()}
    entries |= {_SCHEMA_KEY: _schema_digest(schema), b"huggingface": hf_features(schema)}
    with (
        create(path) as file,
        pq.ParquetWriter(
            file,
            schema.with_metadata(entries),
            compression="zstd",
            write_page_checksum=True,
            write_statistics=False,
            use_compliant_nested_type=False,
        ) as parquet,
    ):
        writer = TableWriter(parquet)
        yield writer
        writer.flush()
        parquet.add_key_value_metadata({_ROWS_KEY.decode(): str(writer.rows)})


class TableWriter:
    """An open Parquet file; counts the rows that it is given."""

    def __init__(self, parquet: pq.ParquetWriter) -> None:
        self.parquet = parquet
        self.rows = 0
        self._gathered: list[pa.Table] = []

    def write(self, table: pa.Table) -> None:
        """Adds a table to the row group in hand."""
        self._gathered.append(table.replace_schema_metadata(self.parquet.schema.metadata))
        self.rows += table.num_rows
        if sum(part.nbytes for part in self._gathered) >= ROW_GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes the row group in hand."""
        if self._gathered:
            self.parquet.write_table(pa.concat_tables(self._gathered))
            self._gathered = []


def write_shard(path: Path, table: pa.Table, metadata: Mapping[str, str] | None = None) -> None:
    """Writes `table` to `path`, whole or not at all."""
    with atomic_path(path) as partial, open_writer(partial, table.schema, metadata) as writer:
        writer.write(table)


def check_written(file: pq.ParquetFile, rows: int) -> None:
    """Raises `ValueError` unless a file has the columns, and what was read of it the number of rows, that `open_writer` was told."""
    schema = file.schema_arrow
    entries = file.metadata.metadata or {}
    if entries.get(_SCHEMA_KEY) != _schema_digest(schema) or entries.get(_ROWS_KEY) != str(rows).encode():
        raise ValueError("its columns or rows are not the ones that were written")


def damaged(path: Path, why: object) -> RpoError:
    return RpoError(
        f"{path} is damaged ({why}). Delete it and run again with --resume: only that shard of that stage and what depends on it is redone."
    )


def unreadable(path: Path, error: BaseException) -> RpoError:
    """The error for what came of reading `path`: damage if its bytes are wrong; if the system refused to read them, its reason."""
    return refusal(path, error) or damaged(path, error)


def refusal(path: Path, error: BaseException) -> RpoError | None:
    """The error for a file that the system refused to read, which says nothing of its bytes; `None` for any other error."""
    refused = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, errno.ENOENT)
    return RpoError(disk_error(error, path) or "") if refused else None


def read_footer(path: Path) -> tuple[int, dict[str, str]]:
    """(number of rows, metadata) of a shard, without reading its data. Raises `RpoError` when the footer is damaged."""
    try:
        footer = pq.read_metadata(path)
        return footer.num_rows, {key.decode(): value.decode() for key, value in (footer.metadata or {}).items()}
    except FileNotFoundError:
        raise
    except CORRUPT as error:
        raise unreadable(path, error) from error


def read_shard(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads a shard, or some of its columns in the order asked for, without metadata.

    Raises `FileNotFoundError` when there is none, and `RpoError` that names the file when it is damaged.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read(columns=None if columns is None else list(columns)).replace_schema_metadata(None)
            check_written(file, table.num_rows)
        table.validate(full=True)
        return table if columns is None else table.select(list(columns))
    except FileNotFoundError:
        raise
    except CORRUPT as error:
        raise unreadable(path, error) from error
