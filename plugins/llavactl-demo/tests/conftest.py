import importlib.util
import os
from pathlib import Path

import pytest
from llavactl_demo.convert import language_folder, vision_folder
from llavactl_demo.weights import LANGUAGE, VISION, Weights

PHOTOS = Path(__file__).parents[4] / "shared/data/coco-mini"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory):
    """A cache folder for this test run, shared by its processes: both models are converted once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "llavactl-demo-home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVACTL_HOME", str(folder))
        yield folder


def require(weights: Weights) -> None:
    if importlib.util.find_spec(weights.module) is None:
        pytest.skip(f"{weights.requirement} is not installed (weights.txt)")


@pytest.fixture(scope="session")
def vision(home: Path) -> Path:
    require(VISION)
    return vision_folder()


@pytest.fixture(scope="session")
def language(home: Path) -> Path:
    require(LANGUAGE)
    return language_folder()


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    """Four real photos, portrait and landscape."""
    files = sorted(PHOTOS.rglob("*.jpg"))[:4]
    if not files:
        pytest.skip(f"{PHOTOS} is missing")
    return files
