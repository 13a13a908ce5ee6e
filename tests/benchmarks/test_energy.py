from pathlib import Path

from benchmarks.energy import Meter


def test_packages_add_up_and_wrap_around(tmp_path: Path) -> None:
    assert Meter(rapl=tmp_path).joules() is None
    for name, start in (("intel-rapl:0", 1_000_000), ("intel-rapl:1", 9_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(f"package-{name[-1]}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("10000000\n")
        (tmp_path / name / "energy_uj").write_text(f"{start}\n")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of a package, which has it counted
    (tmp_path / "intel-rapl:2").mkdir()  # the whole platform, packages and all
    (tmp_path / "intel-rapl:2" / "name").write_text("psys\n")
    meter = Meter(rapl=tmp_path)
    assert meter.joules() == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("3500000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("1000000")  # past its range
    assert meter.joules() == 2.5 + 2.0
    assert meter.joules() == 4.5
