"""Configuration: unknown keys by their whole path, variables that override, paths from the file's own folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from common.config import listen_address, load
from common.errors import InvalidInput, Reason


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    cert: Path
    allow_single_ca: bool = False


class Guest(msgspec.Struct, frozen=True, kw_only=True):
    program: list[str]
    firmware: Path


class Config(msgspec.Struct, frozen=True, kw_only=True):
    listen: str
    tls: Tls
    state_dir: Path = Path("unset")
    timeout: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    bits: Annotated[int, msgspec.Meta(ge=1, le=5)] | None = None
    names: tuple[str, ...] = ()
    roots: tuple[Path, ...] = ()
    guests: dict[str, Guest] = {}
    kds: Path | None = None
    extra: Tls | None = None

    def __post_init__(self) -> None:
        listen_address(self.listen)
        if self.state_dir == self.tls.cert:
            raise ValueError("State and certificate are the same.")


GOOD = """
listen = "127.0.0.1:7443"
state_dir = "state"
kds = "/abs/kds"
[tls]
cert = "tls/a.pem"
[guests.web-1]
program = ["qemu", "-S"]
firmware = "OVMF.fd"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(GOOD, encoding="utf-8")
    return path


def _refusal(path: Path, text: str | None = None, **environ: str) -> str:
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInput) as caught:
        load(path, Config, environ)
    assert caught.value.reason is Reason.INVALID_CONFIGURATION
    return caught.value.message.replace(f"{path.parent}/", "")


def test_a_file_becomes_a_struct_with_paths_from_its_own_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(Path("agent.toml"), Config, {})
    assert config == Config(
        listen="127.0.0.1:7443",
        state_dir=tmp_path / "state",
        kds=Path("/abs/kds"),
        tls=Tls(cert=tmp_path / "tls/a.pem"),
        guests={"web-1": Guest(program=["qemu", "-S"], firmware=tmp_path / "OVMF.fd")},
    )
    assert load(file, Config, {}) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("cert =", "crt ="), 'agent.toml: unknown key "tls.crt"'),
        (("state_dir", "statedir"), 'agent.toml: unknown key "statedir"'),
        (("firmware", "firm"), 'agent.toml: unknown key "guests.web-1.firm"'),
        (('cert = "tls/a.pem"', ""), 'agent.toml: missing key "tls.cert"'),
        (('firmware = "OVMF.fd"', ""), 'agent.toml: missing key "guests.web-1.firmware"'),
        (('"127.0.0.1:7443"', "7443"), "agent.toml: listen: expected `str`, got `int`"),
        (('"127.0.0.1:7443"', '"7443"'), "agent.toml: '7443' is not an address to listen on (HOST:PORT)"),
        (('["qemu", "-S"]', "[1]"), "agent.toml: guests.web-1.program: expected `str`, got `int` - at `$[0]`"),
        (("state_dir =", "timeout = 0\nstate_dir ="), "agent.toml: timeout: expected `float` > 0.0"),
        (("state_dir =", "timeout = '30'\nstate_dir ="), "agent.toml: timeout: expected `float`, got `str`"),
        (("state_dir =", "bits = 6\nstate_dir ="), "agent.toml: bits: expected `int` <= 5"),
        (('"state"', '""'), "agent.toml: state_dir: expected a path"),
        (('"state"', "1"), "agent.toml: state_dir: expected a path"),
        (('"state"', '"tls/a.pem"'), "agent.toml: state and certificate are the same"),
        (
            ("[tls]", "[tls"),
            "agent.toml: is not TOML: expected ']' at the end of a table declaration (at line 5, column 5)",
        ),
        (("[tls]\ncert", "tls"), "agent.toml: tls: expected a table"),
        (("listen =", "guests = 1\nlisten ="), "agent.toml: is not TOML: "),
        (("[guests.web-1]", "[guests]"), "agent.toml: guests.program: expected a table"),
        (("listen =", "extra = {crt = 'x'}\nlisten ="), 'agent.toml: unknown key "extra.crt"'),
    ],
)
def test_what_is_wrong_is_said_with_the_keys_whole_path(file: Path, change: tuple[str, str], message: str) -> None:
    assert _refusal(file, GOOD.replace(*change, 1)).startswith(message)


def test_a_missing_file_and_a_file_that_is_no_text_are_named(file: Path, tmp_path: Path) -> None:
    assert _refusal(tmp_path / "gone.toml") == "gone.toml: no such file or directory"
    assert _refusal(tmp_path) == f"{tmp_path.name}: is a directory"
    file.write_bytes(b"\xff\xfe")
    assert _refusal(file) == "agent.toml: is not UTF-8 text"
    file.write_bytes(b"#" * ((1 << 20) + 1))
    assert _refusal(file) == "agent.toml: is too large for a configuration"


def test_a_file_that_is_nested_without_end_is_refused(file: Path) -> None:
    assert _refusal(file, "x = " + "[" * 100_000).startswith("agent.toml: is ")


@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 5000])
def test_a_number_without_end_is_refused(file: Path, number: str) -> None:
    assert _refusal(file, f"bits = {number}\n{GOOD}").startswith("agent.toml: ")


def test_a_variable_that_could_mean_two_tables_is_refused(file: Path) -> None:
    twin = '[guests."web.1"]\nprogram = ["other"]\nfirmware = "other.fd"\n'
    message = _refusal(file, GOOD + twin, SEVATTEST_GUESTS__WEB_1__FIRMWARE="x")
    assert message == "environment: SEVATTEST_GUESTS__WEB_1__FIRMWARE could mean web-1 or web.1"


def test_variables_override_the_file_with_their_types(file: Path, tmp_path: Path) -> None:
    config = load(
        file,
        Config,
        {
            "SEVATTEST_LISTEN": "[::1]:0",
            "SEVATTEST_TLS__CERT": "other.pem",
            "SEVATTEST_TLS__ALLOW_SINGLE_CA": "true",
            "SEVATTEST_TIMEOUT": "5",
            "SEVATTEST_BITS": "5",
            "SEVATTEST_NAMES": '["a", "b"]',
            "SEVATTEST_ROOTS": '["r.cert"]',
            "SEVATTEST_KDS": "kds",
            "SEVATTEST_GUESTS__WEB_1__FIRMWARE": "/new/OVMF.fd",
            "SEVATTEST_EXTRA__CERT": "extra.pem",
            "SEVATTEST_VECTORS": "not a setting, and not an error",
            "HOME": "/nowhere",
        },
    )
    assert config.listen == "[::1]:0"
    assert config.tls == Tls(cert=tmp_path / "other.pem", allow_single_ca=True)
    assert (config.timeout, config.bits, config.names) == (5.0, 5, ("a", "b"))
    assert (config.roots, config.kds) == ((tmp_path / "r.cert",), tmp_path / "kds")
    assert config.guests["web-1"].firmware == Path("/new/OVMF.fd")
    assert config.extra == Tls(cert=tmp_path / "extra.pem")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SEVATTEST_LISTN", "x", "environment: SEVATTEST_LISTN names no setting"),
        ("SEVATTEST_TLS__CRT", "x", "environment: SEVATTEST_TLS__CRT names no setting"),
        ("SEVATTEST_TLS_CERT", "x", "environment: SEVATTEST_TLS_CERT names no setting"),
        ("SEVATTEST_tls__cert", "x", "environment: SEVATTEST_tls__cert names no setting"),
        ("SEVATTEST_LISTEN__X", "x", "environment: SEVATTEST_LISTEN__X names no setting"),
        ("SEVATTEST_GUESTS__DB__FIRMWARE", "x", "environment: SEVATTEST_GUESTS__DB__FIRMWARE names no setting"),
        ("SEVATTEST_", "x", "environment: SEVATTEST_ names no setting"),
        ("SEVATTEST_TLS", "x", "environment: SEVATTEST_TLS names a whole table; name one of its settings"),
        ("SEVATTEST_GUESTS", "x", "environment: SEVATTEST_GUESTS names a whole table; name one of its settings"),
        (
            "SEVATTEST_GUESTS__WEB_1",
            "x",
            "environment: SEVATTEST_GUESTS__WEB_1 names a whole table; name one of its settings",
        ),
        ("SEVATTEST_TIMEOUT", "soon", "environment: SEVATTEST_TIMEOUT: expected `float`, got `str`"),
        ("SEVATTEST_TIMEOUT", "-1", "environment: SEVATTEST_TIMEOUT: expected `float` > 0.0"),
        ("SEVATTEST_BITS", "9", "environment: SEVATTEST_BITS: expected `int` <= 5"),
        ("SEVATTEST_NAMES", "a,b", 'environment: SEVATTEST_NAMES: expected a list such as ["a", "b"]'),
        ("SEVATTEST_NAMES", "[" * 10_000, 'environment: SEVATTEST_NAMES: expected a list such as ["a", "b"]'),
        ("SEVATTEST_NAMES", "9" * 5000, 'environment: SEVATTEST_NAMES: expected a list such as ["a", "b"]'),
        ("SEVATTEST_STATE_DIR", "", "agent.toml: state_dir: expected a path"),
    ],
)
def test_a_variable_that_names_no_setting_or_no_value_is_refused(
    file: Path, name: str, value: str, message: str
) -> None:
    assert _refusal(file, None, **{name: value}).startswith(message)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:7443", ("127.0.0.1", 7443)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),  # noqa: S104 -- read, not listened on
        ("localhost:65535", ("localhost", 65535)),
        ("[::1]:7443", ("::1", 7443)),
    ],
)
def test_an_address_to_listen_on_is_host_and_port(text: str, address: tuple[str, int]) -> None:
    assert listen_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "host",
        "host:",
        ":7443",
        "host:65536",
        "host:-1",
        "host: 1",
        "::1:7443",
        "[::1]",
        "[x]:1",
        "a b:1",
        "unix:/x",
        "host:1\n",
    ],
)
def test_an_address_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="is not an address to listen on"):
        listen_address(text)
