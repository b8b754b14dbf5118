"""Files of keys, and addresses that need one."""

from __future__ import annotations

from pathlib import Path

import pytest

from recycle_ds.config import ConfigError
from recycle_ds.serving.access import is_host_allowed, read_keys, sees_causes, warning_about


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


def test_names_under_which_a_server_is_asked() -> None:
    """Prevents DNS rebinding, and refused clients of servers where it does no harm or that are asked under other names."""
    good = ("localhost", "LOCALHOST.:8000", "127.0.0.1:8000", "127.5.5.5", "[::1]", "[::1]:8000", None)
    bad = (
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "",
        ":8000",
        "10.0.0.5",
    )
    for host in ("127.0.0.1", "localhost", "::1"):
        assert [is_host_allowed(name, host, (), ()) for name in good] == [True] * len(good)
        assert [is_host_allowed(name, host, (), ()) for name in bad] == [False] * len(bad)
        assert is_host_allowed("evil.example", host, (), ("key",))
        assert is_host_allowed("LLM.example:443", host, ("llm.example",), ())
        assert not is_host_allowed("evil.example", host, ("llm.example",), ("key",))
    assert is_host_allowed("node17:8000", "0.0.0.0", (), ())
    assert is_host_allowed("node17:8000", "node17", ("llm.example",), ())
    assert not is_host_allowed("evil.example", "0.0.0.0", ("llm.example",), ())


def test_who_sees_causes() -> None:
    """Prevents strangers from reading exceptions, and users of their own server from not finding the reason."""
    assert sees_causes(None, "127.0.0.1", ()) and not sees_causes(None, "0.0.0.0", ())
    assert sees_causes("Bearer key", "0.0.0.0", ("key",)) and not sees_causes("Bearer k", "127.0.0.1", ("key",))
