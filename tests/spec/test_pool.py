"""Specifications: what is accepted, and what a bad option is told, before anything starts."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import skyward as sky
from skyward.environment.wheels import Wheel
from skyward.pool import PoolOptions
from skyward.spec.pool import CHECKS, PoolSpec
from skyward.spec.validation import parse_memory

BAD = [
    ("nodes", 0, "an integer >= 1"),
    ("nodes", True, "an integer >= 1"),
    ("nodes", "2", "an integer >= 1"),
    ("concurrency", -1, "an integer >= 1"),
    ("accelerator", "A1000", "did you mean"),
    ("memory", "lots", "'32GB' or '32GiB'"),
    ("memory", 0, "'32GB' or '32GiB'"),
    ("memory", "3 parsecs", "'32GB' or '32GiB'"),
    ("selection", "best", "'first', 'cheapest', 'available' or a function"),
    ("selection", "cheapst", "did you mean 'cheapest'?"),
    ("timeout", -5, "seconds greater than 0"),
    ("timeout", float("nan"), "seconds greater than 0"),
    ("timeout", float("inf"), "seconds greater than 0"),
    ("idle_timeout", 0, "seconds greater than 0"),
    ("boot_timeout", 0, "seconds greater than 0"),
    ("heartbeat_timeout", 9, "seconds from 10"),
    ("heartbeat_timeout", 3601, "at most timeout=3600"),
    ("retries", -1, "an integer >= 0"),
    ("cpu", 0.5, "an integer >= 1"),
    ("max_price", 0, "USD per hour greater than 0"),
    ("max_cost", "5", "USD greater than 0"),
    ("display", "loud", "'auto', 'log', 'spinner', 'quiet'"),
    ("architecture", "sparc", "'x86_64', 'arm64'"),
    ("machine", "", "a text that is not empty"),
    ("allocation", "sometimes", "'always-spot', 'spot-if-available'"),
    ("allocation", 1.5, "a share from 0 to 1"),
    ("env", {"A-B": "x"}, "letters, digits and _"),
    ("env", {"A": 1}, "a text of one line"),
    ("env", ["A=1"], "a mapping of names to texts"),
    ("on_event", 5, "a function that takes an event"),
    ("collect_metrics", "yes", "True or False"),
    ("logging", True, "an sky.LogConfig"),
    ("image", "python:3.12", "an sky.Image"),
    ("volume", "s3://bucket", "an sky.S3Volume"),
]


@pytest.mark.parametrize(("option", "value", "accepted"), BAD, ids=[f"{o}={v!r}" for o, v, _ in BAD])
def test_a_bad_option_is_told_before_anything_starts(option: str, value: Any, accepted: str) -> None:
    before = psutil.Process().children(recursive=True)

    with pytest.raises(sky.SpecError) as info:
        sky.ComputePool(**{option: value})

    assert accepted in str(info.value)
    assert option in str(info.value)
    assert info.value.option == option  # type: ignore[attr-defined]
    assert psutil.Process().children(recursive=True) == before


def test_the_default_heartbeat_timeout_gives_way_to_a_shorter_timeout() -> None:
    assert PoolSpec(timeout=60).heartbeat_timeout == 60
    assert PoolSpec().heartbeat_timeout == 120


def test_all_bad_options_are_told_at_once() -> None:
    with pytest.raises(sky.SpecError, match="3 options can't work") as info:
        sky.ComputePool(nodes=0, memory="lots", accelerator="A1000")

    lines = str(info.value).splitlines()[1:]
    assert [line.split("=")[0].strip() for line in lines] == ["nodes", "accelerator", "memory"]
    assert len(info.value.errors) == 3  # type: ignore[attr-defined]
    assert len(pickle.loads(pickle.dumps(info.value)).errors) == 3


def test_options_are_brought_into_one_form() -> None:
    spec = PoolSpec(
        accelerator="a100:2",  # type: ignore[arg-type]
        memory="32GiB",  # type: ignore[arg-type]
        volume=sky.S3Volume("/data", "my-bucket"),  # type: ignore[arg-type]
        allocation=0.8,  # type: ignore[arg-type]
        architecture=sky.Auto,  # type: ignore[arg-type]
    )

    assert spec.accelerator == sky.Accelerator.NVIDIA.A100(2)
    assert spec.memory == 34360
    assert spec.volume == (sky.S3Volume("/data", "my-bucket"),)
    assert spec.allocation == sky.Allocation.Percent(0.8)
    assert spec.architecture is None


def test_a_specification_is_a_value_that_travels() -> None:
    options: dict[str, Any] = {
        "env": {"A": "1"}, "accelerator": "A100:2", "memory": "8GB", "allocation": 0.5,
        "volume": sky.S3Volume("/data", "my-bucket"), "image": sky.Image(pip=["numpy"], env={"B": "2"}),
        "logging": sky.LogConfig(), "machine": "m5.large", "idle_timeout": 60,
    }  # fmt: skip

    spec = PoolSpec(**options)

    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec
    assert hash(spec) == hash(PoolSpec(**options))
    assert dataclasses.replace(spec, nodes=2).nodes == 2


def test_environment_variables_can_not_be_changed_and_are_not_shown() -> None:
    variables = {"TOKEN": "secret-value"}
    spec = PoolSpec(env=variables)

    variables["TOKEN"] = "other"

    assert spec.env == {"TOKEN": "secret-value"}
    assert "secret-value" not in repr(spec)
    with pytest.raises(TypeError):
        spec.env["TOKEN"] = "other"  # type: ignore[index]


@given(
    option=st.sampled_from([f.name for f in dataclasses.fields(PoolSpec)]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=4,
    ),
)
def test_any_option_value_is_accepted_or_a_spec_error_of_that_option(option: str, value: Any) -> None:
    error: Any = None

    try:
        PoolSpec(**{option: value})
    except sky.SpecError as exc:
        error = exc

    assert error is None or (error.option == option and f"{option}=" in str(error) and error.accepted)


@pytest.mark.parametrize(
    ("text", "megabytes"),
    [(1024, 1024), ("32GB", 32000), ("1.5 GB", 1500), ("1GiB", 1074), ("500mb", 500), ("2TB", 2_000_000)],
)
def test_memory_is_read_as_written(text: Any, megabytes: int) -> None:
    assert parse_memory(text) == megabytes


# --- allocation ---------------------------------------------------------------------------------------------


def test_allocations_by_name_and_by_share() -> None:
    assert sky.Allocation.parse("always-spot") is sky.Allocation.AlwaysSpot
    assert sky.Allocation.OnDemand() is sky.Allocation.OnDemand
    assert sky.Allocation.parse(0.8).spot_nodes(10) == 8
    assert sky.Allocation.parse(0.75).spot_nodes(2) == 2
    assert sky.Allocation.AlwaysSpot().spot_nodes(3) == 3
    assert sky.Allocation.Cheapest().spot_nodes(3) == 0
    with pytest.raises(sky.SpecError, match="did you mean 'cheapest'"):
        sky.Allocation("cheapst")


@given(share=st.floats(0, 1), nodes=st.integers(1, 1000))
def test_a_share_is_rounded_up_to_whole_nodes(share: float, nodes: int) -> None:
    spot = sky.Allocation.Percent(spot=share).spot_nodes(nodes)

    assert 0 <= spot <= nodes
    assert share * nodes - 1e-6 <= spot < share * nodes + 1


# --- image --------------------------------------------------------------------------------------------------


def test_images_with_the_same_content_have_the_same_hash() -> None:
    a = sky.Image(pip=["numpy", "torch >= 2"], apt=["git", "curl"], env={"A": "1", "B": "2"})
    b = sky.Image(pip=("torch>=2", "numpy"), apt=("curl", "git"), env={"B": "2", "A": "1"})
    c = sky.Image(pip=["numpy"])

    assert a.content_hash() == b.content_hash() != c.content_hash()
    assert len(a.content_hash()) == 12
    assert set(a.content_hash()) <= set("0123456789abcdef")
    assert pickle.loads(pickle.dumps(a)).content_hash() == a.content_hash()


def test_modules_to_preload_are_no_part_of_the_environment() -> None:
    image = sky.Image(pip=["numpy"], preload=["numpy", "sklearn.ensemble"])

    assert image.content_hash() == sky.Image(pip=["numpy"]).content_hash()
    assert pickle.loads(pickle.dumps(image)) == image != sky.Image(pip=["numpy"])
    assert "preload=('numpy', 'sklearn.ensemble')" in repr(image)
    with pytest.raises(sky.SpecError, match=r"preload=.* is invalid: expected names of modules .*'two words' is not"):
        sky.Image(preload=["two words"])


def test_requirement_names_compare_as_in_indexes_and_addresses_verbatim() -> None:
    def digest(requirement: str) -> str:
        return sky.Image(pip=[requirement]).content_hash()

    assert digest("Scikit_Learn>=1.5") == digest("scikit-learn >= 1.5")
    assert digest("x @ https://host/A.whl") != digest("x @ https://host/a.whl")


@given(pip=st.permutations(["numpy", "torch>=2", "dask[array]"]), apt=st.permutations(["git", "curl", "jq"]))
def test_the_order_of_packages_does_not_matter(pip: list[str], apt: list[str]) -> None:
    image = sky.Image(pip=pip, apt=apt)

    assert image.content_hash() == sky.Image(pip=sorted(pip), apt=sorted(apt)).content_hash()


def test_images_are_values() -> None:
    a = sky.Image(pip=["numpy"], env={"A": "1"})

    assert copy.deepcopy(a) == pickle.loads(pickle.dumps(a)) == a
    assert len({a, sky.Image(pip=("numpy",), env={"A": "1"})}) == 1
    with pytest.raises(TypeError):
        a.env["A"] = "2"  # type: ignore[index]


def test_values_of_environment_variables_are_not_shown() -> None:
    image = sky.Image(env={"TOKEN": "secret-value"})

    assert "secret-value" not in repr(image)
    assert "TOKEN" in repr(image)


@pytest.mark.parametrize(
    "options",
    [
        {"pip": "numpy"},
        {"pip": ["numpy; rm -rf /$HOME"]},
        {"pip": ["numpy\nrm"]},
        {"pip": ["`id`"]},
        {"pip": ["numpy; rm -rf /tmp"]},
        {"pip": ["numpy & reboot"]},
        {"pip": ["numpy > /etc/x"]},
        {"pip": ["numpy # x"]},
        {"pip": ["numpy'; reboot #"]},
        {"pip": ["numpy (id)"]},
        {"pip": ["two words"]},
        {"pip": ["x @ https://h/a && reboot"]},
        {"pip": ["y; python_version < '$(id)'"]},
        {"pip": [""]},
        {"pip": ["--index-url=x"]},
        {"apt": ["git; reboot"]},
        {"apt": ["-o=x"]},
        {"env": {"A B": "x"}},
        {"env": {"A": "x\ny"}},
        {"python": "3"},
        {"python": "3.12; id"},
        {"python": "3.1٢"},
        {"pip_extra_index_url": "file:///etc"},
        {"pip_extra_index_url": "https://x/$(id)"},
        {"pip_extra_index_url": "https://x/(id)"},
        {"pip_extra_index_url": "https://x/\0"},
        {"pip_extra_index_url": ["https://x", "https://x/$(id)"]},
        {"pip": ["x --hash=sha256:$(id)"]},
        {"pip": ["x --hash=sha256:" + "ab" * 32 + " --index-url=x"]},
        {"constraints": ["x; $(id)"]},
        {"wheels": ["a.whl"]},
        {"not_reproduced": ["x"]},
        {"wheels": [Wheel('a-1-py3-none-any";id;".whl', b"")]},
        {"include": ["a\nb"]},
        {"include": [""]},
        {"include": ["-rf"]},
        {"include": "src"},
        {"preload": "numpy"},
        {"preload": ["numpy;id"]},
        {"preload": ["sklearn..svm"]},
        {"preload": ["a b"]},
        {"preload": ["from.x"]},
        {"preload": [""]},
    ],
    ids=str,
)
def test_no_field_of_an_image_lets_a_shell_in(options: Any) -> None:
    with pytest.raises(sky.SpecError, match=r"Image\("):
        sky.Image(**options)


def test_messages_keep_values_of_environment_variables_and_addresses() -> None:
    makers: list[Callable[[], object]] = [
        lambda: sky.Image(env={"TOKEN": "secret-value\n"}),
        lambda: PoolSpec(env={"TOKEN": "secret-value", "A-B": "x"}),
        lambda: sky.Image(pip_extra_index_url="https://user:secret-value@host/;"),
    ]

    for make in makers:
        with pytest.raises(sky.SpecError) as info:
            make()

        assert "secret-value" not in str(info.value)


@pytest.mark.parametrize(
    "requirement",
    [
        "numpy",
        "torch>=2.2,<3",
        "dask[array]==2025.1.*",
        "x @ https://host/x.whl#sha256=ab",
        "y; python_version < '3.12'",
        "y>=1; (python_version < '3.12' and sys_platform == \"linux\") or 'a' in extra",
        "y [a, b] (>=1, <2) ; platform_machine not in 'x86_64 arm64'",
        "x@git+https://host/r.git@v1#egg=x&subdirectory=y",
        "x @ https://host/a?b=1&c=2 ; os_name == 'posix'",
        "torch===2.2.0+cu121",
        "zope.interface~=5.0,!=5.1.*",
        "numpy==2.0; os_name == 'posix' --hash=sha256:" + "ab" * 32,
    ],
)
def test_requirements_are_taken_as_pip_has_them(requirement: str) -> None:
    assert sky.Image(pip=[requirement]).pip == (requirement,)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "piece", ["x in y and ", "xinyandxiny", "x == y and ", "(", " ", ">=1,", "[a,", "a.", "'", "not in ", ") ", "; "]
)
def test_no_requirement_takes_long_to_refuse(piece: str) -> None:
    for beginning in ("a", "a;", "a; x in y", "a[", "a @ https://host/"):
        with pytest.raises(sky.SpecError):
            sky.Image(pip=[beginning + piece * 300 + "$"])


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "bucket"),
        ("/", "bucket"),
        ("//", "bucket"),
        ("/data/../etc", "bucket"),
        ("/data\rx", "bucket"),
        ("/$(id)", "bucket"),
        ("/da'ta", "bucket"),
        ("/data", ""),
        ("/data", "Upper_Case"),
        ("/data", "bucket", "x'; rm -rf /"),
        ("/data", "bucket", "x\n"),
        ("/data", "bucket", "x/../y"),
        ("/data", "bucket", "x//y"),
        ("/data", "bucket", "--option"),
        ("/data", "bucket", 5),
        ("/data", "bucket", "", "yes"),
    ],
    ids=str,
)
def test_a_volume_needs_a_place_and_a_bucket(arguments: Any) -> None:
    with pytest.raises(sky.SpecError, match="S3Volume"):
        sky.S3Volume(*arguments)


@pytest.mark.parametrize("path", ["/", "//", "/usr", "/etc/", "/bin", "/proc/x", "/var/lib", "/home", "/root/", "/tmp"])
def test_a_volume_is_not_mounted_over_what_the_system_needs(path: str) -> None:
    with pytest.raises(sky.SpecError, match="such as '/data'") as caught:
        sky.S3Volume(path, "bucket")

    assert (caught.value.option, caught.value.value) == ("mount_path", path)


@pytest.mark.parametrize("path", ["/data", "/mnt/data", "/home/ada/data", "/root/data", "/tmp/data", "/srv", "/users"])
def test_a_volume_may_be_mounted_anywhere_else(path: str) -> None:
    assert sky.S3Volume(path, "bucket").mount_path == path


def test_a_volume_is_taken_as_written() -> None:
    volume = sky.S3Volume("/mnt/data/", "my-bucket", "datasets/2024 a/", False, endpoint_url="https://s3.example.org")

    assert (volume.mount_path, volume.prefix, volume.read_only) == ("/mnt/data", "datasets/2024 a/", False)
    assert pickle.loads(pickle.dumps(volume)) == volume
    with pytest.raises(sky.SpecError, match="a different mount_path"):
        PoolSpec(volume=[volume, sky.S3Volume("/mnt/data", "other-bucket")])  # type: ignore[arg-type]


def test_log_configurations_are_checked() -> None:
    with pytest.raises(sky.SpecError, match="did you mean 'INFO'"):
        sky.LogConfig(level="info")
    with pytest.raises(sky.SpecError, match="retention=0"):
        sky.LogConfig(retention=0)
    assert sky.LogConfig(file="a.log").rotation == "50 MB"


@given(st.dictionaries(st.sampled_from(["nodes", "concurrency", "retries", "timeout", "memory", "cpu"]), st.integers()))
def test_whole_numbers_are_accepted_or_refused_with_every_reason(options: dict[str, int]) -> None:
    least = {"nodes": 1, "concurrency": 1, "retries": 0, "timeout": 1, "memory": 1, "cpu": 1}
    bad = {k for k, v in options.items() if v < least[k]}

    if not bad:
        PoolSpec(**options)  # type: ignore[arg-type]
        return
    with pytest.raises(sky.SpecError) as info:
        PoolSpec(**options)  # type: ignore[arg-type]

    assert all(f"{k}=" in str(info.value) for k in bad)


def test_every_list_of_pool_options_has_the_same_ones_and_defaults() -> None:
    signature = inspect.signature(sky.ComputePool)
    given = {name: p for name, p in signature.parameters.items() if name != "provider"}
    handed_on = {name: hint.__forward_arg__ for name, hint in PoolOptions.__annotations__.items()}
    defaults = {f.name: f.default for f in dataclasses.fields(PoolSpec)}
    shown = {name: getattr(p.default, "value", p.default) for name, p in given.items()}

    assert {name: p.annotation for name, p in given.items()} == handed_on
    assert set(given) == set(defaults) == set(CHECKS)
    assert sky.Allocation.parse(shown.pop("allocation")) == defaults.pop("allocation")
    assert shown.pop("image") is None
    del defaults["image"]  # an empty one
    assert shown == defaults
