"""The lock of a device: what another user's file, a link in its place or a full disk does to it."""

from __future__ import annotations

import os
import stat
import tempfile

import pytest

from kernel_pytorch.backends import lock
from kernel_pytorch.errors import KptError


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_all_users_may_open_the_file_whatever_the_umask(directory):
    before = os.umask(0o077)
    try:
        with lock.exclusive("device"):
            (path,) = directory.iterdir()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666


def test_it_is_one_lock_for_one_process_and_is_released_with_the_outermost(directory):
    with lock.exclusive("device"):
        with lock.exclusive("device"):
            assert lock._held == {"device"}
        assert lock._held == {"device"}, "the inner one must not release it"
    assert lock._held == set()


def test_two_devices_are_two_locks(directory):
    with lock.exclusive("one"), lock.exclusive("two"):
        assert {path.name for path in directory.iterdir()} == {"kernel_pytorch-one.lock", "kernel_pytorch-two.lock"}


def test_a_link_in_its_place_is_not_followed(directory):
    (directory / "victim").write_text("keep")
    (directory / "kernel_pytorch-device.lock").symlink_to(directory / "victim")
    with pytest.raises(KptError, match="cannot lock"), lock.exclusive("device"):
        raise AssertionError("it was locked")
    assert (directory / "victim").read_text() == "keep"


def test_no_directory_for_it_is_one_line_with_a_fix(directory, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(directory / "absent"))
    with pytest.raises(KptError, match="cannot lock the device") as caught, lock.exclusive("device"):
        raise AssertionError("it was locked")
    assert "TMPDIR" in caught.value.fix
