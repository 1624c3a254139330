"""References to images (files, archives, URLs, base64), and opening them safely."""
