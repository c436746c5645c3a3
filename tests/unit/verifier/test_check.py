"""`check-config`: everything that is wrong, each with its place, and what deserves a second look."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from common.errors import InvalidInput, Reason, Unavailable
from tests.support.documents import CALLER, SECRET_GUID, grant, platform, revocation, write_document
from tests.support.documents import workload as document
from tests.support.recording_log import RecordingLog
from tests.support.verifier_process import VerifierSite
from verifier.app import App, real_surroundings
from verifier.check import check
from verifier.cli import main
from verifier.config import (
    load_config,
    until_restart,
)
from verifier.documents.generations import GENERATIONS


@pytest.fixture
def site(tmp_path: Path) -> VerifierSite:
    (tmp_path / "kds").mkdir()
    return VerifierSite.make(tmp_path, extra='[kds]\nsource = "kds"', init=False)


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_a_good_configuration_is_good(site: VerifierSite, capsys: pytest.CaptureFixture[str]) -> None:
    (site.folder / "documents" / "secret").chmod(0o600)
    code, out, err = command(capsys, "check-config", "--config", str(site.config))
    assert (code, out) == (0, "sev-verifier: configuration is good: workloads: 1, documents: 1\n")
    assert err.splitlines() == [
        f"warning: platforms.extra_roots: {site.folder}/ask_ark.cert: platforms under this root count as emulated",
        f"warning: web.yaml: spec.platforms.generations: emulated: {GENERATIONS['emulated'].caution}",
    ]


def test_every_problem_is_listed_with_its_place(site: VerifierSite, capsys: pytest.CaptureFixture[str]) -> None:
    (site.folder / "kek.bin").chmod(0o644)
    (site.folder / "ask_ark.cert").write_bytes(b"nothing")
    (site.folder / "documents" / "kernel").unlink()
    (site.folder / "documents" / "secret").unlink()
    code, out, err = command(capsys, "check-config", "--config", str(site.config))
    assert (code, out) == (2, "")
    problems = [line for line in err.splitlines() if line.startswith("sev-verifier: ")]
    assert [problem.split(": ")[1] for problem in problems] == [
        "key_file",
        "platforms.extra_roots",
        "web.yaml",
        "web.yaml",
    ]
    assert "spec.measure: " in problems[2]
    assert "spec.secrets[0].source.file: " in problems[3]


def test_secrets_that_do_not_fit_are_found(site: VerifierSite) -> None:
    (site.folder / "documents" / "secret").write_bytes(bytes(4000))
    (problem,) = check(site.config, {}).problems
    assert problem.startswith("web.yaml: spec.secrets: the workload's secrets take 4048 bytes")


def test_a_secret_that_others_can_read_is_a_warning(site: VerifierSite) -> None:
    (site.folder / "documents" / "secret").chmod(0o644)
    assert any("can be read by others" in warning for warning in check(site.config, {}).warnings)


@pytest.mark.parametrize(("ends", "over"), [("2020-01-01T00:00:00Z", True), ("9020-01-01T00:00:00Z", False)])
def test_a_grant_whose_time_is_over_is_a_warning(site: VerifierSite, ends: str, *, over: bool) -> None:
    write_document(site.folder / "documents", grant(not_after=ends), "fleet.yaml")
    findings = check(site.config, {})
    told = "fleet.yaml: spec.not_after: has passed: nothing is begun under this grant"
    assert (findings.problems, told in findings.warnings) == ([], over)


def test_older_versions_stop_nothing(site: VerifierSite) -> None:
    older = document(measure={**document()["spec"]["measure"], "kernel": "gone"})
    older["metadata"]["version"] = "0"
    write_document(site.folder / "documents", older, "older.yaml")
    findings = check(site.config, {})
    assert findings.problems == []
    assert any(warning.startswith("older.yaml: spec.measure: ") for warning in findings.warnings)


def test_an_empty_folder_and_a_missing_key_service_are_warnings(tmp_path: Path) -> None:
    site = VerifierSite.make(tmp_path, init=False)
    (site.folder / "documents" / "web.yaml").unlink()
    findings = check(site.config, {})
    assert findings.problems == []
    assert any("nothing can be launched" in warning for warning in findings.warnings)
    assert any(warning.startswith("kds: is not set") for warning in findings.warnings)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("colour = 1", 'unknown key "kds.colour"'),
        ("[limits]\nopen_launches = 0", "limits: open_launches: must be 1 to 100000"),
        ('[limits]\nrefusals = "many"', "limits: refusals: must be a number in a period"),
        ('[limits]\nrefusals = "0/1h"', "limits: refusals: must be a number in a period"),
        ("[limits]\nspeed = 1", 'unknown key "limits.speed"'),
        ("[limits]\nsweep_interval = nan", "limits: sweep_interval: must be 1 to 3600"),
        ('[store]\npostgres = "dsn"\nconnections = 1', "store: connections: must be 2 to 64"),
    ],
)
def test_a_bad_key_is_named_with_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, problem: str
) -> None:
    site = VerifierSite.make(tmp_path, extra=f'[kds]\nsource = "kds"\n{line}', init=False)
    code, _, err = command(capsys, "check-config", "--config", str(site.config))
    assert code == 2
    assert problem in err


@pytest.mark.parametrize("denied", ["ab", "AB" * 32, "ab" * 33])
def test_a_denied_chip_that_would_deny_nothing_is_refused(site: VerifierSite, denied: str) -> None:
    text = site.config.read_text().replace("[platforms]\n", f'[platforms]\ndenied_chips = ["{denied}"]\n')
    site.config.write_text(text)
    (problem,) = check(site.config, {}).problems
    assert "platforms: denied_chips[0]: must be 64" in problem


@pytest.mark.parametrize("listen", ["", "/", "localhost", "localhost:65536"])
def test_an_address_that_cannot_be_listened_on_is_found(site: VerifierSite, listen: str) -> None:
    (problem,) = check(site.config, {"SEVATTEST_LISTEN": listen}).problems
    assert problem.startswith("listen: ")


def test_the_owners_listener_is_looked_at(site: VerifierSite) -> None:
    admin = f'[admin]\nlisten = "127.0.0.1:0"\nclient_ca = "{site.pki.owner_ca}"\ntrust_domain = "owner.example"\n'
    text = site.config.read_text()
    site.config.write_text(f"{text}\n{admin}")
    assert check(site.config, {}).problems == []
    for good, bad, problem in (
        ("127.0.0.1:0", "localhost:65536", "admin.listen: "),
        (str(site.pki.owner_ca), str(site.folder / "none.pem"), "none.pem"),
    ):
        site.config.write_text(f"{text}\n{admin.replace(good, bad)}")
        (found,) = check(site.config, {}).problems
        assert problem in found
    # What both listeners have in common is wrong once.
    site.config.write_text(f"{text}\n{admin}")
    load_config(site.config, {}).tls.cert.unlink()
    assert len(check(site.config, {}).problems) == 1


def test_all_files_of_a_listener_that_are_missing_are_named_at_once(site: VerifierSite) -> None:
    config = load_config(site.config, {})
    for file in (config.tls.cert, config.tls.client_ca):
        file.unlink()
    assert check(site.config, {}).problems == [
        f"{config.tls.cert}: no such file or directory",
        f"{config.tls.client_ca}: no such file or directory",
    ]


def test_older_key_files_are_looked_at(site: VerifierSite, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, "keygen", str(site.folder / "old.bin"))[0] == 0
    text = site.config.read_text()
    site.config.write_text(f'older_key_files = ["old.bin"]\n{text}')
    assert check(site.config, {}).problems == []
    (site.folder / "old.bin").chmod(0o644)
    (found,) = check(site.config, {}).problems
    assert "old.bin" in found


def test_a_database_whose_address_is_nowhere_is_a_problem(site: VerifierSite) -> None:
    text = "\n".join(line for line in site.config.read_text().splitlines() if not line.startswith("state_dir"))
    site.config.write_text(f'{text}\n[store]\npostgres = "none.dsn"\n')
    (found,) = check(site.config, {}).problems
    assert "none.dsn" in found


@pytest.mark.parametrize(("content", "good"), [("", False), (" \n\t\n", False), (" host=/nowhere\n", True)])
def test_a_database_that_is_named_by_white_space_is_none(tmp_path: Path, content: str, *, good: bool) -> None:
    # To libpq this would be all of its defaults: some database, of this user's name.
    site = VerifierSite.make(tmp_path, dsn=content, init=False)
    named = f"store.postgres: {site.folder / 'dsn'}: holds no connection string"
    assert check(site.config, {}).problems == ([] if good else [named])


def test_a_database_that_is_not_there_is_said_to_be_the_one_of_the_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = VerifierSite.make(tmp_path, dsn="host=/nowhere/at/all user=alice password=hunter2", init=False)
    app = App(site.config, RecordingLog(), real_surroundings())
    with pytest.raises(Unavailable) as caught:
        asyncio.run(app.run(lambda _: None))
    names = f" (the PostgreSQL of [store], as {site.folder / 'dsn'} names it)"
    assert str(caught.value) == f"the store cannot be reached: No such file or directory{names}"
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    code, out, err = command(capsys, "audit", "--config", str(site.config))
    assert (code, out, err) == (3, "", f"sev-verifier: the store cannot be reached: No such file or directory{names}\n")


@pytest.mark.parametrize("source", ["", "a\0b"])
def test_a_key_service_that_is_nowhere_is_refused(site: VerifierSite, source: str) -> None:
    (problem,) = check(site.config, {"SEVATTEST_KDS__SOURCE": source}).problems
    assert problem.endswith("kds.source: names no folder and no address")


def test_a_key_services_folder_that_is_missing_is_a_warning(site: VerifierSite) -> None:
    (site.folder / "kds").rmdir()
    findings = check(site.config, {})
    assert findings.problems == []
    assert f"kds.source: {site.folder}/kds is not a folder: no CEK is found there" in findings.warnings


def test_a_chip_denied_by_its_id_alone_is_a_warning(tmp_path: Path) -> None:
    site = VerifierSite.make(tmp_path, init=False)
    (warning,) = [each for each in check(site.config, {}).warnings if each.startswith("kds: is not set")]
    assert "which a host can leave out" in warning


def test_a_variable_overrides_the_file(site: VerifierSite) -> None:
    findings = check(site.config, {"SEVATTEST_KEY_FILE": "other.bin"})
    assert any("other.bin" in problem for problem in findings.problems)


def test_one_ca_for_both_sites_is_refused_unless_written_out(site: VerifierSite) -> None:
    site.config.write_text(site.config.read_text().replace(str(site.pki.datacenter_ca), str(site.pki.owner_ca)))
    assert any("issues its callers too" in problem for problem in check(site.config, {}).problems)
    site.config.write_text(site.config.read_text().replace("trust_domain", "allow_single_ca = true\ntrust_domain"))
    findings = check(site.config, {})
    assert findings.problems == []
    assert any("tls.allow_single_ca" in warning for warning in findings.warnings)


async def test_an_owners_listener_for_certificates_of_the_datacenter_is_refused_unless_written_out(
    tmp_path: Path,
) -> None:
    site = VerifierSite.make(tmp_path / "site", owners=True)
    assert check(site.config, {}).problems == []
    both = tmp_path / "both.pem"
    both.write_bytes(site.pki.owner_ca.read_bytes() + site.pki.datacenter_ca.read_bytes())
    site.config.write_text(site.config.read_text().replace(str(site.pki.owner_ca), str(both)))
    (problem,) = check(site.config, {}).problems
    assert problem == f"{both}: lets in whoever has a certificate from a CA in {site.pki.datacenter_ca}"
    with pytest.raises(InvalidInput, match="lets in whoever has a certificate"):
        await App(site.config, RecordingLog(), real_surroundings()).start()
    site.config.write_text(site.config.read_text().replace("[tls]", "[tls]\nallow_single_ca = true"))
    assert check(site.config, {}).problems == []
    log = RecordingLog()
    app = App(site.config, log, real_surroundings())
    await app.start()
    await app.stop()
    assert log.named("verifier.single_ca")


def test_settings_that_wait_for_a_restart_are_told_from_those_that_do_not(site: VerifierSite) -> None:
    serving, text = load_config(site.config, {}), site.config.read_text()
    changed = text.replace('key_file = "kek.bin"', 'key_file = "new.bin"\nolder_key_files = ["kek.bin"]')
    site.config.write_text(changed.replace("[platforms]", f'[platforms]\ndenied_chips = ["{"0" * 64}"]'))
    assert until_restart(serving, load_config(site.config, {})) == []
    site.config.write_text(
        f"{text}\n[limits]\ncalls = 2\n".replace('"127.0.0.1:0"', '"127.0.0.1:7"').replace('"h.sock"', '"other.sock"')
        + '[admin]\nlisten = "127.0.0.1:0"\nclient_ca = "ca.pem"\ntrust_domain = "owner.example"\n'
    )
    assert until_restart(serving, load_config(site.config, {})) == ["listen", "admin", "health.socket", "limits.calls"]


def test_bad_documents_are_listed_one_a_line(site: VerifierSite, capsys: pytest.CaptureFixture[str]) -> None:
    bad: dict[str, Any] = document(callers=["cluster"], lifetime="1s")
    write_document(site.folder / "documents", bad)
    code, _, err = command(capsys, "check-config", "--config", str(site.config))
    assert code == 2
    assert [line for line in err.splitlines() if line.startswith("sev-verifier: web.yaml: spec.")] == [
        "sev-verifier: web.yaml: spec.callers[0]: must be spiffe://TRUST-DOMAIN/orchestrator/NAME",
        "sev-verifier: web.yaml: spec.lifetime: must be 10s to 24h, as in 90s, 10m or 1h",
    ]


def test_all_kinds_are_read_and_names_that_lead_nowhere_are_warnings(site: VerifierSite) -> None:
    folder = site.folder / "documents"
    write_document(folder, grant(workload="db", platforms={"names": ["host-9"]}), "grant.yaml")
    write_document(folder, platform(), "host-1.yaml")
    write_document(folder, revocation(), "incident.yaml")
    write_document(folder, document("alone", measure=None, digests=["00" * 32], callers=[]), "alone.yaml")
    findings = check(site.config, {})
    assert findings.problems == []
    assert (findings.workloads, findings.documents) == (2, 5)
    assert {
        "grant.yaml: spec.workload: there is no workload db",
        "grant.yaml: spec.platforms.names: there is no platform host-9",
        "alone.yaml: spec.callers: names nobody, and no grant is for this workload: nobody can launch it",
    } <= set(findings.warnings)
    write_document(folder, grant(workload="alone"), "grant.yaml")
    assert not [each for each in check(site.config, {}).warnings if "no grant is for" in each or "no workload" in each]


def test_bad_documents_of_every_kind_and_a_repeated_chip_are_problems(site: VerifierSite) -> None:
    folder = site.folder / "documents"
    write_document(folder, grant(launches=0), "a.yaml")
    write_document(folder, platform("host-1"), "b.yaml")
    write_document(folder, platform("host-2"), "c.yaml")
    write_document(folder, revocation(ceks=None), "d.yaml")
    assert check(site.config, {}).problems == [
        "a.yaml: spec.launches: must be 1 to 1000000000",
        "d.yaml: spec: revokes nothing: list chips, ceks, generations, firmware, ocas or workloads",
        "c.yaml: spec.cek: is the chip of host-1 already, in b.yaml",
    ]


def test_a_vault_secret_without_a_vault_is_a_problem_and_secrets_elsewhere_count_as_small(site: VerifierSite) -> None:
    vault = {"vault": {"mount": "kv", "path": "web", "field": "key"}}
    secrets = [{"guid": str(SECRET_GUID), "source": vault}]
    write_document(site.folder / "documents", document(secrets=secrets))
    problem = "web.yaml: spec.secrets[0].source.vault: the configuration has no [vault]"
    assert check(site.config, {}).problems == [problem]
    big = {"guid": "736869e5-84f0-4973-92ec-06879ce3da0b", "source": {"generated": {"size": 512}}}
    more = [{**big, "guid": f"736869e5-84f0-4973-92ec-06879ce3da{n:02x}"} for n in range(6)]
    write_document(site.folder / "documents", document(secrets=[*secrets, *more]))
    found = check(site.config, {}).problems
    assert found[0] == problem
    assert found[1].startswith("web.yaml: spec.secrets: the workload's secrets take")


def test_a_vault_that_serve_would_refuse_is_a_problem_and_files_that_may_come_are_warnings(site: VerifierSite) -> None:
    text = site.config.read_text()
    vault = '[vault]\naddress = "{}://vault.example:8200"\ntoken_file = "token"\nca = "vault-ca.pem"\n'
    site.config.write_text(f"{text}\n{vault.format('http')}")
    assert check(site.config, {}).problems == ["vault.address: must be https://HOST:PORT"]
    site.config.write_text(f"{text}\n{vault.format('https')}")
    findings = check(site.config, {})
    assert findings.problems == []
    missing = [
        f"vault.{name}: {site.folder / file}" for name, file in (("token_file", "token"), ("ca", "vault-ca.pem"))
    ]
    assert [each for each in findings.warnings if each.startswith("vault.")] == [
        f"{each} is not there: no secret in Vault is read" for each in missing
    ]
    for file in ("token", "vault-ca.pem"):
        (site.folder / file).touch()
    assert not [each for each in check(site.config, {}).warnings if each.startswith("vault.")]


def test_a_token_library_that_is_not_there_is_a_problem_and_a_pin_that_is_not_a_warning(site: VerifierSite) -> None:
    named = {name: site.folder / name for name in ("p11.so", "pin")}
    table = f'[pkcs11]\nmodule = "{named["p11.so"]}"\ntoken = "owner"\nkey = "k"\npin_file = "{named["pin"]}"\n'
    site.config.write_text(f"{site.config.read_text()}\n{table}")
    missing = f"pkcs11.module: {named['p11.so']}: no such file or directory"
    assert missing in check(site.config, {}).problems
    named["p11.so"].touch()
    findings = check(site.config, {})
    assert not [each for each in findings.problems if each.startswith("pkcs11.")]
    assert f"pkcs11.pin_file: {named['pin']} is not there: no PIN is tried" in findings.warnings
    named["pin"].touch()
    assert not [each for each in check(site.config, {}).warnings if each.startswith("pkcs11.")]


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('"kek.bin"', '"documents/kek.bin"', "key_file"),
        ('"kek.bin"', '"documents/../documents/kek.bin"', "key_file"),
        ('"kek.bin"', '"kek.bin"\nolder_key_files = ["kek.bin", "documents/old.bin"]', "older_key_files[1]"),
        ('"state"', '"documents/state"', "state_dir"),
        ('"state"', '"documents"', "state_dir"),
        ('documents = "documents"', 'documents = "."', "key_file"),
    ],
)
def test_private_files_in_the_folder_of_documents_are_a_problem(
    site: VerifierSite, old: str, new: str, key: str
) -> None:
    good = site.config.read_text()
    site.config.write_text(good.replace(old, new))
    assert check(site.config, {}).problems == [
        f"{key}: lies in the folder of documents, where an applied document could name it as a guest's secret"
    ]
    site.config.write_text(good.replace('"kek.bin"', '"documents.bin"'))
    (site.folder / "kek.bin").rename(site.folder / "documents.bin")
    assert check(site.config, {}).problems == []


def test_a_grant_that_does_not_limit_its_caller_is_a_warning(site: VerifierSite) -> None:
    folder = site.folder / "documents"
    write_document(folder, grant(callers=[CALLER]), "grant.yaml")
    assert {
        f"grant.yaml: spec.callers: {CALLER} may launch web without a grant, so this one is no limit there",
        f"web.yaml: spec.callers: {CALLER} may launch it without a grant, so grant fleet is no limit there",
    } <= set(check(site.config, {}).warnings)
    write_document(folder, grant(), "grant.yaml")
    assert not [each for each in check(site.config, {}).warnings if "no limit" in each]


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ('listen = "0.0.0.0:9464"', "metrics: listen: 0.0.0.0:9464 is not an address of this machine alone"),
        ('listen = "127.0.0.1:0"\ncert = "c.pem"', "metrics: cert, key and client_ca go together"),
        ('listen = "127.0.0.1:0"\npath = "/m"', 'unknown key "metrics.path"'),
        ("", 'missing key "metrics.listen"'),
        (
            'listen = "[::]:1"\ncert = "c.pem"\nkey = "c.key"\nclient_ca = "ca.pem"',
            "c.key: no such file or directory",
        ),
        (
            'listen = "[::]:1"\ncert = "c.pem"\nkey = "documents/c.key"\nclient_ca = "ca.pem"',
            "metrics.key: lies in the folder of documents, where an applied document could name it",
        ),
    ],
)
def test_metrics_that_others_could_read_are_refused(site: VerifierSite, table: str, sentence: str) -> None:
    site.config.write_text(f"{site.config.read_text()}\n[metrics]\n{table}\n")
    (problem,) = check(site.config, {}).problems
    assert sentence in problem


def test_metrics_of_this_machine_alone_are_good(site: VerifierSite) -> None:
    site.config.write_text(f'{site.config.read_text()}\n[metrics]\nlisten = "127.0.0.1:9464"\n')
    assert check(site.config, {}).problems == []
