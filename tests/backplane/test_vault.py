"""The vault: what is sealed opens only where it should, and a master key that is not right is said in one sentence."""

from __future__ import annotations

import base64
import os
import threading
from pathlib import Path

import pytest

from bathyscope.errors import CredentialUnreadable, SetupError
from bathyscope_backplane.settings import Settings, load_settings
from bathyscope_backplane.vault import Credentials, Vault

KEY = base64.b64encode(bytes(range(32))).decode()


@pytest.fixture(autouse=True)
def no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BATHYSCOPE_MASTER_KEY", "BATHYSCOPE_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def settings(folder: Path, **given: object) -> Settings:
    return load_settings(data_dir=folder, **given)


def test_an_envelope_opens_with_its_key_for_its_job_alone() -> None:
    vault, other = Vault(bytes(32)), Vault(bytes([1] * 32))
    envelope = vault.seal("hf_secret ∞", bound_to="job_a")
    assert vault.unseal(envelope, bound_to="job_a") == "hf_secret ∞"
    assert "hf_secret" not in envelope
    assert vault.seal("hf_secret ∞", bound_to="job_a") != envelope
    with pytest.raises(CredentialUnreadable, match="damaged"):
        vault.unseal(envelope, bound_to="job_b")
    with pytest.raises(CredentialUnreadable, match="BATHYSCOPE_MASTER_KEY"):
        other.unseal(envelope, bound_to="job_a")
    # Naming the right key does not help who has another.
    head, name, body = envelope.split(".")
    forged = f"{head}.{other.seal('x', bound_to='x').split('.')[1]}.{body}"
    with pytest.raises(CredentialUnreadable, match="damaged"):
        other.unseal(forged, bound_to="job_a")
    sealed = bytearray(base64.urlsafe_b64decode(body))
    for place in range(len(sealed)):
        changed = bytes([*sealed[:place], sealed[place] ^ 1, *sealed[place + 1 :]])
        with pytest.raises(CredentialUnreadable):
            vault.unseal(f"{head}.{name}.{base64.urlsafe_b64encode(changed).decode()}", bound_to="job_a")
    for nonsense in ("", "v1", "v1..", "v2.a.b", f"{head}.{name}.", f"{head}.{name}.&&&", "\0"):
        with pytest.raises(CredentialUnreadable):
            vault.unseal(nonsense, bound_to="job_a")


def test_webhook_secrets_hang_on_key_and_salt() -> None:
    vault = Vault(bytes(32))
    secrets = {vault.webhook_secret(*of) for of in (("key_a", "s"), ("key_a", "t"), ("key_b", "s"), ("key_as", ""))}
    assert len(secrets) == 4
    assert vault.webhook_secret("key_a", "s") in secrets
    assert all(secret.startswith("whsec_") and len(secret) == 49 for secret in secrets)
    assert Vault(bytes([1] * 32)).webhook_secret("key_a", "s") not in secrets


def test_representations_hold_no_secret() -> None:
    credentials = Credentials(hf_token="hf_secret")
    assert repr(credentials) == str(credentials) == "Credentials(hf_token=…)"
    assert credentials.names == ("hf_token",)
    vault = Vault(bytes(range(32)))
    assert KEY not in repr(vault)
    assert "000102" not in repr(vault)
    assert KEY not in repr(settings(Path("/nowhere"), master_key=KEY))


def test_credentials_come_back_as_they_went() -> None:
    vault = Vault(bytes(32))
    assert Credentials().sealed(vault, "job_a") is None
    assert Credentials.unsealed(vault, None, "job_a") == Credentials()
    given = Credentials(tinker_api_key="tml-1", hf_token="hf_2")
    envelope = given.sealed(vault, "job_a")
    assert envelope is not None
    assert Credentials.unsealed(vault, envelope, "job_a") == given


def test_the_setting_beats_the_file(tmp_path: Path) -> None:
    vault = Vault.open(settings(tmp_path, master_key=KEY))
    assert vault.unseal(Vault(bytes(range(32))).seal("x", bound_to="j"), bound_to="j") == "x"
    assert not (tmp_path / "master.key").exists()
    url_safe = base64.urlsafe_b64encode(bytes([255] * 32)).decode()
    Vault(bytes([255] * 32)).unseal(
        Vault.open(settings(tmp_path, master_key=url_safe)).seal("x", bound_to="j"), bound_to="j"
    )


def test_the_file_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    made: list[Vault] = []
    threads = [threading.Thread(target=lambda: made.append(Vault.open(settings(folder)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({vault.webhook_secret("k", "s") for vault in made}) == 1
    assert len(made) == 8
    assert [path.name for path in folder.iterdir()] == ["master.key"]
    assert (folder / "master.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o700 | 0o007])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    Vault.open(settings(tmp_path))
    (tmp_path / "master.key").chmod(mode)
    with pytest.raises(SetupError, match=r"chmod 600") as caught:
        Vault.open(settings(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "short", KEY[:-4], KEY + KEY, "\xff" * 44, "=" * 44])
def test_what_is_no_key_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "master.key"
    path.write_text(content)
    path.chmod(0o600)
    for opened in (lambda: Vault.open(settings(tmp_path)), lambda: Vault.open(settings(tmp_path, master_key=content))):
        with pytest.raises(SetupError, match="openssl rand -base64 32") as caught:
            opened()
        assert len(content) < 5 or content not in str(caught.value)


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "master.key").mkdir()
    with pytest.raises(SetupError, match=r"master\.key cannot be used: Is a directory"):
        Vault.open(settings(tmp_path))
    (tmp_path / "master.key").rmdir()
    (tmp_path / "master.key").symlink_to("/dev/null")
    with pytest.raises(SetupError, match="not a plain file"):
        Vault.open(settings(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="BATHYSCOPE_MASTER_KEY"):
        Vault.open(settings(tmp_path / "file" / "below"))
    if os.geteuid() != 0:
        (tmp_path / "master.key").unlink()
        Vault.open(settings(tmp_path))
        (tmp_path / "master.key").chmod(0)
        with pytest.raises(SetupError, match="Permission denied"):
            Vault.open(settings(tmp_path))
