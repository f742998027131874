"""The report of `make test-tpu`, and which failures of pip mean that there was nothing to download."""

from __future__ import annotations

import pytest

from tests.tpu.environments.build import FILES, HERE, is_unavailable
from tests.tpu.environments.stub_cuda import parse_needs, source_of
from tests.tpu.report import Result, counts, main, render, results_of

JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest">
<testcase classname="tests.contracts.test_manager_contract" name="test_time[tpu]" time="1"/>
<testcase classname="tests.contracts.test_manager_contract" name="test_graph[tpu]">
<skipped type="pytest.skip" message="tpu captures no graphs">where</skipped></testcase>
<testcase classname="tests.tpu.test_x.TestGroup" name="test_wrong"><failure message="assert 1 == 2&#10;x"/></testcase>
<testcase classname="tests.tpu.test_y" name="test_setup"><error message="failed on setup"/></testcase>
<testcase classname="" name="tests.gpu.test_ops"><skipped message="collection skipped"
>('/a/test_ops.py', 13, 'Skipped: no CUDA device')</skipped></testcase>
</testsuite></testsuites>
"""


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "torch_tpu.xml"
    path.write_text(JUNIT)
    return results_of(path)


def test_each_test_has_its_outcome_and_the_first_line_of_the_reason(results):
    assert results == [
        Result("tests/contracts/test_manager_contract.py", "test_time[tpu]", "ran"),
        Result("tests/contracts/test_manager_contract.py", "test_graph[tpu]", "could not", "tpu captures no graphs"),
        Result("tests/tpu/test_x.py", "test_wrong", "failed", "assert 1 == 2"),
        Result("tests/tpu/test_y.py", "test_setup", "failed", "failed on setup"),
        Result("tests/gpu/test_ops.py", "all of it", "could not", "no CUDA device"),
    ]


def test_the_table_counts_by_file_and_lists_every_one_that_could_not_run(results):
    text = render({"torch_tpu": results, "torch_xla": results[:1]})
    assert "| device tests | torch_tpu | torch_xla |" in text
    assert "| tests/contracts/test_manager_contract.py | 1 ran, 1 could not | 1 ran |" in text
    assert "| tests/gpu/test_ops.py | 1 could not | - |" in text
    assert "| all | 1 ran, 2 failed, 2 could not | 1 ran |" in text
    could_not = text.split("Could not run on torch_tpu:")[1]
    assert "- no CUDA device\n  - tests/gpu/test_ops.py: all of it" in could_not
    assert "test_graph[tpu]" in could_not
    assert "Failed on torch_tpu:" in text
    assert "on torch_xla:" not in text


def test_outcomes_are_counted(results):
    assert counts(results) == {"ran": 1, "failed": 2, "could not": 2}


def test_a_file_of_which_nothing_could_run_for_one_reason_is_one_line():
    results = [Result("tests/gpu/test_ops.py", f"test_{i}", "could not", "needs a CUDA device") for i in range(9)]
    text = render({"torch_xla": results})
    assert "- needs a CUDA device\n  - tests/gpu/test_ops.py: all 9\n" in text
    assert "test_3" in render({"torch_xla": [*results, Result("tests/gpu/test_ops.py", "test_x", "ran")]})


def test_nothing_run_is_said(capsys, tmp_path):
    assert "No test ran" in render({})
    assert main([]) == 2
    path = tmp_path / "torch_xla.xml"
    path.write_text(JUNIT)
    assert main([str(path)]) == 0
    assert "| torch_xla |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("ERROR: No matching distribution found for torch-tpu==0.2.0", True),
        ('WARNING: Retrying ... ReadTimeoutError("HTTPSConnectionPool: Read timed out.")', True),
        ("ERROR: Could not install packages due to an OSError: HTTP error 503 while getting x", True),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", False),
        ("ERROR: ResolutionImpossible: see\nNo matching distribution found", False),
        ("error: subprocess-exited-with-error", False),
        ("OSError: [Errno 28] No space left on device", False),
    ],
)
def test_only_a_failed_download_is_tolerated(said, expected):
    assert is_unavailable(said) == expected


def test_the_plugin_is_pinned_by_its_hash_and_the_rest_by_version():
    from kernel_pytorch.backends.tpu.packages import PINS, PLUGIN

    assert f"{PLUGIN}=={PINS[PLUGIN]} --hash=sha256:" in (HERE / "plugin.txt").read_text()
    pinned = (HERE / "torch_tpu.txt").read_text() + (HERE / "torch_xla.txt").read_text()
    for name in ("torch", "torch_tpu", "libtpu", "jax", "torch_xla"):
        assert f"{name}=={PINS[name]}\n" in pinned.replace("torch-tpu", "torch_tpu"), name
    assert all((HERE / name).exists() for names in FILES.values() for name in names)


READELF = """
 0x0000000000000001 (NEEDED)             Shared library: [libcudart.so.12]
 0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]

Version needs section '.gnu.version_r' contains 2 entries:
  000000: Version: 1  File: libcudart.so.12  Cnt: 1
  0x0010:   Name: libcudart.so.12  Flags: none  Version: 3
  0x0020: Version: 1  File: libc.so.6  Cnt: 1
  0x0030:   Name: GLIBC_2.2.5  Flags: none  Version: 2

Symbol table '.dynsym' contains 5 entries:
   Num:    Value          Size Type    Bind   Vis      Ndx Name
     1: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND cudaMalloc@libcudart.so.12 (3)
     2: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND malloc@GLIBC_2.2.5 (2)
     3: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND nvmlInit
     4: 0000000000001000    16 FUNC    GLOBAL DEFAULT   12 cudaOfItsOwn
     5: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND cudaOfItsOwn
"""


def test_the_stub_libraries_define_what_torch_asks_of_cuda_and_no_more():
    needs = parse_needs([READELF])
    assert needs.libraries == {"libcudart.so.12"}
    assert dict(needs.symbols) == {
        ("libcudart.so.12", "libcudart.so.12"): {"cudaMalloc"},
        ("libcudart.so.12", ""): {"nvmlInit"},
    }
    source, script = source_of("libcudart.so.12", needs)
    assert source == "int cudaMalloc(void) { return 100; }\nint nvmlInit(void) { return 100; }\n"
    assert script == "libcudart.so.12 { global: cudaMalloc; };\n"
