"""Who may use the gateway: loopback, keys, web pages; and the settings that decide it."""

import logging
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from costeer_vllm.cli import app
from costeer_vllm.edge.gateway import refusal
from costeer_vllm.edge.settings import EdgeSettings, GatewaySettings, gateway_settings
from costeer_vllm.edge.upstream import Patience, Upstream
from costeer_vllm.edge.worker import EXIT_INVALID
from costeer_vllm.edge.worker import run as run_worker
from costeer_vllm.errors import InvalidParameter

from .device import device
from .hub import run

OPEN = GatewaySettings("127.0.0.1", 8787, "http://server:8000/v1")
KEYED = replace(OPEN, key="sesame")


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "127.0.0.1:8787"}, None),
        ({"host": "localhost:8787"}, None),
        ({"host": "LOCALHOST"}, None),
        ({"host": "[::1]:8787"}, None),
        ({"host": "127.0.0.1:8787", "origin": "http://127.0.0.1:8787"}, None),
        ({}, "wrong_host"),
        ({"host": ""}, "wrong_host"),
        ({"host": "evil.example"}, "wrong_host"),
        ({"host": "127.0.0.1.evil.example:8787"}, "wrong_host"),
        ({"host": "[::1"}, "wrong_host"),
        ({"host": "0.0.0.0:8787"}, "wrong_host"),
        ({"host": "evil.example@127.0.0.1:8787"}, "wrong_host"),
        ({"host": "evil.example:80@127.0.0.1"}, "wrong_host"),
        ({"host": "127.0.0.1:8787/evil.example"}, "wrong_host"),
        ({"host": "127.0.0.1?evil.example"}, "wrong_host"),
        ({"host": "127.0.0.1#evil.example"}, "wrong_host"),
        ({"host": "127.0.0.1, evil.example"}, "wrong_host"),
        ({"host": " 127.0.0.1"}, "wrong_host"),
        ({"host": "127.0.0.1\n"}, "wrong_host"),
        ({"host": "127.0.0.1\t:8787"}, "wrong_host"),
        ({"host": "127.0.0.1:"}, "wrong_host"),
        ({"host": "127.0.0.1:x"}, "wrong_host"),
        ({"host": "::1"}, "wrong_host"),
        ({"host": "[localhost]"}, "wrong_host"),
        ({"host": "127.0.0.1:8787", "origin": "https://evil.example"}, "wrong_origin"),
        ({"host": "127.0.0.1:8787", "origin": "null"}, "wrong_origin"),
        ({"host": "127.0.0.1:8787", "origin": ""}, "wrong_origin"),
        ({"host": "127.0.0.1:8787", "origin": "http://127.0.0.1:3000"}, "wrong_origin"),
        ({"host": "127.0.0.1:8787", "origin": "https://127.0.0.1:8787"}, "wrong_origin"),
        ({"host": "evil.example", "origin": "http://evil.example"}, "wrong_host"),
    ],
)
def test_without_a_key_web_pages_are_kept_out(headers: dict[str, str], code: str | None) -> None:
    for path in ("/v1/chat/completions", "/v1/models", "/healthz"):
        error = refusal(path, headers, OPEN)
        assert (error and error.code) == code
        assert error is None or error.status == 403


@pytest.mark.parametrize(("site", "code"), [("none", None), ("same-origin", None), ("same-site", "wrong_origin"),
                                            ("cross-site", "wrong_origin"), ("", "wrong_origin")])  # fmt: skip
def test_what_browsers_ask_without_an_origin_is_kept_out_too(site: str, code: str | None) -> None:
    """Images, scripts and navigation, of which the page sees nothing, but which would reach the server."""
    headers = {"host": "127.0.0.1:8787", "sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
    for path in ("/v1/chat/completions", "/v1/models", "/anything"):
        error = refusal(path, headers, OPEN)
        assert (error and error.code) == code
    assert refusal("/healthz", headers, OPEN) is None
    assert refusal("/v1/models", {**headers, "authorization": "Bearer sesame"}, KEYED) is None


@pytest.mark.parametrize(
    ("authorization", "status"),
    [("Bearer sesame", None), ("bearer sesame", None), ("BEARER  sesame", None), ("Bearer sesam", 401), ("Bearer sesame ", 401),
     ("Bearer Sesame", 401), ("sesame", 401), ("Bearersesame", 401), ("Basic sesame", 401), (" sesame", 401), ("Bearer ", 401),
     ("Bearer", 401), ("", 401), ("Bearer \xe9", 401), (None, 401)],
)  # fmt: skip
def test_with_a_key_it_is_the_key_that_counts(authorization: str | None, status: int | None) -> None:
    headers = {"host": "device.example", "origin": "https://app.example"}
    headers |= {} if authorization is None else {"authorization": authorization}
    for path in ("/v1/chat/completions", "/v1/models", "/anything"):
        error = refusal(path, headers, KEYED)
        assert (error and error.status) == status
        assert "sesame" not in str(error)
    assert refusal("/healthz", headers, KEYED) is None


def test_both_over_real_sockets(tmp_path: Path) -> None:
    async def main() -> None:
        async with device(tmp_path) as at:
            for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
                answer = await at.app.post("/chat/completions", json={}, headers=headers)
                assert answer.status_code == 403
                assert (await at.app.get("/models", headers=headers)).status_code == 403
                preflight = await at.app.options("/chat/completions", headers=headers)
                assert preflight.status_code == 403
                assert "access-control-allow-origin" not in preflight.headers
            assert not at.server.received
        async with device(tmp_path, key="sesame") as at:
            assert (await at.chat()).status_code == 401
            assert (await at.chat()).headers["www-authenticate"] == "Bearer"
            assert (await at.app.get("/models")).status_code == 401
            assert (await at.app.get("../healthz")).status_code == 200
            assert not at.server.received
            for scheme in ("Bearer", "bearer"):
                at.app.headers["authorization"] = f"{scheme} sesame"
                assert (await at.chat()).status_code == 200

    run(main())


@pytest.mark.parametrize(
    ("key", "server_key", "sent", "passed"),
    [
        (None, None, "Bearer app", "Bearer app"),
        (None, None, None, None),
        (None, "server", "Bearer app", "Bearer server"),
        (None, "server", None, "Bearer server"),
        ("sesame", None, "Bearer sesame", None),
        ("sesame", "server", "Bearer sesame", "Bearer server"),
    ],
)
def test_which_key_the_server_gets(tmp_path: Path, key: Any, server_key: Any, sent: str | None, passed: str | None) -> None:
    async def main() -> None:
        async with device(tmp_path, key=key, server_key=server_key) as at:
            at.app.headers.update({"x-request-id": "7", "cookie": "private", "user-agent": "private"})
            at.app.headers.update({} if sent is None else {"authorization": sent})
            await at.chat()
            await at.app.get("/models")
            for call in at.server.calls:
                assert call.headers.get("authorization") == passed
                assert call.headers["x-request-id"] == "7"
            assert b"private" not in at.server.received
            assert b"sesame" not in at.server.received

    run(main())


@pytest.mark.parametrize(
    ("server", "uses_environment"),
    [("http://127.0.0.1:8000/v1", False), ("http://localhost:8000/v1", False), ("http://[::1]:8000/v1", False),
     ("http://server:8000/v1", True), ("https://server.example/v1", True)],
)  # fmt: skip
def test_the_environments_proxies_are_for_servers_elsewhere(server: str, uses_environment: bool) -> None:
    async def main() -> None:
        upstream = Upstream(server, None, True, Patience())
        assert upstream._client.trust_env is uses_environment
        assert upstream._client.follow_redirects is False
        await upstream.close()

    run(main())


# --- settings ---


@pytest.mark.parametrize(
    ("address", "server", "host", "port"),
    [
        ("127.0.0.1:8787", "http://server:8000/v1", "127.0.0.1", 8787),
        ("localhost:0", "https://server/v1/", "localhost", 0),
        ("[::1]:8787", "http://[::1]:8000/v1", "::1", 8787),
    ],
)
def test_addresses(address: str, server: str, host: str, port: int) -> None:
    settings = gateway_settings(address, server)
    assert settings is not None
    assert (settings.host, settings.port, settings.server) == (host, port, server.rstrip("/"))


def test_no_gateway_is_the_default() -> None:
    assert gateway_settings(None, None, "key", "key") is None


@pytest.mark.parametrize(
    ("address", "server", "field"),
    [
        ("127.0.0.1:8787", None, "server"),
        (None, "http://server:8000/v1", "gateway"),
        ("8787", "http://server:8000/v1", "gateway"),
        (":8787", "http://server:8000/v1", "gateway"),
        ("127.0.0.1:99999", "http://server:8000/v1", "gateway"),
        ("127.0.0.1:x", "http://server:8000/v1", "gateway"),
        ("0.0.0.0:8787", "http://server:8000/v1", "gateway"),
        ("192.168.0.2:8787", "http://server:8000/v1", "gateway"),
        ("device.example:8787", "http://server:8000/v1", "gateway"),
        ("127.0.0.1:8787", "server:8000", "server"),
        ("127.0.0.1:8787", "ftp://server/v1", "server"),
        ("127.0.0.1:8787", "http://", "server"),
        ("127.0.0.1:8787", "http://server:99999/v1", "server"),
        ("127.0.0.1:8787", "http://1.2.3.999:8000/v1", "server"),
        ("127.0.0.1:8787", "http://[v1.a]:8000/v1", "server"),
        ("127.0.0.1:8787", "http://xn--a/v1", "server"),
        ("127.0.0.1:8787", f"http://server/{'v' * 2**16}", "server"),
        ("127.0.0.1:8787", "http://me:sesame@server/v1", "server"),
        ("127.0.0.1:8787", "http://server/v1?key=x", "server"),
        ("127.0.0.1:8787", "http://server/v1#x", "server"),
        ("127.0.0.1:8787", "http://ser ver/v1", "server"),
        ("127.0.0.1:8787", "http://server/v1\n", "server"),
        ("127.0.0.1:8787", "http://sörver/v1", "server"),
    ],
)
def test_addresses_that_cannot_be_used(address: str | None, server: str | None, field: str) -> None:
    with pytest.raises(InvalidParameter, match=f"{field} is") as caught:
        gateway_settings(address, server)
    assert "sesame" not in str(caught.value)


def test_beyond_loopback_a_key_is_due() -> None:
    with pytest.raises(InvalidParameter, match="COSTEER_GATEWAY_KEY"):
        gateway_settings("0.0.0.0:8787", "http://server:8000/v1")
    assert gateway_settings("0.0.0.0:8787", "http://server:8000/v1", "sesame") is not None


def test_keys_are_not_shown() -> None:
    assert "sesame" not in repr(replace(KEYED, server_key="sesame 2".replace(" ", "")))
    for key in ("", "sesame sesame", "sesame\n", "sésame", "sesame" * 100):
        for option in ("key", "server_key"):
            with pytest.raises(InvalidParameter) as caught:
                replace(OPEN, **{option: key})
            assert "same" not in str(caught.value).replace("costeer", "")


def test_an_address_in_use_is_told_before_anything_is_loaded(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = gateway_settings(f"127.0.0.1:{other.getsockname()[1]}", "http://server:8000/v1")
        settings = EdgeSettings(hub="127.0.0.1:1", name="laptop", model="none", context="none", gateway=taken)
        assert run_worker(settings) == EXIT_INVALID
    assert "Address already in use" in caplog.text


def test_the_command_lines_options_and_the_environments_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[EdgeSettings] = []
    monkeypatch.setattr(logging.getLogger("httpx"), "setLevel", lambda level: None)  # for the tests that come after
    monkeypatch.setattr("costeer_vllm.edge.worker.run", lambda settings: started.append(settings) or 0)
    command = ["edge", "--hub", "server:8770", "--name", "laptop", "--model", "small", "--context", "me.md"]
    shown = CliRunner().invoke(app, command)
    assert (shown.exit_code, started[-1].gateway) == (0, None)
    environment = {"COSTEER_GATEWAY_KEY": "sesame", "COSTEER_SERVER_KEY": "other"}
    shown = CliRunner().invoke(app, [*command, "--gateway", "0.0.0.0:8787", "--server", "http://server:8000/v1"], env=environment)
    assert shown.exit_code == 0, shown.output
    assert started[-1].gateway == GatewaySettings("0.0.0.0", 8787, "http://server:8000/v1", "sesame", "other")


def test_the_documentation_names_every_error() -> None:
    root = Path(__file__).parents[2]
    source = "".join(path.read_text() for path in (root / "src/costeer_vllm/edge").glob("*.py"))
    codes = set(re.findall(r'GatewayError\(\s*[^,]+,\s*"(\w+)"', source))
    table = (root / "docs/gateway.md").read_text().split("## Errors")[1]
    assert codes == set(re.findall(r"`(\w+_\w+|busy)`", table))
