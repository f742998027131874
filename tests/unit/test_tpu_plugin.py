"""The stand-in for a TPU: which plugin may be loaded, and the shim that is compiled for it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_pytorch.backends.tpu import plugin
from kernel_pytorch.errors import KptError
from kernel_pytorch.hardware.tpu import installed

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")

FAKE = """
/* A PJRT plugin of nothing but a table: each function returns a number that tells which it is. */
#include <stddef.h>
#include <string.h>
struct { size_t size; void *extension; size_t version[3]; void *(*functions[60])(void *); } api;
static void *create(void **a) { return (void *)(100 + (size_t)a[3]); }
static void *compile(void **a) { (void)a; return (void *)200; }
static void *outputs(void **a) { a[3] = (void *)3; return NULL; }
static void *other(void **a) { (void)a; return (void *)300; }
void *GetPjrtApi(void) {
  api.size = sizeof api;
  for (int i = 0; i < 60; i++) api.functions[i] = (void *(*)(void *))other;
  api.functions[10] = (void *(*)(void *))create;
  api.functions[20] = (void *(*)(void *))compile;
  api.functions[44] = (void *(*)(void *))outputs;
  return &api;
}
"""

CALLS = """
import ctypes, sys
api = ctypes.CDLL(sys.argv[1]).GetPjrtApi
api.restype = ctypes.c_void_p
table = ctypes.cast(api(), ctypes.POINTER(ctypes.c_void_p))
def call(index, *words):
    function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(table[5 + index])
    arguments = (ctypes.c_void_p * len(words))(*words)
    return function(arguments), arguments
print("create", call(10, 32, 0, 0, 7)[0])
text = ctypes.create_string_buffer(b"module {}")
kind = ctypes.create_string_buffer(b"mlir")
program = (ctypes.c_void_p * 6)(48, 0, ctypes.addressof(text), 9, ctypes.addressof(kind), 4)
for _ in range(2):
    print("compile", call(20, 64, 0, 0, ctypes.addressof(program))[0])
error, kinds = call(47, 48, 0, 0, 0, 0, 0)
names = ctypes.cast(kinds[4], ctypes.POINTER(ctypes.c_char_p))
sizes = ctypes.cast(kinds[5], ctypes.POINTER(ctypes.c_size_t))
print("kinds", error, kinds[3], [names[i] for i in range(3)], [sizes[i] for i in range(3)])
print("other", call(5, 0)[0])
"""


@needs_gcc
def test_the_shim_hands_on_all_but_three_functions(tmp_path):
    shim = plugin.build_shim(tmp_path)
    source, fake, dump = tmp_path / "fake.c", tmp_path / "fake.so", tmp_path / "dump"
    source.write_text(FAKE)
    dump.mkdir()
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", str(fake), str(source)], check=True)
    environment = {**os.environ, "KPT_PJRT_REAL": str(fake), "KPT_PJRT_DUMP": str(dump)}
    done = subprocess.run(
        [sys.executable, "-c", CALLS, str(shim)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "create 100",  # no option was left of seven
        "compile 200",
        "compile 200",
        "kinds None 3 [b'device', b'device', b'device'] [6, 6, 6]",
        "other 300",
    ]
    assert [(p.name, p.read_text()) for p in sorted(dump.iterdir())] == [
        ("0000.mlir", "module {}"),
        ("0001.mlir", "module {}"),
    ]


@needs_gcc
def test_the_shim_is_built_once_and_anew_for_another_source(tmp_path, monkeypatch):
    first = plugin.build_shim(tmp_path)
    before = first.stat().st_mtime_ns
    assert plugin.build_shim(tmp_path) == first
    assert first.stat().st_mtime_ns == before
    assert hasattr(ctypes.CDLL(str(first)), "GetPjrtApi")
    assert [p.name for p in tmp_path.iterdir()] == [first.name], "no scratch is left"
    other = tmp_path / "other.c"
    other.write_text(plugin.SHIM_SOURCE.read_text() + "/* changed */\n")
    monkeypatch.setattr(plugin, "SHIM_SOURCE", other)
    assert plugin.build_shim(tmp_path) != first


def test_no_compiler_is_said_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(KptError, match="needs a C compiler") as caught:
        plugin.build_shim(tmp_path)
    assert caught.value.fix == "apt-get install gcc"


@needs_gcc
def test_a_source_that_does_not_compile_is_said_in_one_line(tmp_path, monkeypatch):
    broken = tmp_path / "broken.c"
    broken.write_text("int main( {\n")
    monkeypatch.setattr(plugin, "SHIM_SOURCE", broken)
    with pytest.raises(KptError, match=r"cannot build broken\.c: ") as caught:
        plugin.build_shim(tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_only_a_plugin_of_known_content_is_loaded_unless_it_is_named(tmp_path, monkeypatch):
    library = tmp_path / "libpjrt_cpu.so"
    library.write_bytes(b"another")
    monkeypatch.delenv("KPT_TPU_PJRT_PLUGIN", raising=False)
    monkeypatch.setattr(installed, "plugin", lambda: library)
    with pytest.raises(KptError, match="none that this was tested with") as caught:
        plugin.tested_plugin()
    assert "KPT_TPU_PJRT_PLUGIN" in caught.value.fix
    monkeypatch.setenv("KPT_TPU_PJRT_PLUGIN", str(library))
    assert plugin.tested_plugin() == library


def test_the_plugin_is_found_in_its_package(tmp_path, monkeypatch):
    monkeypatch.delenv("KPT_TPU_PJRT_PLUGIN", raising=False)
    monkeypatch.setattr(installed, "_PLUGINS", ("planted_plugin",))
    assert "pip install" in installed.plugin().fix
    package = tmp_path / "planted_plugin"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "libpjrt_cpu.so").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed.plugin() == Path(package, "libpjrt_cpu.so")
