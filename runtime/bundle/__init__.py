"""The bundle: a folder with a manifest, graphs, weights and tokenizers. Everything a host needs, nothing of torch."""

from ddit.runtime.bundle.manifest import MANIFEST, Manifest
from ddit.runtime.bundle.store import Bundle, file_info, read_manifest

__all__ = ["MANIFEST", "Bundle", "Manifest", "file_info", "read_manifest"]
