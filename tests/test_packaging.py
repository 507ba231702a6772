"""What an installed batchinv offers before anything of it is imported, and without what it does not need.

Each case is a process of its own: an import, once done, cannot be taken back.
"""

import os
import subprocess
import sys
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there

ROOT = Path(__file__).parent.parent

COMPILE = """
import torch
compiled = torch.compile(lambda x: torch.softmax(x, 1), backend="batchinv")
x = torch.randn(3, 33)
assert torch.equal(compiled(x)[:1], compiled(x[:1]))
"""


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )


def test_the_backend_is_found_without_an_import():
    done = run_python(f"{COMPILE}\nassert 'bi_inductor' in __import__('sys').modules")
    assert done.returncode == 0, done.stderr


def test_nothing_is_imported_before_the_backend_is_asked_for():
    done = run_python(
        "import sys, torch\n"
        "assert 'batchinv' in torch._dynamo.list_backends()\n"
        "assert 'bi_inductor' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_the_cpu_target_needs_no_triton():
    done = run_python(f"import sys\nsys.modules['triton'] = None\n{COMPILE}")
    assert done.returncode == 0, done.stderr


def test_a_gpu_target_without_triton_says_what_to_install():
    done = run_python(
        "import sys\nsys.modules['triton'] = None\n"
        "import torch, bi_inductor\n"
        "bi_inductor.inspect(lambda x: x.sum(1), torch.randn(2, 3), target='sm_90')"
    )
    assert done.returncode != 0
    last_line = done.stderr.strip().splitlines()[-1]
    assert "MissingDependencyError" in last_line and "pip install" in last_line


def test_importing_the_package_does_not_import_torch():
    done = run_python("import sys, bi_inductor\nassert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_console_script_and_backend_are_registered():
    scripts = metadata.entry_points(group="console_scripts", name="batchinv")
    backends = metadata.entry_points(group="torch_dynamo_backends", name="batchinv")
    assert {script.value for script in scripts} == {"bi_inductor.cli:main"}
    assert {backend.value for backend in backends} == {"bi_inductor.backend:batchinv"}


def test_every_file_that_is_not_python_is_package_data():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = ROOT / "bi_inductor"
    others = [
        p.relative_to(package) for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    unlisted = [
        path
        for path in others
        if path.suffix != ".py" and not any(fnmatch(path.as_posix(), p) for p in patterns["bi_inductor"])
    ]
    assert not unlisted
