"""Files of keys, and addresses that need one."""

from __future__ import annotations

from pathlib import Path

import pytest

from recycle_ds.config import ConfigError
from recycle_ds.serving.access import read_keys, warning_about


def test_keys_of_a_file(tmp_path: Path) -> None:
    """Prevents comments, blanks and line ends from becoming keys, and a file without keys from opening the server."""
    file = tmp_path / "keys.txt"
    file.write_bytes(b"# ours\r\n\r\n  key-1  \r\nkey-2\n")
    assert read_keys(file) == ("key-1", "key-2")
    for content, reason in (
        (b"\n# none\n", "has no key"),
        (b"ok\nk\xc3\xa9y", "key 2 must be"),
        (b"a b", "key 1 must be"),
        (b"\xff", "cannot be read"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=reason):
            read_keys(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "missing")


def test_addresses_that_everyone_reaches() -> None:
    """Prevents a server that is open to its network without a warning, and a warning that everyone ignores."""
    for host in ("127.0.0.1", "127.5.5.5", "::1", "localhost"):
        assert warning_about(host, ()) is None
    for host in ("0.0.0.0", "::", "10.0.0.5", "node17"):
        assert "--api-key-file" in str(warning_about(host, ()))
        assert warning_about(host, ("key",)) is None
