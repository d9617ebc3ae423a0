"""F17: credentials that expire and are replaced while a run goes on; none is kept or handed on."""

import json
import pickle
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from s3fs import S3FileSystem
from services import S3

from raybrats import storage
from raybrats.errors import StorageError

pytestmark = [pytest.mark.faults, pytest.mark.s3]


class Issuer:
    """A program that hands out credentials, as AWS asks one for them: `credential_process`."""

    def __init__(self, folder: Path) -> None:
        self._answer, self._asked = folder / "answer.json", folder / "asked"
        script = folder / "issue.py"
        script.write_text(
            f"open({str(self._asked)!r}, 'a').write('x')\nprint(open({str(self._answer)!r}).read())"
        )
        self.config = folder / "config"
        self.config.write_text(f"[default]\ncredential_process = {sys.executable} {script}\n")

    def issue(self, access_key: str, secret_key: str) -> None:
        """From now on these, for eleven minutes: in the last ones the client asks for new ones."""
        ends = datetime.now(UTC) + timedelta(minutes=11)
        answer = {"Version": 1, "AccessKeyId": access_key, "SecretAccessKey": secret_key}
        self._answer.write_text(json.dumps(answer | {"Expiration": ends.isoformat()}))

    @property
    def asked(self) -> int:
        return len(self._asked.read_text())


@pytest.fixture
def issuer(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = Issuer(tmp_path)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(made.config))
    made.issue(s3.access_key, s3.secret_key)
    S3FileSystem.clear_instance_cache()
    yield made
    S3FileSystem.clear_instance_cache()


def test_new_credentials_are_taken_up_while_the_process_lives(s3, issuer, bucket):
    uri = f"s3://{bucket}/object"
    storage.write_bytes(uri, b"one")
    if s3.kind == "moto":
        pytest.skip("moto takes any key")
    for times in range(2):
        asked = issuer.asked
        issuer.issue(s3.access_key, "revoked" * 6)
        with pytest.raises(StorageError, match="access refused"):
            storage.read_bytes(uri)
        assert issuer.asked > asked, "the client asked anew"
        issuer.issue(s3.access_key, s3.secret_key)
        assert storage.read_bytes(uri) == b"one", times


def test_what_travels_to_the_workers_holds_no_credentials(s3, issuer, bucket):
    uri = f"s3://{bucket}/runs"
    storage.write_bytes(f"{uri}/object", b"one")
    place = storage.for_ray(uri)
    assert place["storage_filesystem"].open_input_file(f"{bucket}/runs/object").read() == b"one"
    packed = pickle.dumps(place)
    assert issuer.asked
    assert s3.secret_key.encode() not in packed
    S3FileSystem.clear_instance_cache()
    again = pickle.loads(packed)["storage_filesystem"]  # noqa: S301 - our own
    assert again.open_input_file(f"{bucket}/runs/object").read() == b"one"
