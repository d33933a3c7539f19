"""The scripts that mount volumes and take them away, as texts. `machines/test_volumes.py` runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import skyward as sky
from skyward.scripts.steps import read_progress
from skyward.scripts.volumes import mount_script, unmount_script

SHELLS = [shell for shell in ("sh", "dash", "bash", "busybox") if shutil.which(shell)]
DATA = sky.S3Volume("/data", "my-bucket", "train/2024")
OUT = sky.S3Volume("/mnt/my out", "other.bucket", "/x y/", False, endpoint_url="https://s3.example.org:9000")

plain = st.text(
    st.characters(codec="utf-8", exclude_characters="'\"\\$`;&|<>*?()[]{}!#~/", exclude_categories=["C", "Z"])
)
names = plain.filter(lambda t: t.strip(".") and not t.startswith("-"))
volumes = st.builds(
    sky.S3Volume,
    mount_path=names.map("/data/{}".format),
    bucket=st.just("bucket"),
    prefix=names,
    read_only=st.booleans(),
    endpoint_url=st.sampled_from([None, "http://10.0.0.1:9000"]),
)


def check_syntax(shell: str, text: str) -> None:
    command = ["busybox", "sh"] if shell == "busybox" else [shell]
    done = subprocess.run([*command, "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def run(text: str, folder: Path, **commands: str) -> subprocess.CompletedProcess[str]:
    """Run a script with some commands replaced by others, given as shell."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, body in {
        "id": "echo 0",
        "rclone": "exit 9",
        "dpkg-query": "echo install ok installed",
        **commands,
    }.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "HOME": str(folder), "SKYWARD_HOME": f"{folder}/home"}
    return subprocess.run(["sh"], input=text, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_posix_shell_reads_the_scripts(shell: str) -> None:
    check_syntax(shell, mount_script([DATA, OUT], region="eu-west-1"))
    check_syntax(shell, unmount_script([DATA, OUT]))


@settings(max_examples=25)
@given(st.lists(volumes, max_size=3))
def test_any_volumes_that_are_accepted_make_scripts_that_a_shell_reads(found: list[sky.S3Volume]) -> None:
    check_syntax("sh", mount_script(found, region=None))
    check_syntax("sh", unmount_script(found))


def test_outer_volumes_are_mounted_first_and_unmounted_last() -> None:
    inner = sky.S3Volume("/data/more", "more")

    mounting = mount_script([inner, DATA], region=None)
    unmounting = unmount_script([inner, DATA])

    assert mounting.index("step 'volume /data' ") < mounting.index("step 'volume /data/more' ")
    assert unmounting.index("step 'unmount /data/more' ") < unmounting.index("step 'unmount /data' ")


def test_what_is_shown_is_the_prefix_with_or_without_slashes() -> None:
    text = mount_script([DATA, OUT], region=None)

    assert "place=:s3:my-bucket/train/2024/\n" in text
    assert "place=':s3:other.bucket/x y/'\n" in text
    assert "place=:s3:all-of-it/\n" in mount_script([sky.S3Volume("/all", "all-of-it")], region=None)


def test_both_scripts_use_one_key_per_volume_and_no_two_volumes_share_it() -> None:
    def keys(text: str) -> set[str]:
        return {line.strip() for line in text.splitlines() if line.startswith("    key=")}

    variants = [DATA, OUT, sky.S3Volume("/data", "my-bucket"), sky.S3Volume("/data", "my-bucket", "train/2024", False)]

    assert keys(mount_script(variants, region="eu-west-1")) == keys(unmount_script(variants))
    assert len(keys(unmount_script(variants))) == 4


def test_aws_buckets_use_the_machines_region_and_others_their_endpoint() -> None:
    aws, other = (mount_script([volume], region="eu-west-1") for volume in (DATA, OUT))

    assert "--s3-region eu-west-1 --s3-provider AWS --s3-acl bucket-owner-full-control" in aws
    assert "--s3-provider Other --s3-endpoint https://s3.example.org:9000 --s3-force-path-style" in other


def test_a_refusal_names_bucket_and_cause(tmp_path: Path) -> None:
    denied = 'echo "ERROR : error listing: AccessDenied: Access Denied"; echo "	status code: 403"; exit 1'

    done = run(mount_script([DATA], region=None, patience_s=0), tmp_path, rclone=denied)

    progress = read_progress(done.stdout.splitlines())
    assert done.returncode == 1
    assert progress is not None
    assert (progress.step, progress.status) == ("volume /data", 86)
    assert progress.lines[-1] == (
        "bucket 'my-bucket' can't be read: this machine's role may not list it (s3:ListBucket)"
    )


def test_a_refusal_is_asked_about_again_until_the_role_is_known(tmp_path: Path) -> None:
    soon = 'case $1 in lsf) [ -e "$0.asked" ] && exit 0; : > "$0.asked"; echo AccessDenied; exit 1 ;; *) exit 9 ;; esac'

    volume = sky.S3Volume(f"{tmp_path}/data", "my-bucket")

    done = run(mount_script([volume], region=None), tmp_path, rclone=soon, sleep="exit 0")

    progress = read_progress(done.stdout.splitlines())
    assert progress is not None
    assert progress.lines[-1] == f"bucket 'my-bucket' could not be mounted at {volume.mount_path}"


def test_unmounting_what_was_never_mounted_does_nothing(tmp_path: Path) -> None:
    done = run(unmount_script([DATA, OUT]), tmp_path)

    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "::skyward step unmount /mnt/my out",
        "::skyward step unmount /data",
        "::skyward step done",
    ]


def test_an_unsent_volume_does_not_stop_others_from_being_unmounted(tmp_path: Path) -> None:
    text = unmount_script([DATA, OUT], stalled_s=0)
    key = text.partition("    key=")[2].partition("\n")[0]  # of the one that is unmounted first
    note = tmp_path / "home" / "volumes" / key / "cache" / "vfsMeta" / "other.bucket" / "x y" / "result"
    note.parent.mkdir(parents=True)
    note.write_text('{\n\t"Size": 4,\n\t"Dirty": true\n}\n')

    done = run(text, tmp_path)

    output = done.stdout.splitlines()
    assert done.returncode == 1
    assert "::skyward failed unmount /mnt/my out 87" in output
    assert "::skyward line other.bucket/x y/result" in output
    assert "::skyward step unmount /data" in output
    assert output[-1] != "::skyward step done"
    assert note.exists()
