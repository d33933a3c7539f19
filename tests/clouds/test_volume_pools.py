"""Buckets as folders of a pool's machines, with what the machines' own role may do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

import skyward as sky
from tests.clouds.emulated import Emulated
from tests.machines.conftest import IMAGE

pytestmark = pytest.mark.slow


@pytest.fixture
def cloud(emulate: Callable[..., Emulated], baked: Path) -> Emulated:
    return emulate("aws", baked=baked)


def test_a_pool_reads_and_writes_a_bucket_and_loses_nothing_at_its_end(cloud: Emulated) -> None:
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="data")
    s3.put_object(Bucket="data", Key="in/greeting", Body=b"hello")
    where = cloud.cloud.url_for_machines
    volumes = [
        sky.S3Volume("/data/in", "data", "in/", endpoint_url=where),
        sky.S3Volume("/data/out", "data", "out/", read_only=False, endpoint_url=where),
    ]

    @sky.compute
    def copy() -> str:
        text = Path("/data/in/greeting").read_text()
        Path("/data/out/answer").write_text(text.upper())
        try:
            Path("/data/in/not").write_text("")
        except OSError as exc:
            return str(exc)
        return "written"

    with sky.ComputePool(
        cloud.provider(), machine=cloud.type, image=IMAGE, volume=volumes, display="quiet"
    ) as pool:
        refused = copy() >> pool

    assert "Read-only file system" in refused
    assert s3.get_object(Bucket="data", Key="out/answer")["Body"].read() == b"HELLO"
    assert cloud.left() == []


def test_a_bucket_that_does_not_exist_is_told_and_nothing_is_left(cloud: Emulated) -> None:
    volume = sky.S3Volume("/data", "missing-bucket", endpoint_url=cloud.cloud.url_for_machines)

    with pytest.raises(sky.BootstrapError, match=r"'missing-bucket'.* does not exist"), sky.ComputePool(
        cloud.provider(), machine=cloud.type, image=IMAGE, volume=volume, display="quiet"
    ):
        pass

    assert cloud.left() == []
