"""Token files: Megatron's .bin/.idx pair plus a sidecar .json that records the content and the tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recycle_ds.config.atomic_files import publish_together, temporary_name
from recycle_ds.data.errors import DataError

if TYPE_CHECKING:
    from recycle_ds.data.tokenizer import Tokenizer

FORMAT_VERSION = 1
"""Version of the sidecar."""
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document bounds
_REMAKE = "recreate it with `recycle-ds prepare`, or delete its folder if data.prepare makes it (the demo's: `make demo-clean`)"

TokenArray = NDArray[np.int64]


@dataclass(frozen=True)
class Sidecar:
    """Content of `<prefix>.json`, which describes a pair."""

    tokens: int
    """Tokens in the .bin, end-of-document tokens included."""
    documents: int
    """Documents in the .bin."""
    vocab_size: int
    """Vocabulary of the tokenizer that made it."""
    eos_id: int
    """Token that ends every document."""
    tokenizer_fingerprint: str
    """`Tokenizer.fingerprint` of that tokenizer."""
    source: str
    """The source that was tokenised."""
    bin_bytes: int
    """Size of the .bin."""
    idx_bytes: int
    """Size of the .idx."""
    bin_sha256: str
    """SHA-256 of the .bin, in hex."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Settings that the pair was made with."""
    format_version: int = FORMAT_VERSION
    """Version of this record."""


def pair_paths(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The three files of a prefix: .bin, .idx and .json."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]] | type[np.signedinteger[Any]]:
    """Smallest dtype of Megatron's format for a vocabulary: uint16 up to 65,536 tokens, else int32."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


class TokenFileWriter:
    """Writes one pair, document by document, under temporary names; a successful `with` block publishes it.

    On any error, including Ctrl-C, the temporary files are removed and existing files are kept.
    """

    def __init__(
        self, prefix: str | Path, tokenizer: Tokenizer, source: str, recipe: Mapping[str, Any] | None = None
    ) -> None:
        self.tokens = 0
        """Tokens written so far."""
        self.documents = 0
        """Documents written so far."""
        self._paths = pair_paths(prefix)
        self._tokenizer, self._source, self._recipe = tokenizer, source, dict(recipe or {})
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._sha256 = hashlib.sha256()
        self._temporary = tuple(temporary_name(path) for path in self._paths)
        self._builder: Any = None

    def __enter__(self) -> TokenFileWriter:
        return self  # creates no file: before `__exit__` is certain to run, it could be left behind

    def add(self, ids: Sequence[int] | NDArray[Any]) -> None:
        """Append one document, which must have at least one token; the end-of-document token is added here."""
        document = np.empty(len(ids) + 1, dtype=self._dtype)
        document[:-1], document[-1] = ids, self._tokenizer.eos_id
        self._open().add_document(document, [len(document)])
        self._sha256.update(document.data)
        self.tokens += len(document)
        self.documents += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            if self._builder is not None:
                with contextlib.suppress(OSError):  # the disk may be full: that error is being raised already
                    self._builder.data_file.close()
            for path in self._temporary:
                path.unlink(missing_ok=True)

    def _open(self) -> Any:
        """Megatron's builder, created with the first document."""
        if self._builder is None:
            megatron = _megatron()
            self._paths[0].parent.mkdir(parents=True, exist_ok=True)
            self._builder = megatron.IndexedDatasetBuilder(str(self._temporary[0]), dtype=self._dtype)
        return self._builder

    def _publish(self) -> None:
        self._open().finalize(str(self._temporary[1]))
        sidecar = Sidecar(
            tokens=self.tokens,
            documents=self.documents,
            vocab_size=self._tokenizer.vocab_size,
            eos_id=self._tokenizer.eos_id,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            source=self._source,
            bin_bytes=self._temporary[0].stat().st_size,
            idx_bytes=self._temporary[1].stat().st_size,
            bin_sha256=self._sha256.hexdigest(),
            recipe=self._recipe,
        )
        record = json.dumps(asdict(sidecar), indent=2, ensure_ascii=False) + "\n"
        self._temporary[2].write_text(record, encoding="utf-8")
        publish_together(list(zip(self._temporary, self._paths, strict=True)))


class TokenFile:
    """One flat stream of tokens in stored order, memory-mapped. Created by `open_token_file`."""

    def __init__(self, prefix: str, sidecar: Sidecar) -> None:
        self.prefix = prefix
        self.sidecar = sidecar
        self.tokens = sidecar.tokens
        """Tokens in the stream."""
        self.documents = sidecar.documents
        """Documents in the stream."""
        self._dataset = _megatron().IndexedDataset(prefix)
        index = self._dataset.index
        self._itemsize = int(index.dtype_size)
        pointers, bounds = index.sequence_pointers, index.document_indices
        # Byte offset of each document. With one sequence per document, this is a view of the memory map, not a copy.
        self._offsets = pointers if len(pointers) == len(bounds) - 1 else pointers[bounds[:-1]]

    def read(self, start: int, count: int) -> tuple[TokenArray, TokenArray]:
        """Read tokens `start` to `start + count` of the stream, across documents.

        Returns:
            [count] int64 token ids, and the ascending positions within them, int64, at which a document starts.

        Raises:
            DataError: a token is outside the vocabulary, so the file is damaged.
            IndexError: the range exceeds the stream.
        """
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"tokens {start} to {start + count} of {self.prefix}, which has {self.tokens}")
        size = self._itemsize
        tokens = self._dataset.bin_reader.read(dtype=self._dataset.index.dtype, count=count, offset=start * size)
        ids = tokens.astype(np.int64)  # a copy: callers may use it after the memory map is closed
        if count and not (ids.max() < self.sidecar.vocab_size and ids.min() >= 0):
            raise DataError(
                f"{self.prefix}.bin is damaged: it contains tokens from {ids.min()} to {ids.max()}, its vocabulary has "
                f"{self.sidecar.vocab_size}; {_REMAKE}"
            )
        # bisect reads log n entries in place; numpy's searchsorted would first copy the complete unaligned map.
        first = bisect_left(self._offsets, start * size)
        last = bisect_left(self._offsets, (start + count) * size, lo=first)
        return ids, np.asarray(self._offsets[first:last], dtype=np.int64) // size - start


def open_token_file(prefix: str | Path, tokenizer: Tokenizer | None) -> TokenFile:
    """Check a pair and its sidecar against each other and against the tokenizer, then memory-map the pair.

    Raises:
        DataError: a file is missing, truncated, invalid or empty, or was made with another tokenizer than `tokenizer`
            (None accepts any tokenizer).
    """
    bin_path, idx_path, sidecar_path = pair_paths(prefix)
    for path in (bin_path, idx_path, sidecar_path):
        if not path.is_file():
            raise DataError(f"no such token file: {path}; {_REMAKE}")
    sidecar = read_sidecar(prefix)
    tokens, documents = _check_index(bin_path, idx_path)
    if (sidecar.tokens, sidecar.documents) != (tokens, documents) or sidecar.bin_bytes != bin_path.stat().st_size:
        raise DataError(
            f"{sidecar_path} records {sidecar.tokens} tokens in {sidecar.documents} documents, the pair beside it "
            f"has {tokens} in {documents}; {_REMAKE}"
        )
    if tokenizer is not None and sidecar.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{prefix} was made with another tokenizer (fingerprint {sidecar.tokenizer_fingerprint[:12]}) than "
            f"{tokenizer.name} (fingerprint {tokenizer.fingerprint[:12]}); {_REMAKE} or set data.tokenizer"
        )
    if tokenizer is not None and (sidecar.vocab_size, sidecar.eos_id) != (tokenizer.vocab_size, tokenizer.eos_id):
        raise DataError(
            f"{prefix} has a vocabulary of {sidecar.vocab_size} and ends documents with token {sidecar.eos_id}, "
            f"{tokenizer.name} has {tokenizer.vocab_size} and {tokenizer.eos_id}; {_REMAKE}"
        )
    return TokenFile(str(prefix), sidecar)


def read_sidecar(prefix: str | Path) -> Sidecar:
    """Read `<prefix>.json`.

    Raises:
        DataError: it cannot be read, or is not a valid sidecar.
    """
    path = pair_paths(prefix)[2]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}; {_REMAKE}") from error
    kinds = {"int": int, "str": str}
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format_version {version}, this code reads {FORMAT_VERSION}; {_REMAKE}")
    for entry in fields(Sidecar):
        kind = kinds.get(str(entry.type), dict)
        if not isinstance(content.get(entry.name), kind):
            raise DataError(
                f"{path}: {entry.name} must be of type {kind.__name__}, not {content.get(entry.name)!r}; {_REMAKE}"
            )
    return Sidecar(**{entry.name: content[entry.name] for entry in fields(Sidecar)})


def _check_index(bin_path: Path, idx_path: Path) -> tuple[int, int]:
    """Numbers of tokens and documents of a pair. Checks header and sizes; reads only both ends of the index."""
    dtypes = _megatron().DType
    idx_bytes, bin_bytes = idx_path.stat().st_size, bin_path.stat().st_size
    with open(idx_path, "rb") as stream:
        header = stream.read(_HEADER.size)
        if header[: len(_MAGIC)] != _MAGIC:
            raise DataError(f"{idx_path} is not a Megatron index: it begins with {header[: len(_MAGIC)]!r}; {_REMAKE}")
        if len(header) < _HEADER.size:
            raise DataError(
                f"{idx_path} is truncated: {idx_bytes} bytes, its header alone has {_HEADER.size}; {_REMAKE}"
            )
        _, version, code, sequences, bounds = _HEADER.unpack(header)
        if version != 1 or code not in {kind.value for kind in dtypes}:
            raise DataError(
                f"{idx_path} has index version {version} and dtype code {code}, which are not supported; {_REMAKE}"
            )
        expected = _HEADER.size + 12 * sequences + 8 * bounds
        if idx_bytes != expected:
            raise DataError(f"{idx_path} is truncated: {idx_bytes} bytes, its header specifies {expected}; {_REMAKE}")
        if not sequences or not bin_bytes:
            raise DataError(f"{bin_path} contains no tokens; {_REMAKE} from a source that is not empty")
        stream.seek(_HEADER.size + 4 * (sequences - 1))
        (last_length,) = struct.unpack("<i", stream.read(4))
        stream.seek(_HEADER.size + 12 * sequences - 8)
        (last_offset,) = struct.unpack("<q", stream.read(8))
        stream.seek(expected - 8)
        (last_bound,) = struct.unpack("<q", stream.read(8))
    itemsize = dtypes.size(code)
    if bin_bytes != last_offset + last_length * itemsize or last_bound != sequences:
        raise DataError(
            f"{bin_path} has {bin_bytes} bytes, its index describes {last_offset + last_length * itemsize}; {_REMAKE}"
        )
    return bin_bytes // itemsize, bounds - 1


def _megatron() -> Any:
    """Megatron's token file module, imported on first use: the import takes seconds and loads torch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
