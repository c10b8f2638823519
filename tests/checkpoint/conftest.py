"""In the tests here, this process finds the S3 server."""

import pytest
from s3_server import S3Server


@pytest.fixture
def s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3
