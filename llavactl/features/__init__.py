"""Frozen vision features: extracted once and stored in HDF5 shards by image content hash, or encoded live."""

from llavactl.features.fingerprint import Fingerprint, fingerprint
from llavactl.features.keys import ContentKeys, content_key
from llavactl.features.reader import (
    CachedFeatures,
    FeatureReader,
    LiveFeatures,
    open_features,
    stage_fingerprint,
    stage_vision,
)
from llavactl.features.store import FeatureStore
from llavactl.features.writer import StoreWriter

__all__ = [
    "CachedFeatures",
    "ContentKeys",
    "FeatureReader",
    "FeatureStore",
    "Fingerprint",
    "LiveFeatures",
    "StoreWriter",
    "content_key",
    "fingerprint",
    "open_features",
    "stage_fingerprint",
    "stage_vision",
]
