from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from fedge.shared.crypto.key_files import MAX_BYTES, load_ed25519, load_elliptic_curve

ED25519 = ed25519.Ed25519PrivateKey.generate()
CURVE = ec.generate_private_key(ec.SECP384R1())
PKCS8, OPENSSH = PrivateFormat.PKCS8, PrivateFormat.OpenSSH


def pem(key, form=PKCS8, password: bytes = b"") -> bytes:
    hidden = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, form, hidden)


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    return path


def test_each_kind_is_read(path):
    path.write_bytes(pem(ED25519))
    assert pem(load_ed25519(path)) == pem(ED25519)
    path.write_bytes(pem(CURVE))
    assert pem(load_elliptic_curve(path)) == pem(CURVE)
    path.write_bytes(pem(CURVE, OPENSSH))
    assert pem(load_elliptic_curve(path, openssh=True)) == pem(CURVE)


@pytest.mark.parametrize(
    ("data", "load", "refusal"),
    [
        (pem(CURVE), load_ed25519, "must hold an Ed25519 key, got another kind"),
        (pem(ED25519), load_elliptic_curve, "must hold an elliptic-curve key, got another kind"),
        (pem(CURVE, OPENSSH), load_elliptic_curve, "in PEM without a password"),
        (pem(ED25519, password=b"secret"), load_ed25519, "in PEM without a password"),
        (b"", load_ed25519, "in PEM without a password"),
        (bytes(MAX_BYTES + 1), load_ed25519, f"must hold at most {MAX_BYTES} bytes"),
    ],
    ids=["curve", "ed25519", "openssh", "password", "empty", "large"],
)
def test_another_file_is_refused_by_name(path, data, load, refusal):
    path.write_bytes(data)
    with pytest.raises(ValueError, match="^" + str(path)) as caught:
        load(path)
    assert refusal in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_may_read_is_refused_unless_that_is_allowed(path, mode):
    path.write_bytes(pem(ED25519))
    path.chmod(mode)
    with pytest.raises(ValueError, match=f"readable by its owner only, got {mode:04o}"):
        load_ed25519(path)
    assert load_ed25519(path, owner_only=False)


def test_no_file_is_an_error_in_words(path):
    path.unlink()
    with pytest.raises(ValueError, match="No such file"):
        load_elliptic_curve(path)
