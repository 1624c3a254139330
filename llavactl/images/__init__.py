"""References to images (files, archives, URLs, base64), and decoding them safely."""
