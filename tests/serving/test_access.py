"""Who may ask a server: keys, addresses that need one, names of hosts, and what strangers see of failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.config import ConfigError
from recycle_ds.serving.access import is_host_allowed, read_keys, sees_causes, warning_about
from tests.serving.servers import LONG, serving


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


def test_names_of_a_loopback_server(loaded: LoadedModel) -> None:
    """Prevents a web page whose name points to this machine (DNS rebinding) from using the server, and names that users do
    use from being refused."""
    with serving(loaded, allowed_hosts=("llm.example",)) as server:
        http = server.http()
        for name, status in (
            ("evil.example", 403),
            ("localhost.evil.example:80", 403),
            ("", 403),
            ("LLM.example:443", 200),
        ):
            found = http.get("/ready", headers={"host": name})
            assert found.status_code == status
            assert status == 200 or found.json()["error"]["code"] == "host_not_allowed"
        for name in ("localhost", "localhost:1234", "127.0.0.1", "[::1]:8000"):
            assert http.post("/v1/completions", json={"prompt": "a"}, headers={"host": name}).status_code == 200


def test_keys(loaded: LoadedModel) -> None:
    """Prevents access without a valid key, probes that need one, and keys in the log."""
    with serving(loaded, api_keys=("first-key", "second-key")) as server:
        with httpx.Client(base_url=server.url, trust_env=False) as http:
            for path in ("/v1/models", "/metrics", "/openapi.json", "/run.json", "/static", "/nothing"):
                assert http.get(path).status_code == 401, path
            for given in (
                "Bearer",
                "Bearer first-ke",
                "Basic first-key",
                "first-key",
                "Bearer \u00e9",
                "Bearer first-key2",
            ):
                answer = http.get("/v1/models", headers={"authorization": given.encode()})
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
            for key in ("first-key", "second-key"):
                assert http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
            assert [http.get(path).status_code for path in ("/health", "/ready")] == [200, 200]
        with pytest.raises(openai.AuthenticationError):
            server.client().with_options(api_key="wrong").models.list()
        assert "-key" not in server.log.getvalue()


@pytest.mark.parametrize(
    ("settings", "seen_by"),
    [({}, {"all"}), ({"api_keys": ("a-key",)}, {"key"}), ({"host": "0.0.0.0"}, set())],
)
def test_who_sees_why_the_engine_failed(loaded: LoadedModel, settings: dict[str, Any], seen_by: set[str]) -> None:
    """Prevents paths, hosts and memory of the machine from being shown to strangers, and clients that repeat a request that
    breaks the engine."""
    with serving(loaded, **settings) as server, httpx.Client(base_url=server.url, trust_env=False) as stranger:

        def fail() -> Any:
            raise RuntimeError("no memory at /secret")

        server.worker.engine.step = fail  # type: ignore[method-assign]
        http = server.http()
        answer = http.post("/v1/completions", json=LONG)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "failed"
        assert answer.headers["x-should-retry"] == "false"
        known = [answer, *(http.get(path) for path in ("/health", "/ready")), http.post("/v1/completions", json=LONG)]
        unknown = [stranger.get(path) for path in ("/health", "/ready")]
        assert [one.status_code for one in (*known[1:], *unknown)] == [503] * 5
        for found, visible in ((known, bool(seen_by)), (unknown, seen_by == {"all"})):
            assert {"secret" in one.text for one in found} == {visible}
            assert all("the engine failed" in one.text for one in found)
