"""Buckets as folders on machines: a real S3 server (moto's), a real FUSE client, and credentials as an instance has."""

from __future__ import annotations

import http.server
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import skyward as sky
from skyward.scripts.steps import Progress, read_progress
from skyward.scripts.volumes import Left, mount_script, read_left, unmount_script
from tests.cloudbox import Machine
from tests.machines.conftest import Site
from tests.slow_proxy import slow_proxy
from tests.waiting import wait_until

boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")

# An instance's metadata service, version 2, with the credentials of a role; it runs on the machine itself.
METADATA = """
import http.server, json
class Handler(http.server.BaseHTTPRequestHandler):
    def do_PUT(self):
        self.answer("token")
    def do_GET(self):
        if self.headers.get("X-aws-ec2-metadata-token") != "token":
            return self.send_error(401)
        keys = dict(AccessKeyId="AKIAROLE", SecretAccessKey="x", Token="session", Expiration="2100-01-01T00:00:00Z")
        is_list = self.path == "/latest/meta-data/iam/security-credentials/"
        self.answer("role" if is_list else json.dumps(dict(Code="Success", Type="AWS-HMAC", **keys)))
    def answer(self, text):
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("X-aws-ec2-metadata-token-ttl-seconds", "21600")
        self.end_headers()
        self.wfile.write(text.encode())
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("169.254.169.254", 80), Handler).serve_forever()
"""


@pytest.fixture(scope="module", autouse=True)
def _can_mount() -> None:
    if not Path("/dev/fuse").exists():
        pytest.skip("this host has no /dev/fuse, and machines in a box have none of their own")


@dataclass
class Store:
    """An S3 server that the site's machines reach at `url`, as anyone does who has its address."""

    url: str
    client: Any
    count: int = 0

    def bucket(self, **objects: str) -> str:
        """Make a bucket with objects: their keys with __ for /."""
        self.count += 1
        name = f"bucket-{self.count}"
        self.client.create_bucket(Bucket=name)
        for key, text in objects.items():
            self.client.put_object(Bucket=name, Key=key.replace("__", "/"), Body=text.encode())
        return name

    def objects(self, bucket: str) -> dict[str, str]:
        found = self.client.list_objects_v2(Bucket=bucket).get("Contents", [])
        return {o["Key"]: self.client.get_object(Bucket=bucket, Key=o["Key"])["Body"].read().decode() for o in found}


@pytest.fixture(scope="module")
def store(site: Site) -> Iterator[Store]:
    server = moto_server.ThreadedMotoServer(ip_address="0.0.0.0", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id="mine",
        aws_secret_access_key="mine",
    )
    yield Store(f"http://{site.network.gateway}:{port}", client)
    client.close()
    server.stop()


def give_role(machine: Machine) -> None:
    """Give the machine a metadata service."""
    Path(f"/proc/{machine.pid}/root/run/metadata.py").write_text(METADATA)
    machine.run("ip address add 169.254.169.254/32 dev lo")
    machine.run("setsid python3 /run/metadata.py > /run/metadata.log 2>&1 < /dev/null &")
    wait_until(lambda: machine.run("curl -s -X PUT 169.254.169.254/latest/api/token", check=False) == "token")


@pytest.fixture(scope="module")
def machine(site: Site) -> Iterator[Machine]:
    (machine,) = site.boot()
    give_role(machine)
    yield machine
    machine.destroy()


@pytest.fixture(autouse=True)
def _unmounted(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "machine" in request.fixturenames:
        machine = request.getfixturevalue("machine")
        machine.run("umount -a -l -t fuse.rclone; pkill -9 rclone; rm -rf /root/.cache/skyward/volumes", check=False)


def run(site: Site, machine: Machine, text: str, left: list[Left] | None = None) -> Progress | None:
    """Run a script over SSH as a pool would; return how it failed, or None. What it says is left goes to `left`."""
    options = ["-i", str(site.key), "-o", f"UserKnownHostsFile={site.known_hosts}", "-o", "BatchMode=yes"]
    command = "cat > script.sh && SKYWARD_POOL=some-pool sh script.sh"
    done = subprocess.run(
        ["ssh", *options, f"{machine.user}@{machine.address}", command],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if left is not None:
        left += filter(None, map(read_left, done.stdout.splitlines()))
    progress = read_progress(done.stdout.splitlines())
    assert progress is not None, done.stderr
    assert (progress == Progress("done")) == (done.returncode == 0), done.stdout
    return progress if done.returncode else None


def mount(site: Site, machine: Machine, *volumes: sky.S3Volume) -> None:
    assert run(site, machine, mount_script(volumes, region="us-east-1", patience_s=0)) is None


def unmount(site: Site, machine: Machine, *volumes: sky.S3Volume) -> None:
    assert run(site, machine, unmount_script(volumes, stalled_s=30)) is None


def clients(machine: Machine) -> list[str]:
    return machine.run("pgrep rclone", check=False).split()


# --- reading and writing ------------------------------------------------------------------------------------


def test_a_bucket_is_read_through_its_folder_and_only_below_the_prefix(
    site: Site, machine: Machine, store: Store
) -> None:
    bucket = store.bucket(a="a", train__b="b", train__deep__c="c", train2__d="d")

    mount(site, machine, sky.S3Volume("/data", bucket, "/train/", endpoint_url=store.url))

    assert machine.run("cd /data; find . -type f | sort").split() == ["./b", "./deep/c"]
    assert machine.run("cat /data/b /data/deep/c") == "bc"


def test_nothing_can_be_written_where_only_reading_was_asked_for(site: Site, machine: Machine, store: Store) -> None:
    bucket = store.bucket(a="a")

    mount(site, machine, sky.S3Volume("/data", bucket, endpoint_url=store.url))

    for command in ("echo x > /data/new", "echo x > /data/a", "rm /data/a", "mkdir /data/folder"):
        said = machine.run(f"{{ {command}; }} 2>&1", check=False)
        assert "Read-only file system" in said
    assert store.objects(bucket) == {"a": "a"}


def test_the_last_writes_reach_the_bucket_and_nothing_stays_behind(
    site: Site, machine: Machine, store: Store
) -> None:
    bucket = store.bucket(out__old="old", out__gone="gone")
    volume = sky.S3Volume("/out", bucket, "out", False, endpoint_url=store.url)
    mount(site, machine, volume)

    machine.run("cd /out; echo new > new; mkdir deep; echo deep > deep/file; echo more >> old; rm gone; touch empty")
    machine.run("head -c 30000000 /dev/zero > /out/large")
    unmount(site, machine, volume)

    found = store.objects(bucket)
    assert len(found.pop("out/large")) == 30_000_000
    assert found == {"out/new": "new\n", "out/deep/file": "deep\n", "out/old": "oldmore\n", "out/empty": ""}
    assert machine.run("findmnt -t fuse.rclone", check=False) == ""
    assert clients(machine) == []
    assert machine.run("ls -A /out /root/.cache/skyward/volumes").split() == ["/out:", "/root/.cache/skyward/volumes:"]


def test_two_machines_see_what_the_other_has_written(site: Site, machine: Machine, store: Store) -> None:
    volume = sky.S3Volume("/shared", store.bucket(), "", False, endpoint_url=store.url)
    (other,) = site.boot()
    try:
        give_role(other)
        mount(site, machine, volume)
        mount(site, other, volume)
        assert other.run("ls /shared") == ""

        machine.run("echo hello > /shared/note")

        wait_until(lambda: other.run("cat /shared/note 2> /dev/null", check=False) == "hello\n")
    finally:
        other.destroy()


def test_several_volumes_are_mounted_also_inside_of_one_another(site: Site, machine: Machine, store: Store) -> None:
    bucket = store.bucket(in__x="x")
    volumes = [
        sky.S3Volume("/mnt/my data/in", bucket, "in", endpoint_url=store.url),
        sky.S3Volume("/mnt/my data", bucket, "out", False, endpoint_url=store.url),
        sky.S3Volume("/mnt/other", store.bucket(y="y"), endpoint_url=store.url),
    ]

    mount(site, machine, *volumes)
    machine.run("cd '/mnt/my data'; cat in/x ../other/y > sum")
    unmount(site, machine, *volumes)

    assert store.objects(bucket) == {"in/x": "x", "out/sum": "xy"}
    assert clients(machine) == []


def test_python_copies_files_and_folders_with_their_times(site: Site, machine: Machine, store: Store) -> None:
    bucket = store.bucket(a__b="b")
    volume = sky.S3Volume("/out", bucket, "", False, endpoint_url=store.url)
    mount(site, machine, volume)

    copy = "import shutil; shutil.copytree('/out/a', '/tmp/a'); shutil.copytree('/tmp/a', '/out/c')"
    machine.run(f'python3 -c "{copy}"')
    unmount(site, machine, volume)

    assert store.objects(bucket) == {"a/b": "b", "c/b": "b"}


# --- again and again ----------------------------------------------------------------------------------------


def test_a_second_run_changes_nothing(site: Site, machine: Machine, store: Store) -> None:
    volume = sky.S3Volume("/data", store.bucket(a="a"), endpoint_url=store.url)
    mount(site, machine, volume)
    before = clients(machine)

    mount(site, machine, volume)

    assert clients(machine) == before
    assert len(before) == 1


def test_a_killed_mount_is_made_again_with_its_unsent_data(
    site: Site, machine: Machine, store: Store
) -> None:
    bucket = store.bucket()
    volume = sky.S3Volume("/out", bucket, "", False, endpoint_url=store.url)
    mount(site, machine, volume)
    machine.run("echo kept > /out/file; pkill -9 rclone")
    assert machine.run("ls /out 2>&1", check=False) != ""

    mount(site, machine, volume)
    unmount(site, machine, volume)

    assert store.objects(bucket) == {"file": "kept\n"}


def test_it_outlives_the_processes_of_the_pool(site: Site, machine: Machine, store: Store) -> None:
    mount(site, machine, sky.S3Volume("/data", store.bucket(a="a"), endpoint_url=store.url))

    (client,) = clients(machine)
    environment = machine.run(f"tr '\\0' '\\n' < /proc/{client}/environ")
    descriptors = machine.run(f"readlink /proc/{client}/fd/*")

    assert "SKYWARD_POOL" not in environment
    assert "/root/.cache/skyward/lock" not in descriptors


def test_a_client_that_is_not_there_is_installed(site: Site, store: Store) -> None:
    (machine,) = site.boot()
    try:
        give_role(machine)
        machine.run("dpkg --purge rclone fuse3 2>&1; ! command -v rclone")

        mount(site, machine, sky.S3Volume("/data", store.bucket(a="a"), endpoint_url=store.url))

        assert machine.run("cat /data/a") == "a"
    finally:
        machine.destroy()


# --- what can't work ----------------------------------------------------------------------------------------


def fail_to_mount(site: Site, machine: Machine, volume: sky.S3Volume) -> str:
    """Return the last line of what a mount that fails says; check that nothing is left of it."""
    failure = run(site, machine, mount_script([volume], region="us-east-1", patience_s=0))
    assert failure is not None
    assert failure.step == f"volume {volume.mount_path}"
    assert machine.run("findmnt -t fuse.rclone", check=False) == ""
    assert clients(machine) == []
    return failure.lines[-1]


def test_a_bucket_that_does_not_exist_is_named_and_not_made(site: Site, machine: Machine, store: Store) -> None:
    said = fail_to_mount(site, machine, sky.S3Volume("/data", "no-such-bucket", "x", False, endpoint_url=store.url))

    assert said == f"bucket 'no-such-bucket' at {store.url} does not exist"
    assert "no-such-bucket" not in [b["Name"] for b in store.client.list_buckets()["Buckets"]]


def test_a_bucket_that_may_not_be_listed_is_named_with_the_permission(site: Site, machine: Machine) -> None:
    class Denying(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), Denying) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://{site.network.gateway}:{server.server_port}"
        said = fail_to_mount(site, machine, sky.S3Volume("/data", "secret-bucket", endpoint_url=url))
        server.shutdown()
        thread.join()

    assert said == f"bucket 'secret-bucket' at {url} can't be read: this machine's role may not list it (s3:ListBucket)"


def test_a_missing_role_is_distinguished_from_a_missing_permission(site: Site, store: Store) -> None:
    (machine,) = site.boot()
    try:
        said = fail_to_mount(site, machine, sky.S3Volume("/data", store.bucket(), endpoint_url=store.url))
    finally:
        machine.destroy()

    assert "this machine has no credentials, since no role (instance profile) was given to it" in said


def test_files_are_not_hidden_by_a_volume(site: Site, machine: Machine, store: Store) -> None:
    machine.run("mkdir -p /full; echo mine > /full/file")

    said = fail_to_mount(site, machine, sky.S3Volume("/full", store.bucket(), endpoint_url=store.url))

    assert said == "the folder /full has files, which would be hidden"
    assert machine.run("cat /full/file") == "mine\n"


def test_a_user_who_may_not_become_root_is_told_so(site: Site, store: Store) -> None:
    (machine,) = site.boot(user="ada")
    try:
        said = fail_to_mount(site, machine, sky.S3Volume("/data", store.bucket(), endpoint_url=store.url))
    finally:
        machine.destroy()

    assert said == "this needs root: user ada is not root and has no sudo without a password"


def test_files_that_cannot_be_sent_are_named_and_kept_until_they_can(
    site: Site, machine: Machine, store: Store
) -> None:
    bucket = store.bucket()
    volume = sky.S3Volume("/out", bucket, "", False, endpoint_url=store.url)
    mount(site, machine, volume)
    store.client.delete_bucket(Bucket=bucket)
    machine.run("echo precious > /out/result")

    failure = run(site, machine, unmount_script([volume], stalled_s=3))
    kept = machine.run("cat /out/result")
    store.client.create_bucket(Bucket=bucket)
    unmount(site, machine, volume)

    assert failure is not None
    assert failure.step == "unmount /out"
    assert failure.lines[-1].startswith(f"1 files of /out have not arrived in bucket '{bucket}'")
    assert any(line.endswith(f"{bucket}/result") for line in failure.lines)
    assert any("NoSuchBucket" in line for line in failure.lines)
    assert kept == "precious\n"
    assert store.objects(bucket) == {"result": "precious\n"}


def test_an_open_file_keeps_a_volume_mounted_and_a_working_folder_does_not(
    site: Site, machine: Machine, store: Store
) -> None:
    bucket = store.bucket()
    volume = sky.S3Volume("/out", bucket, "", False, endpoint_url=store.url)
    mount(site, machine, volume)
    machine.run("cd /out; (echo begun; exec sleep 1000) > /out/open 2> /dev/null < /dev/null &")
    wait_until(lambda: "begun" in machine.run("cat /out/open", check=False))
    machine.run("cd /out; sleep 2000 > /dev/null 2>&1 < /dev/null &")

    failure = run(site, machine, unmount_script([volume], stalled_s=2))
    machine.run("pkill -f '^sleep 1000'")
    unmount(site, machine, volume)

    assert failure is not None
    assert "still open" in failure.lines[-1]
    assert store.objects(bucket) == {"open": "begun\n"}
    assert clients(machine) == []
    machine.run("pkill -f '^sleep 2000'")


def test_a_flush_goes_on_as_long_as_something_is_sent(site: Site, machine: Machine, store: Store) -> None:
    bucket, left = store.bucket(), list[Left]()
    port = int(store.url.rpartition(":")[2])
    with slow_proxy(port) as (proxy, slow_port):
        volume = sky.S3Volume("/out", bucket, "", False, endpoint_url=f"http://{site.network.gateway}:{slow_port}")
        mount(site, machine, volume)
        proxy.rate = 1e6
        machine.run("head -c 9000000 /dev/urandom > /out/checkpoint")

        assert run(site, machine, unmount_script([volume], stalled_s=3), left) is None

    (size,) = (o["Size"] for o in store.client.list_objects_v2(Bucket=bucket)["Contents"])
    assert size == 9_000_000
    rest = [one.bytes for one in left]
    assert 9_000_000 >= rest[0] > rest[len(rest) // 2] > rest[-1]
    assert {(one.path, one.files) for one in left} == {("/out", 1)}


def test_a_flush_ends_when_nothing_is_sent_any_more(site: Site, machine: Machine, store: Store) -> None:
    bucket, left = store.bucket(), list[Left]()
    port = int(store.url.rpartition(":")[2])
    with slow_proxy(port) as (proxy, slow_port):
        volume = sky.S3Volume("/out", bucket, "", False, endpoint_url=f"http://{site.network.gateway}:{slow_port}")
        mount(site, machine, volume)
        proxy.rate = 1e6
        machine.run("head -c 9000000 /dev/urandom > /out/checkpoint")
        wait_until(lambda: proxy.carried > 1e6)
        proxy.rate = 0

        failure = run(site, machine, unmount_script([volume], stalled_s=2), left)
        proxy.rate = None
        unmount(site, machine, volume)

    assert failure is not None
    assert failure.step == "unmount /out"
    assert left[-1].files == 1
    (size,) = (o["Size"] for o in store.client.list_objects_v2(Bucket=bucket)["Contents"])
    assert size == 9_000_000


def test_a_client_that_was_killed_sends_the_rest_at_the_end(site: Site, machine: Machine, store: Store) -> None:
    bucket = store.bucket()
    volume = sky.S3Volume("/out", bucket, "", False, endpoint_url=store.url)
    mount(site, machine, volume)
    machine.run("head -c 100000 /dev/zero > /out/result; pkill -9 rclone")

    unmount(site, machine, volume)

    assert [o["Size"] for o in store.client.list_objects_v2(Bucket=bucket)["Contents"]] == [100_000]
    assert clients(machine) == []
