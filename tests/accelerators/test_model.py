"""Accelerators by name, by factory and by text."""

from __future__ import annotations

import dataclasses
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import skyward as sky
from skyward.accelerators.catalog import TABLE, Model, mig_profiles, recognise
from skyward.providers import prices

GPU = sky.Accelerator.NVIDIA
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("A100", "A100", 1),
        ("A100:4", "A100", 4),
        ("a100-80gb", "A100", 1),
        ("a100 40 GB:2", "A100-40GB", 2),
        ("H100-SXM", "H100", 1),
        ("h100_sxm5_80gb", "H100", 1),
        ("L40S", "L40S", 1),
        ("A10G", "A10G", 1),
        ("V100-32GB", "V100-32GB", 1),
        ("RTX 4090", "RTX-4090", 1),
        ("mi300x", "MI300X", 1),
        ("Trainium2", "Trainium2", 1),
        ("trn1:16", "Trainium1", 16),
        (sky.NVIDIA.H200, "H200", 1),
    ],
)
def test_texts_are_understood_without_case_dashes_or_spaces(text: str, name: str, count: int) -> None:
    found = sky.Accelerator.parse(text)

    assert (found.name, found.count) == (name, count)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A1000", r"did you mean .*'A100'"),
        ("H10", "did you mean"),
        ("A100:x", "a count that is an integer >= 1"),
        ("A100:0", "a count that is an integer >= 1"),
        ("A100:²", "a count that is an integer >= 1"),
        ("A100-60GB", "40 GB or 80 GB for A100"),
        ("T4-SXM", "form factor of T4 none"),
        ("", "one of T4"),
        (5, "a name such as 'A100'"),
    ],
)
def test_what_is_not_understood_is_told_what_is_meant(text: Any, message: str) -> None:
    with pytest.raises(sky.SpecError, match=message) as info:
        sky.Accelerator.parse(text)

    assert info.value.option == "accelerator"  # type: ignore[attr-defined]


def test_factories_make_what_texts_mean() -> None:
    assert GPU.A100(count=4) == sky.Accelerator.parse("A100:4")
    assert GPU.A100(memory=40) == sky.Accelerator.parse("A100-40GB")
    assert GPU.H100(form_factor="NVL").form_factor == "NVL"
    assert GPU.RTX_4000_ADA().name == "RTX-4000-Ada"
    assert sky.Accelerator.AWS.Trainium(2, count=16).name == "Trainium2"
    assert sky.Accelerator.AWS.Inferentia(2).vendor == "AWS"
    assert sky.Accelerator.AMD.MI("300X").memory == 192
    assert sky.Accelerator.Google.TPU("v5e").name == "TPU-v5e"
    assert sky.Accelerator.Google.TPUSlice("v5p-8").slice_topology == "v5p-8"
    assert sky.Accelerator.Habana.Gaudi(3).name == "Gaudi3"


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (lambda: sky.Accelerator("A100"), "A100"),
        (lambda: sky.Accelerator("a100", 2, 40), "A100-40GB:2"),
        (lambda: sky.Accelerator("trn2"), "Trainium2"),
        (lambda: GPU.H100(form_factor="sxm"), "H100-SXM"),
        (lambda: dataclasses.replace(GPU.A100(), count=8), "A100:8"),
    ],
)
def test_however_an_accelerator_is_made_it_has_one_form(made: Callable[[], sky.Accelerator], text: str) -> None:
    assert made() == sky.Accelerator.parse(text)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: sky.Accelerator("A100:4"), "did you mean .*'A100'"),
        (lambda: sky.Accelerator("A100", memory=60), "40 GB or 80 GB for A100"),
        (lambda: sky.Accelerator("T4", mig=("1g.5gb",)), "no mig"),
        (lambda: dataclasses.replace(GPU.A100(mig="3g.40gb"), memory=40), r"for mig of A100 \(40 GB\)"),
        (lambda: sky.Accelerator.Google.TPUSlice("v5p-²"), "a slice such as 'v5p-8'"),
    ],
)
def test_however_an_accelerator_is_made_it_is_checked(made: Callable[[], sky.Accelerator], message: str) -> None:
    with pytest.raises(sky.SpecError, match=message):
        made()


def test_factories_refuse_what_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="has no 'A1000'; it has A10, A100"):
        GPU.A1000()
    with pytest.raises(sky.SpecError, match="a version of Gaudi: 1, 2, 3"):
        sky.Accelerator.Habana.Gaudi(9)
    with pytest.raises(sky.SpecError, match="a slice such as 'v5p-8'"):
        sky.Accelerator.Google.TPUSlice("v5p")
    with pytest.raises(sky.SpecError, match="form factor of L4"):
        GPU.L4(form_factor="SXM")


def test_every_name_of_the_enum_is_known_and_every_model_has_a_name() -> None:
    assert {sky.Accelerator.parse(n).name for n in sky.NVIDIA} == {n.value for n in sky.NVIDIA}
    assert len(sky.NVIDIA) == len(dir(GPU))


def test_accelerators_are_values() -> None:
    a = GPU.H100(2, mig="3g.40gb")

    assert a == pickle.loads(pickle.dumps(a))
    assert len({a, GPU.H100(2, mig="3g.40gb")}) == 1
    assert str(GPU.A100(4)) == "A100:4"


@pytest.mark.parametrize(
    ("model", "memory", "profiles"),
    [
        ("A100", 80, {"1g.10gb": 7, "1g.20gb": 4, "2g.20gb": 3, "3g.40gb": 2, "4g.40gb": 1, "7g.80gb": 1}),
        ("H100", 80, {"1g.10gb": 7, "1g.20gb": 4, "2g.20gb": 3, "3g.40gb": 2, "4g.40gb": 1, "7g.80gb": 1}),
        ("A100", 40, {"1g.5gb": 7, "2g.10gb": 3, "3g.20gb": 2, "4g.20gb": 1, "7g.40gb": 1}),
        ("T4", 16, {}),
    ],
)
def test_as_many_partitions_fit_as_nvidias_tables_say(model: str, memory: int, profiles: dict[str, int]) -> None:
    assert mig_profiles(model, memory) == profiles


def test_mig_is_one_profile_as_often_as_it_fits_or_a_list() -> None:
    assert GPU.A100(mig="2g.20gb").mig == ("2g.20gb",) * 3
    assert GPU.A100(count=2, mig="2g.20gb").partitions == 6
    assert GPU.A100(mig=["3g.40gb", "2g.20gb", "1g.20gb"]).partitions == 3
    assert GPU.A100().partitions == 0


def test_mig_that_does_not_fit_is_refused_with_the_slices_it_takes() -> None:
    with pytest.raises(sky.SpecError, match="these profiles take 8 and 8"):
        GPU.A100(mig=["4g.40gb", "4g.40gb"])
    with pytest.raises(sky.SpecError, match=r"no mig: T4 \(16 GB\) can't be partitioned"):
        GPU.T4(mig="1g.5gb")
    with pytest.raises(sky.SpecError, match=r"for mig of A100 \(80 GB\): 1g\.10gb"):
        GPU.A100(mig="1g.5gb")


def test_vendors_are_told_apart() -> None:
    assert sky.is_nvidia("A100:4")
    assert sky.is_nvidia(GPU.T4())
    assert not sky.is_nvidia("MI300X")
    assert not sky.is_nvidia(None)
    assert sky.is_trainium("trainium2:16")
    assert sky.is_trainium(sky.Trainium.TRAINIUM1)
    assert not sky.is_trainium("Inferentia2")


@given(st.lists(st.sampled_from(sorted(mig_profiles("A100", 80))), min_size=1, max_size=8))
def test_a_mix_is_taken_exactly_when_its_slices_fit(profiles: list[str]) -> None:
    memory_slices = {"1g.10gb": 1, "1g.20gb": 2, "2g.20gb": 2, "3g.40gb": 4, "4g.40gb": 4, "7g.80gb": 8}
    fits = sum(int(p[0]) for p in profiles) <= 7 and sum(memory_slices[p] for p in profiles) <= 8

    try:
        taken = GPU.A100(mig=profiles).mig == tuple(profiles)
    except sky.SpecError:
        taken = False

    assert taken == fits


@given(st.text(max_size=30) | st.from_regex(r"[aA]100[-: ]?\w{0,4}:?\w{0,3}", fullmatch=True))
def test_any_text_is_an_accelerator_or_a_spec_error(text: str) -> None:
    try:
        found = sky.Accelerator.parse(text)
    except sky.SpecError:
        return
    assert found.count >= 1


# --- the table ----------------------------------------------------------------------------------------------


def test_the_reference_page_is_what_the_table_makes_of_it() -> None:
    tool = ROOT / "tools" / "accelerators-page"

    made = runpy.run_path(str(tool))["page"]()

    assert (ROOT / "docs" / "accelerators.md").read_text(encoding="utf-8") == made, f"run {tool.relative_to(ROOT)}"


@pytest.mark.parametrize("model", TABLE, ids=lambda m: m.name)
def test_a_model_has_known_names_and_is_sold_by_clouds_that_exist(model: Model) -> None:
    assert [sky.Accelerator.parse(name).model for name in (model.name, *model.aliases)] == [model.name] * (
        1 + len(model.aliases)
    )
    assert set(model.clouds) <= {"aws", "digitalocean", "verda"}
    assert set(model.mig) <= set(model.memory_gb)


def test_what_clouds_list_is_in_the_table_as_theirs() -> None:
    rows = [
        (cloud, row.accelerator)
        for cloud in ("aws", "digitalocean", "verda")
        for row in prices.table(cloud)
        if row.accelerator
    ]

    assert rows
    assert [row for row in rows if row[0] not in sky.Accelerator.parse(row[1]).facts.clouds] == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Tesla T4", "T4"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("nvidia_rtx4000_ada", "RTX-4000-Ada"),
        ("NVIDIA T400", None),
        ("", None),
    ],
)
def test_names_that_drivers_give_are_recognised(text: str, name: str | None) -> None:
    model = recognise(text)

    assert (model.name if model else None) == name
