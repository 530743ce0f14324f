"""Self-signed certificates, made by `openssl` in a few milliseconds."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_certificate(folder: Path, name: str = "door") -> tuple[Path, Path]:
    """`name.pem` and its key `name.key`, for localhost; there may be older ones, which are replaced."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-keyout", f"{key}.new", "-out", f"{cert}.new"],
        check=True, capture_output=True,
    )  # fmt: skip
    Path(f"{key}.new").chmod(0o600)
    Path(f"{key}.new").replace(key)
    Path(f"{cert}.new").replace(cert)
    return cert, key


def make_expired_certificate(folder: Path) -> tuple[Path, Path]:
    """One that was good until yesterday."""
    cert, key = make_certificate(folder, "expired")
    request = subprocess.run(
        ["openssl", "x509", "-x509toreq", "-in", cert, "-signkey", key], check=True, capture_output=True
    ).stdout
    subprocess.run(
        ["openssl", "x509", "-req", "-days", "-1", "-signkey", key, "-out", cert],
        input=request, check=True, capture_output=True,
    )  # fmt: skip
    return cert, key
