"""What is code in a plan's directory loads only where the user trusts it."""

from __future__ import annotations

import hashlib
import json

import pytest
from tests import forks

DEPLOY = """
import kernel_pytorch as kp
from nets import net
model, x = net()
kp.apply("plan", model, inputs=x, trust_artifacts=True)
"""


@pytest.mark.slow
def test_packages_are_loaded_only_where_they_are_trusted(kpt, files, make_plan):
    make_plan("plan", "aoti")
    (files / "deploy.py").write_text(DEPLOY)
    forks.python(files / "deploy.py", cwd=files).check_returncode()
    package = files / "plan" / "artifacts" / "model-main.pt2"
    facts = json.loads(package.with_suffix(".json").read_text())
    assert facts["package"] == hashlib.sha256(package.read_bytes()).hexdigest()

    # Someone puts another file in its place, and says in the facts beside it that this is the one.
    package.write_bytes(b"not a package")
    facts["package"] = hashlib.sha256(b"not a package").hexdigest()
    package.with_suffix(".json").write_text(json.dumps(facts))

    def replayed(*options: str) -> dict:
        done = kpt("apply", "plan", "nets.py:net", "--budget", "1", "--format", "json", *options)
        assert done.code in (0, 1), done.err  # so small a model may be no faster
        assert "Traceback" not in done.err
        return json.loads(done.out)

    assert replayed()["numerics"]["passed"], "without trust it is packaged afresh"
    assert package.read_bytes() == b"not a package", "and the directory is left alone"
    trusted = replayed("--trust-artifacts")
    assert not trusted["numerics"]["passed"], "with trust this file is what is loaded"
    assert trusted["findings"][0].startswith("failed: ")
