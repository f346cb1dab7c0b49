"""`pip install .` gives the folder model/ as the package idm_cs: all of it, whatever it is called."""
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_folder_of_the_model_is_packaged():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = sorted(path.parent.relative_to(ROOT / "model") for path in (ROOT / "model").rglob("__init__.py"))
    assert sorted(listed) == [".".join(("idm_cs", *folder.parts)) for folder in folders]


def test_the_network_works_under_the_packages_name(tmp_path):
    (tmp_path / "idm_cs").symlink_to(ROOT / "model")
    code = ("import sys, idm_cs; net = idm_cs.IDM.compact(32); net.save_pretrained('net'); "
            "idm_cs.IDM.from_checkpoint('net'); sys.exit('model' in sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"PYTHONPATH": str(tmp_path)})
