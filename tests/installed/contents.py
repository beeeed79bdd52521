"""What the built files hold: the three packages with their data, in the wheel and in the sdist, and nothing else.

python tests/installed/contents.py hf_qst-VERSION-py3-none-any.whl hf_qst-VERSION.tar.gz
"""

import sys
import tarfile
import zipfile

PACKAGES = ("hf_qst", "hf_qst_kernels", "hf_qst_plugins")
DATA = (
    *(f"{package}/py.typed" for package in PACKAGES),
    "hf_qst_kernels/measured/nvidia_h100_80gb_hbm3.json",
    "hf_qst_plugins/code_evaluation/problems/function_problems.jsonl",
)
IN_SDIST = ("README.md", "LICENSE", "setup.cfg", "setup.py", "pyproject.toml")


def main(wheel: str, sdist: str) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    with tarfile.open(sdist) as opened:
        sources = {name.partition("/")[2] for name in opened.getnames()}
    about = {name for name in names if ".dist-info/" in name}
    foreign = [name for name in names - about if name.split("/")[0] not in PACKAGES]
    lacking = [name for name in DATA if name not in names]
    lacking += [name for name in IN_SDIST if name not in sources]
    # The roots of the sources have no part in the names of the wheel.
    known = {name.removeprefix("kernels/").removeprefix("plugins/") for name in sources}
    lacking += sorted(names - about - known)
    if foreign or lacking:
        raise SystemExit(f"foreign files: {foreign}; lacking: {lacking}")
    print(f"{wheel}: {len(names - about)} files")


if __name__ == "__main__":
    main(*sys.argv[1:])
