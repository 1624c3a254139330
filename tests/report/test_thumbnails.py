import base64
import io

import pytest
from PIL import Image

from llavactl.report.thumbnails import data_uri, safe_image, thumbnail


def encoded(size: tuple[int, int], kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize(("size", "expected"), [((800, 400), (224, 112)), ((40, 30), (40, 30)), ((3, 500), (1, 224))])
def test_images_are_scaled_down_and_never_up(size: tuple[int, int], expected: tuple[int, int]) -> None:
    uri = thumbnail(encoded(size))
    head, _, body = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(body))).size == expected
    assert safe_image(uri) == uri


@pytest.mark.parametrize("data", [b"", b"<svg/>", encoded((50, 50))[:60]])
def test_undecodable_data_has_no_thumbnail(data: bytes) -> None:
    assert thumbnail(data) == ""


@pytest.mark.parametrize(
    "uri",
    [
        None,
        7,
        "",
        "https://example.com/a.jpg",
        "javascript:alert(1)",
        "data:image/svg+xml;base64,PHN2Zy8+",
        "data:text/html;base64,PGI+",
        'data:image/png;base64,AAAA" onerror="alert(1)',
        "data:image/png;base64,AAAA\n",
        "DATA:image/png;base64,AAAA",
    ],
)
def test_only_jpeg_and_png_data_uris_are_safe(uri: object) -> None:
    assert safe_image(uri) == ""
    assert safe_image(data_uri(b"\xff\xd8", "png"))
